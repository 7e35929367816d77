"""Experiments: a run is built, served, stored and reported; a capacity search tells and writes what it found."""

from __future__ import annotations

import errno
import json
import math
import os
import random
import sys
import tempfile
import time
import types
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from joblib import parallel_config
from omegaconf import DictConfig, OmegaConf

from block.core import files
from block.core.files import NotStored
from block.core.types import Decision, Forecast, InstanceView, Request
from block.core.user_code import UserFault
from block.dispatch import policies
from block.engine.predictor import Predictor
from block.run import capacity_search, config, hydra_schema
from block.run import execute as execution
from block.run.capacity_search import search
from block.run.config_errors import ConfigError
from block.run.execute import execute, run_command
from block.run.fingerprints import MOST_FILES
from block.run.fingerprints import fingerprints as fingerprints_of
from block.store import provenance, writer
from block.store.results import Run, experiment_hash, runs

CONF = Path(__file__).parents[2] / "conf"
TINY = ["workload.num_requests=60", "workload.qps=6", "cluster.num_gpus=3", "tracking=none"]
CHOICES = {"scheduler": "block", "model": "llama2-7b", "hydra/launcher": "basic"}


def composed(*overrides: str) -> DictConfig:
    hydra_schema.register()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("config", overrides=[*TINY, *overrides])


def executed(folder: Path, *overrides: str) -> Run:
    return execute(composed(f"runs_dir={folder}", *overrides), CHOICES)


@dataclass(frozen=True)
class Broken:
    """A policy that fails at request 40; chosen by `_target_`, as a policy of one's own is."""

    error: ClassVar[type[BaseException]] = RuntimeError
    needs: ClassVar[policies.Needs] = policies.Needs.COUNTS

    def candidates(self, instances: int, request_index: int, rng: random.Random) -> Sequence[int]:
        return [0]

    def choose(self, request: Request, views: Sequence[InstanceView], rng: random.Random) -> Decision:
        if request.id == 40:
            raise self.error("no more")
        return Decision(0, [0], [0.0])


@dataclass(frozen=True)
class Interrupted(Broken):
    """One at whose 40th request somebody presses Ctrl-C."""

    error: ClassVar[type[BaseException]] = KeyboardInterrupt


# ------------------------------------------------------------------------------------------------------------- execute


def test_a_run_is_stored_where_it_says_and_returned(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = executed(tmp_path)
    assert [stored.path for stored in runs(root=tmp_path)] == [run.path]
    assert run.status == "ok"
    assert run.choices == {"scheduler": "block", "model": "llama2-7b"}
    assert run.config["workload"]["num_requests"] == 60
    assert run.counts == {"sent": 60, "ok": 60, "failed": 0, "fallback": 0, "preempted": 0, "failed_over": 0}
    captured = capsys.readouterr()
    assert str(run.path) in captured.out
    told = [line for line in captured.err.splitlines() if not line.startswith("compiling")]  # the first time
    assert len(told) == 2  # why it is simulated, and what is about to run


def test_the_summary_is_that_of_the_stored_requests(tmp_path: Path) -> None:
    run = executed(tmp_path)
    requests = run.requests()
    e2e = (requests["finished"] - requests["arrival"]).to_numpy()
    tokens = requests["prompt_tokens"].sum() + requests["output_tokens"].sum()
    span = requests["finished"].max() - requests["arrival"].min()
    assert run.summary["e2e_mean_s"] == pytest.approx(e2e.mean())
    assert run.summary["token_throughput_tps"] == pytest.approx(tokens / span)
    assert run.summary["dispatch_overhead_mean_s"] == pytest.approx(0.23)  # what conf/backend models
    assert 0 < run.summary["forecast_p50_us"] <= run.summary["forecast_p99_us"]
    assert 0 < run.summary["wall_time_s"] < 60


def test_loading_compiled_code_is_not_measured_as_a_forecast(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forecasts, calls = Predictor.forecasts, 0

    def slow_at_first(*arguments: Any) -> list[Forecast]:
        nonlocal calls
        calls += 1
        if calls == 1:
            time.sleep(0.5)
        return forecasts(*arguments)

    monkeypatch.setattr(Predictor, "forecasts", slow_at_first)
    run = executed(tmp_path)
    assert calls == 61
    assert run.summary["forecast_p99_us"] < 50_000  # with half a second among 60 values it would be more
    calls = 0
    executed(tmp_path, "scheduler=random")
    assert calls == 0


def test_hashes_change_with_what_they_vouch_for(tmp_path: Path) -> None:
    base = executed(tmp_path).document
    scheduler = executed(tmp_path, "scheduler=random", "lengths=noisy").document
    seed = executed(tmp_path, "seed=1").document
    rate = executed(tmp_path, "workload.qps=7").document
    gpu = executed(tmp_path, "cluster.gpu=h100").document
    changed = {key for key, value in base["hashes"].items() if scheduler["hashes"][key] != value}
    assert changed == {"estimates"}  # of the lengths
    names = ["code", "libraries", "engines", "latency_model", "data_set", "arrivals", "estimates"]
    assert list(base["hashes"]) == names
    assert rate["hashes"] == base["hashes"]  # it stretches the arrivals, which are hashed at one rate
    assert seed["hashes"]["latency_model"] == base["hashes"]["latency_model"]
    assert seed["hashes"]["data_set"] != base["hashes"]["data_set"]
    assert seed["hashes"]["arrivals"] != base["hashes"]["arrivals"]
    changed = {key for key, value in base["hashes"].items() if gpu["hashes"][key] != value}
    assert changed == {"latency_model", "engines"}  # which have other KV blocks
    assert len({document["config_hash"] for document in (base, scheduler, seed, rate, gpu)}) == 5


# A policy that keeps count of what it has placed, and a helper that it imports.
STATEFUL = """
from dataclasses import dataclass, field
from typing import ClassVar

from {package}.helper import STEP

from block.dispatch.policies import Needs
from block.core.types import Decision


@dataclass
class Sticky:
    \"\"\"The next instance after every hundred requests that it has placed in its life.\"\"\"

    seen: list = field(default_factory=list)
    needs: ClassVar[Needs] = Needs.COUNTS

    def candidates(self, instances, request_index, rng):
        self.seen.append(request_index)
        return [len(self.seen) * STEP // 100 % instances]

    def choose(self, request, views, rng):
        return Decision(views[0].instance_id, [views[0].instance_id], [0.0])
"""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[str]:
    """A package of the user's with a policy and a helper, in the current folder; its name."""
    name = f"own_{abs(hash(request.node.name))}"
    (tmp_path / name).mkdir()
    (tmp_path / name / "sticky.py").write_text(STATEFUL.format(package=name))
    (tmp_path / name / "helper.py").write_text("STEP = 1\n")
    (tmp_path / name / "aside.py").write_text("UNUSED = 1\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield name
    for module in [module for module in sys.modules if module.partition(".")[0] == name]:
        del sys.modules[module]


def fingerprints(*overrides: str) -> dict[str, str]:
    return fingerprints_of(config.build(composed(*overrides)))


def test_hashes_change_with_a_policy_of_one_s_own_and_what_it_imports(package: str) -> None:
    overrides = ("scheduler=random", f"scheduler._target_={package}.sticky.Sticky")
    base = fingerprints(*overrides)
    assert set(base) - set(fingerprints("scheduler=random")) == {f"{package}.helper", f"{package}.sticky"}
    Path(package, "aside.py").write_text("UNUSED = 2\n")
    Path(package, "helper.py").write_text("STEP = 1  # a remark\n")
    assert fingerprints(*overrides) == base
    Path(package, "helper.py").write_text("STEP = 2\n")
    changed = fingerprints(*overrides)
    assert {key for key in base if changed[key] != base[key]} == {f"{package}.helper"}
    Path(package, "sticky.py").write_text(STATEFUL.format(package=package).replace("100", "50"))
    assert fingerprints(*overrides)[f"{package}.sticky"] != base[f"{package}.sticky"]


def test_a_class_that_no_file_holds_is_never_taken_for_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    notebook = types.ModuleType("notebook")
    code = STATEFUL.replace("from {package}.helper import STEP", "STEP = 1")
    monkeypatch.setitem(sys.modules, "notebook", notebook)
    exec(code, notebook.__dict__)
    one, other = (fingerprints("scheduler=random", "scheduler._target_=notebook.Sticky") for _ in range(2))
    assert {key for key in one if one[key] != other[key]} == {"notebook.Sticky"}


def test_hashes_change_with_a_file_that_a_class_of_one_s_own_names(tmp_path: Path, package: str) -> None:
    Path(package, "sticky.py").write_text(
        STATEFUL.format(package=package).replace("seen: list", 'weights: str = "weights.txt"\n    seen: list')
    )
    Path("weights.txt").write_text("1")
    overrides = ("scheduler=random", f"scheduler._target_={package}.sticky.Sticky")
    base = fingerprints(*overrides)
    Path("weights.txt").write_text("2")
    changed = fingerprints(*overrides)
    assert {key for key in base if changed[key] != base[key]} == {"weights.txt"}


@pytest.mark.parametrize("text", ["x" * 5000, "a\0b", "/none", "v1"])
def test_a_text_of_a_class_of_one_s_own_need_name_no_file(text: str, package: str) -> None:
    code = STATEFUL.format(package=package).replace("seen: list", f"weights: str = {text!r}\n    seen: list")
    Path(package, "sticky.py").write_text(code)
    overrides = ("scheduler=random", f"scheduler._target_={package}.sticky.Sticky")
    assert set(fingerprints(*overrides)) - set(fingerprints("scheduler=random")) == {
        f"{package}.helper",
        f"{package}.sticky",
    }


def test_a_folder_too_large_to_be_looked_through_is_never_the_same(package: str) -> None:
    Path("many").mkdir()
    for i in range(MOST_FILES + 1):
        Path("many", str(i)).touch()
    code = STATEFUL.format(package=package).replace("seen: list", 'weights: str = "many"\n    seen: list')
    Path(package, "sticky.py").write_text(code)
    overrides = ("scheduler=random", f"scheduler._target_={package}.sticky.Sticky")
    one, other = fingerprints(*overrides), fingerprints(*overrides)
    assert {key for key in one if one[key] != other[key]} == {"many"}
    Path("many", "0").unlink()
    assert fingerprints(*overrides) == fingerprints(*overrides)


def test_hashes_change_with_the_data_sheet_of_a_gpu(tmp_path: Path) -> None:
    sheet = tmp_path / "gpu.yaml"
    sheet.write_text("memory_gib: 24\nbandwidth: 1008\ntflops: 165\nlink: 32\n")
    base = fingerprints(f"cluster.gpu={sheet}")
    sheet.write_text("memory_gib: 32\nbandwidth: 1008\ntflops: 165\nlink: 32\n")
    more = fingerprints(f"cluster.gpu={sheet}")
    assert {key for key in base if more[key] != base[key]} == {"engines"}  # KV blocks
    sheet.write_text("memory_gib: 24\nbandwidth: 2016\ntflops: 165\nlink: 32\n")
    faster = fingerprints(f"cluster.gpu={sheet}")
    assert {key for key in base if faster[key] != base[key]} == {"latency_model"}
    believed = fingerprints(f"cluster.gpu={sheet}", "backend=simulated", "backend.predictor_gpu=a30")
    sheet.write_text("memory_gib: 24\nbandwidth: 1008\ntflops: 165\nlink: 32\n")
    changed = fingerprints(f"cluster.gpu={sheet}", "backend=simulated", "backend.predictor_gpu=a30")
    assert {key for key in base if believed[key] != changed[key]} == {"latency_model"}  # the engines', not its belief


def test_hashes_change_with_the_arrival_times_of_a_trace(tmp_path: Path) -> None:
    def of(*times: float) -> dict[str, str]:
        rows = [f"{10 + i},{20 + i},{at}" for i, at in enumerate(times)]
        (tmp_path / "trace.csv").write_text("\n".join(["prompt_tokens,output_tokens,arrival", *rows, ""]))
        return fingerprints("workload=trace", f"workload.trace_path={tmp_path}/trace.csv", "workload.num_requests=3")

    base, other = of(0.0, 1.0, 2.0), of(0.0, 0.1, 2.0)
    assert {key for key in base if other[key] != base[key]} == {"arrivals"}


def test_where_a_run_is_stored_is_no_part_of_its_config_hash(tmp_path: Path) -> None:
    one, other = executed(tmp_path / "a"), executed(tmp_path / "b", "capacity.seeds=9")
    assert one.document["config_hash"] == other.document["config_hash"]


def a_job(folder: Path) -> DictConfig:
    """Hydra's own settings in a job of a sweep."""
    return OmegaConf.create({"sweep": {"dir": str(folder)}, "overrides": {"task": ["seed=0"]}})


def test_a_job_of_a_sweep_says_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "outcomes").mkdir()
    sweep = {"jobs": 7, "began": 0.0, "main": os.getpid(), "folder": str(tmp_path / "outcomes"), "fixed": []}
    monkeypatch.setenv("BLOCK_SWEEP", json.dumps(sweep))
    run = execute(composed(f"runs_dir={tmp_path}"), CHOICES, sweep=a_job(tmp_path))
    captured = capsys.readouterr()
    assert captured.out.startswith("[1/7, ")
    assert "] seed=0: TTFT P99 " in captured.out
    assert captured.out.endswith(f"60 ok → {run.path}\n")
    assert captured.out.count("\n") == 1
    assert captured.err == ""


@pytest.mark.parametrize(
    ("policy", "status", "error"),
    [("Broken", "failed", UserFault), ("Interrupted", "interrupted", KeyboardInterrupt)],
)
def test_a_run_that_stops_half_way_is_stored_as_such(
    policy: str, status: str, error: type[BaseException], tmp_path: Path
) -> None:
    settings = composed("scheduler=random", f"runs_dir={tmp_path}", f"scheduler._target_={__name__}.{policy}")
    with pytest.raises(error):
        execute(settings, CHOICES)
    assert runs(root=tmp_path) == []
    (run,) = runs(root=tmp_path, status=None)
    assert run.status == status
    assert run.document["error"].startswith(error.__name__)
    assert run.counts is not None
    assert 0 < run.counts["ok"] < 41
    requests = run.requests()
    assert (requests["status"] == "ok").sum() == run.counts["ok"]
    assert requests["request_id"].is_monotonic_increasing
    assert error.__name__ in (run.path / "run.log").read_text()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["workload.qps=0"], "workload.qps=0.0: must be"),
        (["workload=trace", "workload.trace_path=gone.csv"], "workload.trace_path=gone.csv: no such file"),
    ],
)
def test_a_wrong_configuration_stores_nothing(overrides: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        executed(tmp_path / "runs", *overrides)
    assert not (tmp_path / "runs").exists()


def test_a_runs_dir_that_cannot_be_made_is_told_before_anything_runs(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"runs_dir=.*/file: File exists"):
        executed(tmp_path / "file")


def full(path: Path, *_: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device", str(path))


@pytest.mark.parametrize("sweep", [False, True])
def test_what_cannot_be_stored_is_reported_and_then_told(
    sweep: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    write = writer.write_table
    monkeypatch.setattr(
        writer, "write_table", lambda path, table: (full if "runs" in path.parts else write)(path, table)
    )
    job = a_job(tmp_path) if sweep else None
    with pytest.raises(NotStored, match=r"^runs_dir=.*/runs: No space left on device; the run is in "):
        execute(composed(f"runs_dir={tmp_path}/runs"), CHOICES, sweep=job)
    (run,) = runs(root=tmp_path / "temporary")
    assert run.counts == {"sent": 60, "ok": 60, "failed": 0, "fallback": 0, "preempted": 0, "failed_over": 0}
    printed = capsys.readouterr().out
    assert f"{run.summary['ttft_p99_s'] * (1 if sweep else 1000):.4g}" in printed
    assert str(run.path) in printed


# -------------------------------------------------------------------------------------------------------------- search

SEARCH = ["capacity.slo_s=[1]", "capacity.low=4", "capacity.high=12", "capacity.tolerance=1", "capacity.seeds=1"]


def searched(*overrides: str) -> dict[str, Any]:
    return search(composed("scheduler=random", *SEARCH, *overrides), {**CHOICES, "scheduler": "random"})


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current folder. Seeds are searched one after the other here; tests/conf runs a search with its processes."""
    monkeypatch.chdir(tmp_path)
    with parallel_config(backend="sequential"):
        yield tmp_path


def stored(folder: Path) -> list[dict[str, Any]]:
    files = sorted((folder / "artifacts" / "capacity").iterdir(), key=lambda path: path.stat().st_mtime_ns)
    return [json.loads(path.read_text()) for path in files]


@pytest.mark.slow
def test_a_search_tells_what_it_found_and_stores_a_file_for_each_seed(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = searched("seed=5", "capacity.seeds=2")["1"]
    one, other = stored(folder)
    assert (one["config"]["seed"], other["config"]["seed"]) == (5, 6)
    assert one["choices"] == {"scheduler": "random", "model": "llama2-7b"}
    assert found["by_seed"] == [one["capacities_qps"]["1"], other["capacities_qps"]["1"]]
    assert found["by_seed"][0] != found["by_seed"][1]
    assert found["capacity_qps"] == pytest.approx(sum(found["by_seed"]) / 2)
    line, *where = capsys.readouterr().out.splitlines()
    assert line.startswith(
        f"random on llama2-7b: {found['capacity_qps']:.2f} ± {found['half_width_qps']:.2f} requests/s"
    )
    assert line.endswith("by seed: {:.2f}, {:.2f})".format(*found["by_seed"]))
    assert sorted(where) == sorted(map(str, Path("artifacts/capacity").iterdir()))


@pytest.mark.slow
def test_a_search_is_done_once_for_each_seed_until_what_it_depends_on_changes(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    served: list[int] = []
    replay = capacity_search.replay

    def counted(run: config.RunConfig, *arguments: Any) -> None:
        served.append(run.seed)
        replay(run, *arguments)

    monkeypatch.setattr(capacity_search, "replay", counted)
    first = searched("capacity.seeds=2")
    assert set(served) == {0, 1}
    served.clear()
    assert searched("capacity.seeds=2", "workload.qps=9") == first
    assert not served
    assert searched("capacity.seeds=3")["1"]["by_seed"][:2] == first["1"]["by_seed"]
    assert set(served) == {2}
    served.clear()
    searched("capacity.slo_s=[0.9]")
    assert set(served) == {0}
    served.clear()
    monkeypatch.setattr(provenance, "code_hash", lambda: "another")
    assert searched("capacity.seeds=2") == first
    assert set(served) == {0, 1}
    assert len(stored(folder)) == 4


@pytest.mark.slow
def test_a_policy_with_a_state_is_the_same_in_a_search_as_alone(folder: Path, package: str) -> None:
    target = f"scheduler._target_={package}.sticky.Sticky"
    searched(target, "workload.num_requests=130")
    (document,) = stored(folder)
    assert document["choices"]["scheduler"] == f"{package}.sticky.Sticky"
    assert len(document["points"]) > 1
    for qps, latency in document["points"]:
        alone = executed(folder, "scheduler=random", target, "workload.num_requests=130", f"workload.qps={qps}")
        assert alone.summary["ttft_p99_s"] == pytest.approx(latency)


def test_each_dispatcher_has_a_policy_of_its_own(folder: Path, package: str) -> None:
    overrides = ("scheduler=random", f"scheduler._target_={package}.sticky.Sticky", "workload.num_requests=300")
    run = executed(folder, *overrides, "dispatch.dispatchers=3")
    placed = run.requests()["instance_id"].tolist()
    assert placed.count(0) / 300 > 0.8  # none of them has placed many more than a hundred
    assert executed(folder, *overrides).requests()["instance_id"].tolist().count(0) == 100  # of 300


@pytest.mark.slow
def test_another_policy_is_another_search_and_what_is_stored_is_called_so(
    folder: Path, package: str, capsys: pytest.CaptureFixture[str]
) -> None:
    target = f"scheduler._target_={package}.sticky.Sticky"
    first = searched(target)
    capsys.readouterr()
    assert searched(target) == first
    assert f" stored {datetime.now():%Y-%m-%d}" in capsys.readouterr().out
    Path(package, "helper.py").write_text("STEP = 50\n")
    for module in (f"{package}.sticky", f"{package}.helper"):
        del sys.modules[module]
    other = searched(target)
    assert other["1"]["capacity_qps"] > 1.2 * first["1"]["capacity_qps"]
    assert " stored " not in capsys.readouterr().out
    searched(target, "capacity.fresh=true")
    assert " stored " not in capsys.readouterr().out
    assert len(stored(folder)) == 1


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        (["scheduler=po2"], "po2"),
        (["scheduler=block_star"], "block_star"),
        (
            ["scheduler=random", "scheduler._target_=block.dispatch.policies.RoundRobin"],
            "block.dispatch.policies.RoundRobin",
        ),
        (["scheduler=random", "scheduler._target_=block.dispatch.policies.Random"], "random"),
    ],
)
def test_a_run_is_filed_under_what_it_was(overrides: list[str], name: str) -> None:
    choices = {"scheduler": overrides[0].partition("=")[2], "backend": "auto", "cluster": "a30x12"}
    assert hydra_schema.filed_choices(composed(*overrides), choices) == {**choices, "scheduler": name}


def test_a_point_of_a_search_is_the_latency_of_that_run(folder: Path) -> None:
    objectives = searched("seed=3")
    qps, latency = stored(folder)[0]["points"][-1]
    run = executed(folder, "scheduler=random", "seed=3", f"workload.qps={qps}")
    assert run.summary["ttft_p99_s"] == pytest.approx(latency)
    assert objectives["1"]["half_width_qps"] is None


def test_another_latency_can_be_asked_for(folder: Path) -> None:
    searched("capacity.metric=ttft_mean_s", "capacity.slo_s=[0.6]")
    (document,) = stored(folder)
    qps, latency = document["points"][0]
    run = executed(folder, "scheduler=random", f"workload.qps={qps}")
    assert run.summary["ttft_mean_s"] == pytest.approx(latency)
    assert all(math.isfinite(latency) for _, latency in document["points"])


def test_a_search_that_cannot_be_stored_is_printed_and_then_told(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder / "temporary"))
    write = files.write_json
    monkeypatch.setattr(
        files, "write_json", lambda path, what: (full if "capacity" in path.parts else write)(path, what)
    )
    with pytest.raises(NotStored) as told:
        searched()
    (place,) = (folder / "temporary").iterdir()
    found = json.loads(place.read_text())["capacities_qps"]["1"]
    assert str(told.value) == f"artifacts/capacity: No space left on device; it is in {place} instead"
    assert capsys.readouterr().out.startswith(f"random on llama2-7b: {found:.2f} requests/s")


def test_a_place_that_takes_nothing_is_told_before_the_search(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "artifacts").write_text("in the way")
    monkeypatch.setattr(capacity_search, "replay", None)
    with pytest.raises(ConfigError, match=r"^artifacts/capacity: Not a directory$"):
        searched()


def test_an_objective_that_no_rate_meets_is_a_gap_that_is_stored_and_told(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = searched("capacity.slo_s=[0.01]")["0.01"]  # the dispatch takes 0.23 s
    assert found["capacity_qps"] is None
    assert all(map(math.isnan, found["by_seed"]))
    said = " ".join(capsys.readouterr().out.split())
    assert "no capacity at ttft_p99_s ≤ 0.01 s: ttft_p99_s misses 0.01 s even at" in said
    (path, *_) = (folder / "artifacts" / "capacity").glob("*.json")
    document = json.loads(path.read_text())
    assert document["capacities_qps"] == {"0.01": None}
    assert "misses 0.01 s" in document["gaps"]["0.01"]


def test_what_is_wrong_is_told_before_any_process_starts(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"capacity\.seeds=0: must be at least 1"):
        searched("capacity.seeds=0")
    with pytest.raises(ConfigError, match="does not fit on gpu=a30"):
        searched("model=llama2-13b")


# ------------------------------------------------------------------------------------------- what the key command says


def of_pairs(folder: Path, *overrides: str) -> DictConfig:
    """Table 1 of 60 pairs, by estimators that need no training."""
    pairs = [{"prompt": f"question {i}", "response": "word " * (i + 1)} for i in range(60)]
    (folder / "mine.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    where = [f"estimation.data_sets=[{folder / 'mine.jsonl'}]", f"estimation.scores={folder / 'scores' / 'mine.json'}"]
    names = "estimation.estimators=[mean,median,compact]"
    return composed("experiment=length_estimation", f"runs_dir={folder / 'runs'}", *where, names, *overrides)


def test_length_estimation_measures_prints_and_writes_and_serves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_command(of_pairs(tmp_path), CHOICES)
    written = json.loads((tmp_path / "scores" / "mine.json").read_text())
    data = str(tmp_path / "mine.jsonl")
    assert [(row["data"], row["estimator"]) for row in written["rows"]] == [(data, "mean"), (data, "median")]
    assert written["missing"] == [[data, "compact"]]
    assert written["config"]["data_sets"] == [data]
    printed = capsys.readouterr().out
    assert f"{written['rows'][0]['error_rate']:.1%}" in printed
    assert f"not measured: {data} compact: lengths.path=artifacts/lengths/compact-mine.npz: no such file" in printed
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("override", "begins"),
    [
        ("estimation.data_sets=[gone.jsonl]", "estimation.data=gone.jsonl: no such file"),
        ("estimation.estimators=[gbm]", "estimation.estimators=gbm: choose from mean"),
        ("estimation.estimators=[compact]", "lengths.path=artifacts/lengths/compact-mine.npz: no such file"),
        ("estimation.scores=/dev/null/x.json", "estimation.scores=/dev/null/x.json: File exists"),
        (
            "command=evaluate_length",
            "command=evaluate_length: did you mean evaluate_lengths? choose from serve, ",
        ),
    ],
)
def test_length_estimation_that_cannot_be_is_told_in_one_line_and_writes_nothing(
    override: str, begins: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as told:
        run_command(of_pairs(tmp_path, override), CHOICES)
    assert str(told.value).startswith(begins)
    assert "\n" not in str(told.value)
    assert not (tmp_path / "scores").exists()


def test_scores_that_cannot_be_written_are_printed_and_then_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    write = files.write_json
    monkeypatch.setattr(files, "write_json", lambda path, what: (full if "scores" in path.parts else write)(path, what))
    with pytest.raises(NotStored, match=r"^estimation\.scores=.*: No space left on device; it is in .*/block-mine"):
        run_command(of_pairs(tmp_path), CHOICES)
    (place,) = (tmp_path / "temporary").iterdir()
    rows = json.loads(place.read_text())["rows"]
    assert f"{rows[0]['error_rate']:.1%}" in capsys.readouterr().out


def test_serving_is_what_is_done_unless_something_else_is_said(tmp_path: Path) -> None:
    run_command(composed(f"runs_dir={tmp_path}"), CHOICES)
    (run,) = runs(root=tmp_path)
    assert run.config["command"] == "serve"
    without = {key: value for key, value in run.config.items() if key != "command"}
    assert run.document["config_hash"] == experiment_hash(without)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux forgets a peak of memory")
def test_the_memory_of_a_run_is_its_own_not_that_of_what_the_process_did_before(tmp_path: Path) -> None:
    much = np.ones(100_000_000)
    before = execution._peak_mib()
    del much
    peak = executed(tmp_path).summary["peak_memory_mib"]
    assert peak is not None
    assert 50 < peak < before - 300
