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
from heapq import heappop
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
    factory = _VirtualLoop if virtual else lambda: _WallLoop(dilation)
    with asyncio.Runner(loop_factory=factory) as runner:
        # Tens of thousands of live tasks make each pass of the cycle collector slow, and simulating makes no cycles.
        collecting = virtual and gc.isenabled()
        if collecting:
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


class _VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop that advances its clock to the next timer where a real one would sleep.

    It has no files to watch, so that one turn is the timers that are due and the callbacks that are ready, and no more
    of what `BaseEventLoop._run_once` does in every turn.
    """

    def __init__(self) -> None:
        super().__init__()
        self._virtual_now = 0.0

    def time(self) -> float:
        return self._virtual_now

    def _run_once(self) -> None:
        ready, timers = self._ready, self._scheduled  # type: ignore[attr-defined]
        while timers and (timers[0]._cancelled or (timers[0]._when <= self._virtual_now)):
            self._due(heappop(timers))
        if not ready and not self._stopping:  # type: ignore[attr-defined]
            if not timers:
                raise SimulationStalled("simulation stalled: every task waits and no timer is set")
            if timers[0]._when == math.inf:
                raise SimulationStalled("simulation stalled: every task waits and the only timers are set for eternity")
            self._virtual_now = timers[0]._when
            while timers and timers[0]._when <= self._virtual_now:
                self._due(heappop(timers))
        for _ in range(len(ready)):
            handle = ready.popleft()
            if not handle._cancelled:
                handle._run()

    def _due(self, timer: Any) -> None:
        timer._scheduled = False
        if not timer._cancelled:
            self._ready.append(timer)  # type: ignore[attr-defined]
