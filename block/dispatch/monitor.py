"""Monitor: what the instances looked like over time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from block.core.arrays import Ints
from block.core.snapshot import (
    META,
    META_BEGIN,
    META_END,
    META_FREE,
    META_ID,
    META_PREEMPTIONS,
    META_RUNNING,
    Snapshots,
)
from block.dispatch.core import SnapshotMany


class Monitor:
    """Samples the instances that are active at the first `tick` that is `every_s` or more after the last sample."""

    def __init__(self, snapshot_many: SnapshotMany, active: Callable[[], Sequence[int]], every_s: float) -> None:
        self._snapshot_many = snapshot_many
        self._active = active
        self._every_s = every_s
        self._next = 0.0
        self._samples: list[tuple[float, int, Ints]] = []

    def tick(self, now: float, request_id: int) -> None:
        """Sample if it is time; `request_id` is the request about to be placed (the figures' x axis)."""
        if now < self._next:
            return
        self._next = now + self._every_s
        active = self._active()
        if active:
            self._samples.append((now, request_id, Snapshots.of(self._snapshot_many(active, now)).meta))

    def columns(self) -> dict[str, NDArray[Any]]:
        """The samples: time (s), request_id, instance_id, free_blocks, running, waiting, preemptions (so far)."""
        instances = [len(meta) for _, _, meta in self._samples]
        meta = np.concatenate([np.zeros((0, META), np.int64), *(meta for _, _, meta in self._samples)])
        return {
            "time": np.repeat([now for now, _, _ in self._samples], instances).astype(np.float64),
            "request_id": np.repeat([request for _, request, _ in self._samples], instances).astype(np.int64),
            "instance_id": meta[:, META_ID],
            "free_blocks": meta[:, META_FREE],
            "running": meta[:, META_RUNNING],
            "waiting": meta[:, META_END] - meta[:, META_BEGIN] - meta[:, META_RUNNING],
            "preemptions": meta[:, META_PREEMPTIONS],
        }
