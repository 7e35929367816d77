"""What an instance shows of itself: its sequences as the columns of one array, and what its scheduler holds.

An instance's sequences travel as one integer array ``seqs[field, column]``: a column per sequence, running ones first
in admission order, then waiting ones in queue order; the rows are the constants below. The engine, the snapshot and the
predictor share this layout, so a snapshot is a slice of an engine and a forecast starts from a copy of a snapshot.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, overload

import numpy as np

from block.core.arrays import Floats, Ints

# Rows of `seqs`.
ID = 0  # the request's number in its run
NUM_PROMPT_TOKENS = 1  # prompt tokens
NUM_OUTPUT_TOKENS = 2  # response tokens generated so far
TARGET = 3  # response tokens at which it finishes; only the engine that runs it knows
MAX_TOKENS = 4  # response tokens at which its scheduler knows that it finishes, if not before: at least TARGET
EXPECTED = 5  # response tokens that the request was tagged with
NUM_COMPUTED_TOKENS = 6  # tokens whose KV is computed, those of the steps in flight included
NUM_BLOCKS = 7  # KV blocks held
NUM_SCHEDULED_TOKENS = 8  # tokens scheduled in the step in flight
NUM_SCHEDULED_NEXT = 9  # tokens scheduled in the step queued behind it (asynchronous scheduling)
NUM_OUTPUT_PLACEHOLDERS = 10  # sampled tokens still in flight: 0, 1, or 2 when the queued step samples too
NUM_PREEMPTIONS = 11  # times preempted
NUM_CACHED_TOKENS = 12  # prompt tokens that its first admission found in the prefix cache, or before it would have when
# the sequence came
NUM_SHARED_BLOCKS = 13  # KV blocks of these that others used at that time
CACHE_RECORD = 14  # where an engine with a prefix cache keeps the hashes and the blocks of the sequence
FIELDS = 15

# Columns of the meta of `Snapshots`.
META_ID = 0  # the instance's
META_ROW = 1  # its sequences lie in pool[META_ROW, :, META_BEGIN:META_END]
META_BEGIN = 2
META_END = 3
META_RUNNING = 4  # from here on as in `Snapshot`
META_STALE = 5
META_FREE = 6
META_PREEMPTIONS = 7
META = 8


class Snapshot(NamedTuple):
    """What one instance publishes at the end of its scheduler's `schedule()`.

    `seqs` is int64[FIELDS, n], its first `running` columns the running sequences; it may be a view of a live engine,
    valid until the engine changes. TARGET is not for policies to read, nor MAX_TOKENS, which gives it away in a replay.
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


class Hits(NamedTuple):
    """What of a request instances have in their prefix caches.

    found: int64[instances, 2]: prompt tokens, and how many KV blocks of them others use. in_transit: the same of the
    requests that are in transit, by their ids, where they go.
    """

    found: Ints
    in_transit: Mapping[int, tuple[int, int]]


class Snapshots(Sequence[Snapshot]):
    """Snapshots of several instances at one moment, by columns; a `Snapshot` is made of them when it is asked for.

    pool: int64[rows, FIELDS, n], the sequences; meta: int64[instances, META]; started: float[instances], when the
    step in flight began. Valid as long as its snapshots are. hits: of the request that is to be placed; None where
    nothing is cached.
    """

    __slots__ = ("hits", "meta", "pool", "started", "taken_at")

    def __init__(self, taken_at: float, pool: Ints, meta: Ints, started: Floats, hits: Hits | None = None) -> None:
        self.taken_at = taken_at
        self.pool = pool
        self.meta = meta
        self.started = started
        self.hits = hits

    @staticmethod
    def of(snapshots: Sequence[Snapshot]) -> Snapshots:
        """These snapshots by columns; `snapshots` itself if it is so already."""
        if isinstance(snapshots, Snapshots):
            return snapshots
        rows = [
            (one.instance_id, 0, 0, one.seqs.shape[1], one.running, one.stale, one.free_blocks, one.preemptions)
            for one in snapshots
        ]
        meta = np.array(rows, dtype=np.int64)
        widths = meta[:, META_END].copy()
        widths.cumsum(out=meta[:, META_END])
        meta[:, META_BEGIN] = meta[:, META_END] - widths
        pool = np.concatenate([one.seqs for one in snapshots], axis=1)[np.newaxis]
        return Snapshots(snapshots[0].taken_at, pool, meta, np.array([one.step_started for one in snapshots]))

    def some(self, places: Sequence[int] | slice) -> Snapshots:
        """The snapshots at these places, without a copy of their sequences."""
        hits = None if self.hits is None else self.hits._replace(found=self.hits.found[places])
        return Snapshots(self.taken_at, self.pool, self.meta[places], self.started[places], hits)

    def ids(self, place: int) -> list[int]:
        """The requests that one of them shows."""
        row, begin, end = self.meta[place, META_ROW : META_END + 1].tolist()
        return self.pool[row, ID, begin:end].tolist()  # type: ignore[no-any-return]

    def __len__(self) -> int:
        return len(self.meta)

    @overload
    def __getitem__(self, place: int) -> Snapshot: ...
    @overload
    def __getitem__(self, place: slice) -> Sequence[Snapshot]: ...
    def __getitem__(self, place: int | slice) -> Snapshot | Sequence[Snapshot]:
        if isinstance(place, slice):
            return self.some(place)
        instance, row, begin, end, running, stale, free, preemptions = self.meta[place].tolist()
        seqs = self.pool[row, :, begin:end]
        return Snapshot(instance, self.taken_at, self.started.item(place), running, stale, free, preemptions, seqs)
