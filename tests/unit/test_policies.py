"""Every policy on hand-made views: scores worked out by hand, ties, samples, and what happens without a forecast."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest

from block.core.snapshot import (
    EXPECTED,
    FIELDS,
    NUM_COMPUTED_TOKENS,
    NUM_OUTPUT_TOKENS,
    NUM_PROMPT_TOKENS,
    TARGET,
    Snapshot,
)
from block.core.types import Decision, Forecast, InstanceView, Request
from block.dispatch.policies import (
    Block,
    INFaaS,
    LeastRequests,
    LeastTokens,
    LlumnixMinus,
    MinQPM,
    Needs,
    Policy,
    Random,
    RoundRobin,
)

REQUEST = Request(100, 0.0, 50, 60, 70)
ALL = [Random(), RoundRobin(), MinQPM(), LeastRequests(), INFaaS(), LlumnixMinus(), LeastTokens(), Block()]


def snapshot(
    instance_id: int, free: int = 100, running: Sequence[tuple[int, int, int, int]] = (), waiting: Sequence[tuple] = ()
) -> Snapshot:
    """Sequences are (prompt, output, expected, computed)."""
    columns = [*running, *waiting]
    seqs = np.zeros((FIELDS, len(columns)), dtype=np.int64)
    for i, (prompt, output, expected, computed) in enumerate(columns):
        seqs[[NUM_PROMPT_TOKENS, NUM_OUTPUT_TOKENS, EXPECTED, NUM_COMPUTED_TOKENS, TARGET], i] = (
            prompt,
            output,
            expected,
            computed,
            9999,
        )
    return Snapshot(instance_id, 0.0, 0.0, len(running), 0, free, 0, seqs)


def view(
    instance_id: int,
    *,
    in_transit: Sequence[Request] = (),
    outstanding: int = 0,
    recent: int = 0,
    seen: Snapshot | None = None,
    forecast: Forecast | None = None,
) -> InstanceView:
    return InstanceView(instance_id, in_transit, outstanding, recent, seen, forecast)


def choose(policy: Policy, views: Sequence[InstanceView], seed: int = 0) -> Decision:
    return policy.choose(REQUEST, views, random.Random(seed))


# ---------------------------------------------------------------------------------------------------- all of them


@pytest.mark.parametrize("policy", ALL, ids=lambda p: type(p).__name__)
def test_a_decision_names_its_candidates_and_a_score_for_each(policy: Policy) -> None:
    candidates = list(policy.candidates(5, 3, random.Random(0)))
    assert set(candidates) <= set(range(5))
    assert len(set(candidates)) == len(candidates) > 0
    views = [view(i, seen=snapshot(i), forecast=Forecast(1.0, 2.0)) for i in candidates]
    decision = choose(policy, views)
    assert list(decision.candidates) == candidates
    assert len(decision.scores) == len(candidates)
    assert decision.instance_id in candidates
    assert decision.fallback is None


@pytest.mark.parametrize("policy", ALL, ids=lambda p: type(p).__name__)
def test_the_same_stream_makes_the_same_choice(policy: Policy) -> None:
    def run(seed: int) -> list[int]:
        rng = random.Random(seed)
        chosen = []
        for index in range(20):
            candidates = policy.candidates(6, index, rng)
            views = [view(i, seen=snapshot(i), forecast=Forecast(1.0, 2.0)) for i in candidates]
            chosen.append(policy.choose(REQUEST, views, rng).instance_id)
        return chosen

    assert run(4) == run(4)


@pytest.mark.parametrize("policy", ALL[2:], ids=lambda p: type(p).__name__)
def test_ties_are_broken_evenly(policy: Policy) -> None:
    views = [view(i, seen=snapshot(i), forecast=Forecast(1.0, 2.0)) for i in range(4)]
    rng = random.Random(1)
    counts = Counter(policy.choose(REQUEST, views, rng).instance_id for _ in range(4000))
    # 1,000 each, standard deviation 27.
    assert all(abs(counts[i] - 1000) < 110 for i in range(4))


@pytest.mark.parametrize("policy", ALL, ids=lambda p: type(p).__name__)
def test_a_policy_reads_all_that_it_says_it_needs_and_nothing_more(policy: Policy) -> None:
    shown = {
        Needs.COUNTS: [view(i) for i in range(3)],
        Needs.SNAPSHOT: [view(i, seen=snapshot(i)) for i in range(3)],
        Needs.FORECAST: [view(i, seen=snapshot(i), forecast=Forecast(1.0, 2.0)) for i in range(3)],
    }
    enough = list(shown).index(policy.needs)
    for much, views in enumerate(shown.values()):
        try:
            chosen = choose(policy, views).fallback is None
        except (AssertionError, AttributeError):
            chosen = False
        assert chosen == (much >= enough)


# ---------------------------------------------------------------------------------------------------- without looking


def test_random_asks_one_instance_each_as_often() -> None:
    rng = random.Random(2)
    counts: Counter[int] = Counter()
    for index in range(4000):
        (candidate,) = Random().candidates(4, index, rng)
        counts[Random().choose(REQUEST, [view(candidate)], rng).instance_id] += 1
    assert all(abs(counts[i] - 1000) < 110 for i in range(4))


def test_round_robin_takes_turns() -> None:
    chosen = [list(RoundRobin().candidates(3, index, random.Random(0))) for index in range(7)]
    assert chosen == [[0], [1], [2], [0], [1], [2], [0]]
    assert choose(RoundRobin(), [view(2)]).instance_id == 2


# ---------------------------------------------------------------------------------------------------- by counts


def test_min_qpm_takes_the_fewest_of_the_last_minute() -> None:
    decision = choose(MinQPM(), [view(0, recent=7), view(1, recent=5, outstanding=99), view(2, recent=6)])
    assert decision == Decision(1, [0, 1, 2], [7.0, 5.0, 6.0])


def test_least_requests_takes_the_fewest_outstanding() -> None:
    decision = choose(
        LeastRequests(), [view(0, outstanding=3, recent=1), view(1, outstanding=4), view(2, outstanding=2)]
    )
    assert decision == Decision(2, [0, 1, 2], [3.0, 4.0, 2.0])


# ---------------------------------------------------------------------------------------------------- power of k


@pytest.mark.parametrize("kind", [LeastRequests, Block])
def test_k_candidates_are_drawn_without_repetition_and_evenly(kind: type) -> None:
    rng = random.Random(3)
    counts: Counter[int] = Counter()
    for index in range(3000):
        candidates = kind(k=2).candidates(6, index, rng)
        assert len(set(candidates)) == len(candidates) == 2
        counts.update(candidates)
    assert all(abs(counts[i] - 1000) < 110 for i in range(6))


@pytest.mark.parametrize("kind", [LeastRequests, Block])
@pytest.mark.parametrize("k", [None, 3, 4, 100])
def test_a_k_of_all_or_more_asks_everybody(kind: type, k: int | None) -> None:
    assert list(kind(k=k).candidates(3, 0, random.Random(0))) == [0, 1, 2]


@pytest.mark.parametrize("kind", [LeastRequests, Block])
def test_k_must_be_positive(kind: type) -> None:
    with pytest.raises(ValueError, match=r"scheduler\.k=0: must be at least 1"):
        kind(k=0)


# ---------------------------------------------------------------------------------------------------- by snapshot


def test_infaas_takes_the_most_free_blocks_for_each_running_request() -> None:
    one = (10, 1, 20, 11)
    views = [
        view(0, seen=snapshot(0, free=90, running=[one, one, one])),  # 30 each
        view(1, seen=snapshot(1, free=80, running=[one, one])),  # 40 each
        view(2, seen=snapshot(2, free=35)),  # 35: nobody counts as one
        view(3, seen=snapshot(3, free=39, running=[one], waiting=[one] * 9)),  # 39: who waits does not count
    ]
    assert choose(INFaaS(), views) == Decision(1, [0, 1, 2, 3], [-30.0, -40.0, -35.0, -39.0])


def test_llumnix_subtracts_what_the_waiting_will_want() -> None:
    one = (10, 1, 20, 11)
    views = [
        # 64 − (⌈33/16⌉ = 3) = 61 over 2 running.
        view(0, seen=snapshot(0, free=64, running=[one, one], waiting=[(33, 0, 9, 0)])),
        # A preempted one wants prompt and output back: ⌈(30 + 3)/16⌉ = 3; 34 − 3 = 31 over 1.
        view(1, seen=snapshot(1, free=34, running=[one], waiting=[(30, 3, 9, 0)])),
        # Underway: ⌈16/16⌉ + ⌈17/16⌉ = 3; 33 − 3 = 30 over one that is not there.
        view(2, seen=snapshot(2, free=33), in_transit=[Request(1, 0.0, 16, 9, 9), Request(2, 0.0, 17, 9, 9)]),
        # More wanted than free: 1 − 2 = −1.
        view(3, seen=snapshot(3, free=1, running=[one], waiting=[(20, 0, 9, 0)])),
    ]
    assert choose(LlumnixMinus(), views) == Decision(1, [0, 1, 2, 3], [-30.5, -31.0, -30.0, 1.0])


def test_llumnix_counts_in_blocks_of_its_size() -> None:
    views = [view(0, seen=snapshot(0, free=50, waiting=[(33, 0, 9, 0)]))]
    assert choose(LlumnixMinus(block_size=8), views).scores == [-45.0]


def test_least_tokens_counts_what_is_left_of_prompts_and_expected_responses() -> None:
    views = [
        # (100 + 50 − 120) + (40 + 10 − 0) = 80
        view(0, seen=snapshot(0, running=[(100, 21, 50, 120)], waiting=[(40, 0, 10, 0)])),
        # One that has outrun its estimate counts nothing, not less: 0; in transit 30 + 45 = 75
        view(1, seen=snapshot(1, running=[(10, 91, 20, 100)]), in_transit=[Request(1, 0.0, 30, 999, 45)]),
        view(2, seen=snapshot(2, running=[(10, 1, 70, 4)])),  # 76
    ]
    assert choose(LeastTokens(), views) == Decision(1, [0, 1, 2], [80.0, 75.0, 76.0])


# ---------------------------------------------------------------------------------------------------- by forecast


def test_block_takes_the_least_predicted_latency_to_the_last_token() -> None:
    forecasts = [Forecast(0.1, 3.0), Forecast(1.5, 2.0), Forecast(0.2, 2.5)]
    decision = choose(Block(), [view(i, forecast=forecast) for i, forecast in enumerate(forecasts)])
    assert decision == Decision(1, [0, 1, 2], [3.0, 2.0, 2.5])


@pytest.mark.parametrize("missing", [None, Forecast(math.nan, math.nan)])
def test_an_instance_without_a_forecast_is_not_chosen_while_another_has_one(missing: Forecast | None) -> None:
    decision = choose(Block(), [view(0, forecast=missing), view(1, forecast=Forecast(1.0, 500.0))])
    assert decision == Decision(1, [0, 1], [math.inf, 500.0])


@pytest.mark.parametrize("missing", [None, Forecast(math.nan, math.nan)])
def test_with_no_forecast_at_all_the_choice_is_random_and_says_so(missing: Forecast | None) -> None:
    rng = random.Random(5)
    views = [view(i, forecast=missing) for i in range(3)]
    decisions = [Block().choose(REQUEST, views, rng) for _ in range(60)]
    assert {decision.fallback for decision in decisions} == {"no forecast"}
    assert {decision.instance_id for decision in decisions} == {0, 1, 2}
    assert decisions[0].scores == [math.inf] * 3
