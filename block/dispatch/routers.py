"""The cache-aware routers of today, from what is published of them, on Block's view of the instances.

They know prefixes in two ways. *Precise*: what each instance has in its cache (`InstanceView.cached_tokens`), as from
KV events. *Approximate*: what was sent there before (`Sent`). Constants are the defaults of their sources.
"""

from __future__ import annotations

import math
import random
from bisect import bisect_left
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha256
from typing import ClassVar, final

import numpy as np

from block.core.snapshot import (
    NUM_BLOCKS,
    NUM_CACHED_TOKENS,
    NUM_COMPUTED_TOKENS,
    NUM_PROMPT_TOKENS,
)
from block.core.types import Decision, InstanceView, Request, Views
from block.dispatch.policies import Needs, check_at_least, least, snapshots_of
from block.dispatch.prefixes import Sent

REMEMBERED = 1 << 20
"""Blocks of an instance that an approximate router remembers: 2^26 characters, at 4 a token."""


def prompt_hashes(request: Request, block_size: int) -> list[int]:
    """The hashes of the full blocks of a prompt; numbers that no other has, if nothing is known of it."""
    if request.block_hashes is None:
        return [-(request.id << 24) - i - 1 for i in range(request.prompt_tokens // block_size)]
    return request.block_hashes[: request.prompt_tokens // block_size].tolist()  # type: ignore[no-any-return]


class _AsksAll:
    """Every instance is a candidate."""

    def candidates(self, instances: int, request_index: int, rng: random.Random) -> Sequence[int]:
        return range(instances)


@dataclass
class _GoesByWhatItSent(_AsksAll):
    """Scores follow from what was sent to each instance. block_size: tokens of the blocks that are remembered."""

    block_size: int = 16
    needs: ClassVar[Needs] = Needs.COUNTS

    def __post_init__(self) -> None:
        check_at_least(self, 1, "block_size")
        self._sent = Sent(REMEMBERED)

    def choose(self, request: Request, views: Sequence[InstanceView], rng: random.Random) -> Decision:
        """Scores: those of `_scores`."""
        seen = Views.of(views)
        hashes = prompt_hashes(request, self.block_size)
        matched = [self._sent.match(hashes, one) * self.block_size for one in seen.ids]
        decision = least(views, self._scores(request, seen, matched), rng)
        chosen = decision.instance_id
        self._sent.add(hashes, chosen)
        self._placed(request, chosen, request.prompt_tokens - matched[list(seen.ids).index(chosen)])
        return decision

    def forget(self, instance_id: int) -> None:
        """It is gone."""
        self._sent.drop(instance_id)

    def _scores(self, request: Request, seen: Views, matched: Sequence[int]) -> list[float]:
        """One for each instance. matched: tokens of the prompt that were sent there."""
        raise NotImplementedError

    def _placed(self, request: Request, instance_id: int, unmatched: int) -> None:
        """It was chosen. unmatched: tokens of the prompt that were not sent there before."""


@final
@dataclass
class CacheAware(_GoesByWhatItSent):
    """SGLang's router and vllm-router: the instance that was sent most of the prompt, while loads are balanced.

    Imbalanced is when the most outstanding requests exceed the least by more than `balance_abs_threshold` and
    `balance_rel_threshold` times: then the least loaded is chosen. Else the best match, if it is more than
    `cache_threshold` of the prompt; else the instance of which least is remembered. (sgl-router's cache_aware policy;
    a tree of 2^26 characters there is 2^20 blocks here, 4 characters a token.)
    """

    cache_threshold: float = 0.3
    balance_abs_threshold: int = 64
    balance_rel_threshold: float = 1.5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, 0, "cache_threshold", "balance_abs_threshold", "balance_rel_threshold")

    def _scores(self, request: Request, seen: Views, matched: Sequence[int]) -> list[float]:
        """Outstanding requests, minus the share of the prompt that was sent there, or blocks remembered."""
        most, fewest = max(seen.outstanding), min(seen.outstanding)
        if most - fewest > self.balance_abs_threshold and most > self.balance_rel_threshold * fewest:
            return list(map(float, seen.outstanding))
        if max(matched) / request.prompt_tokens > self.cache_threshold:
            return [-tokens / request.prompt_tokens for tokens in matched]
        return [float(self._sent.blocks(one)) for one in seen.ids]


@final
@dataclass
class LLMD(_AsksAll):
    """llm-d's scheduler: the highest weighted sum of scores between 0 and 1.

    prefix: share of the prompt that is cached; kv: share of the KV blocks that is free; queue: 1 for the shortest queue
    of waiting requests, 0 for the longest. (Gateway API inference extension, prefix-cache, kv-cache-utilization and
    queue scorers with the max-score picker; the precise prefix scorer.)
    """

    prefix: float = 2.0
    kv: float = 1.0
    queue: float = 1.0
    needs: ClassVar[Needs] = Needs.SNAPSHOT

    def __post_init__(self) -> None:
        check_at_least(self, 0, "prefix", "kv", "queue")
        self._most_free: dict[int, int] = {}  # KV blocks by instance: all of them, once it was idle

    def forget(self, instance_id: int) -> None:
        """It is gone."""
        self._most_free.pop(instance_id, None)

    def choose(self, request: Request, views: Sequence[InstanceView], rng: random.Random) -> Decision:
        """Scores: minus the weighted sum."""
        seen = Views.of(views)
        shown = snapshots_of(seen)
        waiting = [one.seqs.shape[1] - one.running + len(on) for one, on in zip(shown, seen.in_transit, strict=True)]
        longest, shortest = max(waiting), min(waiting)
        scores = []
        for one, cached, queue in zip(shown, seen.cached_tokens, waiting, strict=True):
            total = self._most_free[one.instance_id] = max(self._most_free.get(one.instance_id, 1), one.free_blocks)
            short = (longest - queue) / (longest - shortest) if longest > shortest else 1.0
            prefix = cached / request.prompt_tokens
            scores.append(-(self.prefix * prefix + self.kv * one.free_blocks / total + self.queue * short))
        return least(views, scores, rng)


@final
@dataclass(frozen=True)
class Dynamo(_AsksAll):
    """NVIDIA Dynamo's KV router: the least `overlap_weight` × blocks to prefill + blocks to decode.

    Blocks to prefill: of the request's prompt, less what is cached, and of the prompts that wait there; to decode: in
    use, and of all prompts that wait or go there, this one too. `temperature` 0 takes the least; above, one is drawn by
    softmax of the costs, which are scaled to between 0 and 1. (Its cost function; kv-overlap-score-weight and router-
    temperature.)
    """

    overlap_weight: float = 1.0
    temperature: float = 0.0
    block_size: int = 16
    needs: ClassVar[Needs] = Needs.SNAPSHOT

    def __post_init__(self) -> None:
        check_at_least(self, 0, "overlap_weight", "temperature")
        check_at_least(self, 1, "block_size")

    def choose(self, request: Request, views: Sequence[InstanceView], rng: random.Random) -> Decision:
        """Scores: cost, in blocks; with a temperature, that of the one that was drawn is minus infinity."""
        seen = Views.of(views)
        scores = []
        for one, prefill, on in zip(snapshots_of(seen), _to_prefill(request, seen), seen.in_transit, strict=True):
            queued = int(one.seqs[NUM_PROMPT_TOKENS, one.running :].sum()) + sum(other.prompt_tokens for other in on)
            decode = int(one.seqs[NUM_BLOCKS].sum()) + (queued + request.prompt_tokens) / self.block_size
            scores.append(self.overlap_weight * prefill / self.block_size + decode)
        if self.temperature > 0:
            low, spread = min(scores), max(max(scores) - min(scores), 1e-9)
            weights = [math.exp(-(score - low) / spread / self.temperature) for score in scores]
            drawn = rng.choices(range(len(scores)), weights)[0]
            scores[drawn] = -math.inf
        return least(views, scores, rng)


@final
@dataclass(frozen=True)
class LMetric(_AsksAll):
    """LMetric (arXiv 2603.15202): the least tokens to prefill × requests in the batch, both with the new one."""

    needs: ClassVar[Needs] = Needs.SNAPSHOT

    def choose(self, request: Request, views: Sequence[InstanceView], rng: random.Random) -> Decision:
        """Scores: the product."""
        seen = Views.of(views)
        scores = []
        for one, prefill, on in zip(snapshots_of(seen), _to_prefill(request, seen), seen.in_transit, strict=True):
            scores.append(float(prefill * (one.seqs.shape[1] + len(on) + request.sequences)))
        return least(views, scores, rng)


@final
@dataclass
class AIBrix(_GoesByWhatItSent):
    """AIBrix's prefix-cache routing: of the instances that match, the best one that is not too loaded.

    If outstanding requests differ by more than `imbalance`, the least loaded is chosen. Else the instances are tried
    from the longest match on (then fewest requests), and the first is taken whose requests are at most the mean and
    `load_factor` standard deviations; if none matches, the least loaded. (Its prefix cache aware algorithm.)
    """

    imbalance: int = 8
    load_factor: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, 0, "imbalance", "load_factor")

    def _scores(self, request: Request, seen: Views, matched: Sequence[int]) -> list[float]:
        """Outstanding requests; of the one that is taken for its match minus infinity."""
        load = seen.outstanding
        scores = list(map(float, load))
        if max(load) - min(load) <= self.imbalance:
            most = np.mean(load) + self.load_factor * np.std(load)
            for place in sorted(range(len(load)), key=lambda place: (-matched[place], load[place])):
                if matched[place] > 0 and load[place] <= most:
                    scores[place] = -math.inf
                    break
        return scores


@final
@dataclass
class Preble(_GoesByWhatItSent):
    """Preble's E2 (arXiv 2407.00023): exploit the longest match if it is more than half of the prompt, else explore.

    To explore is to take the instance of least cost: tokens that were to be computed there in the last `window`
    requests, prompts less their matches and responses × `decode_cost`, and this prompt's. To exploit is refused where
    that cost is more than `imbalance` times the least. (Its costs are times from a profile; here they are tokens, a
    response's `decode_cost` times a prompt's.)
    """

    window: int = 1000
    decode_cost: float = 8.0
    imbalance: float = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, 0, "decode_cost")
        check_at_least(self, 1, "window", "imbalance")
        self._latest: deque[tuple[int, float]] = deque()  # instance and cost of the last requests
        self._load: dict[int, float] = {}  # by instance, the sum of these costs

    def forget(self, instance_id: int) -> None:
        """It is gone."""
        super().forget(instance_id)
        self._load.pop(instance_id, None)
        self._latest = deque(one for one in self._latest if one[0] != instance_id)

    def _scores(self, request: Request, seen: Views, matched: Sequence[int]) -> list[float]:
        """Cost, in tokens; of the one that is exploited minus infinity."""
        own = [request.prompt_tokens - tokens for tokens in matched]
        scores = [self._load.get(one, 0.0) + tokens for one, tokens in zip(seen.ids, own, strict=True)]
        best = max(range(len(own)), key=lambda place: (matched[place], -scores[place]))
        if matched[best] > own[best] and scores[best] <= self.imbalance * max(min(scores), 1.0):
            scores[best] = -math.inf
        return scores

    def _placed(self, request: Request, instance_id: int, unmatched: int) -> None:
        """Its cost counts until `window` others have come."""
        cost = request.sequences * (unmatched + self.decode_cost * request.predicted_output_tokens)
        self._load[instance_id] = self._load.get(instance_id, 0.0) + cost
        self._latest.append((instance_id, cost))
        if len(self._latest) > self.window:
            old, spent = self._latest.popleft()
            self._load[old] -= spent


@final
@dataclass(frozen=True)
class Sticky(_AsksAll):
    """Consistent hashing with bounded loads (arXiv 1608.01350) of the session, or of the prompt's first tokens.

    The first instance on the ring from the key's hash on that has at most `load_factor` times the mean of outstanding
    requests, the new one counted. tokens: that are the key where no session is known.
    """

    load_factor: float = 1.25
    tokens: int = 256
    points: int = 100
    block_size: int = 16
    needs: ClassVar[Needs] = Needs.COUNTS

    def __post_init__(self) -> None:
        check_at_least(self, 1, "load_factor", "tokens", "points", "block_size")

    def choose(self, request: Request, views: Sequence[InstanceView], rng: random.Random) -> Decision:
        """Scores: 0 of the one on the ring, 1 of the others."""
        seen = Views.of(views)
        key = request.session
        if key is None:
            hashes = prompt_hashes(request, self.block_size) or [-request.id]
            key = hashes[min(len(hashes), max(self.tokens // self.block_size, 1)) - 1]
        most = math.ceil(self.load_factor * (sum(seen.outstanding) + 1) / len(seen))
        ring = _ring(tuple(seen.ids), self.points)
        begin = bisect_left(ring, (_point(str(key)), -1))
        for _, place in (*ring[begin:], *ring[:begin]):
            if seen.outstanding[place] + 1 <= most:
                return least(views, [float(one != place) for one in range(len(seen))], rng)
        return least(views, list(map(float, seen.outstanding)), rng)


@lru_cache(maxsize=16)
def _ring(ids: tuple[int, ...], points: int) -> tuple[tuple[int, int], ...]:
    """Points of the instances on the ring, with the place of each among `ids`."""
    return tuple(sorted((_point(f"{one}/{i}"), place) for place, one in enumerate(ids) for i in range(points)))


def _point(text: str) -> int:
    return int.from_bytes(sha256(text.encode()).digest()[:8], "big")


def _to_prefill(request: Request, seen: Views) -> list[int]:
    """Tokens of prompts that each instance would have to compute with this one: those that are neither computed there
    nor, of those that wait, cached.
    """
    found = []
    for one, cached, on in zip(snapshots_of(seen), seen.cached_tokens, seen.in_transit, strict=True):
        known = one.seqs[NUM_COMPUTED_TOKENS].copy()
        known[one.running :] = one.seqs[NUM_CACHED_TOKENS, one.running :]
        there = int(np.maximum(one.seqs[NUM_PROMPT_TOKENS] - known, 0).sum())
        found.append(request.prompt_tokens - cached + there + sum(other.prompt_tokens for other in on))
    return found
