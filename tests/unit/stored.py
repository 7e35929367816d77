"""Small runs for the tests of what is stored: every number is written out here, none comes from product code."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from block.core.types import Decision, Forecast, Request, RequestRecord
from block.store.writer import RunWriter

NAN = float("nan")


def record(
    i: int,
    arrival: float,
    first: float,
    finished: float,
    *,
    prompt: int = 100,
    output: int = 11,
    forecast: Forecast | None = None,
    status: str = "ok",
    preemptions: int = 0,
    instance: int = 0,
) -> RequestRecord:
    request = Request(
        id=i, arrival=arrival, prompt_tokens=prompt, output_tokens=output, predicted_output_tokens=output + 1
    )
    return RequestRecord(
        request=request,
        instance_id=instance,
        dispatched=arrival,
        first_token=first,
        finished=finished,
        forecast=forecast,
        status=status,
        preemptions=preemptions,
        output_tokens=output,
    )


RECORDS = [
    record(0, 0.0, 1.0, 2.0, forecast=Forecast(0.5, 3.0), instance=0),
    record(1, 1.0, 3.0, 5.0, preemptions=2, instance=1),
    record(2, 2.0, NAN, NAN, status="failed", preemptions=1, instance=-1),
]
DECISIONS = [
    (0.0, Decision(0, [0, 1], [1.5, 2.5]), 0),
    (1.0, Decision(1, (0, 1), (4.0, 3.0)), 1),
    (2.0, Decision(1, [], [], "no forecast"), 2),
]
INSTANCES = {
    "time": np.array([0.0, 0.0, 2.0, 2.0]),
    "instance_id": np.array([0, 1, 0, 1]),
    "running": np.array([1, 0, 2, 3]),
    "active": np.array([True, False, True, True]),
}
CONFIG: dict[str, Any] = {"seed": 1, "workload": {"qps": 30, "shape": None}, "threshold": float("inf")}


def store(root: Path, config: dict[str, Any] = CONFIG, **choices: str) -> Path:
    """A stored run of the tables above; returns its folder."""
    with RunWriter(config, choices or {"scheduler": "block"}, root=root) as writer:
        writer.store(RECORDS, DECISIONS, INSTANCES, forecast_us=[10.0, 30.0], wall_time_s=0.25)
    return writer.path


def warnings(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    """What was logged at level WARNING or above."""
    return [entry for entry in caplog.records if entry.levelno >= logging.WARNING]
