"""Virtual time: exact, ordered, and loud when it has nothing to wait for. The wall clock: real seconds."""

from __future__ import annotations

import asyncio
import gc
import math
import time
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from block import clock


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

    with pytest.raises(clock.SimulationStalled, match="simulation stalled"):
        virtually(main)


def test_it_is_one_too_if_the_only_timer_was_cancelled() -> None:
    async def main() -> None:
        clock.call_at(1.0, lambda: None).cancel()
        await asyncio.get_running_loop().create_future()

    with pytest.raises(clock.SimulationStalled):
        virtually(main)


def test_waiting_for_eternity_is_one_too() -> None:
    async def main() -> None:
        await clock.sleep(math.inf)

    with pytest.raises(clock.SimulationStalled):
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
