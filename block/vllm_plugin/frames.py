"""Frames: what a scheduler publishes, as it is pushed to other hosts over one response of HTTP that does not end.

Each frame is whole: the header of the state buffer, the sequences, and the requests that have gone since the frame
before. Who reads slowly gets fewer frames, and not older ones; what has gone is kept for it, the latest GONE of them.
Without anything new a frame is sent all the same every HEARTBEAT_S, so that silence means that nobody is there.
"""

from __future__ import annotations

import asyncio
import struct
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np

from block.core.arrays import Ints
from block.core.snapshot import FIELDS
from block.vllm_plugin.state_buffer import CAPACITY, COLUMNS, FINISHED, GONE, HEADER, State, StateBuffer, checked

POLL_S = 0.001
"""How often the state buffer is looked at while anybody listens: its writer, another process, tells nobody."""
GAP_S = 0.01
"""The least time between two frames."""
HEARTBEAT_S = 1.0

Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]

_MARK = b"BLOCK f1"
_PREFIX = struct.Struct("<8sqqdqq")  # mark, bytes of all that follows, number, sent, requests that have gone, width
_MOST = 8 * (HEADER + FIELDS * CAPACITY + 2 * GONE)


class Frame(NamedTuple):
    """One frame. Its times, and those of `state`, are on the sender's CLOCK_MONOTONIC.

    number: counts the frames of a connection from 0. gone: int64[n, 2], number and preemptions of requests that have
    gone, the latest of them the FINISHED-th.
    """

    number: int
    sent: float
    state: State
    gone: Ints


def encode(buffer: StateBuffer, number: int, since: int) -> tuple[bytes, int]:
    """The frame of what is on `buffer` now, with what has gone since the first `since` requests; and how many have gone
    by then. TimeoutError as of `StateBuffer.read`.
    """
    state = buffer.read()
    finished = int(state.header[FINISHED])
    gone = buffer.gone_since(since, finished)
    small = state.seqs.astype(np.int32)  # half of the bytes, unless a number is too large
    seqs = small if np.array_equal(small, state.seqs) else state.seqs
    body = b"".join((state.header.tobytes(), seqs.tobytes(), gone.tobytes()))
    return _PREFIX.pack(_MARK, len(body), number, time.monotonic(), len(gone), seqs.itemsize) + body, finished


class FrameReader:
    """Takes bytes as they come."""

    def __init__(self) -> None:
        self._rest = b""
        self._next = 0

    def feed(self, data: bytes) -> list[Frame]:
        """The frames that these bytes complete. ValueError if they are none, or one is missing."""
        data = self._rest + data if self._rest else data
        begin, frames = 0, []
        while len(data) - begin >= _PREFIX.size:
            mark, length, number, sent, gone, width = _PREFIX.unpack_from(data, begin)
            if mark != _MARK or not 8 * HEADER <= length <= _MOST or number != self._next:
                raise ValueError("no frame of this version")
            end = begin + _PREFIX.size + length
            if len(data) < end:
                break
            frames.append(_decoded(data[begin + _PREFIX.size : end], number, sent, gone, width))
            begin, self._next = end, number + 1
        self._rest = data[begin:]
        return frames


def _decoded(body: bytes, number: int, sent: float, gone: int, width: int) -> Frame:
    header = checked(np.frombuffer(body, dtype=np.int64, count=HEADER).copy())
    columns = int(header[COLUMNS])
    if width not in (4, 8) or not 0 <= gone <= GONE or len(body) != 8 * HEADER + width * FIELDS * columns + 16 * gone:
        raise ValueError("no frame of this version")
    kind = np.int32 if width == 4 else np.int64
    seqs = np.frombuffer(body, dtype=kind, count=FIELDS * columns, offset=8 * HEADER).astype(np.int64)
    theirs = np.frombuffer(body, dtype=np.int64, offset=len(body) - 16 * gone)
    return Frame(number, sent, State(header, seqs.reshape(FIELDS, columns)), theirs.reshape(gone, 2))


class Pushing:
    """Sends frames of a state buffer to any number of listeners."""

    def __init__(self, buffer: StateBuffer) -> None:
        self._buffer = buffer
        self._news = asyncio.Event()
        self._listeners = 0
        self._watch: asyncio.Task[None] | None = None

    async def push(self, since: int | None, receive: Receive, send: Send, stopping: Callable[[], bool]) -> None:
        """Send frames as the body of an ASGI response, until the listener has gone or the server is `stopping`.

        since: how many requests that have gone it knows of; None: none, and it wants to know of none before now.
        """
        finished = int(self._buffer.header[FINISHED]) if since is None else since
        self._listeners += 1
        if self._watch is None or self._watch.done():
            self._watch = asyncio.create_task(self._keep_watching(self._buffer.version, stopping))
        sending = asyncio.create_task(self._keep_sending(finished, send, stopping))
        left = asyncio.create_task(_left(receive))
        try:
            await asyncio.wait((sending, left), return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                sending.result()
        finally:
            self._listeners -= 1
            sending.cancel()
            left.cancel()

    async def _keep_sending(self, finished: int, send: Send, stopping: Callable[[], bool]) -> None:
        number = 0
        while not stopping():
            # Waits while what was sent before lies with the listener's socket; what comes next is the newest by then.
            await send({"type": "http.response.body", "body": b"", "more_body": True})
            news = self._news
            try:
                body, finished = encode(self._buffer, number, finished)
            except TimeoutError:  # if it ended there, silence says so
                pass
            else:
                number += 1
                await send({"type": "http.response.body", "body": body, "more_body": True})
            with suppress(TimeoutError):
                async with asyncio.timeout(HEARTBEAT_S):
                    await news.wait()
        await send({"type": "http.response.body", "body": b""})

    async def _keep_watching(self, seen: int, stopping: Callable[[], bool]) -> None:
        """Tell those that listen of each change from the version `seen` on, as long as there are any."""
        while self._listeners and not stopping():
            version = self._buffer.version
            if version == seen or version % 2:
                await asyncio.sleep(POLL_S)
                continue
            seen, news, self._news = version, self._news, asyncio.Event()
            news.set()
            await asyncio.sleep(GAP_S)
        if stopping():
            self._news.set()


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
