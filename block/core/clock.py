"""Time on the wall clock, as a run counts it. A simulation keeps its own (`block.cluster.simulation`)."""

from __future__ import annotations

import asyncio
import time


class Clock:
    """Seconds since it was made or last restarted.

    dilation: seconds of the wall clock in which this clock advances by one, so that few cores can carry many servers.
    """

    def __init__(self, dilation: float = 1.0) -> None:
        self._dilation = dilation
        self._origin = time.monotonic()

    def now(self) -> float:
        """The seconds that have passed on it."""
        return self.at(time.monotonic())

    def at(self, monotonic: float) -> float:
        """What it reads when CLOCK_MONOTONIC reads `monotonic`."""
        return (monotonic - self._origin) / self._dilation

    def restart(self) -> None:
        """Have it begin again, at 0."""
        self._origin = time.monotonic()

    async def sleep(self, seconds: float) -> None:
        """Wait for so many of its seconds; zero or less lets others run once."""
        await asyncio.sleep(seconds * self._dilation)

    async def sleep_until(self, when: float) -> None:
        """Wait until it reads `when`; returns at once, without letting others run, if it already does."""
        while (delay := when - self.now()) > 0:
            await self.sleep(delay)
