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

from block.core.types import Request, RequestRecord, Views
from block.dispatch.core import Dispatcher, Observer
from block.engine.batch import EngineBatch
from block.engine.engine import Engine


class Counterfactuals(Observer):
    """Tries the requests with the ids `sampled` on every active instance; instance i is row i of `engines`.

    delay_s: seconds from a decision to the request's arrival at the instance.
    """

    def __init__(self, engines: EngineBatch, sampled: Collection[int], delay_s: float) -> None:
        self._engines = engines
        self._sampled = frozenset(sampled)
        self._delay_s = delay_s
        self._in_transit: deque[tuple[float, RequestRecord]] = deque()  # placed, and when they arrive
        self._rows: list[tuple[int, int, bool, float, float]] = []

    def placed(self, dispatcher: Dispatcher, record: RequestRecord, views: Views, now: float) -> None:
        """Try it, if it is sampled."""
        while self._in_transit and not math.isnan(self._in_transit[0][1].dispatched):
            self._in_transit.popleft()
        arrives = now + self._delay_s
        if record.request.id in self._sampled:
            forecasts = {view.instance_id: view.forecast for view in views}
            for i in dispatcher.active:
                before = [(at, other.request) for at, other in self._in_transit if other.instance_id == i]
                finished = would_finish(Engine(self._engines, i), [*before, (arrives, record.request)])
                forecast = forecasts.get(i)
                expected = math.nan if forecast is None else forecast.e2e + self._delay_s
                self._rows.append(
                    (record.request.id, i, i == record.instance_id, expected, finished - record.request.arrival)
                )
        self._in_transit.append((arrives, record))

    def columns(self) -> dict[str, NDArray[Any]]:
        """A row per sampled request and instance.

        request_id, instance_id, chosen; forecast_e2e: seconds from the decision as forecast, NaN for an instance that
        was not asked; replayed_e2e: seconds from arrival to the last token, had it gone there and nothing come later.
        """
        names = ("request_id", "instance_id", "chosen", "forecast_e2e", "replayed_e2e")
        kinds = (np.int64, np.int64, np.bool_, np.float64, np.float64)
        values = list(zip(*self._rows, strict=True)) or [()] * len(names)
        return {name: np.asarray(column, dtype=kind) for name, column, kind in zip(names, values, kinds, strict=True)}


def would_finish(engine: Engine, arrivals: Sequence[tuple[float, Request]]) -> float:
    """When the last of `arrivals`, (time, request) in order of time, would finish if nothing else came; inf: never.

    The engine itself is left as it is.
    """
    copy = engine.copy()
    for at, request in arrivals:
        copy.advance(at)
        copy.add(request, at)
    finished = {done.id: done.finished for done in copy.advance(math.inf)}
    return finished.get(arrivals[-1][1].id, math.inf)


def sample(requests: Sequence[Request], share: float, rng: np.random.Generator) -> Collection[int]:
    """The ids of a `share` of the requests, at random."""
    picked = rng.choice(len(requests), round(share * len(requests)), replace=False)
    return [requests[i].id for i in picked.tolist()]
