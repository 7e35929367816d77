"""The monitor samples every instance, no more often than it was told to."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from block.core.snapshot import FIELDS, Snapshot
from block.dispatch.monitor import Monitor

NAMES = ["time", "request_id", "instance_id", "free_blocks", "running", "waiting", "preemptions"]


def still(ids: Sequence[int], now: float) -> list[Snapshot]:
    """Instances whose picture never changes: 2 running, 3 waiting."""
    seqs = np.zeros((FIELDS, 5), dtype=np.int64)
    return [Snapshot(i, now, math.nan, 2, 0, 40 + i, 7, seqs) for i in ids]


def test_a_row_for_each_instance() -> None:
    monitor = Monitor(still, lambda: (0, 1), 1.0)
    monitor.tick(0.5, 12)
    columns = monitor.columns()
    assert list(columns) == NAMES
    assert {name: column.tolist() for name, column in columns.items()} == {
        "time": [0.5, 0.5],
        "request_id": [12, 12],
        "instance_id": [0, 1],
        "free_blocks": [40, 41],
        "running": [2, 2],
        "waiting": [3, 3],
        "preemptions": [7, 7],
    }


def test_samples_are_at_least_the_interval_apart() -> None:
    monitor = Monitor(still, lambda: (0,), 2.0)
    for i, now in enumerate([0.0, 1.0, 1.9, 2.0, 3.5, 9.0, 10.0, 11.0]):
        monitor.tick(now, i)
    assert monitor.columns()["time"].tolist() == [0.0, 2.0, 9.0, 11.0]
    assert monitor.columns()["request_id"].tolist() == [0, 3, 5, 7]


def test_every_tick_is_a_sample_if_the_interval_is_zero() -> None:
    monitor = Monitor(still, lambda: (0,), 0.0)
    for now in (0.0, 0.0, 0.1):
        monitor.tick(now, 0)
    assert len(monitor.columns()["time"]) == 3


def test_the_columns_of_no_samples_are_empty_and_typed() -> None:
    columns = Monitor(still, lambda: (0,), 1.0).columns()
    assert list(columns) == NAMES
    assert {len(column) for column in columns.values()} == {0}
    assert columns["time"].dtype == np.float64
    assert all(columns[name].dtype == np.int64 for name in NAMES[1:])
