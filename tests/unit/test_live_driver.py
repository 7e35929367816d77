"""The driver on the wall clock: it tells the dispatcher what deliveries come to, and starts and stops servers."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from random import Random
from typing import Any

import pytest
from testbed import request

from block.cluster import live
from block.cluster.instance import InstanceFailed, LaunchFailed, RequestFailed
from block.cluster.live import LiveDriver
from block.core.clock import Clock
from block.core.types import RequestRecord
from block.dispatch.config import DispatchConfig
from block.dispatch.core import Dispatcher
from block.dispatch.policies import RoundRobin


class Servers:
    """Servers that take a moment to start, some of which do not come up."""

    def __init__(self, bad: Sequence[int] = (), takes: float = 0.01) -> None:
        self.bad, self.takes = bad, takes
        self.log: list[tuple[str, int]] = []

    async def start(self, instance_id: int) -> None:
        await asyncio.sleep(self.takes)
        if instance_id in self.bad:
            raise LaunchFailed(f"{instance_id} is bad")
        self.log.append(("start", instance_id))

    async def stop(self, instance_id: int) -> None:
        self.log.append(("stop", instance_id))


def driven(
    main: Callable[[LiveDriver, Dispatcher], Awaitable[Any]], servers: Servers | None = None, instances: int = 2
) -> Dispatcher:
    """What is left of a dispatcher, of which the first instance is active, after `main` and the end of the driver."""

    async def run() -> Dispatcher:
        dispatcher = Dispatcher(instances, RoundRobin(), None, DispatchConfig(), Random(0), initial=1)
        async with LiveDriver(Clock(), servers) as driver:
            await main(driver, dispatcher)
        return dispatcher

    return asyncio.run(run())


def answering(driver: LiveDriver) -> Callable[[RequestRecord], Awaitable[None]]:
    async def deliver(record: RequestRecord) -> None:
        await asyncio.sleep(0.005)
        record.finished = driver.clock.now()

    return deliver


def test_a_request_is_served_and_recorded() -> None:
    async def main(driver: LiveDriver, dispatcher: Dispatcher) -> None:
        record = await driver.submit(dispatcher, request(0, 1, 1), answering(driver))
        assert (record.status, record.instance_id) == ("ok", 0)
        assert 0.0 < record.dispatched < record.finished <= driver.clock.now()

    assert driven(main).outstanding(0) == 0


@pytest.mark.parametrize(
    ("error", "status", "retries", "active"),
    [
        (RequestFailed("too long"), "failed", 0, [0, 1]),
        (InstanceFailed("full", gone=False), "ok", 1, [0, 1]),
        (InstanceFailed("lost"), "ok", 1, [1]),
    ],
)
def test_a_failed_delivery_is_told_as_what_it_is(
    error: Exception, status: str, retries: int, active: list[int]
) -> None:
    async def main(driver: LiveDriver, dispatcher: Dispatcher) -> None:
        dispatcher.instance_up(1, 0.0)

        async def deliver(record: RequestRecord) -> None:
            if record.instance_id == 0:
                raise error
            await answering(driver)(record)

        record = await driver.submit(dispatcher, request(0, 1, 1), deliver)
        assert (record.status, record.retries, record.error) == (status, retries, str(error))
        assert list(dispatcher.active) == active

    dispatcher = driven(main)
    assert [dispatcher.outstanding(i) for i in range(2)] == [0, 0]


def test_another_error_is_not_hidden_and_nothing_is_left_of_its_request() -> None:
    async def broken(record: RequestRecord) -> None:
        raise ZeroDivisionError

    async def main(driver: LiveDriver, dispatcher: Dispatcher) -> None:
        with pytest.raises(ZeroDivisionError):
            await driver.submit(dispatcher, request(0, 1, 1), broken)

    dispatcher = driven(main)
    assert dispatcher.outstanding(0) == 0
    assert dispatcher.history.records[0].status == "pending"


def test_a_client_that_goes_away_leaves_nothing_behind() -> None:
    async def forever(record: RequestRecord) -> None:
        await asyncio.get_running_loop().create_future()

    async def main(driver: LiveDriver, dispatcher: Dispatcher) -> None:
        task = asyncio.create_task(driver.submit(dispatcher, request(0, 1, 1), forever))
        await asyncio.sleep(0.005)
        assert dispatcher.outstanding(0) == 1
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    assert driven(main).outstanding(0) == 0


def test_a_server_is_started_and_takes_requests_when_it_is_there_and_it_is_time() -> None:
    servers = Servers()

    async def main(driver: LiveDriver, dispatcher: Dispatcher) -> None:
        driver.start_instance(1, dispatcher, ready_at=driver.clock.now() + 0.03)
        assert list(dispatcher.active) == [0]
        await asyncio.sleep(0.02)
        assert servers.log == [("start", 1)]
        assert list(dispatcher.active) == [0]
        while list(dispatcher.active) != [0, 1]:
            await asyncio.sleep(0.001)
        assert driver.clock.now() >= 0.03
        driver.stop_instance(1, dispatcher)
        while len(servers.log) < 2:
            await asyncio.sleep(0.001)

    driven(main, servers)
    assert servers.log == [("start", 1), ("stop", 1)]


def test_a_request_waits_for_the_instance_that_starts_for_it() -> None:
    async def main(driver: LiveDriver, dispatcher: Dispatcher) -> None:
        driver.start_instance(1, dispatcher, 0.0)
        record = dispatcher.arrived(request(0, 1, 1), 0.0)
        assert record.instance_id == 0
        await driver._until_up(1, dispatcher)
        assert list(dispatcher.active) == [0, 1]

    driven(main, Servers())


def test_a_server_that_does_not_come_up_is_told_and_costs_nothing_more() -> None:
    async def main(driver: LiveDriver, dispatcher: Dispatcher) -> None:
        driver.start_instance(1, dispatcher, 0.0)
        with pytest.raises(InstanceFailed, match="instance 1 did not start"):
            await driver._until_up(1, dispatcher)
        assert list(dispatcher.active) == [0]

    dispatcher = driven(main, Servers(bad=[1]))
    assert list(dispatcher.history.ejections) == []


def test_what_is_starting_is_cancelled_at_the_end() -> None:
    servers = Servers(takes=1000.0)

    async def main(driver: LiveDriver, dispatcher: Dispatcher) -> None:
        driver.start_instance(1, dispatcher, 0.0)
        await asyncio.sleep(0.002)

    driven(main, servers)
    assert servers.log == []


def test_where_there_is_nothing_to_start_an_instance_is_up_at_once() -> None:
    async def main(driver: LiveDriver, dispatcher: Dispatcher) -> None:
        driver.start_instance(1, dispatcher, 0.0)
        assert list(dispatcher.active) == [0, 1]

    driven(main)


def test_what_stopping_raises_does_not_hide_what_went_wrong_before() -> None:
    class Broken(Servers):
        async def stop(self, instance_id: int) -> None:
            raise OSError("cannot stop it")

    async def main(driver: LiveDriver, dispatcher: Dispatcher) -> None:
        driver.stop_instance(1, dispatcher)
        await asyncio.sleep(0.002)
        raise LookupError("this went wrong")

    with pytest.raises(LookupError, match="this went wrong"):
        driven(main, Broken())


class Watched:
    """Servers that are lost, and back, when the test says so."""

    def __init__(self) -> None:
        self.gone: set[int] = set()
        self.well: set[int] = set()

    async def lost(self, instance_id: int) -> str | None:
        return f"{instance_id} is gone" if instance_id in self.gone else None

    async def back(self, instance_id: int) -> bool:
        return instance_id in self.well


def test_an_instance_that_is_lost_is_ejected_and_readmitted_when_it_is_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "PROBE_S", 0.001)

    async def until(true: Callable[[], bool]) -> None:
        async with asyncio.timeout(10):
            while not true():
                await asyncio.sleep(0.001)

    async def main(driver: LiveDriver, dispatcher: Dispatcher) -> None:
        health = Watched()
        driver.watch(dispatcher, health)
        health.well = {1}  # which was never lost
        health.gone = {0}
        await until(lambda: not dispatcher.active)
        health.gone, health.well = set(), {0, 1}
        await until(lambda: list(dispatcher.active) == [0])

    dispatcher = driven(main)
    assert [(i, why) for _, i, why in dispatcher.history.ejections] == [(0, "0 is gone")]
    assert [i for _, i in dispatcher.history.readmissions] == [0]
