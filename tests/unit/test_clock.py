"""Virtual time: exact, ordered, and loud when it has nothing to wait for. The wall clock: real seconds."""

from __future__ import annotations

import asyncio
import gc
import math
import time
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from block.core import clock
from block.core.virtual import SimulationStalled


def virtually(main: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
    """Run `main` in virtual time; not even a stuck test may last ten seconds of real time."""
    began = time.monotonic()
    try:
        return clock.run(main(), virtual=True)
    finally:
        assert time.monotonic() - began < 10


def test_a_year_passes_at_once_and_to_the_second() -> None:
    async def main() -> float:
        assert clock.now() == 0.0
        await clock.sleep(365 * 86400.0)
        return clock.now()

    assert virtually(main) == 31_536_000.0


def test_a_sleeper_wakes_at_exactly_its_time() -> None:
    times = [0.1, 0.1 + 0.2, 1 / 3, 1e-9, 12345.678901234567, 1e6 + 1e-9]

    async def sleeper(when: float) -> float:
        await clock.sleep_until(when)
        return clock.now()

    async def main() -> list[float]:
        return await asyncio.gather(*(sleeper(when) for when in times))

    assert virtually(main) == times


def test_timers_that_differ_by_a_hair_fire_apart_and_in_order() -> None:
    hair = 1e-9
    log: list[tuple[str, float]] = []

    async def main() -> None:
        clock.call_at(5.0 + hair, lambda: log.append(("late", clock.now())))
        clock.call_at(5.0, lambda: log.append(("early", clock.now())))
        await clock.sleep_until(6.0)

    virtually(main)
    assert log == [("early", 5.0), ("late", 5.0 + hair)]


def test_time_never_goes_back() -> None:
    seen: list[float] = []

    async def walker(step: float) -> None:
        for _ in range(200):
            await clock.sleep(step)
            seen.append(clock.now())

    async def main() -> None:
        await asyncio.gather(*(walker(step) for step in (0.1, 0.07, 0.013, 1.0)))

    virtually(main)
    assert seen == sorted(seen)
    assert seen[-1] == pytest.approx(200.0)


def test_nothing_sleeps_shorter_than_asked() -> None:
    async def main() -> list[float]:
        short = []
        for seconds in (0.3, 0.1, 1e-7, 2.5):
            before = clock.now()
            await clock.sleep(seconds)
            short.append(clock.now() - before - seconds)
        return short

    assert virtually(main) == pytest.approx([0.0] * 4, abs=1e-12)


def test_sleeping_until_the_past_does_not_yield_but_sleeping_for_nothing_does() -> None:
    log: list[str] = []

    async def other() -> None:
        log.append("other")

    async def main() -> None:
        await clock.sleep(1.0)
        task = asyncio.create_task(other())
        await clock.sleep_until(0.5)
        log.append("still me")
        await clock.sleep(-3.0)
        log.append("me again")
        await task
        assert clock.now() == 1.0

    virtually(main)
    assert log == ["still me", "other", "me again"]


def test_a_cancelled_timer_does_not_fire() -> None:
    fired: list[int] = []

    async def main() -> float:
        clock.call_at(1.0, lambda: fired.append(1)).cancel()
        clock.call_at(2.0, lambda: fired.append(2))
        await clock.sleep(3.0)
        return clock.now()

    assert virtually(main) == 3.0
    assert fired == [2]


def test_waiting_for_what_nothing_will_bring_is_an_error() -> None:
    async def main() -> None:
        await clock.sleep(5.0)
        await asyncio.get_running_loop().create_future()

    with pytest.raises(SimulationStalled, match="simulation stalled"):
        virtually(main)


def test_it_is_one_too_if_the_only_timer_was_cancelled() -> None:
    async def main() -> None:
        clock.call_at(1.0, lambda: None).cancel()
        await asyncio.get_running_loop().create_future()

    with pytest.raises(SimulationStalled):
        virtually(main)


def test_waiting_for_eternity_is_one_too() -> None:
    async def main() -> None:
        await clock.sleep(math.inf)

    with pytest.raises(SimulationStalled):
        virtually(main)


def test_results_and_errors_come_through() -> None:
    async def fails() -> None:
        await clock.sleep(1.0)
        raise LookupError("no")

    async def returns() -> str:
        await clock.sleep(1.0)
        return "yes"

    assert virtually(returns) == "yes"
    with pytest.raises(LookupError, match="no"):
        virtually(fails)


def test_the_cycle_collector_is_as_before_afterwards() -> None:
    async def main() -> None:
        await clock.sleep(1.0)

    async def fails() -> None:
        raise LookupError

    assert gc.isenabled()
    virtually(main)
    assert gc.isenabled()
    with pytest.raises(LookupError):
        virtually(fails)
    assert gc.isenabled()


def test_the_wall_clock_starts_at_zero_and_takes_its_time() -> None:
    async def main() -> tuple[float, float, list[float]]:
        fired: list[float] = []
        began = clock.now()
        clock.call_at(began + 0.02, lambda: fired.append(clock.now()))
        await clock.sleep(0.05)
        return began, clock.now(), fired

    real = time.monotonic()
    began, ended, fired = clock.run(main(), virtual=False)
    assert 0.0 <= began < 1.0
    assert 0.04 < ended - began <= time.monotonic() - real
    assert began + 0.019 < fired[0] < ended


# ------------------------------------------------------------------------------------------------------------- together


@pytest.mark.parametrize("virtual", [True, False])
def test_together_waits_for_all_that_was_started_and_what_that_started(virtual: bool) -> None:
    log: list[str] = []

    async def leaf(name: str) -> None:
        await clock.sleep(0.002)
        log.append(name)

    async def first(start: clock.Start) -> None:
        async def branch() -> None:
            await clock.sleep(0.001)
            start(leaf("leaf"))
            log.append("branch")

        start(branch())
        log.append("first")

    async def main() -> None:
        await clock.together(first)
        log.append("all")

    clock.run(main(), virtual=virtual)
    assert log == ["first", "branch", "leaf", "all"]


@pytest.mark.parametrize("virtual", [True, False])
def test_if_one_fails_the_others_end_where_they_are_and_its_error_is_raised(virtual: bool) -> None:
    log: list[str] = []

    async def fails() -> None:
        await clock.sleep(0.001)
        raise KeyError("one")

    async def waits() -> None:
        try:
            await clock.sleep(30.0)
            log.append("too far")
        finally:
            log.append("ended")

    async def first(start: clock.Start) -> None:
        start(waits())
        start(fails())
        try:
            await clock.sleep(30.0)
        finally:
            log.append("first ended")

    async def main() -> None:
        with pytest.raises(KeyError, match="one"):
            await clock.together(first)
        log.append("caught")
        await clock.sleep(0.001)  # what was set for those that have ended troubles nobody

    clock.run(main(), virtual=virtual)
    assert sorted(log[:2]) == ["ended", "first ended"]
    assert log[2:] == ["caught"]


@pytest.mark.parametrize("virtual", [True, False])
def test_who_waits_for_together_can_be_cancelled_and_all_end(virtual: bool) -> None:
    ended: list[int] = []

    async def waits(number: int) -> None:
        try:
            await clock.future()
        finally:
            ended.append(number)

    async def first(start: clock.Start) -> None:
        for number in range(3):
            start(waits(number))

    async def main() -> None:
        task = asyncio.ensure_future(clock.together(first))
        await clock.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    clock.run(main(), virtual=virtual)
    assert sorted(ended) == [0, 1, 2]


def test_a_strand_waits_for_signals_futures_and_tasks_and_yields_when_it_sleeps_for_nothing() -> None:
    log: list[tuple[str, float]] = []

    def note(what: str) -> None:
        log.append((what, clock.now()))

    async def slow() -> None:
        await clock.sleep(1.0)

    async def strand() -> None:
        mine = clock.future()
        clock.call_at(1.0, lambda: mine.set_result(None))
        await mine
        note("signal")
        already = clock.future()
        already.set_result(None)
        await already
        note("signal that was there")
        theirs = asyncio.get_running_loop().create_future()
        clock.call_at(2.0, lambda: theirs.set_result(None))
        await theirs
        note("future")
        await asyncio.create_task(slow())
        note("task")
        await clock.sleep(0)
        note("nothing")
        await clock.sleep_until(4.0)
        note("sleep")

    async def main() -> None:
        await clock.together(lambda start: strand())

    virtually(main)
    expected = ["signal", "signal that was there", "future", "task", "nothing", "sleep"]
    assert log == list(zip(expected, [1.0, 1.0, 2.0, 3.0, 3.0, 4.0], strict=True))


def test_strands_that_wake_at_the_same_time_go_on_in_the_order_in_which_they_went_to_sleep() -> None:
    log: list[int] = []

    async def sleeper(number: int, began: float) -> None:
        await clock.sleep_until(began)
        await clock.sleep_until(5.0)
        log.append(number)

    async def first(start: clock.Start) -> None:
        for number, began in enumerate((3.0, 1.0, 2.0)):
            start(sleeper(number, began))

    async def main() -> None:
        await clock.together(first)

    virtually(main)
    assert log == [1, 2, 0]


def test_strands_that_wait_for_what_nothing_will_bring_are_an_error_and_are_ended() -> None:
    ended: list[bool] = []

    async def strand() -> None:
        try:
            await clock.future()
        finally:
            ended.append(True)

    async def main() -> None:
        await clock.together(lambda start: strand())

    with pytest.raises(SimulationStalled):
        virtually(main)
    assert ended == [True]
