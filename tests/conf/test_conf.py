"""Every conf choice composes and builds; runs, sweeps and capacity searches work; bad input is told in one line."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from block import config, results, sweep

ROOT = Path(__file__).resolve().parents[2]
TINY = ["workload.num_requests=150", "cluster.num_gpus=3", "workload.qps=6", "tracking=none"]
GROUPS = ("scheduler", "model", "cluster", "engine", "workload", "lengths", "backend", "tracking")
CHOICES = [(group, path.stem) for group in GROUPS for path in sorted((ROOT / "conf" / group).glob("*.yaml"))]
sys.path.insert(0, str(ROOT))


def build(*overrides: str) -> config.RunConfig:
    config.register()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return config.build(compose("config", overrides=list(overrides)))


@pytest.mark.parametrize(("group", "choice"), CHOICES)
def test_every_choice_builds(group: str, choice: str, tmp_path: Path) -> None:
    extra = ["cluster.gpu=h200", "engine.max_model_len=4096"] if group == "model" else []
    if choice == "trace":
        (tmp_path / "t.csv").write_text("prompt_tokens,output_tokens,arrival\n5,6,0\n7,8,1\n")
        extra = [f"workload.trace_path={tmp_path / 't.csv'}"]
    assert build(f"{group}={choice}", *extra).seed == 0


def cli(monkeypatch: pytest.MonkeyPatch, script: str, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    with pytest.raises(SystemExit) as exit_:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    assert isinstance(exit_.value.code, int)
    return exit_.value.code


def test_a_run_is_stored_and_the_same_seed_repeats_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in range(2):
        assert cli(monkeypatch, "run.py", *TINY, f"runs_dir={tmp_path}") == 0
    first, second = results.runs(root=tmp_path, scheduler="block")
    assert first.counts == {"sent": 150, "ok": 150, "failed": 0, "fallback": 0, "preempted": 0}
    assert first.requests().equals(second.requests())
    assert str(first.path.name) in capsys.readouterr().out


def test_a_failed_job_of_a_sweep_does_not_lose_the_others(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = ["-m", *TINY[1:], "workload.num_requests=100,-1", f"runs_dir={tmp_path}"]
    assert cli(monkeypatch, "run.py", *overrides, f"hydra.sweep.dir={tmp_path / 's'}") == 1
    assert sweep.Tally.failed == 1
    assert len(results.runs(root=tmp_path)) == 1
    assert "workload.num_requests=-1" in capsys.readouterr().err


def test_a_capacity_search_brackets_the_crossing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    keys = ("capacity.slo_s=[1]", "capacity.seeds=2", "capacity.low=4", "capacity.high=12", "capacity.tolerance=1")
    assert cli(monkeypatch, "scripts/capacity.py", *TINY, *keys) == 0
    (found,) = (tmp_path / "artifacts" / "capacity").glob("*.json")
    document = json.loads(found.read_text())
    assert len(document["objectives_s"]["1"]["by_seed"]) == 2


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("schedular=block", "did you mean scheduler"),
        ("scheduler=blok", "choose from block"),
        ("scheduler.kk=2", "choose from k"),
        ("engine.max_num_seqs=abc", "engine.max_num_seqs=abc"),
        ("cluster.gpu=h1000", "choose from t4"),
        ("workload.qps=-1", "workload.qps=-1"),
        ("workload.qps", "not of the form key=value"),
    ],
)
def test_bad_input_is_one_line(
    override: str, says: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli(monkeypatch, "run.py", override) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ")
    assert says in line
