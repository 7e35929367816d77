"""The monitor samples every instance, no more often than it was told to."""

from __future__ import annotations

import math

import numpy as np

from block.core.snapshot import FIELDS, Snapshot
from block.core.types import Request, RequestRecord
from block.dispatch.instance import one_by_one
from block.dispatch.monitor import Monitor

NAMES = ["time", "request_id", "instance_id", "free_blocks", "running", "waiting", "preemptions"]


class Still:
    """An instance whose picture never changes: 2 running, 3 waiting."""

    def __init__(self, instance_id: int) -> None:
        self.instance_id = instance_id

    def snapshot(self) -> Snapshot:
        seqs = np.zeros((FIELDS, 5), dtype=np.int64)
        return Snapshot(self.instance_id, 0.0, math.nan, 2, 0, 40 + self.instance_id, 7, seqs)

    async def generate(self, request: Request, record: RequestRecord) -> None:
        raise AssertionError("a monitor only looks")


def test_a_row_for_each_instance() -> None:
    monitor = Monitor(one_by_one([Still(0), Still(1)]), lambda: (0, 1), 1.0)
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
    monitor = Monitor(one_by_one([Still(0)]), lambda: (0,), 2.0)
    for i, now in enumerate([0.0, 1.0, 1.9, 2.0, 3.5, 9.0, 10.0, 11.0]):
        monitor.tick(now, i)
    assert monitor.columns()["time"].tolist() == [0.0, 2.0, 9.0, 11.0]
    assert monitor.columns()["request_id"].tolist() == [0, 3, 5, 7]


def test_every_tick_is_a_sample_if_the_interval_is_zero() -> None:
    monitor = Monitor(one_by_one([Still(0)]), lambda: (0,), 0.0)
    for now in (0.0, 0.0, 0.1):
        monitor.tick(now, 0)
    assert len(monitor.columns()["time"]) == 3


def test_the_columns_of_no_samples_are_empty_and_typed() -> None:
    columns = Monitor(one_by_one([Still(0)]), lambda: (0,), 1.0).columns()
    assert list(columns) == NAMES
    assert {len(column) for column in columns.values()} == {0}
    assert columns["time"].dtype == np.float64
    assert all(columns[name].dtype == np.int64 for name in NAMES[1:])
