"""The nouns. Times are seconds, lengths are tokens, and nothing here imports the rest of the package.

An instance's sequences travel as one integer array ``seqs[field, column]``: a column per sequence, running ones first
in admission order, then waiting ones in queue order; the rows are the constants below. The engine, the snapshot and the
predictor share this layout, so a snapshot is a slice of an engine and a forecast starts from a copy of a snapshot.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, overload

import numpy as np
from numpy.typing import NDArray

Int = int | np.int64
Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

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


@dataclass(frozen=True, slots=True)
class Request:
    """One request of a workload. `output_tokens` is the truth, known to the engine only.

    max_tokens: the most tokens that it asks for. The model may stop before, which no scheduler can foresee; None asks
    for `output_tokens` exactly, as a replay does that ignores the model's end of sequence. prompt: its text, if known.
    """

    id: int
    arrival: float
    prompt_tokens: int
    output_tokens: int
    predicted_output_tokens: int
    max_tokens: int | None = None
    prompt: str | None = None


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


class Forecast(NamedTuple):
    """Predicted seconds from now to the first token, and to the last."""

    ttft: float
    e2e: float


class Forecasts(Sequence[Forecast]):
    """Forecasts for several instances, by columns: the fields of a `Forecast`, which is made when it is asked for.

    Where there is none they are NaN.
    """

    __slots__ = ("e2e", "ttft")

    def __init__(self, ttft: Sequence[float], e2e: Sequence[float]) -> None:
        self.ttft = ttft
        self.e2e = e2e

    @staticmethod
    def of(forecasts: Sequence[Forecast | None]) -> Forecasts:
        """The same by columns."""
        if isinstance(forecasts, Forecasts):
            return forecasts
        known = [one or (math.nan, math.nan) for one in forecasts]
        return Forecasts([ttft for ttft, _ in known], [e2e for _, e2e in known])

    def times(self, factors: Sequence[float]) -> Forecasts:
        """Each multiplied by a factor of its own."""
        both = ([one * factor for one, factor in zip(times, factors, strict=True)] for times in (self.ttft, self.e2e))
        return Forecasts(*both)

    def __eq__(self, other: object) -> bool:
        return list(self) == list(other) if isinstance(other, Sequence) else NotImplemented

    def __len__(self) -> int:
        return len(self.e2e)

    @overload
    def __getitem__(self, place: int) -> Forecast: ...
    @overload
    def __getitem__(self, place: slice) -> Sequence[Forecast]: ...
    def __getitem__(self, place: int | slice) -> Forecast | Sequence[Forecast]:
        if isinstance(place, slice):
            return Forecasts(self.ttft[place], self.e2e[place])
        return Forecast(self.ttft[place], self.e2e[place])


class InstanceView(NamedTuple):
    """What a policy may know of one instance.

    underway: requests placed there that the snapshot does not show; outstanding: requests placed there and not
    finished; recent: requests placed there in the last 60 s. `snapshot` and `forecast` are there if the policy needs
    them.
    """

    instance_id: int
    underway: Sequence[Request]
    outstanding: int
    recent: int
    snapshot: Snapshot | None
    forecast: Forecast | None


class Views(Sequence[InstanceView]):
    """Views of several instances, by columns: the fields of an `InstanceView`, which is made when it is asked for."""

    __slots__ = ("forecasts", "ids", "outstanding", "recent", "snapshots", "underway")

    def __init__(
        self,
        ids: Sequence[int],
        underway: Sequence[Sequence[Request]],
        outstanding: Sequence[int],
        recent: Sequence[int],
        snapshots: Snapshots | None,
        forecasts: Sequence[Forecast | None] | None,
    ) -> None:
        self.ids = ids
        self.underway = underway
        self.outstanding = outstanding
        self.recent = recent
        self.snapshots = snapshots
        self.forecasts = forecasts

    @staticmethod
    def of(views: Sequence[InstanceView]) -> Views:
        """The same by columns."""
        if isinstance(views, Views):
            return views
        ids, underway, outstanding, recent, shown, forecasts = map(list, zip(*views, strict=True))
        return Views(ids, underway, outstanding, recent, None if None in shown else Snapshots.of(shown), forecasts)

    def __len__(self) -> int:
        return len(self.ids)

    @overload
    def __getitem__(self, place: int) -> InstanceView: ...
    @overload
    def __getitem__(self, place: slice) -> Sequence[InstanceView]: ...
    def __getitem__(self, place: int | slice) -> InstanceView | Sequence[InstanceView]:
        if isinstance(place, slice):
            return [self[i] for i in range(*place.indices(len(self)))]
        return InstanceView(
            self.ids[place],
            self.underway[place],
            self.outstanding[place],
            self.recent[place],
            None if self.snapshots is None else self.snapshots[place],
            None if self.forecasts is None else self.forecasts[place],
        )

    def __iter__(self) -> Iterator[InstanceView]:
        return (self[place] for place in range(len(self)))


class Decision(NamedTuple):
    """Where a request goes, and why: `scores[i]` belongs to `candidates[i]`, and the least one is chosen.

    `fallback` names the reason when the policy's own rule could not be applied.
    """

    instance_id: int
    candidates: Sequence[int]
    scores: Sequence[float]
    fallback: str | None = None


@dataclass(slots=True)
class RequestRecord:
    """What happened to one request; its status is pending, ok or failed. Times are on the run's clock, NaN before.

    retries: instances that it was lost on before; error: the last thing that went wrong. token_times: when each token
    came, or the several that came at once, if that is known.
    """

    request: Request
    instance_id: int = -1
    dispatched: float = float("nan")
    first_token: float = float("nan")
    finished: float = float("nan")
    forecast: Forecast | None = None
    status: str = "pending"
    preemptions: int = 0
    output_tokens: int = 0
    retries: int = 0
    error: str | None = None
    token_times: list[float] | None = None
