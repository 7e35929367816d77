"""Time: one asyncio program, on wall-clock or on virtual time.

All of `block` reads time through `now` and waits through `sleep`. Under ``run(main, virtual=True)`` the event loop
never sleeps: when nothing is left to do at this instant it jumps to the next timer. A program that waits for something
that no timer will bring fails with `SimulationStalled` instead of hanging.
"""

from __future__ import annotations

import asyncio
import gc
import math
import selectors
import time
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class SimulationStalled(RuntimeError):
    """The program waits, and no timer is left that could wake it."""


def now() -> float:
    """Seconds since `run` began."""
    return asyncio.get_running_loop().time()


async def sleep(seconds: float) -> None:
    """Wait for `seconds` of the running loop's time; zero or less yields once."""
    await asyncio.sleep(max(seconds, 0.0))


async def sleep_until(when: float) -> None:
    """Wait until the clock reads `when`; returns at once, without yielding, if it already does."""
    delay = when - now()
    if delay > 0:
        await asyncio.sleep(delay)


def call_at(when: float, callback: Callable[[], object]) -> asyncio.TimerHandle:
    """Call `callback` when the clock reads `when`; the handle cancels it."""
    return asyncio.get_running_loop().call_at(when, callback)


def at(monotonic: float) -> float:
    """What the clock reads when CLOCK_MONOTONIC reads `monotonic`; on wall-clock time only."""
    loop = asyncio.get_running_loop()
    return loop.time() + (monotonic - time.monotonic()) / getattr(loop, "dilation", 1.0)


def restart() -> None:
    """Set the clock to 0. Timers keep what they were set to; on virtual time nothing happens."""
    loop = asyncio.get_running_loop()
    if isinstance(loop, _WallLoop):
        loop.origin = time.monotonic()


def run(main: Coroutine[Any, Any, T], *, virtual: bool, dilation: float = 1.0) -> T:
    """Run `main` to its end and return its result, on virtual time or on the wall clock; both start at 0.

    dilation: seconds of the wall clock in which this clock advances by one.
    """
    if not virtual:
        with asyncio.Runner(loop_factory=lambda: _WallLoop(dilation)) as runner:
            return runner.run(main)
    with asyncio.Runner(loop_factory=_VirtualLoop) as runner:
        # Tens of thousands of live tasks make each pass of the cycle collector slow, and simulating makes no cycles.
        collecting = gc.isenabled()
        gc.disable()
        try:
            return runner.run(main)
        finally:
            if collecting:
                gc.enable()


class _Dilated(selectors.DefaultSelector):
    """A selector that sleeps `dilation` times as long as it is told."""

    dilation = 1.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        return super().select(None if timeout is None else timeout * self.dilation)


class _WallLoop(asyncio.SelectorEventLoop):
    def __init__(self, dilation: float = 1.0) -> None:
        selector = _Dilated()
        selector.dilation = self.dilation = dilation
        super().__init__(selector)
        self.origin = time.monotonic()

    def time(self) -> float:
        return (time.monotonic() - self.origin) / self.dilation


class _Jump(selectors.SelectSelector):
    """A selector that advances the loop's clock where a real one would sleep."""

    loop: _VirtualLoop

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None:
            raise SimulationStalled("simulation stalled: every task waits and no timer is set")
        if timeout > 0:
            self.loop.jump()
        return []


class _VirtualLoop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        selector = _Jump()
        super().__init__(selector)
        selector.loop = self
        self._virtual_now = 0.0
        self._clock_resolution = math.ulp(0.0)

    def time(self) -> float:
        return self._virtual_now

    def jump(self) -> None:
        """Move the clock to the earliest timer."""
        timers: list[asyncio.TimerHandle] = self._scheduled  # type: ignore[attr-defined]
        if timers[0].when() == math.inf:
            raise SimulationStalled("simulation stalled: every task waits and the only timers are set for eternity")
        self._virtual_now = max(self._virtual_now, timers[0].when())
        self._clock_resolution = math.ulp(self._virtual_now)  # the loop fires what is due before now + resolution
