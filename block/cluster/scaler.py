"""Scaler: has instances started and stopped as a provisioner decides, while the dispatcher serves.

spare → (start) → starting → (join) → active → (drain) → draining → (stop) → spare

An instance costs from the decision to start it until it is stopped. One that is draining serves what it has; if another
is called for meanwhile, it joins again at once.
"""

from __future__ import annotations

import logging
import math
from bisect import insort
from typing import NamedTuple, Protocol

from block.cluster.provisioner import Elastic
from block.core.types import RequestRecord, Views
from block.dispatch.core import Dispatcher, Observer

log = logging.getLogger(__name__)


class Driver(Protocol):
    """Starts and stops instances: `block.cluster.simulation.Simulation` or `block.cluster.live.LiveDriver`."""

    def start_instance(self, instance_id: int, dispatcher: Dispatcher, ready_at: float) -> None:
        """Have an instance come up, not before `ready_at`; the dispatcher is told when it is up, or did not come up."""
        ...

    def stop_instance(self, instance_id: int, dispatcher: Dispatcher) -> None:
        """Have an instance, at which no request is, stop; the dispatcher is told when it is down."""
        ...


class Change(NamedTuple):
    """Something that happened to an instance: start, join, drain, stop, or fail (to start)."""

    time: float
    instance_id: int
    change: str
    reason: str


class Scaler(Observer):
    """Has a dispatcher, which begins with the first `initial` of `instances` instances, use more or fewer of them.

    changes: what happened, in order.
    """

    def __init__(self, provisioner: Elastic, instances: int, driver: Driver) -> None:
        self._provisioner = provisioner
        self._driver = driver
        self._spare = list(range(provisioner.initial, instances))
        self._starting: dict[int, str] = {}  # and why
        self._draining: set[int] = set()
        self._stopping: set[int] = set()
        self._since = dict.fromkeys(range(provisioner.initial), 0.0)  # when each instance that costs began to
        self._spent = 0.0  # instance-seconds of those that cost no more
        self._grew = -math.inf  # when it was last decided to grow
        self._busy = 0.0  # when a request last had reason to need all instances
        self.changes: list[Change] = []

    def instance_seconds(self, now: float) -> float:
        """What all instances have cost so far."""
        return self._spent + sum(now - since for since in self._since.values())

    def arriving(self, dispatcher: Dispatcher, views: Views, now: float) -> int | None:
        """The instance that joins for a request, if one does.

        It goes there unless a running instance would give its first token before the new one is there.
        """
        reason = self._provisioner.foreseen(views)
        if reason is None:
            return None
        self._busy = now
        grown = self._grow(reason, dispatcher, now)
        if grown in self._starting:
            soonest = min(view.forecast.ttft for view in views if view.forecast is not None)
            return grown if self._provisioner.startup_s <= soonest else None
        return grown

    def placed(self, dispatcher: Dispatcher, record: RequestRecord, views: Views, now: float) -> None:
        """Drain an instance if all have long been idle."""
        patience = self._provisioner.drain_after_s
        if patience is None or not self._provisioner.idle(views):
            self._busy = now
        elif now - self._busy >= patience and len(dispatcher.active) > self._provisioner.initial:
            reason = f"first tokens within {self._provisioner.drain_ttft_s:g} s everywhere for {patience:g} s"
            self._drain(reason, dispatcher, now)
            self._busy = now

    def left(self, dispatcher: Dispatcher, record: RequestRecord, now: float) -> None:
        """Grow if a request took too long; stop an instance that has served what it had."""
        if record.status == "ok":
            reason = self._provisioner.measured(record.finished - record.request.arrival)
            if reason is not None:
                self._grow(reason, dispatcher, now)
        self._stop_if_drained(record.instance_id, dispatcher)

    def instance_up(self, dispatcher: Dispatcher, instance_id: int, now: float) -> None:
        """An instance that was starting has joined."""
        if (reason := self._starting.pop(instance_id, None)) is not None:
            self._note(instance_id, "join", reason, now)

    def instance_down(self, dispatcher: Dispatcher, instance_id: int, reason: str, now: float) -> None:
        """An instance that was starting did not come up, or one that was drained has stopped."""
        if self._starting.pop(instance_id, None) is not None:
            self._note(instance_id, "fail", reason, now)
            self._no_longer_costs(instance_id, now)
        elif instance_id in self._stopping:
            self._stopping.remove(instance_id)
            self._note(instance_id, "stop", reason, now)
            self._no_longer_costs(instance_id, now)
            insort(self._spare, instance_id)

    def _note(self, instance_id: int, change: str, reason: str, now: float) -> None:
        self.changes.append(Change(now, instance_id, change, reason))
        log.info("instance %d: %s: %s", instance_id, change, reason)

    def _grow(self, reason: str, dispatcher: Dispatcher, now: float) -> int | None:
        """Have another instance join, now or in time; its id, or None if there is none, or it is too soon."""
        if now - self._grew < self._provisioner.cooldown_s or not (self._draining or self._spare):
            return None
        self._grew = now
        if self._draining:
            chosen = max(self._draining, key=dispatcher.outstanding)
            self._draining.remove(chosen)
            self._starting[chosen] = reason
            dispatcher.instance_up(chosen, now)
            return chosen
        chosen = self._spare.pop(0)
        self._since[chosen] = now
        self._note(chosen, "start", reason, now)
        self._starting[chosen] = reason
        self._driver.start_instance(chosen, dispatcher, now + self._provisioner.startup_s)
        return chosen

    def _drain(self, reason: str, dispatcher: Dispatcher, now: float) -> None:
        """Have the instance with the fewest requests leave once it has served them."""
        chosen = min(reversed(dispatcher.active), key=dispatcher.outstanding)
        self._note(chosen, "drain", reason, now)
        dispatcher.retire(chosen)
        self._draining.add(chosen)
        self._stop_if_drained(chosen, dispatcher)

    def _stop_if_drained(self, instance_id: int, dispatcher: Dispatcher) -> None:
        if instance_id in self._draining and dispatcher.outstanding(instance_id) == 0:
            self._draining.remove(instance_id)
            self._stopping.add(instance_id)
            self._driver.stop_instance(instance_id, dispatcher)

    def _no_longer_costs(self, instance_id: int, now: float) -> None:
        self._spent += now - self._since.pop(instance_id)
