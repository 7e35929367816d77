"""Policies: which of the instances should take this request?

A policy is a small dataclass whose fields are its Hydra options. Views and a generator go in, a Decision comes out;
those here keep no state, and are frozen. What a policy may look at is declared by `needs`, so that none pays for
snapshots or forecasts that it does not use. Lower scores are better, and ties are broken at random.
"""

from __future__ import annotations

import enum
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol, final

import numpy as np

from block.core.arrays import Floats, Int, Ints
from block.core.jit import compiled
from block.core.snapshot import (
    EXPECTED,
    META_BEGIN,
    META_END,
    META_FREE,
    META_ROW,
    META_RUNNING,
    NUM_COMPUTED_TOKENS,
    NUM_OUTPUT_TOKENS,
    NUM_PROMPT_TOKENS,
    Snapshot,
    Snapshots,
)
from block.core.types import Decision, Forecasts, InstanceView, Request, Views


class Needs(enum.Enum):
    """What a policy must be shown: the dispatcher's own counts, a snapshot of each candidate, or also a forecast."""

    COUNTS = "counts"
    SNAPSHOT = "snapshot"
    FORECAST = "forecast"


class Policy(Protocol):
    """What the dispatcher asks of a policy. One that remembers instances may have a method `forget`, too, which is told
    the id of one that is gone for good.
    """

    needs: ClassVar[Needs]

    def candidates(self, instances: int, request_index: int, rng: random.Random) -> Sequence[int]:
        """Which of instances 0 … `instances` − 1 to look at for the request of this index, from 0 on."""
        ...

    def choose(self, request: Request, views: Sequence[InstanceView], rng: random.Random) -> Decision:
        """Choose among the views of the candidates, of which there is at least one."""
        ...


def least(
    views: Sequence[InstanceView], scores: Sequence[float], rng: random.Random, fallback: str | None = None
) -> Decision:
    """The decision for the least of `scores`; one of the ties at random."""
    ids = Views.of(views).ids
    best = min(scores)
    if scores.count(best) == 1:
        chosen = ids[scores.index(best)]
    else:
        chosen = rng.choice([id_ for id_, score in zip(ids, scores, strict=True) if score == best])
    return Decision(chosen, ids, scores, fallback)


def sample(instances: int, k: int | None, rng: random.Random) -> Sequence[int]:
    """`k` different instances at random; all of them, in order, if k is None or no smaller than their number."""
    if k is None or k >= instances:
        return range(instances)
    # `sample` draws the same for one, at five times the cost.
    return [rng.choice(range(instances))] if k == 1 else rng.sample(range(instances), k)


@final
@dataclass(frozen=True)
class Random:
    """Any instance, with equal probability."""

    needs: ClassVar[Needs] = Needs.COUNTS

    def candidates(self, instances: int, request_index: int, rng: random.Random) -> Sequence[int]:
        return sample(instances, 1, rng)

    def choose(self, request: Request, views: Sequence[InstanceView], rng: random.Random) -> Decision:
        return least(views, [0.0], rng)


@final
@dataclass(frozen=True)
class RoundRobin:
    """Each instance in turn."""

    needs: ClassVar[Needs] = Needs.COUNTS

    def candidates(self, instances: int, request_index: int, rng: random.Random) -> Sequence[int]:
        return [request_index % instances]

    def choose(self, request: Request, views: Sequence[InstanceView], rng: random.Random) -> Decision:
        return least(views, [0.0], rng)


@final
@dataclass(frozen=True)
class MinQPM:
    """Fewest requests sent in the last 60 s."""

    needs: ClassVar[Needs] = Needs.COUNTS

    def candidates(self, instances: int, request_index: int, rng: random.Random) -> Sequence[int]:
        return range(instances)

    def choose(self, request: Request, views: Sequence[InstanceView], rng: random.Random) -> Decision:
        """Scores: requests in the last minute."""
        return least(views, [float(count) for count in Views.of(views).recent], rng)


@final
@dataclass(frozen=True)
class LeastRequests:
    """Fewest outstanding requests, counted by the dispatcher, as most routers do. `k`: among that many at random."""

    k: int | None = None
    needs: ClassVar[Needs] = Needs.COUNTS

    def __post_init__(self) -> None:
        _check_k(self.k)

    def candidates(self, instances: int, request_index: int, rng: random.Random) -> Sequence[int]:
        return sample(instances, self.k, rng)

    def choose(self, request: Request, views: Sequence[InstanceView], rng: random.Random) -> Decision:
        """Scores: outstanding requests."""
        return least(views, [float(count) for count in Views.of(views).outstanding], rng)


@final
@dataclass(frozen=True)
class INFaaS:
    """INFaaS++: most free KV blocks for each running request."""

    needs: ClassVar[Needs] = Needs.SNAPSHOT

    def candidates(self, instances: int, request_index: int, rng: random.Random) -> Sequence[int]:
        return range(instances)

    def choose(self, request: Request, views: Sequence[InstanceView], rng: random.Random) -> Decision:
        """Scores: minus free blocks over running requests."""
        meta = snapshots_of(views).meta
        scores = -meta[:, META_FREE] / np.maximum(meta[:, META_RUNNING], 1)
        return least(views, scores.tolist(), rng)


@final
@dataclass(frozen=True)
class LlumnixMinus:
    """Llumnix's dispatcher without migration: most freeness, (free − wanted by waiting requests) / running requests."""

    block_size: int = 16
    needs: ClassVar[Needs] = Needs.SNAPSHOT

    def __post_init__(self) -> None:
        check_at_least(self, 1, "block_size")

    def candidates(self, instances: int, request_index: int, rng: random.Random) -> Sequence[int]:
        return range(instances)

    def choose(self, request: Request, views: Sequence[InstanceView], rng: random.Random) -> Decision:
        """Scores: minus freeness, in KV blocks."""
        size = self.block_size
        shown = snapshots_of(views)
        wanted = [_blocks(requests, size) for requests in Views.of(views).in_transit]
        scores = np.array(wanted, dtype=np.float64)
        _less_free(shown.pool, shown.meta, size, scores)
        return least(views, scores.tolist(), rng)


def _blocks(requests: Sequence[Request], block_size: int) -> int:
    """KV blocks that the prompts of these want."""
    return sum(-(-one.prompt_tokens // block_size) for one in requests) if requests else 0


@compiled
def _less_free(pool: Ints, meta: Ints, block_size: int, scores: Floats) -> None:
    """Scores that hold the KV blocks wanted by requests in transit become minus freeness; the rest: `Snapshots`."""
    for i in range(meta.shape[0]):
        seqs = pool[meta[i, META_ROW]]
        running = meta[i, META_RUNNING]
        wanted: Int = 0
        for column in range(meta[i, META_BEGIN] + running, meta[i, META_END]):
            wanted += (seqs[NUM_PROMPT_TOKENS, column] + seqs[NUM_OUTPUT_TOKENS, column] + block_size - 1) // block_size
        scores[i] = (scores[i] + wanted - meta[i, META_FREE]) / max(running, 1)


def freeness(snapshots: Sequence[Snapshot], in_transit: Sequence[Sequence[Request]], block_size: int) -> list[float]:
    """Llumnix's freeness of each: (KV blocks − virtual usage) / batch size, in blocks for each running request.

    Virtual usage (arXiv 2406.03243, Algorithm 1, for one priority) is what running requests hold, what the first
    waiting one demands, and nothing for those behind it. A request in transit counts as if it were admitted.
    """
    shown = Snapshots.of(snapshots)
    free = np.array([_blocks(requests, block_size) for requests in in_transit], dtype=np.float64)
    _freeness(shown.pool, shown.meta, block_size, free)
    return free.tolist()  # type: ignore[no-any-return]


@compiled
def _freeness(pool: Ints, meta: Ints, block_size: int, free: Floats) -> None:
    """KV blocks wanted by requests in transit become `freeness`; the rest is of `Snapshots`."""
    for i in range(meta.shape[0]):
        seqs = pool[meta[i, META_ROW]]
        running = meta[i, META_RUNNING]
        first = meta[i, META_BEGIN] + running
        if first < meta[i, META_END]:
            free[i] += (seqs[NUM_PROMPT_TOKENS, first] + seqs[NUM_OUTPUT_TOKENS, first] + block_size - 1) // block_size
        free[i] = (meta[i, META_FREE] - free[i]) / max(running, 1)


@final
@dataclass(frozen=True)
class Llumnix:
    """Llumnix's dispatcher: the instance of most `freeness`. Its other half is `block.cluster.migration`."""

    block_size: int = 16
    needs: ClassVar[Needs] = Needs.SNAPSHOT

    def __post_init__(self) -> None:
        check_at_least(self, 1, "block_size")

    def candidates(self, instances: int, request_index: int, rng: random.Random) -> Sequence[int]:
        return range(instances)

    def choose(self, request: Request, views: Sequence[InstanceView], rng: random.Random) -> Decision:
        """Scores: minus freeness."""
        free = freeness(snapshots_of(views), Views.of(views).in_transit, self.block_size)
        return least(views, [-one for one in free], rng)


@final
@dataclass(frozen=True)
class LeastTokens:
    """Fewest tokens left to process, prompt and expected response: Block's knowledge without its simulation."""

    needs: ClassVar[Needs] = Needs.SNAPSHOT

    def candidates(self, instances: int, request_index: int, rng: random.Random) -> Sequence[int]:
        return range(instances)

    def choose(self, request: Request, views: Sequence[InstanceView], rng: random.Random) -> Decision:
        """Scores: tokens."""
        scores = []
        for snapshot, in_transit in zip(snapshots_of(views), Views.of(views).in_transit, strict=True):
            seqs = snapshot.seqs
            left = seqs[NUM_PROMPT_TOKENS] + seqs[EXPECTED] - seqs[NUM_COMPUTED_TOKENS]
            tokens = int(left[left > 0].sum())
            tokens += sum(other.prompt_tokens + other.predicted_output_tokens for other in in_transit)
            scores.append(float(tokens))
        return least(views, scores, rng)


@final
@dataclass(frozen=True)
class Block:
    """Least predicted end-to-end latency of the request. `k`: ask that many instances at random (power of k), not all.

    With true response lengths this is the paper's Block, with estimated ones its Block*. An instance without a forecast
    is not chosen while another has one; if none has, the choice is random and recorded as a fallback.
    """

    k: int | None = None
    needs: ClassVar[Needs] = Needs.FORECAST

    def __post_init__(self) -> None:
        _check_k(self.k)

    def candidates(self, instances: int, request_index: int, rng: random.Random) -> Sequence[int]:
        return sample(instances, self.k, rng)

    def choose(self, request: Request, views: Sequence[InstanceView], rng: random.Random) -> Decision:
        """Scores: predicted seconds from now to the last token; inf without a forecast."""
        return _least_known(views, _forecasts(Views.of(views)).e2e, rng)


@final
@dataclass(frozen=True)
class BlockCache:
    """Block that prices work: predicted latency + price × seconds of compute that the prompt takes there.

    What is cached is no work, so requests go where their prefix is, unless others would have to wait too long for
    that. Work delays whom it meets: those that come before it is worked off, and those that are there. So the price
    is `kappa`, plus `gamma` × the mean number of requests of an instance, plus `others` × those of this one: the
    shares of it that they pay, where requests are the outstanding ones and this one (docs/prefix-caching.md has the
    study). aim: the latency, "e2e" or "ttft". At price 0 it is `Block`.
    """

    kappa: float = 0.0
    gamma: float = 0.4
    others: float = 0.035
    aim: str = "e2e"
    k: int | None = None
    needs: ClassVar[Needs] = Needs.FORECAST

    def __post_init__(self) -> None:
        _check_k(self.k)
        check_at_least(self, 0, "kappa", "gamma", "others")
        if self.aim not in ("e2e", "ttft"):
            raise ValueError(f"scheduler.aim={self.aim}: choose e2e or ttft")

    def candidates(self, instances: int, request_index: int, rng: random.Random) -> Sequence[int]:
        return sample(instances, self.k, rng)

    def choose(self, request: Request, views: Sequence[InstanceView], rng: random.Random) -> Decision:
        """Scores: seconds; inf without a forecast."""
        seen = Views.of(views)
        forecasts = _forecasts(seen)
        price = self.kappa + self.gamma * (sum(seen.outstanding) + 1) / len(seen)
        latency = forecasts.e2e if self.aim == "e2e" else forecasts.ttft
        scores = [
            one + (price + self.others * (requests + 1)) * work
            for one, work, requests in zip(latency, forecasts.work, seen.outstanding, strict=True)
        ]
        return _least_known(views, scores, rng)


def _forecasts(views: Views) -> Forecasts:
    return Forecasts.of(views.forecasts or [None] * len(views))


def _least_known(views: Sequence[InstanceView], scores: Sequence[float], rng: random.Random) -> Decision:
    """The decision for the least of scores that follow from forecasts; where there is none they are NaN."""
    if math.isnan(sum(scores)):
        scores = [math.inf if math.isnan(one) else one for one in scores]
    return least(views, scores, rng, "no forecast" if math.isinf(min(scores)) else None)


def snapshots_of(views: Sequence[InstanceView]) -> Snapshots:
    """The snapshots of a policy that needs them."""
    snapshots = Views.of(views).snapshots
    assert snapshots is not None, "the dispatcher shows snapshots to a policy that needs them"
    return snapshots


def check_at_least(policy: object, least: int, *keys: str) -> None:
    """ValueError unless these fields of a policy are numbers from `least` on."""
    for key in keys:
        if not least <= getattr(policy, key) < math.inf:
            raise ValueError(f"scheduler.{key}={getattr(policy, key)}: must be at least {least}")


def _check_k(k: int | None) -> None:
    if k is not None and k < 1:
        raise ValueError(f"scheduler.k={k}: must be at least 1, or null for all instances")
