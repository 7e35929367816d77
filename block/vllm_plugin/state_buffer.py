"""The state buffer: shared memory on which a scheduler publishes its state after every `schedule()`.

One writer, any number of readers, no locks: the writer makes the counter odd, writes, makes it even; a reader copies
and begins anew if the counter was odd or has changed. The memory is a *memfd* of the server process, so it has no name
that could be left behind: others open it as ``/proc/<pid>/fd/<fd>``, and it is gone with the last of its users.

Times in the state buffer are CLOCK_MONOTONIC, which all processes of a host share. Other hosts have the same pushed to
them (`block.vllm_plugin.frames`), without the table of what is in the prefix cache, which is not copied by readers
either: they look up in it.
"""

from __future__ import annotations

import mmap
import os
import secrets
import time
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from block.core.arrays import Floats, Ints
from block.core.snapshot import FIELDS, Snapshot
from block.engine.config import EngineSettings

if TYPE_CHECKING:
    from block.engine.prefix_table import PrefixTable

CAPACITY = 16384  # sequences; more than that waiting are counted in HIDDEN and not shown
MAGIC = 0x424C4F434B0003  # "BLOCK", layout 3
MOST_PLACES = 1 << 20  # of the table of the prefix cache; memory that is not written to is not taken

# The header: 64 words. Words from STARTED to PUBLISHED are floats.
_MAGIC = 0
_COUNTER = 1
COLUMNS = 2  # sequences on the state buffer
RUNNING = 3
STALE = 4
FREE = 5
PREEMPTIONS = 6
STEPS = 7  # steps scheduled so far
HIDDEN = 8  # waiting sequences beyond CAPACITY
STARTED = 9  # when the step in flight began; NaN when idle
PUBLISHED = 10
TIMED = 11  # steps whose duration was noted so far, the latest RING of them in `StateBuffer.steps`
FINISHED = 12  # requests that have gone so far, the latest GONE of them in `StateBuffer.gone`
NONCE = 16  # tells state buffers apart: a path may mean another file on another host
_FIELDS = 17
PLACES = 18  # of the table of what is in the prefix cache; 0: that is not told
PLAIN_HITS = 19  # 1 if a hit of the prefix cache is the longest run of blocks, and there is one scheduler; else 0
SETTINGS = 20  # the engine's, in the order of `EngineSettings`
HEADER = 64

PATIENCE_S = 0.02
RING = 1024  # timed steps that are kept
STEP = 7  # floats of a timed step, see StepTime
GONE = 4096  # finished requests that are kept
_WORDS = HEADER + FIELDS * CAPACITY + RING * STEP + GONE * 2  # before the table
_BYTES = 8 * (_WORDS + 2 * MOST_PLACES)


class StepTime(NamedTuple):
    """One step that another followed at once: what it computed, and the seconds from its start to the other's.

    A chunk is what a sequence with more than one token in the step computes, its context the tokens before it;
    the others decode. `chunk_context` is Σ chunk × context, `chunk_squared` Σ chunk².
    """

    tokens: float
    decodes: float
    decode_kv: float
    chunks: float
    chunk_context: float
    chunk_squared: float
    seconds: float


class State(NamedTuple):
    """What a reader sees: `header` and `seqs` are copies. Times are on CLOCK_MONOTONIC."""

    header: Ints
    seqs: Ints

    @property
    def started(self) -> float:
        """When the step in flight began; NaN when idle."""
        return float(self.header.view(np.float64)[STARTED])

    @property
    def published(self) -> float:
        """When it was written."""
        return float(self.header.view(np.float64)[PUBLISHED])

    def snapshot(self, instance_id: int, now: float, started: float) -> Snapshot:
        """As the dispatcher wants it, with `now` and `started` on the run's clock."""
        header = self.header
        return Snapshot(
            instance_id,
            now,
            started,
            int(header[RUNNING]),
            int(header[STALE]),
            int(header[FREE]),
            int(header[PREEMPTIONS]),
            self.seqs,
        )

    @property
    def settings(self) -> EngineSettings:
        """The engine's settings."""
        return EngineSettings.of(self.header[SETTINGS : SETTINGS + len(EngineSettings._fields)].tolist())


class StateBuffer:
    """The shared memory, mapped. Made with `create` (server) or `open` (scheduler and readers)."""

    def __init__(self, fd: int) -> None:
        self._map = mmap.mmap(fd, _BYTES)
        words: Ints = np.frombuffer(self._map, dtype=np.int64)
        self.header = words[:HEADER]
        self.times: Floats = self.header.view(np.float64)
        self.seqs: Ints = words[HEADER : HEADER + FIELDS * CAPACITY].reshape(FIELDS, CAPACITY)
        steps, gone = HEADER + FIELDS * CAPACITY, HEADER + FIELDS * CAPACITY + RING * STEP
        self.steps: Floats = words[steps:gone].view(np.float64).reshape(RING, STEP)
        self.gone: Ints = words[gone:_WORDS].reshape(GONE, 2)  # number and preemptions of each
        self._table: Ints = words[_WORDS:].reshape(2, MOST_PLACES)

    @staticmethod
    def create() -> tuple[StateBuffer, str]:
        """A new state buffer of this process, and the path by which other processes of this host can open it."""
        fd = os.memfd_create("block-state-buffer")
        os.ftruncate(fd, _BYTES)
        buffer = StateBuffer(fd)
        buffer.header[_FIELDS] = FIELDS
        buffer.header[NONCE] = secrets.randbits(62)
        buffer.times[STARTED] = np.nan
        buffer.gone[:, 0] = np.iinfo(np.int64).min
        buffer.header[_MAGIC] = MAGIC
        return buffer, f"/proc/{os.getpid()}/fd/{fd}"

    @staticmethod
    def open(path: str, nonce: int | None = None) -> StateBuffer:
        """The one at `path`. OSError if it is not there, ValueError if it is another layout, or not the one meant."""
        fd = os.open(path, os.O_RDWR)
        try:
            if os.fstat(fd).st_size != _BYTES:
                raise ValueError(f"state buffer {path}: not of this version's layout")
            buffer = StateBuffer(fd)
        finally:
            os.close(fd)  # the mapping stays
        checked(buffer.header)
        if nonce is not None and buffer.header[NONCE] != nonce:
            raise ValueError(f"state buffer {path}: belongs to another server")
        return buffer

    @property
    def prefix_table(self) -> PrefixTable | None:
        """What the engine's prefix cache has; not a copy. None if that is not told."""
        from block.engine.prefix_table import PrefixTable  # late: see `Publishing._watched_cache`

        places = int(self.header[PLACES])
        return PrefixTable(*self._table[:, :places]) if places else None

    @property
    def version(self) -> int:
        """Another number after each change; odd in the midst of one."""
        return int(self.header[_COUNTER])

    def begin(self) -> None:
        """The writer's: what is on the state buffer is about to change."""
        self.header[_COUNTER] += 1

    def end(self) -> None:
        """The writer's: the state buffer is consistent again."""
        self.times[PUBLISHED] = time.monotonic()
        self.header[_COUNTER] += 1

    def read(self) -> State:
        """A consistent copy; TimeoutError if a change takes PATIENCE_S, because the writer died or waits for a core."""
        header = self.header
        deadline = time.monotonic() + PATIENCE_S
        while True:
            before = int(header[_COUNTER])
            if before % 2 == 0:
                copied = header.copy()
                seqs = self.seqs[:, : copied[COLUMNS]].copy()
                if header[_COUNTER] == before:
                    return State(copied, seqs)
            if time.monotonic() > deadline:
                raise TimeoutError("the scheduler stopped in the middle of publishing")
            time.sleep(20e-6)

    def step_times(self, since: int) -> tuple[int, Floats]:
        """How many steps were timed, and those after the first `since`: float[n, STEP], at most RING − 1 of them."""
        timed = int(self.header[TIMED])
        first = max(since, timed - RING + 1)  # the oldest place may be being overwritten
        return timed, self.steps[np.arange(first, timed) % RING].copy()

    def preemptions_of(self, number: int) -> int | None:
        """Preemptions of the latest request with this number that has gone; None if it is not, or no longer, noted."""
        places = np.flatnonzero(self.gone[:, 0] == number)
        if not len(places):
            return None
        latest = np.argmax((places - int(self.header[FINISHED])) % GONE)  # the next place to be written is the oldest
        return int(self.gone[places[latest], 1])

    def gone_since(self, since: int, finished: int) -> Ints:
        """Number and preemptions of the requests that have gone from the first `since` on up to the first `finished`:
        int64[n, 2], the latest of them if they are too many.
        """
        first = max(since, 0, finished - GONE + 1)  # the oldest place may be being overwritten
        found: Ints = self.gone[np.arange(first, finished) % GONE]
        return found


def checked(header: Ints) -> Ints:
    """`header` itself. ValueError if it is of another layout."""
    if header[_MAGIC] != MAGIC or header[_FIELDS] != FIELDS:
        raise ValueError("not of this version's layout")
    return header
