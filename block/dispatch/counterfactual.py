"""Counterfactuals: when would a request have finished on the instances that were not chosen?

At the moment of a decision the engine of every instance is copied, as it really is: with true response lengths, with
the step times that it will really have, and with the requests that are on their way to it. The request is added when
it would have got there, and the copy is run until it finishes. Requests placed later are left out: where they go
depends on where this one went, so there is no such thing as what would have come to an instance that was not chosen,
and what came to the chosen one was sent there knowing of this request. What really happened is in the request table.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from block.core import clock
from block.core.types import InstanceView, Request, RequestRecord
from block.engine.simulated_instance import SimulatedInstance


class Counterfactuals:
    """Tries the requests with the ids `sampled` on every active instance; told of all placements by `placed`.

    delay_s: seconds from a decision to the request's arrival at the instance.
    """

    def __init__(self, instances: Sequence[SimulatedInstance], sampled: Collection[int], delay_s: float) -> None:
        self._instances = instances
        self._sampled = frozenset(sampled)
        self._delay_s = delay_s
        self._underway: deque[tuple[float, RequestRecord]] = deque()  # placed, and when they arrive
        self._rows: list[tuple[int, int, bool, float, float]] = []

    def placed(self, record: RequestRecord, views: Sequence[InstanceView], active: Sequence[int]) -> None:
        """A request has just been placed, by these views, on one of the instances `active`."""
        while self._underway and not math.isnan(self._underway[0][1].dispatched):
            self._underway.popleft()
        arrives = clock.now() + self._delay_s
        if record.request.id in self._sampled:
            forecasts = {view.instance_id: view.forecast for view in views}
            for i in active:
                before = [(at, other.request) for at, other in self._underway if other.instance_id == i]
                finished = self._instances[i].would_finish([*before, (arrives, record.request)])
                forecast = forecasts.get(i)
                expected = math.nan if forecast is None else forecast.e2e + self._delay_s
                self._rows.append(
                    (record.request.id, i, i == record.instance_id, expected, finished - record.request.arrival)
                )
        self._underway.append((arrives, record))

    def columns(self) -> dict[str, NDArray[Any]]:
        """A row per sampled request and instance.

        request_id, instance_id, chosen; forecast_e2e: seconds from the decision as forecast, NaN for an instance that
        was not asked; replayed_e2e: seconds from arrival to the last token, had it gone there and nothing come later.
        """
        names = ("request_id", "instance_id", "chosen", "forecast_e2e", "replayed_e2e")
        kinds = (np.int64, np.int64, np.bool_, np.float64, np.float64)
        values = list(zip(*self._rows, strict=True)) or [()] * len(names)
        return {name: np.asarray(column, dtype=kind) for name, column, kind in zip(names, values, kinds, strict=True)}


def sample(requests: Sequence[Request], share: float, rng: np.random.Generator) -> Collection[int]:
    """The ids of a `share` of the requests, at random."""
    picked = rng.choice(len(requests), round(share * len(requests)), replace=False)
    return [requests[i].id for i in picked.tolist()]
