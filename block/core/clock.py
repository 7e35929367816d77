"""Time: one asyncio program, on wall-clock or on virtual time.

All of `block` reads time through `now` and waits through `sleep`. Under ``run(main, virtual=True)`` the event loop
never sleeps: when nothing is left to do at this instant it jumps to the next timer. A program that waits for something
that no timer will bring fails with `block.core.virtual.SimulationStalled` instead of hanging.
"""

from __future__ import annotations

import asyncio
import gc
import selectors
import time
from collections.abc import Awaitable, Callable, Coroutine, Generator
from contextvars import ContextVar, copy_context
from typing import Any, Protocol, TypeVar

from block.core.virtual import Signal, Strands, VirtualLoop, until

T = TypeVar("T")

Start = Callable[[Coroutine[Any, Any, None]], object]
"""Has a coroutine run beside the others."""


class Future(Protocol):
    """What somebody waits for, once."""

    def set_result(self, result: None, /) -> None:
        """It is there."""
        ...

    def __await__(self) -> Generator[Any, None, None]:
        """Wait until it is there."""
        ...


# The loop of `run`. A context variable, because asyncio asks the kernel who it is whenever it is asked for its loop.
_running: ContextVar[asyncio.AbstractEventLoop] = ContextVar("running")


def _loop() -> asyncio.AbstractEventLoop:
    return _running.get(None) or asyncio.get_running_loop()


def now() -> float:
    """Seconds since `run` began."""
    return (_running.get(None) or asyncio.get_running_loop()).time()


def sleep(seconds: float) -> Awaitable[None]:
    """Wait for `seconds` of the running loop's time; zero or less yields once."""
    if seconds <= 0:
        return asyncio.sleep(0)
    loop = _loop()
    if isinstance(loop, VirtualLoop) and loop.in_strand:
        return until(loop.time() + seconds)
    return _sleep(seconds, loop)


async def _sleep(seconds: float, loop: asyncio.AbstractEventLoop) -> None:
    woken = loop.create_future()
    timer = loop.call_later(seconds, _wake, woken)
    try:
        await woken
    finally:
        timer.cancel()


def _wake(sleeper: asyncio.Future[None]) -> None:
    if not sleeper.done():
        sleeper.set_result(None)


async def sleep_until(when: float) -> None:
    """Wait until the clock reads `when`; returns at once, without yielding, if it already does."""
    delay = when - now()
    if delay > 0:
        await sleep(delay)


def call_at(when: float, callback: Callable[[], object]) -> asyncio.TimerHandle:
    """Call `callback` when the clock reads `when`; the handle cancels it."""
    return _loop().call_at(when, callback)


def future() -> Future:
    """Something that the one who asks for it can wait for."""
    loop = _loop()
    return Signal(loop) if isinstance(loop, VirtualLoop) and loop.in_strand else loop.create_future()


def at(monotonic: float) -> float:
    """What the clock reads when CLOCK_MONOTONIC reads `monotonic`; on wall-clock time only."""
    loop = _loop()
    return loop.time() + (monotonic - time.monotonic()) / getattr(loop, "dilation", 1.0)


def restart() -> None:
    """Set the clock to 0. Timers keep what they were set to; on virtual time nothing happens."""
    loop = _loop()
    if isinstance(loop, _WallLoop):
        loop.origin = time.monotonic()


async def together(first: Callable[[Start], Coroutine[Any, Any, None]]) -> None:
    """Run `first(start)`, and beside it what it starts and what that starts; returns when all have ended.

    If one fails, the others are ended where they are, and what it raised is raised. On virtual time they are strands
    (`block.core.virtual`): as tasks they would be a third of what a run costs.
    """
    loop = _loop()
    if isinstance(loop, VirtualLoop):
        strands = Strands(loop)
        try:
            strands.start(first(strands.start))
            await strands.ended
        finally:
            strands.close()
        return
    try:
        async with asyncio.TaskGroup() as group:
            group.create_task(first(group.create_task))
    except BaseExceptionGroup as failed:  # the first to fail says what is wrong; it ended the others
        raise failed.exceptions[0] from None


def run(main: Coroutine[Any, Any, T], *, virtual: bool, dilation: float = 1.0) -> T:
    """Run `main` to its end and return its result, on virtual time or on the wall clock; both start at 0.

    dilation: seconds of the wall clock in which this clock advances by one.
    """
    return copy_context().run(_run, main, VirtualLoop if virtual else lambda: _WallLoop(dilation), virtual)


def _run(main: Coroutine[Any, Any, T], factory: Callable[[], asyncio.AbstractEventLoop], virtual: bool) -> T:
    with asyncio.Runner(loop_factory=factory) as runner:
        # Tens of thousands of live tasks make each pass of the cycle collector slow, and simulating makes no cycles.
        collecting = virtual and gc.isenabled()
        if collecting:
            gc.disable()
        _running.set(runner.get_loop())
        try:
            return runner.run(main, context=copy_context())
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
