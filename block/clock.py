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
import types
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Generator
from contextvars import Context, ContextVar, copy_context
from heapq import heappop, heappush
from itertools import count
from typing import Any, Protocol, TypeVar

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


class SimulationStalled(RuntimeError):
    """The program waits, and no timer is left that could wake it."""


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
    if isinstance(loop, _VirtualLoop) and loop.in_strand:
        return _until(loop.time() + seconds)
    return _sleep(seconds, loop)


@types.coroutine
def _until(when: float) -> Generator[float, None, None]:
    """What a strand waits for that sleeps."""
    yield when


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
    return _Signal(loop) if isinstance(loop, _VirtualLoop) and loop.in_strand else loop.create_future()


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

    If one fails, the others are ended where they are, and what it raised is raised. They are no tasks: on virtual time,
    where asyncio's are most of the cost of a run, they are strands.
    """
    loop = _loop()
    if isinstance(loop, _VirtualLoop):
        strands = _Strands(loop)
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
    return copy_context().run(_run, main, _VirtualLoop if virtual else lambda: _WallLoop(dilation), virtual)


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


class _Call(list[Any]):
    """When, number, callback, arguments, context: a list, because lists are compared and made in C."""

    __slots__ = ()

    def cancel(self) -> None:
        self[2] = None

    def cancelled(self) -> bool:
        return self[2] is None

    def when(self) -> float:
        return self[0]  # type: ignore[no-any-return]


class _VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop that advances its clock to the next timer where a real one would sleep.

    It has no files to watch and is never asked from another thread, so that its calls need none of what asyncio's
    handles carry. Those that name no context share the loop's. Timers set for the same moment go off in the order in
    which they were set.
    """

    def __init__(self) -> None:
        super().__init__()
        self._virtual_now = 0.0
        self._calls: deque[list[Any]] = deque()  # laid out as a `_Call`
        self._timers: list[list[Any]] = []
        self._numbers = count()
        self.in_strand = False  # is it a strand that runs now?

    def time(self) -> float:
        return self._virtual_now

    def call_soon(self, callback: Any, *args: Any, context: Context | None = None) -> _Call:  # type: ignore[override]
        call = _Call((0.0, 0, callback, args, context))
        self._calls.append(call)
        return call

    call_soon_threadsafe = call_soon  # type: ignore[assignment]

    def call_at(  # type: ignore[override]
        self, when: float, callback: Any, *args: Any, context: Context | None = None
    ) -> _Call:
        call = _Call((when, next(self._numbers), callback, args, context))
        heappush(self._timers, call)
        return call

    def call_later(  # type: ignore[override]
        self, delay: float, callback: Any, *args: Any, context: Context | None = None
    ) -> _Call:
        return self.call_at(self._virtual_now + delay, callback, *args, context=context)

    def step_soon(self, strand: _Strand) -> None:
        """`call_soon` for a strand, which never cancels it."""
        self._calls.append([0.0, 0, strand.step, (), None])

    def step_at(self, when: float, strand: _Strand) -> None:
        """`call_at` for a strand."""
        heappush(self._timers, [when, next(self._numbers), strand.step, (), None])

    def _run_once(self) -> None:
        """Turn after turn until the loop is stopped: the timers that are due, then the calls that were waiting."""
        calls, timers = self._calls, self._timers
        while True:
            if not calls and not self._stopping:  # type: ignore[attr-defined]
                self._virtual_now = self._next_timer()
            while timers and timers[0][0] <= self._virtual_now:
                calls.append(heappop(timers))
            for _ in range(len(calls)):
                _, _, callback, args, context = calls.popleft()
                if callback is None:
                    continue
                try:
                    if context is None:
                        callback(*args)
                    else:
                        context.run(callback, *args)
                except (SystemExit, KeyboardInterrupt):
                    raise
                except BaseException as error:
                    told = {"message": f"Exception in callback {callback}", "exception": error}
                    self.call_exception_handler(told)
            if self._stopping:  # type: ignore[attr-defined]
                return

    def _next_timer(self) -> float:
        """When the next timer goes off that was not cancelled."""
        timers = self._timers
        while timers and timers[0][2] is None:
            heappop(timers)
        if not timers:
            raise SimulationStalled("simulation stalled: every task waits and no timer is set")
        when: float = timers[0][0]
        if when == math.inf:
            raise SimulationStalled("simulation stalled: every task waits and the only timers are set for eternity")
        return when if when > self._virtual_now else self._virtual_now


class _Strands:
    """Coroutines that run beside each other on virtual time; `ended` is done when all have ended, or one has failed."""

    def __init__(self, loop: _VirtualLoop) -> None:
        self.loop = loop
        self.ended: asyncio.Future[None] = loop.create_future()
        self.alive: set[_Strand] = set()

    def start(self, coroutine: Coroutine[Any, Any, None]) -> None:
        """Have a coroutine begin once the one that runs now waits."""
        strand = _Strand(self, coroutine)
        self.alive.add(strand)
        self.loop.step_soon(strand)

    def end(self, strand: _Strand, error: BaseException | None = None) -> None:
        """A strand has ended, or failed."""
        self.alive.discard(strand)
        if (error is None and self.alive) or self.ended.done():
            return
        if error is None:
            self.ended.set_result(None)
        else:
            self.ended.set_exception(error)

    def close(self) -> None:
        """End those that are left where they are."""
        while self.alive:
            self.alive.pop().close()


class _Strand:
    """A coroutine that costs less than a task: it has no context, nobody can wait for it, and to sleep is a timer.

    It may await what this module has, and asyncio's futures.
    """

    __slots__ = ("_coroutine", "_loop", "_strands")

    def __init__(self, strands: _Strands, coroutine: Coroutine[Any, Any, None]) -> None:
        self._strands = strands
        self._loop = strands.loop
        self._coroutine: Coroutine[Any, Any, None] | None = coroutine

    def step(self, _: object = None) -> None:
        """Go on until it waits for something."""
        loop, coroutine = self._loop, self._coroutine
        if coroutine is None:
            return
        loop.in_strand = True
        try:
            awaited = coroutine.send(None)
        except StopIteration:
            self._strands.end(self)
        except (SystemExit, KeyboardInterrupt):
            raise
        except BaseException as error:
            self._strands.end(self, error)
        else:
            if type(awaited) is float:
                loop.step_at(awaited, self)
            elif type(awaited) is _Signal:
                awaited.strand = self
            elif awaited is None:  # as of asyncio.sleep(0)
                loop.step_soon(self)
            else:
                awaited._asyncio_future_blocking = False
                awaited.add_done_callback(self.step)
        finally:
            loop.in_strand = False

    def close(self) -> None:
        """End it where it is."""
        coroutine, self._coroutine = self._coroutine, None
        if coroutine is not None:
            coroutine.close()


class _Signal:
    """A future of one strand."""

    __slots__ = ("_loop", "_there", "strand")

    def __init__(self, loop: _VirtualLoop) -> None:
        self._loop = loop
        self._there = False
        self.strand: _Strand | None = None

    def set_result(self, result: None) -> None:
        self._there = True
        if self.strand is not None:
            self._loop.step_soon(self.strand)

    def __await__(self) -> Generator[_Signal, None, None]:
        if not self._there:
            yield self
