"""What a server on another host pushes of its state (`block.vllm_plugin.frames`), kept up to date here."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from array import array
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass

import aiohttp
import numpy as np

from block.core.arrays import Ints
from block.core.errors import one_line
from block.vllm_plugin.frames import HEARTBEAT_S, Frame, FrameReader
from block.vllm_plugin.state_buffer import FINISHED, NONCE, PUBLISHED, STARTED, STEPS, State

log = logging.getLogger(__name__)

SILENCE_S = 4 * HEARTBEAT_S
"""Without a frame for so long, the connection counts as lost."""
AGAIN_S = 0.2
"""From the loss of a connection to the next one, and between tries."""
LATE_S = 1.0
"""Frames that are so late for so long are given up: a new connection begins with the newest."""
TELL_S = 60.0
"""Of connections that are lost one is told in so long."""
DRIFT = 1e-4
"""Seconds that two clocks may drift apart in a second."""

_LOST = (aiohttp.ClientError, TimeoutError, OSError, ValueError)


@dataclass
class Received:
    """What has come over the network.

    skipped: states that were published and did not come. breaks: connections that were lost. late: wall-clock seconds
    from each publication to its arrival; None: they are not kept.
    """

    frames: int = 0
    bytes: int = 0
    skipped: int = 0
    breaks: int = 0
    late: array[float] | None = None


class Subscription:
    """Frames of the server at `url`, from `begin` to `end`, over one connection after another.

    gone: is told of each frame which requests have gone, by their numbers, and their preemptions. received: is kept up
    to date.

    Clocks of two hosts have nothing in common. The quickest frame of a connection is taken to have come at once; what
    others took longer they were on their way. So ages are right but for what the quickest one took.
    """

    def __init__(
        self, url: str, session: aiohttp.ClientSession, gone: Callable[[Ints], None], received: Received
    ) -> None:
        self._url = url
        self._session = session
        self._gone = gone
        self._received = received
        self._task: asyncio.Task[None] | None = None
        self._offset = math.inf  # of this host's clock to the other's
        self._heard = -math.inf  # when the latest frame came
        self._sent = -math.inf  # when it was sent, on this host's clock
        self._published = math.nan  # what it shows, on the other's
        self._late_since = math.inf
        self.state: State | None = None
        """What was published last, its times on this host's CLOCK_MONOTONIC. None before `begin`."""

    @property
    def current(self) -> bool:
        """Whether the server has said of late that nothing is newer."""
        return time.monotonic() - self._sent < SILENCE_S

    async def begin(self) -> None:
        """Returns with the first frame. aiohttp.ClientError, TimeoutError or ValueError if there is none."""
        frames = self._listen()
        try:
            await anext(frames)
        except BaseException:
            await frames.aclose()
            raise
        self._task = asyncio.create_task(self._keep_listening(frames))

    async def end(self) -> None:
        """Listen no more."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _keep_listening(self, frames: AsyncGenerator[None]) -> None:
        counted, told = -math.inf, -math.inf
        while True:
            try:
                async with aclosing(frames):
                    async for _ in frames:
                        pass
            except _Replaced as error:
                log.warning("%s: %s", self._url, error)
                return
            except _LOST as error:
                now = time.monotonic()
                if self._heard > counted:  # else it could not even be opened again
                    self._received.breaks += 1
                    counted = self._heard
                if now > told + TELL_S:
                    log.warning("%s: its state is asked for anew: %s", self._url, one_line(error))
                    told = now
            await asyncio.sleep(AGAIN_S)
            frames = self._listen()

    async def _listen(self) -> AsyncGenerator[None]:
        """One connection; yields whenever the state is a newer one. Ends by one of _LOST, or _Replaced."""
        known, self._offset, self._late_since = self.state, math.inf, math.inf
        since = {} if known is None else {"nonce": int(known.header[NONCE]), "since": int(known.header[FINISHED])}
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=SILENCE_S, sock_read=SILENCE_S)
        async with self._session.get(f"{self._url}/block/frames", params=since, timeout=timeout) as response:
            if response.status != 200:
                raise ValueError(f"/block/frames answers {response.status}; is the plugin of this version?")
            reader = FrameReader()
            async for data in response.content.iter_any():
                self._received.bytes += len(data)
                now = time.monotonic()
                if frames := reader.feed(data):
                    for frame in frames:
                        self._take(frame, now)
                    yield
                    late = now - self._sent
                    self._late_since = math.inf if late < LATE_S else min(self._late_since, now)
                    if now - self._late_since > LATE_S:
                        raise ConnectionError(f"it comes {late:.1f} s late")
        raise ConnectionError("it has ended")

    def _take(self, frame: Frame, now: float) -> None:
        state, known = frame.state, self.state
        if known is not None and state.header[NONCE] != known.header[NONCE]:
            if state.settings != known.settings:
                raise _Replaced(f"another server is there, with {state.settings}")
            known = None
        self._offset = min(now - frame.sent, self._offset + DRIFT * (now - self._heard))
        self._received.frames += 1
        self._heard, self._sent = now, frame.sent + self._offset
        published = state.published
        state.header.view(np.float64)[[STARTED, PUBLISHED]] += self._offset
        if known is not None and published != self._published:
            self._received.skipped += max(int(state.header[STEPS] - known.header[STEPS]) - 1, 0)
            if self._received.late is not None:
                self._received.late.append(now - state.published)
        self._published, self.state = published, state
        if len(frame.gone):
            self._gone(frame.gone)


class _Replaced(Exception):
    """Another process is there, whose state is not to be taken for that of the one before."""
