"""Objectives of requests, and what is done by forecasts about those that would miss theirs."""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

from block.core.choices import did_you_mean
from block.core.types import Forecast, RequestRecord

SERVE, QUEUE, REFUSE = "serve", "queue", "refuse"
RETRY_S = 0.02
"""From one look at the queue to the next."""


@dataclass(frozen=True)
class Slo:
    """Objectives, and what is done about a request whose forecast misses one (the node `gateway.slo`).

    ttft_s, e2e_s: seconds from a request's arrival; null: none. A request's own are its headers x-slo-ttft-ms and
        x-slo-e2e-ms.
    missed: "serve" it anyway; "refuse" it with 429, and with how long it should wait; or "queue" it until its forecast
        meets what is left of them, and refuse it once that cannot be, or after `queue_s`.
    """

    ttft_s: float | None = None
    e2e_s: float | None = None
    missed: str = SERVE
    queue_s: float = 10.0

    def __post_init__(self) -> None:
        for key in ("ttft_s", "e2e_s", "queue_s"):
            given = getattr(self, key)
            if given is not None and not 0 < given < math.inf:
                raise ValueError(f"gateway.slo.{key}={given}: must be greater than 0")
        if self.missed not in (choices := (SERVE, QUEUE, REFUSE)):
            raise ValueError(f"gateway.slo.missed={self.missed}: {did_you_mean(self.missed, choices)}")

    def of(self, headers: Iterable[tuple[bytes, bytes]]) -> Objectives | None:
        """Those of a request with these headers; None if it has none. ValueError for one that is no time."""
        ttft_s, e2e_s = self.ttft_s, self.e2e_s
        for name, value in headers:
            lower = name.lower()
            if lower == b"x-slo-ttft-ms":
                ttft_s = _seconds(lower, value)
            elif lower == b"x-slo-e2e-ms":
                e2e_s = _seconds(lower, value)
        return None if ttft_s is e2e_s is None else Objectives(ttft_s, e2e_s)


def _seconds(name: bytes, value: bytes) -> float:
    try:
        found = float(value) / 1000
    except ValueError:
        found = math.nan
    if not 0 < found < math.inf:
        raise ValueError(f"{name.decode()}: {value.decode('latin-1')} are no milliseconds")
    return found


class Objectives(NamedTuple):
    """Of one request, in seconds; None: it has none."""

    ttft_s: float | None
    e2e_s: float | None

    def missed_by_s(self, forecast: Forecast | None, waited_s: float) -> float:
        """How much too late it would be, having waited so long already; 0 if it is in time, or nobody knows."""
        if forecast is None:
            return 0.0
        late = [
            waited_s + predicted - wanted
            for predicted, wanted in ((forecast.ttft, self.ttft_s), (forecast.e2e, self.e2e_s))
            if wanted is not None
        ]
        return max((one for one in late if one > 0), default=0.0)  # a forecast may be NaN

    def lost(self, waited_s: float) -> bool:
        """Whether it has waited so long that it cannot be in time."""
        return any(wanted is not None and waited_s >= wanted for wanted in self)

    def met(self, record: RequestRecord) -> bool | None:
        """Whether an answer was in time; None without an objective that can be judged, as of a first token unseen."""
        arrival = record.request.arrival
        took = ((record.first_token - arrival, self.ttft_s), (record.finished - arrival, self.e2e_s))
        judged = [seconds <= wanted for seconds, wanted in took if wanted is not None and not math.isnan(seconds)]
        return all(judged) if judged else None


class Queue:
    """Requests whose forecasts miss, in the order in which they came. `watch` tries them again, until it is cancelled.

    A request is a call that tries to place it, and returns whether it need not be tried again.
    """

    def __init__(self) -> None:
        self._waiting: deque[Callable[[], bool]] = deque()

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, place: Callable[[], bool]) -> None:
        """One more, behind the others."""
        self._waiting.append(place)

    async def watch(self) -> None:
        """Place the first, and those behind it, as soon as their forecasts allow it."""
        while True:
            await asyncio.sleep(RETRY_S)
            while self._waiting and self._waiting[0]():
                self._waiting.popleft()
