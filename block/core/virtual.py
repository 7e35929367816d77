"""Virtual time: an event loop that jumps to the next timer where a real one would sleep.

Beside asyncio's tasks it runs *strands*: coroutines that it steps itself, at a fraction of the cost.
"""

from __future__ import annotations

import asyncio
import math
import types
from collections import deque
from collections.abc import Coroutine, Generator
from contextvars import Context
from heapq import heappop, heappush
from itertools import count
from typing import Any


class SimulationStalled(RuntimeError):
    """The program waits, and no timer is left that could wake it."""


class _Call(list[Any]):
    """When, number, callback, arguments, context: a list, because lists are compared and made in C."""

    __slots__ = ()

    def cancel(self) -> None:
        self[2] = None

    def cancelled(self) -> bool:
        return self[2] is None

    def when(self) -> float:
        return self[0]  # type: ignore[no-any-return]


class VirtualLoop(asyncio.SelectorEventLoop):
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
        """Seconds since it began."""
        return self._virtual_now

    def call_soon(self, callback: Any, *args: Any, context: Context | None = None) -> _Call:  # type: ignore[override]
        """As of asyncio."""
        call = _Call((0.0, 0, callback, args, context))
        self._calls.append(call)
        return call

    call_soon_threadsafe = call_soon  # type: ignore[assignment]

    def call_at(  # type: ignore[override]
        self, when: float, callback: Any, *args: Any, context: Context | None = None
    ) -> _Call:
        """As of asyncio."""
        call = _Call((when, next(self._numbers), callback, args, context))
        heappush(self._timers, call)
        return call

    def call_later(  # type: ignore[override]
        self, delay: float, callback: Any, *args: Any, context: Context | None = None
    ) -> _Call:
        """As of asyncio."""
        return self.call_at(self._virtual_now + delay, callback, *args, context=context)

    def step_soon(self, strand: Strand) -> None:
        """`call_soon` for a strand, which never cancels it."""
        self._calls.append([0.0, 0, strand.step, (), None])

    def step_at(self, when: float, strand: Strand) -> None:
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


class Strands:
    """Coroutines that run beside each other on virtual time; `ended` is done when all have ended, or one has failed."""

    def __init__(self, loop: VirtualLoop) -> None:
        self.loop = loop
        self.ended: asyncio.Future[None] = loop.create_future()
        self.alive: set[Strand] = set()

    def start(self, coroutine: Coroutine[Any, Any, None]) -> None:
        """Have a coroutine begin once the one that runs now waits."""
        strand = Strand(self, coroutine)
        self.alive.add(strand)
        self.loop.step_soon(strand)

    def end(self, strand: Strand, error: BaseException | None = None) -> None:
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


class Strand:
    """A coroutine that costs less than a task: it has no context, nobody can wait for it, and to sleep is a timer.

    It may await what this module has, and asyncio's futures.
    """

    __slots__ = ("_coroutine", "_loop", "_strands")

    def __init__(self, strands: Strands, coroutine: Coroutine[Any, Any, None]) -> None:
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
            elif type(awaited) is Signal:
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


class Signal:
    """A future of one strand."""

    __slots__ = ("_loop", "_there", "strand")

    def __init__(self, loop: VirtualLoop) -> None:
        self._loop = loop
        self._there = False
        self.strand: Strand | None = None

    def set_result(self, result: None) -> None:
        """It is there."""
        self._there = True
        if self.strand is not None:
            self._loop.step_soon(self.strand)

    def __await__(self) -> Generator[Signal, None, None]:
        if not self._there:
            yield self


@types.coroutine
def until(when: float) -> Generator[float, None, None]:
    """What a strand waits for that sleeps."""
    yield when
