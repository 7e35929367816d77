"""Scaler: starts and stops a fleet's instances as a provisioner decides, while the dispatcher serves.

spare → (start) → starting → (join) → active → (drain) → draining → (stop) → spare

An instance costs from the decision to start it until it is stopped. One that is draining serves what it has; if another
is called for meanwhile, it joins again at once.
"""

from __future__ import annotations

import asyncio
import logging
import math
from bisect import insort
from collections.abc import Coroutine, Sequence
from types import TracebackType
from typing import Any, NamedTuple, Self

from block.cluster.fleet import Fleet
from block.cluster.provisioner import Elastic
from block.core import clock
from block.core.types import InstanceView, RequestRecord
from block.dispatch.core import Dispatcher
from block.dispatch.instance import InstanceFailed, LaunchFailed

log = logging.getLogger(__name__)


class Change(NamedTuple):
    """Something that happened to an instance: start, join, drain, stop, or fail (to start)."""

    time: float
    instance_id: int
    change: str
    reason: str


class Scaler:
    """A context in which `dispatcher`, which begins with the first `initial` instances, has more or fewer of `fleet`.

    changes: what happened, in order. Leaving the context cancels what is starting; what runs is the fleet's to stop.
    instance_seconds: what all instances have cost, once the context is left.
    """

    def __init__(self, provisioner: Elastic, fleet: Fleet, dispatcher: Dispatcher) -> None:
        self._provisioner = provisioner
        self._servers = fleet.servers
        self._dispatcher = dispatcher
        self._spare = list(range(provisioner.initial, len(fleet.instances)))
        self._starting: dict[int, asyncio.Task[None]] = {}
        self._draining: set[int] = set()
        self._tasks: list[asyncio.Task[None]] = []
        self._since = dict.fromkeys(range(provisioner.initial), 0.0)  # when each instance that costs began to
        self._spent = 0.0  # instance-seconds of those that cost no more
        self._grew = -math.inf  # when it was last decided to grow
        self._busy = 0.0  # when a request last had reason to need all instances
        self.changes: list[Change] = []
        self.instance_seconds = math.nan

    async def __aenter__(self) -> Self:
        self._dispatcher.watcher = self
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.instance_seconds = self._spent + sum(clock.now() - since for since in self._since.values())
        for task in self._tasks:
            task.cancel()
        for outcome in await asyncio.gather(*self._tasks, return_exceptions=True):
            if isinstance(outcome, Exception) and error is None:
                raise outcome

    # ------------------------------------------------------------------------------------- what the dispatcher tells

    def arrived(self, views: Sequence[InstanceView]) -> int | None:
        """A request has come; the id of the instance that joins for it and that it is to go to, if there is one.

        It goes there unless a running instance would give its first token before the new one is there.
        """
        reason = self._provisioner.foreseen(views)
        if reason is None:
            return None
        self._busy = clock.now()
        grown = self._grow(reason)
        if grown in self._starting:
            soonest = min(view.forecast.ttft for view in views if view.forecast is not None)
            return grown if self._provisioner.startup_s <= soonest else None
        return grown

    def placed(self, views: Sequence[InstanceView]) -> None:
        """A request has been placed, and these were the views."""
        patience = self._provisioner.drain_after_s
        now = clock.now()
        if patience is None or not self._provisioner.idle(views):
            self._busy = now
        elif now - self._busy >= patience and len(self._dispatcher.active) > self._provisioner.initial:
            self._drain(f"first tokens within {self._provisioner.drain_ttft_s:g} s everywhere for {patience:g} s")
            self._busy = now

    async def ready(self, instance_id: int) -> None:
        """Wait until an instance that is starting has joined. InstanceFailed if it does not come up."""
        task = self._starting.get(instance_id)
        if task is None:
            return
        await asyncio.shield(task)
        if instance_id not in self._dispatcher.active:
            raise InstanceFailed(f"instance {instance_id} did not start")

    def finished(self, record: RequestRecord) -> None:
        """A request has left its instance, served or not."""
        if record.status == "ok":
            reason = self._provisioner.measured(record.finished - record.request.arrival)
            if reason is not None:
                self._grow(reason)
        self._stop_if_drained(record.instance_id)

    # --------------------------------------------------------------------------------------------------- what it does

    def _note(self, instance_id: int, change: str, reason: str) -> None:
        self.changes.append(Change(clock.now(), instance_id, change, reason))
        log.info("instance %d: %s: %s", instance_id, change, reason)

    def _grow(self, reason: str) -> int | None:
        """Have another instance join, now or in time; its id, or None if there is none, or it is too soon."""
        now = clock.now()
        if now - self._grew < self._provisioner.cooldown_s or not (self._draining or self._spare):
            return None
        self._grew = now
        if self._draining:
            chosen = max(self._draining, key=self._dispatcher.outstanding)
            self._draining.remove(chosen)
            self._join(chosen, reason)
            return chosen
        chosen = self._spare.pop(0)
        self._since[chosen] = now
        self._note(chosen, "start", reason)
        if self._servers is None and self._provisioner.startup_s == 0:
            self._join(chosen, reason)
        else:
            self._starting[chosen] = self._do(self._start(chosen, reason))
        return chosen

    def _do(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.append(task)
        return task

    async def _start(self, instance_id: int, reason: str) -> None:
        ready_at = clock.now() + self._provisioner.startup_s
        try:
            if self._servers is not None:
                await self._servers.start(instance_id)
            await clock.sleep_until(ready_at)
        except (LaunchFailed, InstanceFailed) as error:
            log.warning("instance %d did not start: %s", instance_id, error)
            self._note(instance_id, "fail", str(error))
            self._no_longer_costs(instance_id)
        else:
            self._join(instance_id, reason)
        finally:
            del self._starting[instance_id]

    def _join(self, instance_id: int, reason: str) -> None:
        self._note(instance_id, "join", reason)
        self._dispatcher.readmit(instance_id)

    def _drain(self, reason: str) -> None:
        """Have the instance with the fewest requests leave once it has served them."""
        active = self._dispatcher.active
        chosen = min(reversed(active), key=self._dispatcher.outstanding)
        self._note(chosen, "drain", reason)
        self._dispatcher.retire(chosen)
        self._draining.add(chosen)
        self._stop_if_drained(chosen)

    def _stop_if_drained(self, instance_id: int) -> None:
        if instance_id in self._draining and self._dispatcher.outstanding(instance_id) == 0:
            self._draining.remove(instance_id)
            self._do(self._stop(instance_id))

    async def _stop(self, instance_id: int) -> None:
        if self._servers is not None:
            await self._servers.stop(instance_id)
        self._note(instance_id, "stop", "drained")
        self._no_longer_costs(instance_id)
        insort(self._spare, instance_id)

    def _no_longer_costs(self, instance_id: int) -> None:
        self._spent += clock.now() - self._since.pop(instance_id)
