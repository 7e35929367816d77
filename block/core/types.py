"""Requests, forecasts, what a policy sees and decides, and the record of what happened. Times are seconds, lengths are
tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple, overload

import numpy as np

from block.core.arrays import Ints
from block.core.snapshot import Hits, Snapshot, Snapshots


@dataclass(frozen=True, slots=True)
class Request:
    """One request of a workload. `output_tokens` is the truth, known to the engine only.

    max_tokens: the most tokens that it asks for. The model may stop before, which no scheduler can foresee; None asks
    for `output_tokens` exactly, as a replay does that ignores the model's end of sequence. prompt: its text, if known.
    session: number of the session that it is a turn of, if that is known.
    content: int64[n, 2], what prompt and response consist of (`block.workload.content`), if it is known.
    block_hashes: int64[n], above 0: of its blocks of `engine.block_size` tokens, prompt and then response, the first n;
    each stands for a block and all before it, so that requests with equal ones share a prefix. None: it shares nothing.
    sequences: that a server makes of it, as of `n` samples or a list of prompts; lengths are those of one. If it has
    block hashes they share the prompt. Simulated engines, and servers in a run, know only requests of one.
    """

    id: int
    arrival: float
    prompt_tokens: int
    output_tokens: int
    predicted_output_tokens: int
    max_tokens: int | None = None
    prompt: str | None = None
    session: int | None = None
    content: Ints | None = field(default=None, compare=False)
    block_hashes: Ints | None = field(default=None, compare=False)
    sequences: int = 1

    @property
    def number(self) -> int:
        """Its id, or that of the request that it is a sibling of."""
        return max(self.id, ~self.id)

    def siblings(self) -> list[Request]:
        """Its sequences but one, as requests whose id is `~id`, which no other has."""
        return [replace(self, id=~self.id, sequences=1)] * (self.sequences - 1)


def shared_blocks(one: Request, other: Request, most: int) -> int:
    """How many blocks, at most `most`, two requests have in common: their hashes say all that stands before a block."""
    if one.block_hashes is None or other.block_hashes is None:
        return 0
    most = min(most, len(one.block_hashes), len(other.block_hashes))
    return int(np.count_nonzero(one.block_hashes[:most] == other.block_hashes[:most]))


class Forecast(NamedTuple):
    """Predicted seconds from now to the first token, and to the last."""

    ttft: float
    e2e: float


class Forecasts(Sequence[Forecast]):
    """Forecasts for several instances, by columns: the fields of a `Forecast`, which is made when it is asked for.

    Where there is none they are NaN. work: seconds of compute that the prompt takes there, less what is cached; 0 where
    no instance has a prefix cache.
    """

    __slots__ = ("_work", "e2e", "ttft")

    def __init__(self, ttft: Sequence[float], e2e: Sequence[float], work: Sequence[float] = ()) -> None:
        self.ttft = ttft
        self.e2e = e2e
        self._work = work

    @property
    def work(self) -> Sequence[float]:
        """Seconds of compute."""
        return self._work or [0.0] * len(self.e2e)

    @staticmethod
    def of(forecasts: Sequence[Forecast | None]) -> Forecasts:
        """These forecasts by columns; `forecasts` itself if it is so already."""
        if isinstance(forecasts, Forecasts):
            return forecasts
        known = [one or (math.nan, math.nan) for one in forecasts]
        return Forecasts([ttft for ttft, _ in known], [e2e for _, e2e in known])

    def times(self, factors: Sequence[float]) -> Forecasts:
        """Each multiplied by a factor of its own."""
        columns = (self.ttft, self.e2e, self.work)
        return Forecasts(*([one * by for one, by in zip(column, factors, strict=True)] for column in columns))

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
            return Forecasts(self.ttft[place], self.e2e[place], self.work[place])
        return Forecast(self.ttft[place], self.e2e[place])


class InstanceView(NamedTuple):
    """What a policy may know of one instance.

    in_transit: requests placed there that the snapshot does not show, and their siblings; outstanding: sequences of
    requests placed there and not finished; recent: requests placed there in the last 60 s. `snapshot` and `forecast`
    are there if the policy needs them. cached_tokens: of the request's prompt that the instance has in its prefix
    cache; a policy that needs no snapshot is not told.
    """

    instance_id: int
    in_transit: Sequence[Request]
    outstanding: int
    recent: int
    snapshot: Snapshot | None
    forecast: Forecast | None
    cached_tokens: int = 0


class Views(Sequence[InstanceView]):
    """Views of several instances, by columns: an `InstanceView` is made of them when it is asked for.

    Each column has an entry per instance and is what the field of `InstanceView` of that name is, in the plural.
    snapshots, forecasts: None if the policy does not need them.
    """

    __slots__ = ("forecasts", "ids", "in_transit", "outstanding", "recent", "snapshots")

    def __init__(
        self,
        ids: Sequence[int],
        in_transit: Sequence[Sequence[Request]],
        outstanding: Sequence[int],
        recent: Sequence[int],
        snapshots: Snapshots | None,
        forecasts: Sequence[Forecast | None] | None,
    ) -> None:
        self.ids = ids
        self.in_transit = in_transit
        self.outstanding = outstanding
        self.recent = recent
        self.snapshots = snapshots
        self.forecasts = forecasts

    @staticmethod
    def of(views: Sequence[InstanceView]) -> Views:
        """These views by columns; `views` itself if it is so already."""
        if isinstance(views, Views):
            return views
        ids, in_transit, outstanding, recent, shown, forecasts, cached = map(list, zip(*views, strict=True))
        snapshots = None if None in shown else Snapshots.of(shown)
        if snapshots is not None and any(cached):
            snapshots.hits = Hits(np.array([(tokens, 0) for tokens in cached], dtype=np.int64), {})
        return Views(ids, in_transit, outstanding, recent, snapshots, forecasts)

    @property
    def cached_tokens(self) -> Sequence[int]:
        """As of `InstanceView`, of each."""
        hits = None if self.snapshots is None else self.snapshots.hits
        return [0] * len(self) if hits is None else hits.found[:, 0].tolist()

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
            self.in_transit[place],
            self.outstanding[place],
            self.recent[place],
            None if self.snapshots is None else self.snapshots[place],
            None if self.forecasts is None else self.forecasts[place],
            0 if self.snapshots is None or self.snapshots.hits is None else int(self.snapshots.hits.found[place, 0]),
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

    preemptions: None where they are not known. cached_tokens: of its prompt that its instance found in the prefix
    cache; -1 where that is not told. retries: instances that it was lost on before; error: the last thing that went
    wrong. token_times: when each token came, or the several that came at once, if that is known.
    """

    request: Request
    instance_id: int = -1
    dispatched: float = float("nan")
    first_token: float = float("nan")
    finished: float = float("nan")
    forecast: Forecast | None = None
    status: str = "pending"
    preemptions: int | None = None
    output_tokens: int = 0
    retries: int = 0
    cached_tokens: int = -1
    error: str | None = None
    token_times: list[float] | None = None
