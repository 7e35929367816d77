"""The dispatcher: told what happens, it answers where a request goes. It waits for nothing and knows no event loop.

    record = dispatcher.arrived(request, now)      # record.instance_id: where it goes
    dispatcher.delivered(record, now)              # it has got there
    dispatcher.first_token(record, now)
    dispatcher.finished(record, now)               # or failed, refused, cancelled

Who sends requests and keeps time is a *driver*: `block.cluster.simulation` (a heap of events), `block.cluster.live`
(asyncio) and `block.gateway.exchange` (bare protocols). Whatever watches or steers (counterfactuals, provisioning,
migration) is an `Observer` of the same events.

Between the choice of an instance and the first snapshot that shows the request there, every other decision would be
blind to it, and requests would herd to the instance that looks emptiest. The *ledger* closes that gap: it lists what is
in transit, placed and not yet visible, and views and forecasts count it in. The paper's artifact has none;
``ledger=False`` is that.
"""

from __future__ import annotations

import logging
import math
import random
import time
from collections import deque
from collections.abc import Callable, Collection, Container, Sequence
from typing import Protocol, TypeVar

from block.core.arrays import Ints
from block.core.snapshot import ID, Hits, Snapshot, Snapshots
from block.core.types import Decision, Forecast, Request, RequestRecord, Views, shared_blocks
from block.dispatch.config import DispatchConfig
from block.dispatch.policies import Needs, Policy
from block.dispatch.policy_checks import with_checks

log = logging.getLogger(__name__)

T = TypeVar("T")

RECENT_S = 60.0
"""Window of `InstanceView.recent`."""

MAX_RETRIES = 3
"""Times that a request may begin anew, each on an instance that has not failed it; then it fails."""

SnapshotMany = Callable[[Sequence[int], float], Sequence[Snapshot]]
"""Snapshots of the instances with these ids at this time. They are in memory already: nothing is waited for."""


class PrefixIndex(Protocol):
    """Tells what instances have of a request in their prefix caches."""

    @property
    def block_size(self) -> int:
        """Tokens of a KV block."""
        ...

    def hits(self, request: Request, ids: Sequence[int]) -> Ints:
        """int64[instances, 2]: as of `Hits`, of a request that has block hashes."""
        ...


class Forecaster(Protocol):
    """Tells when a request would finish where: a `block.engine.predictor.Predictor`, or several."""

    def forecasts(
        self, snapshots: Sequence[Snapshot], in_transit: Sequence[Sequence[Request]], request: Request, now: float
    ) -> Sequence[Forecast]:
        """One forecast for each snapshot, with the requests that are in transit there."""
        ...


class Observer:
    """Is told what happens at a dispatcher, which it gets with each event. A subclass overrides what it cares for."""

    def arriving(self, dispatcher: Dispatcher, views: Views, now: float) -> int | None:
        """A request is to be placed among these; the id of another instance that it is to go to instead, if any.

        That instance may still be starting: the driver then holds the request until it is up.
        """
        return None

    def placed(self, dispatcher: Dispatcher, record: RequestRecord, views: Views, now: float) -> None:
        """It was placed, by these views. It may be placed again, if the instance fails it."""

    def delivered(self, dispatcher: Dispatcher, record: RequestRecord, now: float) -> None:
        """It has got to its instance."""

    def left(self, dispatcher: Dispatcher, record: RequestRecord, now: float) -> None:
        """It is at no instance any more: it has finished (its status is "ok") or failed there."""

    def instance_up(self, dispatcher: Dispatcher, instance_id: int, now: float) -> None:
        """An instance takes requests, again or for the first time."""

    def instance_down(self, dispatcher: Dispatcher, instance_id: int, reason: str, now: float) -> None:
        """An instance takes no more requests: lost (then it is ejected, if active), not come up, or drained."""


class History:
    """What dispatchers did, all of it or the latest `length` of each; several dispatchers may share one.

    records: one per request. decisions: (time, Decision, request id). forecast_s: wall-clock seconds that each batch of
    forecasts took, divided by its number of forecasts. ejections: (time, instance id, reason). readmissions: (time,
    instance id) of those that were ejected and take requests again.
    """

    def __init__(self, length: int | None = None) -> None:
        self.records: deque[RequestRecord] = deque(maxlen=length)
        self.decisions: deque[tuple[float, Decision, int]] = deque(maxlen=length)
        self.forecast_s: deque[float] = deque(maxlen=length)
        self.ejections: deque[tuple[float, int, str]] = deque(maxlen=length)
        self.readmissions: deque[tuple[float, int]] = deque(maxlen=length)


class _Instances:
    """What a dispatcher knows of the instances without asking, by their ids.

    in_transit: requests placed there that no snapshot shows yet, if there is a ledger. delivered: the ids of those of
    them that have got there. outstanding, recent: as in `InstanceView`. ejected: times that it was. snapshots: the last
    ones, if they are used again.
    """

    def __init__(self, count: int) -> None:
        self.in_transit: list[list[Request]] = []
        self.delivered: list[set[int]] = []
        self.outstanding: list[int] = []
        self.recent: list[int] = []
        self.ejected: list[int] = []
        self.snapshots: list[Snapshot | None] = []
        self._placed: deque[tuple[float, int]] = deque()  # when and where, of those that are recent
        for _ in range(count):
            self.add()

    def add(self) -> None:
        """One more."""
        self.in_transit.append([])
        self.delivered.append(set())
        self.outstanding.append(0)
        self.recent.append(0)
        self.ejected.append(0)
        self.snapshots.append(None)

    def place(self, request: Request, instance_id: int, now: float, *, in_ledger: bool) -> None:
        """A request goes to an instance."""
        self.outstanding[instance_id] += request.sequences
        self.recent[instance_id] += 1
        self._placed.append((now, instance_id))
        if in_ledger:
            self.in_transit[instance_id].append(request)
            if request.sequences > 1:
                self.in_transit[instance_id] += request.siblings()

    def forget(self, now: float) -> None:
        """What was placed longer than `RECENT_S` ago is not recent any more."""
        placed = self._placed
        while placed and placed[0][0] <= now - RECENT_S:
            self.recent[placed.popleft()[1]] -= 1

    def show(self, instance_id: int, shown: Sequence[int]) -> None:
        """A snapshot shows the requests with these ids: those of them that were in transit are not any more. Of several
        sequences a server has all as soon as it has one, but for a step in which they happen to come.
        """
        visible = self.delivered[instance_id].intersection(shown)
        if visible:
            self.in_transit[instance_id] = [one for one in self.in_transit[instance_id] if one.number not in visible]
            self.delivered[instance_id] -= visible

    def release(self, request: Request, instance_id: int) -> None:
        """A request has left an instance."""
        self.outstanding[instance_id] -= request.sequences
        if self.in_transit[instance_id]:
            self.delivered[instance_id].discard(request.id)
            self.in_transit[instance_id] = [one for one in self.in_transit[instance_id] if one.number != request.id]


def _of(values: Sequence[T], ids: Sequence[int]) -> Sequence[T]:
    """Those of some instances; of all it is a copy, which costs less."""
    return values[:] if ids == range(len(values)) else [values[i] for i in ids]


class Dispatcher:
    """Places requests on `instances` instances by a policy. Times are the driver's, in seconds, and never go back.

    policy: checked at each answer if it is not of this package (`block.dispatch.policy_checks`).
    forecaster: may be None if the policy needs no forecasts.
    snapshot_many: may be None if the policy needs no snapshots.
    prefixes: None where no instance has a prefix cache.
    delay_s: modelled seconds from a request's arrival to its arrival at the instance, which forecasts count in; 0 where
        the delay is real.
    initial: so many instances, the first, take requests from the start; None: all.
    observers: are told of each event, in this order.

    An instance that fails a request is *ejected*, unless it only turned it away: no request goes there until
    `instance_up`.
    """

    def __init__(
        self,
        instances: int,
        policy: Policy,
        forecaster: Forecaster | None,
        config: DispatchConfig,
        rng: random.Random,
        *,
        snapshot_many: SnapshotMany | None = None,
        prefixes: PrefixIndex | None = None,
        delay_s: float = 0.0,
        initial: int | None = None,
        observers: Sequence[Observer] = (),
        history: History | None = None,
    ) -> None:
        if policy.needs is Needs.FORECAST and forecaster is None:
            raise ValueError(f"policy {type(policy).__name__} needs a forecaster")
        if policy.needs is not Needs.COUNTS and snapshot_many is None:
            raise ValueError(f"policy {type(policy).__name__} needs snapshots")
        self._policy = with_checks(policy)
        self._policy_forgets: Callable[[int], None] | None = getattr(policy, "forget", None)
        self._forecaster = forecaster
        self._config = config
        self._rng = rng
        self._snapshot_many = snapshot_many
        self._prefixes = prefixes
        self._held: dict[int, tuple[int, int]] = {}  # request id → what its instance had of it when it was placed
        self._delay_s = delay_s
        self._observers = observers
        self._state = _Instances(instances)
        self._count = instances
        self._keeps_ledger = config.ledger and policy.needs is not Needs.COUNTS
        self._active = list(range(instances))[:initial]
        self._lost: set[int] = set()
        self._requests = 0  # so many have arrived
        self._others: dict[
            tuple[Policy | None, Container[int] | None], int
        ] = {}  # so many have, by who may place where
        self._index: dict[int, int] = {}  # request id → how many had arrived before it, of those that are here
        self._lost_on: dict[int, list[int]] = {}  # request id → instances that have failed it
        self._moved: dict[int, int] = {}  # request id → instance that it has migrated to
        self._by: dict[int, Policy] = {}  # request id → the policy that places it, if not the usual one
        self._among: dict[int, Container[int]] = {}  # request id → the only instances that may serve it
        self.starting: set[int] = set()
        """Instances that requests were placed on and that do not take any yet: the driver holds these requests."""
        self.history = history or History()

    @property
    def active(self) -> Sequence[int]:
        """Ids of the instances that requests may go to, in ascending order."""
        return self._active

    @property
    def lost(self) -> Collection[int]:
        """Ids of the instances that were ejected and are not up again."""
        return self._lost

    def outstanding(self, instance_id: int) -> int:
        """Sequences of requests placed there and not finished."""
        return self._state.outstanding[instance_id]

    def ejected(self, instance_id: int) -> int:
        """Times that it was ejected."""
        return self._state.ejected[instance_id]

    # ------------------------------------------------------------------------------------------------ what happens

    def arrived(
        self, request: Request, now: float, by: Policy | None = None, among: Container[int] | None = None
    ) -> RequestRecord:
        """A request has come: place it. Its record says where it goes (`instance_id`), and is "failed" if no instance
        is left.

        by: a policy that needs counts only and places this one instead, which snapshots and the ledger do not show.
        among: the only instances that may serve it, which may change while it is here; None: all. Requests with equal
            ones take turns.
        """
        record = RequestRecord(request)
        self.history.records.append(record)
        if by is None and among is None:
            self._index[request.id] = self._requests
            self._requests += 1
        else:  # which are counted by themselves: a policy that takes turns takes them among these
            kind = by, among
            self._index[request.id] = self._others.setdefault(kind, 0)
            self._others[kind] += 1
        if by is not None:
            self._by[request.id] = by
        if among is not None:
            self._among[request.id] = among
        if active := self._eligible(request):
            self._place_or_end(record, active, now)
        else:
            self._end(record, "no instance is left")
        return record

    def delivered(self, record: RequestRecord, now: float) -> None:
        """A request has got to its instance, whose next snapshots may show it."""
        record.dispatched = now
        if self._keeps_ledger and not (self._by and record.request.id in self._by):
            self._state.delivered[record.instance_id].add(record.request.id)
        for observer in self._observers:
            observer.delivered(self, record, now)

    def first_token(self, record: RequestRecord, now: float) -> None:
        """The first token of its response is there. A simulation tells it with the last, at its own time."""
        record.first_token = now

    def finished(self, record: RequestRecord, now: float) -> None:
        """Its last token is there."""
        record.finished = now
        record.status = "ok"
        del self._index[record.request.id]
        if self._lost_on:
            self._lost_on.pop(record.request.id, None)
        if self._by:
            self._by.pop(record.request.id, None)
        if self._among:
            self._among.pop(record.request.id, None)
        self._release(record, now)

    def failed(self, record: RequestRecord, reason: str, now: float, *, gone: bool = True) -> bool:
        """The instance did not serve it. Returns whether it was placed on another, and is to begin anew there.

        gone: the instance serves no other request either, and is ejected; False if it only turned this one away.
        """
        record.error = reason
        lost_on = self._lost_on.setdefault(record.request.id, [])
        lost_on.append(record.instance_id)
        if gone:
            self.instance_down(record.instance_id, reason, now)
        self._release(record, now)
        again = record.retries < MAX_RETRIES
        left = [i for i in self._eligible(record.request) if i not in lost_on] if again else []
        if left:
            record.retries += 1
            record.first_token = math.nan
            record.output_tokens = 0
            self._place_or_end(record, left, now)
        else:
            self._end(record, reason)
        return bool(left)

    def has_another(self, record: RequestRecord) -> bool:
        """Whether a request that is placed could begin anew on an instance that has not failed it."""
        tried = {record.instance_id, *self._lost_on.get(record.request.id, ())}
        return record.retries < MAX_RETRIES and any(i not in tried for i in self._eligible(record.request))

    def refused(self, record: RequestRecord, reason: str, now: float) -> None:
        """It cannot be served, or not any more, and that is not the instance's fault."""
        self._release(record, now)
        self._end(record, reason)

    def cancelled(self, record: RequestRecord, now: float) -> None:
        """Nobody waits for it any more. Its record stays as it is."""
        self._release(record, now)
        self._forget(record)

    def add_instance(self) -> int:
        """There is one more instance, with the id that is returned; it takes requests once it is up."""
        self._state.add()
        self._count += 1
        return self._count - 1

    def instance_up(self, instance_id: int, now: float) -> None:
        """An instance takes requests, again or for the first time."""
        self.starting.discard(instance_id)
        if instance_id not in self._active:
            self._active = sorted([*self._active, instance_id])
        if instance_id in self._lost:
            self._lost.remove(instance_id)
            self.history.readmissions.append((now, instance_id))
        for observer in self._observers:
            observer.instance_up(self, instance_id, now)

    def instance_down(self, instance_id: int, reason: str, now: float) -> None:
        """An instance takes no more requests: lost (then it is ejected, if active), not come up, or drained."""
        if instance_id in self._active:
            self.retire(instance_id)
            self._state.ejected[instance_id] += 1
            self._lost.add(instance_id)
            self.history.ejections.append((now, instance_id, reason))
            log.warning("instance %d gets no more requests: %s", instance_id, reason)
        self.starting.discard(instance_id)
        for observer in self._observers:
            observer.instance_down(self, instance_id, reason, now)

    def remove_instance(self, instance_id: int, now: float) -> None:
        """An instance is gone for good, and has no request: what is known of it is forgotten."""
        self.retire(instance_id)
        self.instance_down(instance_id, "it is gone", now)
        self._lost.discard(instance_id)
        if self._policy_forgets is not None:
            self._policy_forgets(instance_id)

    def retire(self, instance_id: int) -> None:
        """Send nothing more to an instance that requests may go to, and that has done nothing wrong."""
        self._active = [i for i in self._active if i != instance_id]

    def migrated(self, record: RequestRecord, source: int, target: int, now: float) -> None:
        """A request has moved between two instances. Its record keeps where it was sent."""
        self._state.release(record.request, source)
        self._state.outstanding[target] += record.request.sequences
        self._moved[record.request.id] = target

    # -------------------------------------------------------------------------------------------------- where it goes

    def _eligible(self, request: Request) -> Sequence[int]:
        """The active instances that may serve a request."""
        among = self._among.get(request.id) if self._among else None
        return self._active if among is None else [i for i in self._active if i in among]

    def _place_or_end(self, record: RequestRecord, active: Sequence[int], now: float) -> None:
        """Place it; if the policy raises, it has failed, and is at no instance."""
        try:
            self._place(record, active, now)
        except BaseException:
            self._end(record, "the policy failed")
            raise

    def _place(self, record: RequestRecord, active: Sequence[int], now: float) -> None:
        """Decide to which of the instances `active` a request goes."""
        request = record.request
        policy = self._by.get(request.id, self._policy) if self._by else self._policy
        candidates = policy.candidates(len(active), self._index[request.id], self._rng)
        if len(active) < self._count:
            candidates = [active[candidate] for candidate in candidates]
        views = self._views(candidates, request, now, policy.needs)
        for observer in self._observers:
            joining = observer.arriving(self, views, now)
            if joining is not None:
                decision, views = self._joined_by(joining, views, request, now)
                break
        else:
            decision = policy.choose(request, views, self._rng)
        chosen = record.instance_id = decision.instance_id
        if views.forecasts is not None and chosen in views.ids:
            forecast = views.forecasts[views.ids.index(chosen)]
            if forecast is not None:
                record.forecast = Forecast(forecast.ttft + self._delay_s, forecast.e2e + self._delay_s)
        self.history.decisions.append((now, decision, request.id))
        if views.snapshots is not None and views.snapshots.hits is not None and chosen in views.ids:
            self._held[request.id] = tuple(views.snapshots.hits.found[views.ids.index(chosen)].tolist())
            if request.sequences > 1:
                self._held[~request.id] = views.snapshots.hits.in_transit[~request.id]
        self._state.place(request, chosen, now, in_ledger=self._keeps_ledger and policy is self._policy)
        for observer in self._observers:
            observer.placed(self, record, views, now)

    def _joined_by(self, joining: int, views: Views, request: Request, now: float) -> tuple[Decision, Views]:
        """The decision for an instance that joins, and what it was decided by."""
        if joining in self._active:
            views = self._views([joining], request, now, self._policy.needs)
            return self._policy.choose(request, views, self._rng), views
        self.starting.add(joining)  # which has nothing to show yet
        return Decision(joining, [joining], [math.nan]), views

    def _views(self, candidates: Sequence[int], request: Request, now: float, needs: Needs) -> Views:
        state = self._state
        snapshots: Snapshots | None = None
        forecasts: Sequence[Forecast] | None = None
        if needs is not Needs.COUNTS:
            snapshots = self._snapshots(candidates, now)
        in_transit = _of(state.in_transit, candidates)
        if snapshots is not None and self._prefixes is not None and request.block_hashes is not None:
            snapshots.hits = self._hits(self._prefixes, candidates, in_transit, request)
        if snapshots is not None and needs is Needs.FORECAST and self._forecaster is not None:
            began = time.perf_counter()
            before = in_transit
            if request.sequences > 1:  # its last one is forecast
                before = [[*others, *request.siblings()] for others in in_transit]
            forecasts = self._forecaster.forecasts(snapshots, before, request, now)
            self.history.forecast_s.append((time.perf_counter() - began) / len(candidates))
        state.forget(now)
        outstanding, recent = _of(state.outstanding, candidates), _of(state.recent, candidates)
        return Views(candidates, in_transit, outstanding, recent, snapshots, forecasts)

    def _hits(
        self,
        prefixes: PrefixIndex,
        candidates: Sequence[int],
        in_transit: Sequence[Sequence[Request]],
        request: Request,
    ) -> Hits:
        """What of a request the candidates have. What is in transit counts as if its prompt were cached, and in use:
        else all requests of a burst that begin alike would scatter.
        """
        found = prefixes.hits(request, candidates)
        size = prefixes.block_size
        most = (request.prompt_tokens - 1) // size
        for place, others in enumerate(in_transit):
            for other in others:
                blocks = shared_blocks(request, other, min(most, other.prompt_tokens // size))
                if blocks * size > found[place, 0]:
                    found[place] = blocks * size, blocks
        if request.sequences > 1:  # all but one find the prompt
            return Hits(found, {**self._held, ~request.id: (most * size, most)})
        return Hits(found, self._held)

    def _snapshots(self, candidates: Sequence[int], now: float) -> Snapshots:
        """The snapshots of instances to decide by; what they show leaves the ledger."""
        interval, state = self._config.snapshot_interval_s, self._state
        assert self._snapshot_many is not None, "a policy that needs snapshots has them"
        if interval == 0:
            seen = Snapshots.of(self._snapshot_many(candidates, now))
            for place, delivered in enumerate(_of(state.delivered, candidates)):
                if delivered:
                    state.show(candidates[place], seen.ids(place))
            return seen
        known = {candidate: state.snapshots[candidate] for candidate in candidates}
        outdated = [i for i, snapshot in known.items() if snapshot is None or now - snapshot.taken_at >= interval]
        for candidate, snapshot in zip(outdated, self._snapshot_many(outdated, now), strict=True):
            kept = snapshot._replace(seqs=snapshot.seqs.copy())  # to outlive this instant
            known[candidate] = state.snapshots[candidate] = kept
            state.show(candidate, snapshot.seqs[ID].tolist())
        return Snapshots.of([snapshot for snapshot in known.values() if snapshot is not None])

    def _release(self, record: RequestRecord, now: float) -> None:
        """A request has left the instance that it was placed on, or has migrated to."""
        chosen = self._moved.pop(record.request.id, record.instance_id) if self._moved else record.instance_id
        self._state.release(record.request, chosen)
        if self._held:
            self._held.pop(record.request.id, None)
            self._held.pop(~record.request.id, None)
        for observer in self._observers:
            observer.left(self, record, now)

    def _end(self, record: RequestRecord, reason: str) -> None:
        record.status, record.error = "failed", record.error or reason
        self._forget(record)

    def _forget(self, record: RequestRecord) -> None:
        del self._index[record.request.id]
        self._lost_on.pop(record.request.id, None)
        self._by.pop(record.request.id, None)
        self._among.pop(record.request.id, None)
