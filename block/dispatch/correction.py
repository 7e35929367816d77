"""Online correction: an instance that is slower or faster than its latency model says is found out by its steps.

Two snapshots tell how long the steps between them took. If exactly one step passed, or several in which the same
sequences decoded and nothing else ran, the latency model says how long that should have been. What the latest steps of
an instance took, over what they should have, is its *factor*, and all its forecasts are stretched by it: to multiply
every step by a factor is to let time run slower, so the twin itself needs no change.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from block.core.arrays import Floats, Ints
from block.core.jit import compiled
from block.core.snapshot import (
    FIELDS,
    ID,
    META_ID,
    NUM_COMPUTED_TOKENS,
    NUM_SCHEDULED_NEXT,
    NUM_SCHEDULED_TOKENS,
    Snapshot,
    Snapshots,
)
from block.core.types import Forecasts, Request
from block.dispatch.core import Forecaster
from block.engine.latency import LatencyModel
from block.engine.scheduler import step_time


@dataclass(slots=True)
class _Watch:
    """Seconds that steps took and should have taken, the older ones exponentially less; and the last snapshot."""

    took: float = 0.0
    expected: float = 0.0
    last: Snapshot | None = None

    def add(self, took: float, expected: float, steps: int) -> None:
        """One observation more, of which the latest `steps` count."""
        self.took += took - self.took / steps
        self.expected += expected - self.expected / steps


class CorrectedForecaster:
    """The forecasts of another forecaster, stretched by what the steps of each instance take against what they should.

    latency: the model that those forecasts are made with. steps: observed steps of an instance that are remembered.
    Snapshots are observed as they come to be forecast from.
    """

    def __init__(self, forecaster: Forecaster, latency: LatencyModel, steps: int) -> None:
        self._forecaster = forecaster
        self._packed = latency.pack()
        self._steps = steps
        self._watches: dict[int, _Watch] = {}
        self._all = _Watch()
        nothing = np.zeros((FIELDS, 2), dtype=np.int64)
        expected_time(
            nothing.copy(), nothing[:, :1], self._packed
        )  # compiled, or loaded, before a request waits for it

    def factor(self, instance_id: int) -> float:
        """What an instance's steps take, over what they should; 1 as long as nothing is known.

        Before its own first step is seen, what those of all take: if the model is too slow, an instance that was never
        used would else look slow beside the others, and never be used.
        """
        watch = self._watches.get(instance_id)
        known = watch if watch is not None and watch.expected > 0 else self._all
        return known.took / known.expected if known.expected > 0 else 1.0

    def forecasts(
        self, snapshots: Sequence[Snapshot], in_transit: Sequence[Sequence[Request]], request: Request, now: float
    ) -> Forecasts:
        """One forecast for each snapshot."""
        shown = Snapshots.of(snapshots)
        ids = shown.meta[:, META_ID].tolist()
        for place, (instance_id, started_at) in enumerate(zip(ids, shown.started.tolist(), strict=True)):
            watch = self._watches.get(instance_id)
            if watch is None or watch.last is None or watch.last.step_started != started_at:
                self._observe(shown[place])
        factors = [self.factor(instance_id) for instance_id in ids]
        # In the time of the twin, the step in flight has been running for less long.
        started = now - (now - shown.started) / np.array(factors)
        slowed = Snapshots(shown.taken_at, shown.pool, shown.meta, started, shown.hits)
        found = self._forecaster.forecasts(slowed, in_transit, request, now)
        return Forecasts.of(found).times(factors)

    def _observe(self, snapshot: Snapshot) -> None:
        """Learn from the steps since the last snapshot of the same instance."""
        watch = self._watches.setdefault(snapshot.instance_id, _Watch())
        last = watch.last
        if math.isnan(snapshot.step_started):
            watch.last = None
            return
        in_flight = snapshot.seqs[:, : snapshot.running + snapshot.stale]
        if last is not None:
            expected = expected_time(last.seqs, in_flight, self._packed)
            if expected > 0:
                took = snapshot.step_started - last.step_started
                watch.add(took, expected, self._steps)
                self._all.add(took, expected, self._steps * len(self._watches))
        watch.last = snapshot._replace(seqs=in_flight.copy())


@compiled
def expected_time(before: Ints, after: Ints, packed: Floats) -> float:
    """Modelled seconds from the beginning of the step in flight in `before` to that of the one in `after`.

    Both are sequences in flight, int64[FIELDS, n]; 0 if what ran between cannot be told.
    """
    done = np.int64(-1)  # tokens that a sequence in both computed between the two steps
    for column in range(before.shape[1]):
        if before[NUM_SCHEDULED_TOKENS, column] == 0:
            continue
        for other in range(after.shape[1]):
            if after[ID, other] == before[ID, column]:
                if after[NUM_SCHEDULED_TOKENS, other] > 0:
                    done = _computed(after, other) - after[NUM_SCHEDULED_TOKENS, other] - _computed(before, column)
                break
        if done >= 0:
            break
    first = step_time(before, 0, before.shape[1], NUM_SCHEDULED_TOKENS, packed)
    if done == 0:
        return first
    if done < 0 or before.shape[1] != after.shape[1]:
        return 0.0
    for column in range(before.shape[1]):
        same = before[ID, column] == after[ID, column]
        decodes = before[NUM_SCHEDULED_TOKENS, column] == 1 and after[NUM_SCHEDULED_TOKENS, column] == 1
        if not (same and decodes and _computed(after, column) - 1 - _computed(before, column) == done):
            return 0.0
    # The time of such steps grows by the same from one to the next; `after` itself is not one of them.
    last = step_time(after, 0, after.shape[1], NUM_SCHEDULED_TOKENS, packed)
    growth = (last - first) / (done + 1)
    return (done + 1) * (first + last - growth) / 2.0


@compiled
def _computed(seqs: Ints, column: int) -> np.int64:
    """Tokens computed once the step in flight has ended."""
    return np.int64(seqs[NUM_COMPUTED_TOKENS, column] - seqs[NUM_SCHEDULED_NEXT, column])
