"""Jobs from cells: the same as `run.py` would make of the same overrides, and composed once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir

from block import campaign, config
from block.campaign import Composer
from block.provenance import SOURCE
from block.results import experiment_hash

ALWAYS = ("backend=simulated", "tracking=none", "workload.num_requests=40")
CONF = SOURCE / "conf"


@pytest.fixture(autouse=True)
def _cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("BLOCK_CACHE", str(tmp_path))


@pytest.mark.parametrize(
    "cell",
    [
        {"scheduler": "block_star", "workload.qps": 31, "seed": 2},
        {"scheduler": "po_k", "scheduler.k": 4, "lengths": "compact"},
        {"cluster": "mixed", "scheduler": "infaas", "dispatch.ledger": False},
        {"scheduler": "block", "backend.slowdown": [1.5, 1.5], "dispatch.correction_steps": 200},
    ],
)
def test_a_job_is_what_the_command_line_makes_of_the_same_overrides(cell: dict[str, Any]) -> None:
    job = Composer(CONF, ALWAYS).job(cell, search=False)
    config.register()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        typed = compose("config", overrides=[*(f"{key}={value}" for key, value in cell.items()), *ALWAYS])
    assert experiment_hash(job.settings) == experiment_hash(config.plain(typed))
    assert job.choices["scheduler"] == cell["scheduler"]


def test_a_setting_that_there_is_not_is_an_error() -> None:
    with pytest.raises(KeyError, match="speed"):
        Composer(CONF, ALWAYS).job({"scheduler": "block", "scheduler.speed": 2}, search=False)


def test_the_fingerprints_of_a_job_change_with_its_model_and_lengths_only() -> None:
    composer = Composer(CONF, ALWAYS)
    base = composer.job({"scheduler": "block", "workload.qps": 20.0}, search=False).hashes
    assert composer.job({"scheduler": "random", "workload.qps": 30.0}, search=False).hashes == base
    assert composer.job({"scheduler": "block", "seed": 1}, search=False).hashes["data_set"] != base["data_set"]
    other = composer.job({"scheduler": "block", "model": "qwen2-7b"}, search=False).hashes
    assert {key for key, value in other.items() if value != base[key]} == {"latency_model"}
    estimated = composer.job({"scheduler": "block", "lengths": "compact"}, search=False).hashes
    changed = {key for key, value in estimated.items() if value != base[key]}
    assert changed == {"estimates"}


def test_hydra_is_asked_once_and_not_by_the_next_composer(monkeypatch: pytest.MonkeyPatch) -> None:
    cells = [{"scheduler": "block", "workload.qps": float(qps)} for qps in range(20, 25)]
    asked = []
    monkeypatch.setattr(campaign, "compose", lambda *a, **k: asked.append(k) or compose(*a, **k))
    first = [Composer(CONF, ALWAYS).job(cell, search=False) for cell in cells[:1]]
    made = len(asked)
    assert made > 0
    composer = Composer(CONF, ALWAYS)
    again = [composer.job(cell, search=False) for cell in cells]
    assert len(asked) == made
    assert again[0] == first[0]
    assert [job.settings["workload"]["qps"] for job in again] == [20, 21, 22, 23, 24]


def test_a_changed_file_is_composed_again(tmp_path: Path) -> None:
    state = campaign._state(tmp_path)
    (tmp_path / "one.yaml").write_text("a: 1\n")
    assert campaign._state(tmp_path) != state


def test_without_a_place_for_the_cache_it_composes_all_the_same(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("BLOCK_CACHE", str(tmp_path / "file"))
    assert Composer(CONF, ALWAYS).job({"scheduler": "random"}, search=True).search


def test_jobs_that_do_the_same_are_done_once_and_the_longest_first() -> None:
    composer = Composer(CONF, ALWAYS)
    cell = {"scheduler": "random", "workload.qps": 20.0}
    run, same, search = (composer.job(cell, search=search) for search in (False, False, True))
    assert campaign.distinct([run, same, search]) == [search, same]
