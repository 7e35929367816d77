"""The commands as a user types them: what they print, what they leave on disk, and how they end."""

from __future__ import annotations

import ast
import json
import math
import signal
import subprocess
import time
from pathlib import Path

import pytest
from commands import CONF, ROOT, SMALL, TINY, alive, command, new_process, start
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from block.store.results import runs

LONG = ["workload.num_requests=200000", "tracking=none"]  # half a minute: it is stopped in the middle
SUMMARY = (
    [f"ttft_{which}_s" for which in ("mean", "p50", "p99")]
    + [f"tpot_{which}_s" for which in ("p50", "p99")]
    + [f"e2e_{which}_s" for which in ("mean", "p50", "p99")]
    + ["request_throughput_rps", "token_throughput_tps", "preemptions"]
    + [f"dispatch_overhead_{which}_s" for which in ("mean", "p99")]
    + [f"forecast_{which}_us" for which in ("p50", "p99")]
    + ["wall_time_s"]
)


def tiny(folder: Path, *arguments: str, script: str = "run.py", **environment: str) -> subprocess.CompletedProcess[str]:
    """One tiny command that stores its runs in `folder`/runs."""
    return command(script, *TINY, f"runs_dir={folder / 'runs'}", *arguments, folder=folder, environment=environment)


def sweep(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return command("run.py", "-m", *TINY, f"runs_dir={folder / 'runs'}", *arguments, folder=folder)


def when_begun(folder: Path, process: subprocess.Popen[str]) -> Path:
    """The folder of the run that `process` is doing, once it is there."""
    for _ in range(600):
        found = [path for path in folder.glob("runs/*") if not (path / "run.json").exists()]
        if found:
            return found[0]
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    raise AssertionError("the run did not begin within a minute")


# ---------------------------------------------------------------------------------------------------------------- help


@pytest.mark.parametrize(
    "script", ["run.py", *sorted(f"scripts/{path.name}" for path in (ROOT / "scripts").glob("*.py"))]
)
def test_help_tells_what_a_command_does(script: str, tmp_path: Path) -> None:
    done = command(script, "--help", folder=tmp_path)
    source = "block/run/command.py" if script == "run.py" else script
    doc = ast.get_docstring(ast.parse((ROOT / source).read_text()))
    assert doc is not None
    assert done.returncode == 0, done.stderr
    before_the_keys = done.stdout.partition("== Configuration groups ==")[0]
    assert " ".join(doc.splitlines()[0].split()) in " ".join(before_the_keys.split())


# ----------------------------------------------------------------------------------------------------------- one run


def test_a_run_prints_its_summary_and_stores_it(tmp_path: Path) -> None:
    done = tiny(tmp_path, "tracking=wandb", "seed=3", COLUMNS="60")
    assert done.returncode == 0, done.stderr
    (run,) = runs(root=tmp_path / "runs")
    for words in ("block · llama2-7b · 6 requests/s", "TTFT (ms)", "token latency (ms)", "end to end (s)", "P99"):
        assert words in done.stdout
    assert "150 sent, 150 ok, 0 failed, 0 fallback" in done.stdout
    lines = dict(line.split(maxsplit=1) for line in done.stdout.splitlines() if line.startswith(("run ", "W&B ")))
    assert lines["run"].strip() == str(run.path)  # whole, even where the terminal is narrow
    assert lines["W&B"].strip().startswith(str(run.path / "wandb" / "offline-run-"))
    assert Path(lines["W&B"].strip()).is_dir()
    assert "running the simulated testbed" in done.stderr
    assert "Error" not in done.stderr

    document = json.loads((run.path / "run.json").read_text())
    assert document["status"] == "ok"
    assert document["choices"] == {
        "scheduler": "block",
        "model": "llama2-7b",
        "cluster": "a30x12",
        "engine": "vllm_v0",
        "workload": "sharegpt",
        "lengths": "oracle",
        "backend": "auto",
        "provisioner": "static",
        "migration": "none",
        "tracking": "wandb",
        "experiment": None,
    }
    counts = {"sent": 150, "ok": 150, "failed": 0, "fallback": 0}
    assert counts.items() <= document["counts"].items()
    assert document["config"]["seed"] == 3
    assert document["config"]["cluster"]["num_gpus"] == 3
    missing = [key for key in SUMMARY if not math.isfinite(document["summary"].get(key, math.nan))]
    assert missing == []
    assert document["summary"]["ttft_p50_s"] <= document["summary"]["ttft_p99_s"] <= document["summary"]["e2e_p99_s"]

    requests = run.requests()
    ttft = requests["first_token"] - requests["arrival"]
    assert document["summary"]["ttft_mean_s"] == pytest.approx(ttft.mean())
    assert len(run.decisions()) == 150
    assert set(run.instances()["instance_id"]) == {0, 1, 2}


def test_a_run_that_does_not_forecast_says_so(tmp_path: Path) -> None:
    done = tiny(tmp_path, "scheduler=random")
    assert "forecasts    none: this policy does not use them" in done.stdout
    assert "W&B          not logged" in done.stdout
    (run,) = runs(root=tmp_path / "runs")
    assert run.summary["forecast_p99_us"] is None
    assert not (run.path / "wandb").exists()


def test_the_same_seed_gives_the_same_requests_whatever_the_hash_seed(tmp_path: Path) -> None:
    keys = ["scheduler=po2", "lengths=noisy", "workload.num_requests=100"]  # everything that draws
    arguments = [*TINY, f"runs_dir={tmp_path / 'runs'}", *keys]
    for hash_seed in ("1", "2"):
        done = new_process("run.py", *arguments, folder=tmp_path, environment={"PYTHONHASHSEED": hash_seed})
        assert done.returncode == 0, done.stderr
    first, second = (run.requests() for run in runs(root=tmp_path / "runs"))
    assert first.equals(second)


def test_every_key_is_shown(tmp_path: Path) -> None:
    shown = command("run.py", "--cfg", "job", folder=tmp_path).stdout
    for line in ("qps: 30.0", "num_gpus: 12", "max_num_seqs: 48", "seed: 0", "slo_s:", "runs_dir: artifacts/runs"):
        assert line in shown


# ------------------------------------------------------------------------------------------------------------- sweeps


def test_a_sweep_in_several_processes_stores_every_combination(tmp_path: Path) -> None:
    done = sweep(tmp_path, "hydra/launcher=joblib", "lengths=glob([noisy,or*])", "workload.qps=5,6")
    assert done.returncode == 0, done.stderr
    stored = {(run.get("lengths"), run.get("workload.qps")) for run in runs(root=tmp_path / "runs")}
    assert stored == {("noisy", 5.0), ("noisy", 6.0), ("oracle", 5.0), ("oracle", 6.0)}
    lines = [line for line in done.stdout.splitlines() if "150 ok →" in line]
    assert len(lines) == 4
    assert all("/4, " in line for line in lines)
    assert any(line.startswith("[4/4, 0:00 left] ") for line in lines)
    (folder,) = (tmp_path / "artifacts" / "sweeps").iterdir()
    assert sorted(path.name for path in folder.glob("[!.]*") if path.is_dir()) == ["0", "1", "2", "3"]
    assert sorted(path.name for path in folder.glob(".outcomes/[!.]*")) == ["0", "1", "2", "3"]


@pytest.mark.parametrize("launcher", ["basic", "joblib"])
def test_a_failed_job_is_reported_and_the_others_are_stored(launcher: str, tmp_path: Path) -> None:
    done = sweep(tmp_path, f"hydra/launcher={launcher}", "cluster.num_gpus=2,0,3", "workload.num_requests=50")
    assert done.returncode == 1
    assert sorted(run.get("cluster.num_gpus") for run in runs(root=tmp_path / "runs")) == [2, 3]
    report = done.stderr[done.stderr.index("1 of 3 jobs failed:") :].splitlines()
    assert len(report) == 2
    assert report[1].startswith("  1: ")
    assert report[1].endswith("cluster.num_gpus=0: must be at least 1")
    assert "Traceback" not in done.stderr


def test_a_sweep_over_traces_tells_of_each_and_one_over_rates_once(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / f"{name}.csv").write_text("prompt_tokens,output_tokens,arrival\n5,9,0\n6,8,1\n0,8,2\n")
    trace = ["-m", "workload=trace", "scheduler=random", "tracking=none", "workload.num_requests=null"]
    each = command("run.py", *trace, "workload.trace_path=a.csv,b.csv", folder=tmp_path)
    assert each.returncode == 0, each.stderr
    told = [line for line in each.stderr.splitlines() if "left out" in line or "rows, read" in line]
    lost = "left out: 1 of 3 rows: prompt_tokens below 1"
    assert told == ["a.csv: 3 rows, read as block", lost, "b.csv: 3 rows, read as block", lost]
    once = command("run.py", *trace, "workload.trace_path=a.csv", "workload.qps=1,2", folder=tmp_path)
    assert once.stderr.count(lost) == 1


def shrunk(experiment: str) -> list[str]:
    """What makes an experiment tiny: of the first key that it sweeps over two values are left, of others one."""
    params = OmegaConf.select(OmegaConf.load(CONF / "experiment" / f"{experiment}.yaml"), "hydra.sweeper.params") or {}
    parsed = OverridesParser.create().parse_overrides([f"{key}={values}" for key, values in params.items()])
    return [
        f"{one.get_key_element()}={','.join(list(one.sweep_string_iterator())[: 1 if place else 2])}"
        for place, one in enumerate(parsed)
    ]


@pytest.mark.parametrize("experiment", [path.stem for path in sorted((CONF / "experiment").glob("*.yaml"))])
def test_an_experiment_runs_as_it_is_typed(experiment: str, tmp_path: Path) -> None:
    """One of them through its own launcher, whose processes cost more than the jobs; all have the same."""
    keys = [*shrunk(experiment), "workload.num_requests=60", f"runs_dir={tmp_path / 'runs'}"]
    if experiment == "length_estimation":
        pairs = [{"prompt": f"count to {i}", "response": " ".join(map(str, range(i % 40 + 1)))} for i in range(200)]
        (tmp_path / "pairs.json").write_text(json.dumps(pairs))
        keys = ["estimation.data_sets=[pairs.json]", "estimation.estimators=[mean,median]"]
    if experiment == "scale":
        keys.append("cluster.num_gpus=20")
    if experiment != "main_sweep":
        keys.append("hydra/launcher=basic")
    done = command("run.py", f"experiment={experiment}", *keys, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    if experiment == "length_estimation":
        assert done.stdout.splitlines()[-1] == "artifacts/lengths/scores.json"
    else:
        stored = runs(root=tmp_path / "runs")
        assert [run.counts["ok"] if run.counts else 0 for run in stored] == [60, 60]


# --------------------------------------------------------------------------------------------------------- hard endings


def test_a_killed_run_leaves_no_process_and_the_earlier_runs(tmp_path: Path) -> None:
    assert tiny(tmp_path, "workload.num_requests=20").returncode == 0
    process = start("run.py", [*LONG, f"runs_dir={tmp_path / 'runs'}"], tmp_path)
    unfinished = when_begun(tmp_path, process)
    process.kill()
    process.communicate(timeout=10)
    assert process.returncode == -signal.SIGKILL
    assert not alive(process.pid)
    (earlier,) = runs(root=tmp_path / "runs", status=None)
    assert earlier.path != unfinished
    assert len(earlier.requests()) == 20


def test_a_killed_sweep_leaves_no_process(tmp_path: Path) -> None:
    arguments = ["-m", *LONG, f"runs_dir={tmp_path / 'runs'}", "hydra/launcher=joblib", "seed=1,2"]
    process = start("run.py", arguments, tmp_path)
    when_begun(tmp_path, process)
    process.kill()
    process.communicate(timeout=30)  # which ends when the last process has closed its end of the pipes
    for _ in range(100):
        if not alive(process.pid):
            break
        time.sleep(0.1)
    assert not alive(process.pid)
    assert runs(root=tmp_path / "runs", status=None) == []


def test_ctrl_c_keeps_what_has_finished(tmp_path: Path) -> None:
    process = start("run.py", [*LONG, f"runs_dir={tmp_path / 'runs'}"], tmp_path)
    when_begun(tmp_path, process)
    time.sleep(4)  # of half a minute: some requests have finished, also on a busy machine
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.endswith("interrupted\n")
    assert "Traceback" not in err
    assert runs(root=tmp_path / "runs") == []
    (run,) = runs(root=tmp_path / "runs", status="interrupted")
    assert run.counts is not None
    assert 0 < run.counts["ok"] < 200_000
    assert (run.requests()["status"] == "ok").sum() == run.counts["ok"]
    assert run.document["error"].startswith("KeyboardInterrupt")


# ------------------------------------------------------------------------------------------------------------ capacity


def test_a_capacity_search_tells_rate_and_interval(tmp_path: Path) -> None:
    keys = ["capacity.slo_s=[0.8,2]", "capacity.seeds=2", "capacity.low=4", "capacity.high=8", "capacity.tolerance=1"]
    done = command("scripts/capacity.py", *SMALL, *keys, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    strict, loose, *where = done.stdout.splitlines()
    assert strict.startswith("block on llama2-7b: ")
    assert "requests/s at ttft_p99_s ≤ 0.8 s (95 % interval; by seed: " in strict
    assert "≤ 2 s" in loose
    documents = [json.loads((tmp_path / path).read_text()) for path in where]
    assert [document["config"]["seed"] for document in documents] == [0, 1]
    for document in documents:
        assert document["choices"]["scheduler"] == "block"
        low, high = (document["capacities_qps"][slo] for slo in ("0.8", "2"))
        assert low < high
        for slo, found in ((0.8, low), (2, high)):
            met = max(qps for qps, latency in document["points"] if latency <= slo and qps <= found)
            missed = min(qps for qps, latency in document["points"] if latency > slo and qps >= found)
            assert met <= found <= missed <= met + 1
    for slo in ("0.8", "2"):
        one, other = (document["capacities_qps"][slo] for document in documents)
        # Two seeds: t = 12.706 with one degree of freedom, standard error |difference| / 2.
        told = f": {(one + other) / 2:.2f} ± {12.706 * abs(one - other) / 2:.2f} requests/s at ttft_p99_s ≤ {slo} s"
        assert told in done.stdout
