"""Dispatcher: one request in, one instance chosen, one record out.

snapshots → requests underway → forecasts → policy → ledger → (dispatch delay) → generate → record

Between the choice of an instance and the first snapshot that shows the request there, every other decision would be
blind to it, and requests would herd to the instance that looks emptiest. The *ledger* closes that gap: it lists what
was placed and is not yet visible, and views and forecasts count it in. The paper's artifact has none; ``ledger=False``
is that.
"""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from random import Random as Stream
from typing import Protocol, TypeVar

from block.core import clock
from block.core.snapshot import ID, Snapshot, Snapshots
from block.core.types import Decision, Forecast, InstanceView, Request, RequestRecord, Views
from block.dispatch.instance import Instance, InstanceFailed, Look, RequestFailed, one_by_one
from block.dispatch.policies import Needs, Policy
from block.dispatch.policy_checks import checked

log = logging.getLogger(__name__)

T = TypeVar("T")

RECENT_S = 60.0
"""Window of `InstanceView.recent`."""

MAX_RETRIES = 3
"""Instances that a request may lose before it fails."""

Deliver = Callable[[Instance, RequestRecord], Awaitable[None]]
"""Has an instance serve a record's request; raises what `Instance.generate` raises."""

Placed = Callable[[RequestRecord, Sequence[InstanceView], Sequence[int]], None]
"""Is told of a placement: the record, the views that it was decided by, and the instances that were active."""


class Forecaster(Protocol):
    """Tells when a request would finish where: a `block.engine.predictor.Predictor`, or several."""

    def forecasts(
        self, snapshots: Sequence[Snapshot], underway: Sequence[Sequence[Request]], request: Request, now: float
    ) -> Sequence[Forecast]:
        """One forecast for each snapshot, with the requests that are underway there."""
        ...


class Watcher(Protocol):
    """Is told what happens, and may change which instances requests go to: a `block.cluster.scaler.Scaler`."""

    def arrived(self, views: Sequence[InstanceView]) -> int | None:
        """A request is to be placed among these; the id of another instance that it is to go to instead, if any."""
        ...

    async def ready(self, instance_id: int) -> None:
        """Wait until the instance takes requests. InstanceFailed if it never will."""
        ...

    def placed(self, views: Sequence[InstanceView]) -> None:
        """It has been placed."""
        ...

    def finished(self, record: RequestRecord) -> None:
        """It has left its instance, served or not."""
        ...


@dataclass(frozen=True)
class DispatchConfig:
    """How requests get to instances (one Hydra node).

    ledger: count in requests that were placed and are not yet visible in a snapshot.
    snapshot_interval_s: a snapshot is used again until it is this old; 0 takes a fresh one for every decision.
    correction_steps: observed steps by which forecasts are corrected (`block.dispatch.correction`); 0: they are not.
    dispatchers: so many dispatchers, each with books of its own; a request goes to one of them at random.
    forecast_noise: standard deviation of the Gaussian factor by which each forecast is off on purpose; 0 for none.
    """

    ledger: bool = True
    snapshot_interval_s: float = 0.0
    correction_steps: int = 0
    dispatchers: int = 1
    forecast_noise: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.snapshot_interval_s < float("inf"):
            raise ValueError(f"dispatch.snapshot_interval_s={self.snapshot_interval_s}: must be 0 or more seconds")
        if self.correction_steps < 0:
            raise ValueError(f"dispatch.correction_steps={self.correction_steps}: must be 0 or more")
        if self.dispatchers < 1:
            raise ValueError(f"dispatch.dispatchers={self.dispatchers}: must be at least 1")
        if not 0 <= self.forecast_noise < float("inf"):
            raise ValueError(f"dispatch.forecast_noise={self.forecast_noise}: must be 0 or more")


class _Books:
    """What the dispatcher knows without asking, by instance.

    ledger: requests placed there that no snapshot shows yet; landed: ids of those of them that have got there.
    outstanding, recent: as in `InstanceView`. ejected: times that it was. snapshots: the last ones.
    """

    def __init__(self, instances: int) -> None:
        self.ledger: list[list[Request]] = [[] for _ in range(instances)]
        self.landed: list[set[int]] = [set() for _ in range(instances)]
        self.outstanding = [0] * instances
        self.recent = [0] * instances
        self.ejected = [0] * instances
        self.snapshots: list[Snapshot | None] = [None] * instances
        self._placed: deque[tuple[float, int]] = deque()  # when and where, of those that are recent

    def place(self, request: Request, instance_id: int, now: float, *, in_ledger: bool) -> None:
        """A request goes to an instance."""
        self.outstanding[instance_id] += 1
        self.recent[instance_id] += 1
        self._placed.append((now, instance_id))
        if in_ledger:
            self.ledger[instance_id].append(request)

    def forget(self, now: float) -> None:
        """What was placed long ago is not recent any more."""
        placed = self._placed
        while placed and placed[0][0] <= now - RECENT_S:
            self.recent[placed.popleft()[1]] -= 1

    def show(self, instance_id: int, shown: Sequence[int]) -> None:
        """Take out of the ledger what is among the requests that a snapshot shows."""
        visible = self.landed[instance_id].intersection(shown)
        if visible:
            self.ledger[instance_id] = [one for one in self.ledger[instance_id] if one.id not in visible]
            self.landed[instance_id] -= visible

    def release(self, request: Request, instance_id: int) -> None:
        """A request has left an instance."""
        self.outstanding[instance_id] -= 1
        self.landed[instance_id].discard(request.id)
        self.ledger[instance_id] = [one for one in self.ledger[instance_id] if one is not request]


def _of(values: Sequence[T], ids: Sequence[int]) -> Sequence[T]:
    """Those of some instances; of all it is a copy, which costs less."""
    return values[:] if ids == range(len(values)) else [values[i] for i in ids]


class Dispatcher:
    """Places requests on instances by a policy. `predictor` may be None if the policy needs no forecasts. A policy that
    is not of this package is checked (`block.dispatch.policy_checks`).

    delay_s: modelled seconds from a request's arrival to its arrival at the instance; 0 where the delay is real.
    An instance that fails a request is *ejected*, unless it only turned it away: no request goes there until `readmit`.
    Keeps what it did, all of it or the latest `history`: `records`, one per request, and `decisions`, (time, Decision,
    request id). forecast_s: wall-clock seconds that each batch of forecasts took, divided by its number of forecasts.
    ejections: (time, instance id, reason). placed: is told of each placement. initial: so many instances, the first,
    take requests from the start (None: all). look: snapshots of many instances at once; by default one by one.
    watcher: is told of each request.
    """

    def __init__(
        self,
        instances: Sequence[Instance],
        policy: Policy,
        predictor: Forecaster | None,
        config: DispatchConfig,
        stream: Stream,
        *,
        delay_s: float = 0.0,
        history: int | None = None,
        placed: Placed | None = None,
        initial: int | None = None,
        look: Look | None = None,
    ) -> None:
        if policy.needs is Needs.FORECAST and predictor is None:
            raise ValueError(f"policy {type(policy).__name__} needs a predictor")
        self._instances = instances
        self._policy = checked(policy)
        self._predictor = predictor
        self._config = config
        self._stream = stream
        self._delay_s = delay_s
        self._placed = placed
        self._look = look or one_by_one(instances)
        self._books = _Books(len(instances))
        self._keeps_ledger = config.ledger and policy.needs is not Needs.COUNTS
        self._active = list(range(len(instances)))[:initial]  # ids of the instances that requests may go to
        self._turn = 0
        self.watcher: Watcher | None = None
        self._moved: dict[int, int] = {}  # request id → instance that it has migrated to
        self.records: deque[RequestRecord] = deque(maxlen=history)
        self.decisions: deque[tuple[float, Decision, int]] = deque(maxlen=history)
        self.forecast_s: deque[float] = deque(maxlen=history)
        self.ejections: deque[tuple[float, int, str]] = deque(maxlen=history)

    def replica(self, policy: Policy, stream: Stream) -> Dispatcher:
        """Another dispatcher in front of the same instances; they know nothing of each other, but keep one history.

        policy: the same one, but another object if it has a state.
        """
        other = Dispatcher(
            self._instances,
            policy,
            self._predictor,
            self._config,
            stream,
            delay_s=self._delay_s,
            placed=self._placed,
            look=self._look,
        )
        other.records, other.decisions = self.records, self.decisions
        other.forecast_s, other.ejections = self.forecast_s, self.ejections
        return other

    @property
    def active(self) -> Sequence[int]:
        """Ids of the instances that requests may go to."""
        return self._active

    def outstanding(self, instance_id: int) -> int:
        """Requests placed there and not finished."""
        return self._books.outstanding[instance_id]

    def ejected(self, instance_id: int) -> int:
        """Times that it was ejected."""
        return self._books.ejected[instance_id]

    def eject(self, instance_id: int, reason: str) -> None:
        """Send nothing more to an instance; does nothing if it is out already."""
        if instance_id in self._active:
            self.retire(instance_id)
            self._books.ejected[instance_id] += 1
            self.ejections.append((clock.now(), instance_id, reason))
            log.warning("instance %d gets no more requests: %s", instance_id, reason)

    def retire(self, instance_id: int) -> None:
        """Send nothing more to an instance that requests may go to, and that has done nothing wrong."""
        self._active.remove(instance_id)

    def readmit(self, instance_id: int) -> None:
        """Send requests to an instance, again or for the first time."""
        if instance_id not in self._active:
            self._active = sorted([*self._active, instance_id])

    def moved(self, record: RequestRecord, source: int, target: int) -> None:
        """A request has migrated between two instances: the books follow it, its record keeps where it was sent."""
        self._books.release(record.request, source)
        self._books.outstanding[target] += 1
        self._moved[record.request.id] = target

    async def submit(self, request: Request, deliver: Deliver | None = None) -> RequestRecord:
        """Place `request`, have it served and return its record, with status "ok" or "failed" and why.

        If an instance fails it, it begins anew on one that has not yet; `record.retries` counts that.
        deliver: how to have it served; by default `Instance.generate`.
        """
        record = RequestRecord(request)
        self.records.append(record)
        turn = self._turn
        self._turn += 1
        failed: list[int] = []
        while active := self._active if not failed else [i for i in self._active if i not in failed]:
            chosen = self._place(request, record, active, turn)
            try:
                if self.watcher is not None:
                    await self.watcher.ready(chosen)
                if self._delay_s > 0:
                    await clock.sleep(self._delay_s)
                record.dispatched = clock.now()
                if self._keeps_ledger:
                    self._books.landed[chosen].add(request.id)
                instance = self._instances[chosen]
                await (instance.generate(request, record) if deliver is None else deliver(instance, record))
                record.status = "ok"
                return record
            except RequestFailed as error:
                record.error = str(error)
                break
            except InstanceFailed as error:
                record.error = str(error)
                failed.append(chosen)
                if error.gone:
                    self.eject(chosen, str(error))
                if record.retries == MAX_RETRIES:
                    break
                record.retries += 1
                record.first_token = math.nan
                record.output_tokens = 0
            finally:
                self._books.release(request, self._moved.pop(request.id, chosen))
                if self.watcher is not None:
                    self.watcher.finished(record)
        record.status = "failed"
        record.error = record.error or "no instance is left"
        return record

    def _place(self, request: Request, record: RequestRecord, active: Sequence[int], turn: int) -> int:
        """Decide to which of the instances `active` the `turn`-th request goes and enter it in the books."""
        now = clock.now()
        candidates = self._policy.candidates(len(active), turn, self._stream)
        if len(active) < len(self._instances):
            candidates = [active[candidate] for candidate in candidates]
        views = self._views(candidates, request, now)
        joining = None if self.watcher is None else self.watcher.arrived(views)
        if joining is not None and joining in self._active:
            views = self._views([joining], request, now)
        if joining is None or joining in self._active:
            decision = self._policy.choose(request, views, self._stream)
        else:  # it has nothing to show yet
            decision = Decision(joining, [joining], [math.nan])
        chosen = decision.instance_id
        record.instance_id = chosen
        if views.forecasts is not None and chosen in views.ids:
            forecast = views.forecasts[views.ids.index(chosen)]
            if forecast is not None:
                record.forecast = Forecast(forecast.ttft + self._delay_s, forecast.e2e + self._delay_s)
        self.decisions.append((now, decision, request.id))
        self._books.place(request, chosen, now, in_ledger=self._keeps_ledger)
        if self._placed is not None:
            self._placed(record, views, active)
        if self.watcher is not None:
            self.watcher.placed(views)
        return chosen

    def _views(self, candidates: Sequence[int], request: Request, now: float) -> Views:
        needs = self._policy.needs
        snapshots: Snapshots | None = None
        forecasts: Sequence[Forecast] | None = None
        if needs is not Needs.COUNTS:
            snapshots = self._seen(candidates, now)
        books = self._books
        underway = _of(books.ledger, candidates)
        if snapshots is not None and needs is Needs.FORECAST and self._predictor is not None:
            began = time.perf_counter()
            forecasts = self._predictor.forecasts(snapshots, underway, request, now)
            self.forecast_s.append((time.perf_counter() - began) / len(candidates))
        books.forget(now)
        outstanding, recent = _of(books.outstanding, candidates), _of(books.recent, candidates)
        return Views(candidates, underway, outstanding, recent, snapshots, forecasts)

    def _seen(self, candidates: Sequence[int], now: float) -> Snapshots:
        """The snapshots of instances to decide by; what they show leaves the ledger."""
        interval = self._config.snapshot_interval_s
        books = self._books
        if interval == 0:
            seen = Snapshots.of(self._look(candidates))
            for place, landed in enumerate(_of(books.landed, candidates)):
                if landed:
                    books.show(candidates[place], seen.ids(place))
            return seen
        known = {candidate: books.snapshots[candidate] for candidate in candidates}
        outdated = [i for i, snapshot in known.items() if snapshot is None or now - snapshot.taken_at >= interval]
        for candidate, snapshot in zip(outdated, self._look(outdated), strict=True):
            kept = snapshot._replace(seqs=snapshot.seqs.copy())  # to outlive this instant
            known[candidate] = books.snapshots[candidate] = kept
            books.show(candidate, snapshot.seqs[ID].tolist())
        return Snapshots.of([snapshot for snapshot in known.values() if snapshot is not None])
