"""The clock of real runs: real seconds, from zero on, as many times slower as it is told."""

from __future__ import annotations

import asyncio
import time

import pytest

from block.core.clock import Clock


def test_a_clock_starts_at_zero_and_shows_seconds() -> None:
    clock = Clock()
    assert 0.0 <= clock.now() < 1.0
    before = clock.now()
    time.sleep(0.01)
    assert clock.now() - before >= 0.01


def test_a_restarted_clock_shows_zero_again() -> None:
    clock = Clock()
    time.sleep(0.01)
    later = clock.now()
    clock.restart()
    assert clock.now() < later


def test_a_dilated_clock_advances_by_one_in_so_many_seconds() -> None:
    clock = Clock(dilation=10.0)
    origin = time.monotonic() - 10.0 * clock.now()
    assert clock.at(origin + 50.0) == pytest.approx(5.0, abs=0.01)
    began = time.monotonic()
    asyncio.run(clock.sleep(0.002))
    assert time.monotonic() - began >= 0.02


def test_a_sleeper_wakes_when_the_clock_reads_its_time_and_not_before() -> None:
    clock = Clock(dilation=0.5)

    async def main() -> float:
        await clock.sleep_until(0.02)
        return clock.now()

    assert asyncio.run(main()) >= 0.02


def test_sleeping_until_the_past_lets_nobody_run_but_sleeping_for_nothing_does() -> None:
    log: list[str] = []

    async def other() -> None:
        log.append("other")

    async def main() -> None:
        clock = Clock()
        task = asyncio.create_task(other())
        await clock.sleep_until(-1.0)
        log.append("still me")
        await clock.sleep(0.0)
        log.append("me again")
        await task

    asyncio.run(main())
    assert log == ["still me", "other", "me again"]
