"""What an instance shows of itself: its sequences as the columns of one array, and what its scheduler holds.

An instance's sequences travel as one integer array ``seqs[field, column]``: a column per sequence, running ones first
in admission order, then waiting ones in queue order; the rows are the constants below. The engine, the snapshot and the
predictor share this layout, so a snapshot is a slice of an engine and a forecast starts from a copy of a snapshot.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, overload

import numpy as np

from block.core.arrays import Floats, Ints

# Rows of `seqs`.
ID = 0  # the request's number in its run
PROMPT = 1  # prompt tokens
OUTPUT = 2  # response tokens generated so far
TARGET = 3  # response tokens at which it finishes; only the engine that runs it knows
MAX_TOKENS = 4  # response tokens at which its scheduler knows that it finishes, if not before: at least TARGET
EXPECTED = 5  # response tokens that the request was tagged with
COMPUTED = 6  # tokens whose KV is computed, those of the steps in flight included
BLOCKS = 7  # KV blocks held
CHUNK = 8  # tokens scheduled in the step in flight
NEXT = 9  # tokens scheduled in the step queued behind it (asynchronous scheduling)
PENDING = 10  # sampled tokens still in flight: 0, 1, or 2 when the queued step samples too
PREEMPTED = 11  # times preempted
FIELDS = 12

# Columns of the heads of `Snapshots`.
HEAD_ID = 0  # the instance's
HEAD_ROW = 1  # its sequences lie in pool[HEAD_ROW, :, HEAD_BEGIN:HEAD_END]
HEAD_BEGIN = 2
HEAD_END = 3
HEAD_RUNNING = 4  # from here on as in `Snapshot`
HEAD_STALE = 5
HEAD_FREE = 6
HEAD_PREEMPTIONS = 7
HEADS = 8


class Snapshot(NamedTuple):
    """What one instance publishes at the end of its scheduler's `schedule()`.

    `seqs` is int64[FIELDS, n], its first `running` columns the running sequences; it may be a view of a live engine,
    valid until the next await. TARGET is not for policies to read, nor MAX_TOKENS, which gives it away in a replay.
    `step_started` is when the step in flight began, NaN when the engine is idle. `stale` running-then-preempted
    sequences, the first of the waiting ones, still have a token in flight.
    """

    instance_id: int
    taken_at: float
    step_started: float
    running: int
    stale: int
    free_blocks: int
    preemptions: int
    seqs: Ints


class Snapshots(Sequence[Snapshot]):
    """Snapshots of several instances at one moment, by columns; a `Snapshot` is made of them when it is asked for.

    pool: int64[rows, FIELDS, n], the sequences; heads: int64[instances, HEADS]; started: float[instances], when the
    step in flight began. Valid as long as its snapshots are.
    """

    __slots__ = ("heads", "pool", "started", "taken_at")

    def __init__(self, taken_at: float, pool: Ints, heads: Ints, started: Floats) -> None:
        self.taken_at = taken_at
        self.pool = pool
        self.heads = heads
        self.started = started

    @staticmethod
    def of(snapshots: Sequence[Snapshot]) -> Snapshots:
        """The same by columns."""
        if isinstance(snapshots, Snapshots):
            return snapshots
        rows = [
            (one.instance_id, 0, 0, one.seqs.shape[1], one.running, one.stale, one.free_blocks, one.preemptions)
            for one in snapshots
        ]
        heads = np.array(rows, dtype=np.int64)
        widths = heads[:, HEAD_END].copy()
        widths.cumsum(out=heads[:, HEAD_END])
        heads[:, HEAD_BEGIN] = heads[:, HEAD_END] - widths
        pool = np.concatenate([one.seqs for one in snapshots], axis=1)[np.newaxis]
        return Snapshots(snapshots[0].taken_at, pool, heads, np.array([one.step_started for one in snapshots]))

    def some(self, places: Sequence[int] | slice) -> Snapshots:
        """Those at these places."""
        return Snapshots(self.taken_at, self.pool, self.heads[places], self.started[places])

    def ids(self, place: int) -> list[int]:
        """The requests that one of them shows."""
        row, begin, end = self.heads[place, HEAD_ROW : HEAD_END + 1].tolist()
        return self.pool[row, ID, begin:end].tolist()  # type: ignore[no-any-return]

    def __len__(self) -> int:
        return len(self.heads)

    @overload
    def __getitem__(self, place: int) -> Snapshot: ...
    @overload
    def __getitem__(self, place: slice) -> Sequence[Snapshot]: ...
    def __getitem__(self, place: int | slice) -> Snapshot | Sequence[Snapshot]:
        if isinstance(place, slice):
            return self.some(place)
        instance, row, begin, end, running, stale, free, preemptions = self.heads[place].tolist()
        seqs = self.pool[row, :, begin:end]
        return Snapshot(instance, self.taken_at, self.started.item(place), running, stale, free, preemptions, seqs)
