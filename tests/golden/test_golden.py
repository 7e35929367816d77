"""Golden runs: the exact outcome of small runs, kept in files beside this one.

They say *that* something changed, not that it was right: what is right is stated in tests/invariants and in the tests
of the twin against its reference. After a change that is meant to move them, `pytest tests/golden --regenerate`, and
say why in the commit that brings the new files.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from testbed import poisson, round_latency, simulate

from block.dispatch.config import DispatchConfig
from block.dispatch.policies import Block, LeastRequests, LlumnixMinus
from block.engine.config import EngineConfig
from block.lengths import Noisy, tag

FOLDER = Path(__file__).parent
SMALL = {"max_model_len": 512, "max_num_seqs": 12, "max_num_batched_tokens": 256}
RUNS: dict[str, dict[str, Any]] = {
    "v0-block": {"policy": Block(), "config": EngineConfig(**SMALL), "noise": 0.05, "delay_s": 0.05},
    "v0-llumnix": {"policy": LlumnixMinus(), "config": EngineConfig(**SMALL), "noise": 0.05},
    "v1-block-po2": {"policy": Block(k=2), "config": EngineConfig("v1", **SMALL), "noise": 0.05, "delay_s": 0.05},
    "v1-async-block": {"policy": Block(), "config": EngineConfig("v1", async_scheduling=True, **SMALL)},
    "v1-least-requests-stale": {
        "policy": LeastRequests(),
        "config": EngineConfig("v1", **SMALL),
        "dispatch": DispatchConfig(ledger=False, snapshot_interval_s=0.5),
    },
}


def play(name: str) -> list[dict[str, Any]]:
    """What the run called `name` does, a row per request; times to nine significant digits."""
    requests = tag(poisson(80, 8.0, 11, prompt=120, output=60), Noisy(), 11)
    run = simulate(requests, latency=round_latency(), instances=3, total_blocks=48, seed=11, **RUNS[name])
    return [
        {
            "id": record.request.id,
            "instance": record.instance_id,
            "preemptions": record.preemptions,
            "first_token": float(f"{record.first_token:.9g}"),
            "finished": float(f"{record.finished:.9g}"),
        }
        | ({} if record.forecast is None else {"forecast": float(f"{record.forecast.e2e:.9g}")})
        for record in run.records
    ]


@pytest.mark.parametrize("name", RUNS)
def test_a_run_is_as_it_was(name: str, request: pytest.FixtureRequest) -> None:
    path = FOLDER / f"{name}.json"
    rows = play(name)
    if request.config.getoption("--regenerate"):
        path.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")
    golden = json.loads(path.read_text())
    assert len(rows) == len(golden)
    for row, wanted in zip(rows, golden, strict=True):
        assert row == pytest.approx(wanted, rel=1e-7), f"request {wanted['id']} of {name}"


def test_the_runs_are_eventful() -> None:
    """Memory is tight in all of them: there is something to get wrong."""
    preempted = {
        name: sum(row["preemptions"] for row in json.loads((FOLDER / f"{name}.json").read_text())) for name in RUNS
    }
    assert min(preempted.values()) >= 5, preempted
    used = {row["instance"] for name in RUNS for row in json.loads((FOLDER / f"{name}.json").read_text())}
    assert used == {0, 1, 2}


def test_no_file_is_left_over() -> None:
    assert {path.stem for path in FOLDER.glob("*.json")} == set(RUNS)
