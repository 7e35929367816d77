"""The driver on the wall clock: asyncio over real servers, for runs. The gateway is a driver of its own.

arrival → dispatcher.arrived → deliver (HTTP, as long as it takes) → dispatcher.finished, or another attempt
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from types import TracebackType
from typing import Any, Protocol, Self

from block.cluster.instance import FirstToken, InstanceFailed, LaunchFailed, ReplayInstance, RequestFailed
from block.core.clock import Clock
from block.core.types import Request, RequestRecord
from block.dispatch.core import Dispatcher

log = logging.getLogger(__name__)

PROBE_S = 1.0
"""Wall-clock seconds from one look at the servers to the next."""

Deliver = Callable[[RequestRecord], Awaitable[None]]
"""Has the instance `record.instance_id` serve the record's request; raises InstanceFailed or RequestFailed."""


def generating(instances: Sequence[ReplayInstance], first_token: FirstToken) -> Deliver:
    """Has the instance of each record, by its id, generate the response. first_token: as of `Dispatcher`."""

    async def deliver(record: RequestRecord) -> None:
        await instances[record.instance_id].generate(record, first_token)

    return deliver


class ServerProcesses(Protocol):
    """The processes behind a fleet's instances."""

    async def start(self, instance_id: int) -> None:
        """Start the server of an instance that has none. LaunchFailed if it does not come up."""
        ...

    async def stop(self, instance_id: int) -> None:
        """Stop the server of an instance; it has ended when this returns."""
        ...


class Health(Protocol):
    """Whether the servers of a fleet are those that it looks at, and are well."""

    async def lost(self, instance_id: int) -> str | None:
        """Why the server of an instance is no longer the one that it had; None if it is, as far as is known."""
        ...

    async def back(self, instance_id: int) -> bool:
        """Whether the server of an instance that was lost is well again, or another has its place; the instance is then
        that one.
        """
        ...


class LiveDriver:
    """Has requests served, and servers started and stopped; a context, at whose end what is starting is cancelled.

    servers: None if there is nothing to start or stop, as where all servers run already.
    """

    def __init__(self, clock: Clock, servers: ServerProcesses | None = None) -> None:
        self.clock = clock
        self._servers = servers
        self._tasks: list[asyncio.Task[None]] = []
        self._starting: dict[int, asyncio.Task[None]] = {}

    async def submit(self, dispatcher: Dispatcher, request: Request, deliver: Deliver) -> RequestRecord:
        """Place `request`, have it served and return its record, with status "ok" or "failed" and why.

        If an instance fails it, it begins anew on one that has not yet; `record.retries` counts that.
        """
        clock = self.clock
        record = dispatcher.arrived(request, clock.now())
        while record.status == "pending":
            try:
                await self._until_up(record.instance_id, dispatcher)
                dispatcher.delivered(record, clock.now())
                await deliver(record)
            except RequestFailed as error:
                dispatcher.refused(record, str(error), clock.now())
            except InstanceFailed as error:
                dispatcher.failed(record, str(error), clock.now(), gone=error.gone)
            except BaseException:
                dispatcher.cancelled(record, clock.now())
                raise
            else:
                dispatcher.finished(record, record.finished)
        return record

    async def _until_up(self, instance_id: int, dispatcher: Dispatcher) -> None:
        """Wait until an instance that is starting takes requests. InstanceFailed if it does not come up."""
        if (starting := self._starting.get(instance_id)) is not None:
            await asyncio.shield(starting)
            if instance_id not in dispatcher.active:
                raise InstanceFailed(f"instance {instance_id} did not start")

    def watch(self, dispatcher: Dispatcher, health: Health) -> None:
        """From now on, eject instances whose servers are lost, and readmit those whose servers are well again."""
        self._do(self._watch(dispatcher, health))

    async def _watch(self, dispatcher: Dispatcher, health: Health) -> None:
        while True:
            await asyncio.sleep(PROBE_S)
            await asyncio.gather(
                *[self._eject(i, dispatcher, health) for i in dispatcher.active],
                *[self._readmit(i, dispatcher, health) for i in dispatcher.lost],
            )

    async def _eject(self, instance_id: int, dispatcher: Dispatcher, health: Health) -> None:
        reason = await health.lost(instance_id)
        if reason is not None and instance_id in dispatcher.active:
            dispatcher.instance_down(instance_id, reason, self.clock.now())

    async def _readmit(self, instance_id: int, dispatcher: Dispatcher, health: Health) -> None:
        if await health.back(instance_id) and instance_id in dispatcher.lost:
            dispatcher.instance_up(instance_id, self.clock.now())
            log.warning("instance %d gets requests again", instance_id)

    # ---- what a `block.cluster.scaler.Scaler` asks for

    def start_instance(self, instance_id: int, dispatcher: Dispatcher, ready_at: float) -> None:
        """Have an instance come up: once its server runs, and not before `ready_at`."""
        if self._servers is None and ready_at <= self.clock.now():
            dispatcher.instance_up(instance_id, self.clock.now())
        else:
            self._starting[instance_id] = self._do(self._start(instance_id, dispatcher, ready_at))

    async def _start(self, instance_id: int, dispatcher: Dispatcher, ready_at: float) -> None:
        try:
            if self._servers is not None:
                await self._servers.start(instance_id)
            await self.clock.sleep_until(ready_at)
        except (LaunchFailed, InstanceFailed) as error:
            log.warning("instance %d did not start: %s", instance_id, error)
            dispatcher.instance_down(instance_id, str(error), self.clock.now())
        else:
            dispatcher.instance_up(instance_id, self.clock.now())
        finally:
            del self._starting[instance_id]

    def stop_instance(self, instance_id: int, dispatcher: Dispatcher) -> None:
        """Have an instance, at which no request is, stop."""
        self._do(self._stop(instance_id, dispatcher))

    async def _stop(self, instance_id: int, dispatcher: Dispatcher) -> None:
        if self._servers is not None:
            await self._servers.stop(instance_id)
        dispatcher.instance_down(instance_id, "drained", self.clock.now())

    def _do(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.append(task)
        return task

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for task in self._tasks:
            task.cancel()
        for outcome in await asyncio.gather(*self._tasks, return_exceptions=True):
            if isinstance(outcome, Exception) and error is None:
                raise outcome
