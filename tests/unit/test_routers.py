"""The routers of today, and Block's price: a case worked by hand for each."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from block.core.snapshot import (
    FIELDS,
    NUM_BLOCKS,
    NUM_CACHED_TOKENS,
    NUM_COMPUTED_TOKENS,
    NUM_PROMPT_TOKENS,
    Hits,
    Snapshot,
    Snapshots,
)
from block.core.types import Decision, Forecasts, Request, Views
from block.dispatch.policies import BlockCache, Policy
from block.dispatch.prefixes import Sent
from block.dispatch.routers import LLMD, AIBrix, CacheAware, Dynamo, LMetric, Preble, Sticky


def asked(*hashes: int, prompt: int | None = None, output: int = 10, session: int | None = None) -> Request:
    """A request whose prompt has blocks of 16 tokens with these hashes."""
    tokens = 16 * len(hashes) if prompt is None else prompt
    return Request(1, 0.0, tokens, output, output, session=session, block_hashes=np.array(hashes, dtype=np.int64))


def snapshot(
    instance_id: int,
    free: int = 100,
    running: Sequence[tuple[int, int, int]] = (),
    waiting: Sequence[tuple[int, int]] = (),
) -> Snapshot:
    """Running sequences are (prompt, computed, blocks), waiting ones (prompt, cached)."""
    seqs = np.zeros((FIELDS, len(running) + len(waiting)), dtype=np.int64)
    for i, row in enumerate(running):
        seqs[[NUM_PROMPT_TOKENS, NUM_COMPUTED_TOKENS, NUM_BLOCKS], i] = row
    for i, row in enumerate(waiting, len(running)):
        seqs[[NUM_PROMPT_TOKENS, NUM_CACHED_TOKENS], i] = row
    return Snapshot(instance_id, 0.0, 0.0, len(running), 0, free, 0, seqs)


def views(
    outstanding: Sequence[int],
    *,
    shown: Sequence[Snapshot] | None = None,
    cached: Sequence[int] = (),
    in_transit: dict[int, list[Request]] | None = None,
    forecasts: Forecasts | None = None,
) -> Views:
    count = len(outstanding)
    snapshots = None
    if shown is not None or forecasts is not None:
        snapshots = Snapshots.of(shown or [snapshot(i) for i in range(count)])
        snapshots.hits = Hits(np.array([(tokens, 0) for tokens in cached or [0] * count]), {})
    on_the_way = [(in_transit or {}).get(i, []) for i in range(count)]
    return Views(list(range(count)), on_the_way, list(outstanding), [0] * count, snapshots, forecasts)


def choose(policy: Policy, request: Request, seen: Views, seed: int = 0) -> Decision:
    return policy.choose(request, seen, random.Random(seed))


# ------------------------------------------------------------------------------------------------------ what was sent


def test_what_was_sent_is_known_from_its_first_block_on_and_forgotten_from_its_last() -> None:
    sent = Sent(5)
    sent.add([1, 2, 3], 0)
    assert [sent.match(hashes, 0) for hashes in ([1, 2, 3, 4], [1, 9], [9, 8], [])] == [3, 1, 0, 0]
    assert sent.match([1], 1) == 0
    sent.add([7, 8, 9], 0)
    assert sent.blocks(0) == 5
    assert [sent.match([1, 2, 3], 0), sent.match([7, 8, 9], 0)] == [2, 3]
    sent.add([1, 2], 0)
    sent.add([6], 0)
    assert [sent.match([1, 2], 0), sent.match([7, 8, 9], 0)] == [2, 2]


# ------------------------------------------------------------------------------------------------------- cache_aware


def test_cache_aware_takes_the_match_if_loads_are_balanced() -> None:
    policy = CacheAware()
    first = choose(policy, asked(1, 2, 3, 4), views([0, 0, 0])).instance_id
    busy = [0, 0, 0]
    busy[first] = 60
    assert choose(policy, asked(1, 2, 9, 9), views(busy)).instance_id == first  # half of it, above 0.3
    busy[first] = 65
    assert choose(policy, asked(1, 2, 9, 9), views(busy)).instance_id != first
    policy = CacheAware()
    first = choose(policy, asked(1, 2, 3, 4), views([0, 0, 0])).instance_id
    busy = [200] * 3
    busy[first] = 290  # 90 more, but not 1.5 times as many
    assert choose(policy, asked(1, 2, 9, 9), views(busy)).instance_id == first


def test_cache_aware_takes_the_emptiest_tree_if_too_little_matches() -> None:
    policy = CacheAware()
    first = choose(policy, asked(1, 2, 3, 4), views([0, 0])).instance_id
    other = choose(policy, asked(5, 6), views([0, 0])).instance_id
    assert other != first
    assert choose(policy, asked(1, 8, 9, 10), views([0, 0])).instance_id == other  # a quarter matches, with 4 against 2


# --------------------------------------------------------------------------------------------------------------- llmd


def test_llmd_weighs_prefix_memory_and_queue() -> None:
    policy = LLMD()
    choose(policy, asked(1), views([0, 0], shown=[snapshot(0, 100), snapshot(1, 200)]))  # idle: all is free
    shown = [snapshot(0, 50, waiting=[(5, 0)]), snapshot(1, 50)]
    decision = choose(policy, asked(*range(1, 11)), views([0, 0], shown=shown, cached=[80, 0]))
    assert decision.scores == pytest.approx([-(2 * 0.5 + 50 / 100 + 0), -(0 + 50 / 200 + 1)])
    assert decision.instance_id == 0
    heavier = LLMD(prefix=1.0)
    heavier.choose(asked(1), views([0, 0], shown=[snapshot(0, 100), snapshot(1, 200)]), random.Random(0))
    assert choose(heavier, asked(*range(1, 11)), views([0, 0], shown=shown, cached=[80, 0])).instance_id == 1


def test_llmd_counts_equal_queues_as_short() -> None:
    shown = [snapshot(0, 100, waiting=[(5, 0)]), snapshot(1, 100, waiting=[(5, 0)])]
    assert choose(LLMD(), asked(1), views([0, 0], shown=shown)).scores == [-2.0, -2.0]


# ------------------------------------------------------------------------------------------------------------- dynamo


def test_dynamo_adds_blocks_to_prefill_and_to_decode() -> None:
    shown = [
        snapshot(0, running=[(64, 32, 2), (16, 20, 3)]),  # 32 tokens left of a prompt, 5 blocks in use
        snapshot(1, waiting=[(80, 48)]),
    ]
    decision = choose(Dynamo(), asked(*range(1, 9)), views([0, 0], shown=shown, cached=[96, 0]))
    assert decision.scores == [(32 + 32) / 16 + 5 + 8, (128 + 32) / 16 + 5 + 8]
    weighed = choose(Dynamo(overlap_weight=3.0), asked(*range(1, 9)), views([0, 0], shown=shown, cached=[96, 0]))
    assert weighed.scores == [3 * 4 + 13, 3 * 10 + 13]


def test_dynamo_draws_by_softmax_if_it_has_a_temperature() -> None:
    shown = [snapshot(i, running=[(16, 20, 10 * i)]) for i in range(3)]
    drawn = Counter(
        choose(Dynamo(temperature=0.5), asked(1), views([0] * 3, shown=shown), seed).instance_id for seed in range(3000)
    )
    weights = np.exp([-0.0, -1.0, -2.0])  # costs 0, 1/2 and 1 once scaled, over 0.5
    assert [drawn[i] / 3000 for i in range(3)] == pytest.approx((weights / weights.sum()).tolist(), abs=0.03)
    with pytest.raises(ValueError, match=r"scheduler\.temperature=-1"):
        Dynamo(temperature=-1)


# ------------------------------------------------------------------------------------------------------------ lmetric


def test_lmetric_multiplies_tokens_to_prefill_by_the_batch() -> None:
    shown = [snapshot(0, running=[(64, 32, 2), (16, 20, 3)]), snapshot(1, waiting=[(80, 48)])]
    on = {1: [Request(2, 0.0, 40, 1, 1)]}
    decision = choose(LMetric(), asked(*range(1, 9)), views([0, 0], shown=shown, cached=[96, 0], in_transit=on))
    assert decision.scores == [(32 + 32) * 3, (128 + 32 + 40) * 3]


# ------------------------------------------------------------------------------------------------------------- aibrix


def test_aibrix_takes_the_longest_match_that_is_not_too_loaded() -> None:
    policy = AIBrix()
    for one, outstanding in ((asked(1, 2, 3, 4), [1, 0, 1]), (asked(1, 2), [0, 1, 1])):
        choose(policy, one, views(outstanding))  # none matches, or the one that does is not loaded
    assert choose(policy, asked(1, 2, 3, 4), views([0, 0, 0])).instance_id == 1
    # Requests 2, 8 and 2: mean 4, standard deviation 2.8; 8 is above the sum.
    assert choose(policy, asked(1, 2, 3, 4), views([2, 8, 2])).instance_id != 1
    assert choose(policy, asked(9), views([3, 2, 1])).instance_id == 2
    assert choose(policy, asked(1, 2, 3, 4), views([9, 0, 9])).instance_id == 1  # 9 apart: the least loaded


# ------------------------------------------------------------------------------------------------------------- preble


def test_preble_exploits_what_is_more_than_half_there_and_else_explores() -> None:
    policy = Preble(decode_cost=0.0, imbalance=1.5)
    choose(policy, asked(1, 2, 3, 4), views([0, 0]))  # 64 tokens of load
    assert choose(policy, asked(1, 2, 9), views([0, 0])).scores.count(-math.inf) == 0  # 64 + 16 against 48
    policy = Preble(decode_cost=0.0, imbalance=10.0)
    first = choose(policy, asked(1, 2, 3, 4), views([0, 0])).instance_id
    assert choose(policy, asked(1, 2, 9), views([0, 0])).instance_id == first
    assert choose(policy, asked(1, 7, 8, 9), views([0, 0])).instance_id != first  # a quarter: 80 + 48 against 64


def test_preble_forgets_the_load_of_long_ago() -> None:
    policy = Preble(window=1, decode_cost=1.0)
    first = choose(policy, asked(1, output=100), views([0, 0])).instance_id
    second = choose(policy, asked(2, output=5), views([0, 0])).instance_id
    assert second != first
    assert choose(policy, asked(3), views([0, 0])).instance_id == first


# ------------------------------------------------------------------------------------------------------------- sticky


def test_sticky_keeps_a_session_where_it_is_until_that_is_too_loaded() -> None:
    policy = Sticky()
    homes = [choose(policy, asked(session=i, prompt=10), views([0] * 5)).instance_id for i in range(400)]
    assert homes == [choose(policy, asked(session=i, prompt=10), views([3] * 5)).instance_id for i in range(400)]
    assert all(40 < homes.count(i) < 130 for i in range(5))
    loaded = [2] * 5
    loaded[homes[0]] = 3  # of 11 requests, the new one counted, 1.25 times the mean is 2.75: at most 3
    assert choose(policy, asked(session=0, prompt=10), views(loaded)).instance_id != homes[0]


def test_sticky_goes_by_the_first_tokens_where_no_session_is_known() -> None:
    policy = Sticky(tokens=32)
    one, other = (choose(policy, asked(1, 2, *rest), views([0] * 50)).instance_id for rest in ((3,), (4, 5)))
    assert one == other
    homes = {choose(policy, asked(1, i), views([0] * 50)).instance_id for i in range(2, 40)}
    assert len(homes) > 10
    alone = {choose(policy, Request(i, 0.0, 9, 9, 9), views([0] * 50)).instance_id for i in range(40)}
    assert len(alone) > 10


# -------------------------------------------------------------------------------------------------------- block_cache


def test_block_cache_prices_work_by_congestion_and_by_those_there() -> None:
    forecasts = Forecasts([1.0, 2.0], [5.0, 6.0], [0.5, 0.1])
    seen = views([30, 10], forecasts=forecasts)
    assert choose(BlockCache(kappa=0.0, gamma=0.0, others=0.0), asked(1), seen).scores == [5.0, 6.0]
    priced = choose(BlockCache(kappa=4.0, gamma=0.3, others=0.0), asked(1), seen)
    assert priced.scores == pytest.approx([5.0 + (4 + 0.3 * 20.5) * 0.5, 6.0 + (4 + 0.3 * 20.5) * 0.1])
    assert priced.instance_id == 1
    theirs = choose(BlockCache(kappa=0.0, gamma=0.0, others=0.1, aim="ttft"), asked(1), seen)
    assert theirs.scores == pytest.approx([1.0 + 0.1 * 31 * 0.5, 2.0 + 0.1 * 11 * 0.1])


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"kappa": -1.0}, r"scheduler\.kappa=-1"),
        ({"gamma": math.inf}, r"scheduler\.gamma=inf"),
        ({"others": -0.1}, r"scheduler\.others=-0\.1"),
        ({"aim": "tpot"}, r"scheduler\.aim=tpot: choose e2e or ttft"),
        ({"k": 0}, r"scheduler\.k=0"),
    ],
)
def test_block_cache_is_checked(change: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        BlockCache(**change)


@pytest.mark.parametrize("policy", [LLMD(), Dynamo(), LMetric(), AIBrix()])
def test_where_nothing_is_known_of_prompts_a_router_goes_by_load(policy: Any) -> None:
    idle = [snapshot(0, 180), snapshot(1, 180)]
    choose(policy, Request(99, 0.0, 9, 5, 5), views([0, 0], shown=idle))
    shown = [snapshot(0, 60, running=[(64, 70, 40)] * 3), snapshot(1, 180)]
    seen = views([9, 1], shown=shown)
    assert {choose(policy, Request(i, 0.0, 90, 5, 5), seen, i).instance_id for i in range(1, 9)} == {1}


@pytest.mark.parametrize("policy", [CacheAware(), Preble(decode_cost=0.0)])
def test_where_nothing_is_known_of_prompts_a_router_goes_by_what_it_sent(policy: Any) -> None:
    chosen = [choose(policy, Request(i, 0.0, 90, 5, 5), views([0, 0]), i).instance_id for i in range(20)]
    assert chosen.count(0) == 10


@pytest.mark.parametrize(
    ("kind", "key", "least"),
    [
        *[(kind, "block_size", 1) for kind in (CacheAware, Dynamo, AIBrix, Preble, Sticky)],
        *[(CacheAware, key, 0) for key in ("cache_threshold", "balance_abs_threshold", "balance_rel_threshold")],
        *[(LLMD, key, 0) for key in ("prefix", "kv", "queue")],
        *[(Dynamo, key, 0) for key in ("overlap_weight", "temperature")],
        *[(AIBrix, key, 0) for key in ("imbalance", "load_factor")],
        *[(Preble, key, 1) for key in ("window", "imbalance")],
        (Preble, "decode_cost", 0),
        *[(Sticky, key, 1) for key in ("load_factor", "tokens", "points")],
    ],
)
@pytest.mark.parametrize("wrong", [-1, math.nan, math.inf])
def test_numbers_are_checked(kind: Any, key: str, least: int, wrong: float) -> None:
    kind(**{key: least})
    with pytest.raises(ValueError, match=rf"scheduler\.{key}={wrong}: must be at least {least}"):
        kind(**{key: wrong})
