"""The access log: one line of JSON a request, written by a thread, so that a slow disk holds up no request."""

from __future__ import annotations

import asyncio
import json
import logging
import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from io import FileIO

from block.core.errors import message

log = logging.getLogger(__name__)

STDOUT = "-"
"""In place of a path."""
FLUSH_S = 0.1
"""For which lines are collected before the thread has them."""
MOST_WAITING = 100_000
"""Lines that wait for the disk; those beyond are lost."""
CLOSE_S = 2.0
"""For the last lines to be written."""

_NO_SPACES = json.JSONEncoder(separators=(",", ":")).encode


class AccessLog:
    """Appends to the file at `path`, or writes to stdout. ValueError if that cannot be."""

    def __init__(self, path: str) -> None:
        self.path = path
        try:
            self._file = self._open()
        except (OSError, ValueError) as error:
            said = getattr(error, "strerror", None) or message(error)
            raise ValueError(f"gateway.access_log={path}: cannot be written: {said}") from error
        self._lines: list[bytes] = []
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        # Each is counted by one thread: the loop's the first two, the writer the others.
        self._taken = self._dropped = 0
        self._done = self._failed = 0
        self._torn = False  # the last line that was written is not whole
        self._complained = False
        self._thread = threading.Thread(target=self._work, name="access log", daemon=True)
        self._thread.start()

    @property
    def lost(self) -> int:
        """Lines that were not written: the disk is full, or too slow."""
        return self._dropped + self._failed

    def write(self, fields: Mapping[str, object]) -> None:
        """One more line."""
        if self._taken - self._done >= MOST_WAITING:
            self._dropped += 1
            return
        self._taken += 1
        self._lines.append(_NO_SPACES(fields).encode() + b"\n")
        if len(self._lines) == 1:
            asyncio.get_running_loop().call_later(FLUSH_S, self._hand_over)

    def reopen(self) -> None:
        """Go on in a new file, for the one that was open has been moved away."""
        self._hand_over()
        self._jobs.put(self._open_again)

    async def close(self) -> None:
        """Write what is left, unless that takes too long."""
        self._hand_over()
        self._jobs.put(None)
        await asyncio.to_thread(self._thread.join, CLOSE_S)
        if self._thread.is_alive():
            log.warning("the access log is not written: %d lines are lost", self._taken - self._done + self._dropped)

    def _hand_over(self) -> None:
        if self._lines:
            lines, self._lines = self._lines, []
            self._jobs.put(lambda: self._append(lines))

    # ------------------------------------------------------------------------------------------------ in the thread

    def _open(self) -> FileIO:
        return FileIO(1, "w", closefd=False) if self.path == STDOUT else FileIO(self.path, "a")

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            job()
        self._file.close()

    def _open_again(self) -> None:
        try:
            opened = self._open()
        except OSError as error:
            log.warning("gateway.access_log=%s: goes on in the file that was open: %s", self.path, error.strerror)
            return
        self._file.close()
        self._file = opened

    def _append(self, lines: Sequence[bytes]) -> None:
        data = memoryview(b"".join([b"\n" * self._torn, *lines]))
        written = 0
        try:
            while written < len(data):
                written += self._file.write(data[written:]) or 0
            self._torn = self._complained = False
        except OSError as error:
            self._lose(bytes(data), written, error)
        self._done += len(lines)

    def _lose(self, data: bytes, written: int, error: OSError) -> None:
        """Not all of it could be written. A torn line stays: who else writes there may have gone on behind it."""
        whole = data.rfind(b"\n", 0, written) + 1
        self._failed += data.count(b"\n", whole) - (self._torn and written == 0)
        self._torn = whole < written or (self._torn and written == 0)
        if not self._complained:
            log.warning("the access log is not written, and lines are lost: %s", error.strerror)
        self._complained = True
