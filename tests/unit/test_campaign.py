"""Jobs from points: the same as `run.py` would make of the same overrides, and composed once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir

from block.core.paths import shipped
from block.run import campaign, config, hydra_schema
from block.run.campaign import Composer, Job
from block.store.results import Run, experiment_hash
from block.store.writer import RunWriter

ALWAYS = ("backend=simulated", "tracking=none", "workload.num_requests=40")
CONF = shipped("conf")


def job(composer: Composer, point: dict[str, Any], *, search: bool = False) -> Job:
    return composer.jobs([(search, point)])[0]


@pytest.fixture(autouse=True)
def _cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("BLOCK_CACHE", str(tmp_path))


@pytest.mark.parametrize(
    "point",
    [
        {"scheduler": "block_star", "workload.qps": 31, "seed": 2},
        {"scheduler": "po_k", "scheduler.k": 4, "lengths": "compact"},
        {"cluster": "mixed", "scheduler": "infaas", "dispatch.ledger": False},
        {"scheduler": "block", "backend.slowdown": [1.5, 1.5], "dispatch.correction_steps": 200},
        {"scheduler": "preble", "workload": "mooncake", "engine": "vllm_v1", "engine.max_model_len": 8192},
        {"scheduler": "sticky", "engine": "vllm_v1", "engine.block_size": 32, "workload": "agent"},
    ],
)
def test_a_job_is_what_the_command_line_makes_of_the_same_overrides(point: dict[str, Any]) -> None:
    made = job(Composer(CONF, ALWAYS), point)
    hydra_schema.register()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        typed = compose("config", overrides=[*(f"{key}={value}" for key, value in point.items()), *ALWAYS])
    assert experiment_hash(made.settings) == experiment_hash(config.plain(typed))
    assert made.choices["scheduler"] == point["scheduler"]


def test_a_setting_that_there_is_not_is_an_error() -> None:
    with pytest.raises(KeyError, match="speed"):
        job(Composer(CONF, ALWAYS), {"scheduler": "block", "scheduler.speed": 2})


def test_the_fingerprints_of_a_job_change_with_its_model_and_lengths_only() -> None:
    composer = Composer(CONF, ALWAYS)
    base = job(composer, {"scheduler": "block", "workload.qps": 20.0}).hashes
    assert job(composer, {"scheduler": "random", "workload.qps": 30.0}).hashes == base
    assert job(composer, {"scheduler": "block", "seed": 1}).hashes["data_set"] != base["data_set"]
    other = job(composer, {"scheduler": "block", "model": "qwen2-7b"}).hashes
    assert {key for key, value in other.items() if value != base[key]} == {"latency_model", "engines"}
    estimated = job(composer, {"scheduler": "block", "lengths": "compact"}).hashes
    changed = {key for key, value in estimated.items() if value != base[key]}
    assert changed == {"estimates"}


def test_a_file_of_one_s_own_is_read_again_by_the_next_composer(tmp_path: Path) -> None:
    sheet = tmp_path / "gpu.yaml"
    sheet.write_text("memory_gib: 24\nbandwidth: 1008\ntflops: 165\nlink: 32\n")
    point = {"scheduler": "random", "cluster.gpu": str(sheet)}
    base = job(Composer(CONF, ALWAYS), point).hashes
    assert job(Composer(CONF, ALWAYS), point).hashes == base
    sheet.write_text("memory_gib: 24\nbandwidth: 2016\ntflops: 165\nlink: 32\n")
    assert job(Composer(CONF, ALWAYS), point).hashes["latency_model"] != base["latency_model"]


def test_the_fingerprints_of_a_policy_of_one_s_own_are_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_policy.py").write_text(
        "from block.dispatch.policies import Random\n\n\nclass Mine(Random):\n    pass\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    base = job(Composer(CONF, ALWAYS), {"scheduler": "random"}).hashes
    own = job(Composer(CONF, ALWAYS), {"scheduler": "random", "scheduler._target_": "own_policy.Mine"}).hashes
    assert own == {**base, "own_policy": own["own_policy"]}


def test_hydra_is_asked_once_and_not_by_the_next_composer(monkeypatch: pytest.MonkeyPatch) -> None:
    points = [{"scheduler": "block", "workload.qps": float(qps)} for qps in range(20, 25)]
    asked = []
    monkeypatch.setattr(campaign, "compose", lambda *a, **k: asked.append(k) or compose(*a, **k))
    first = [job(Composer(CONF, ALWAYS), point) for point in points[:1]]
    made = len(asked)
    assert made > 0
    composer = Composer(CONF, ALWAYS)
    again = [job(composer, point) for point in points]
    assert len(asked) == made
    assert again[0] == first[0]
    assert [one.settings["workload"]["qps"] for one in again] == [20, 21, 22, 23, 24]


@pytest.mark.parametrize("cached", [True, False])
def test_many_are_composed_in_parallel_and_are_the_same(
    cached: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if not cached:
        (tmp_path / "file").write_text("")
        monkeypatch.setenv("BLOCK_CACHE", str(tmp_path / "file"))
    policies = ("block", "random", "infaas")
    points = [(False, {"scheduler": scheduler, "seed": seed}) for scheduler in policies for seed in range(4)]
    together = Composer(CONF, ALWAYS).jobs(points)
    monkeypatch.setattr(campaign, "FEW", 1000)
    assert together == Composer(CONF, ALWAYS).jobs(points)


def test_a_changed_file_is_composed_again(tmp_path: Path) -> None:
    state = campaign._state(tmp_path)
    (tmp_path / "one.yaml").write_text("a: 1\n")
    assert campaign._state(tmp_path) != state


def test_compositions_need_no_place_for_their_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("BLOCK_CACHE", str(tmp_path / "file"))
    assert job(Composer(CONF, ALWAYS), {"scheduler": "random"}, search=True).search


def test_of_the_runs_of_a_job_the_latest_that_is_current_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    wanted = job(Composer(CONF, ALWAYS), {"scheduler": "random"})
    campaign.attach_stored([wanted])
    assert wanted.stored is None
    folders = []
    for hashes in (wanted.hashes, wanted.hashes, {**wanted.hashes, "code": "another"}, {}):
        with RunWriter(wanted.settings, wanted.choices, hashes=hashes) as writer:
            writer.store([], [], {})
        folders.append(writer.path)
    old = folders[0] / "run.json"  # of a version that hashed nothing
    document = json.loads(old.read_text())
    del document["hashes"], document["config_hash"]
    old.write_text(json.dumps(document))
    campaign.attach_stored([wanted])
    assert isinstance(wanted.stored, Run)
    assert wanted.stored.path == folders[1]


def test_jobs_that_do_the_same_are_done_once_and_the_longest_first() -> None:
    composer = Composer(CONF, ALWAYS)
    point = {"scheduler": "random", "workload.qps": 20.0}
    run, same, search = (job(composer, point, search=search) for search in (False, False, True))
    assert campaign.distinct([run, same, search]) == [search, same]


def test_a_run_without_a_rate_has_a_name() -> None:
    settings = {"workload": {"qps": None, "num_requests": None}, "seed": 0}
    assert str(Job(False, settings, {"scheduler": "block"}, {})) == "scheduler=block qps=null seed=0"
