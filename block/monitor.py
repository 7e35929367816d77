"""Monitor: what the instances looked like over time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from block.instances.base import Look


class Monitor:
    """Samples the instances that are active at the first `tick` that is `every_s` or more after the last sample."""

    def __init__(self, look: Look, active: Callable[[], Sequence[int]], every_s: float) -> None:
        self._look = look
        self._active = active
        self._every_s = every_s
        self._next = 0.0
        self._rows: list[tuple[float, int, int, int, int, int, int]] = []

    def tick(self, now: float, request_id: int) -> None:
        """Sample if it is time; `request_id` is the request about to be placed (the figures' x axis)."""
        if now < self._next:
            return
        self._next = now + self._every_s
        for seen in self._look(self._active()):
            waiting = seen.seqs.shape[1] - seen.running
            row = (now, request_id, seen.instance_id, seen.free_blocks, seen.running, waiting, seen.preemptions)
            self._rows.append(row)

    def columns(self) -> dict[str, NDArray[Any]]:
        """The samples: time (s), request_id, instance_id, free_blocks, running, waiting, preemptions (so far)."""
        names = ("time", "request_id", "instance_id", "free_blocks", "running", "waiting", "preemptions")
        values = list(zip(*self._rows, strict=True)) or [()] * len(names)
        return {
            name: np.asarray(column, dtype=np.float64 if name == "time" else np.int64)
            for name, column in zip(names, values, strict=True)
        }
