"""Forecasts: exact where the future is known, the same compressed as step by step, and by hand where it is guessed."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from random import Random
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from testbed import (
    COMPILED,
    constant_latency,
    engine_config,
    examples,
    lone_engine,
    poisson,
    predictor_for,
    request,
    round_latency,
    simulate,
)

from block.core.snapshot import (
    EXPECTED,
    FIELDS,
    ID,
    MAX_TOKENS,
    NUM_BLOCKS,
    NUM_COMPUTED_TOKENS,
    NUM_OUTPUT_PLACEHOLDERS,
    NUM_OUTPUT_TOKENS,
    NUM_PROMPT_TOKENS,
    NUM_SCHEDULED_TOKENS,
    NUM_SHARED_BLOCKS,
    TARGET,
    Hits,
    Snapshot,
    Snapshots,
)
from block.core.types import Forecast, Request
from block.dispatch.policies import Block
from block.engine.config import EngineConfig
from block.engine.engine import Engine
from block.engine.latency import prefill_time
from block.engine.predictor import OUTRUN_MARGIN, Predictors

KINDS: dict[str, dict[str, Any]] = {
    "v0": {"version": "v0", "watermark": 0.02},
    "v0-unchunked": {
        "version": "v0",
        "watermark": 0.02,
        "enable_chunked_prefill": False,
        "max_num_batched_tokens": 2048,
    },
    "v1": {"version": "v1"},
    "v1-long-prefill": {"version": "v1", "long_prefill_token_threshold": 8},
    "v1-watermark": {"version": "v1", "watermark": 0.1, "scheduler_reserve_full_isl": False},
    "v1-async": {"version": "v1", "async_scheduling": True},
    "v0-few-tokens": {"version": "v0", "watermark": 0.02, "max_num_batched_tokens": 4},
    "v1-few-tokens": {"version": "v1", "max_num_batched_tokens": 4},
}
LATENCY = round_latency()
BLOCKS = 50


def small(kind: str) -> EngineConfig:
    return engine_config(**{"max_model_len": 120, "max_num_seqs": 6, "max_num_batched_tokens": 32} | KINDS[kind])


def busy_engine(
    config: EngineConfig,
    seed: int,
    count: int,
    *,
    truth: bool,
    gap: float = 0.1,
    blocks: int = BLOCKS,
    unruly: bool = False,
) -> tuple[Engine, float, list[Request]]:
    """An engine that has received `count` requests at random times, the time, and which of them it does not show.

    unruly: the model stops before max_tokens, and one client in ten is gone again.
    """
    rng = Random(seed)
    whims = Random(seed + 1)
    engine = lone_engine(config, LATENCY, blocks)
    received = {}
    now = 0.0
    for i in range(count):
        now += rng.expovariate(1 / gap)
        for done in engine.advance(now):
            del received[done.id]
        output = rng.randint(1, 60)
        guess = output if truth else max(1, round(output * rng.uniform(0.3, 1.5)))
        most = output + whims.randint(0, 60) if unruly else None
        received[i] = request(i, rng.randint(1, 90), output, predicted=guess, max_tokens=most)
        engine.add(received[i], now)
        if unruly and whims.random() < 0.1:
            engine.abort(gone := whims.choice(list(received)), now)
            del received[gone]
    now += rng.expovariate(1 / gap)
    for done in engine.advance(now):
        del received[done.id]
    visible = set(engine.snapshot(0, now).seqs[ID].tolist())
    return engine, now, [one for one in received.values() if one.id not in visible]


def forecasts(
    config: EngineConfig,
    snapshots: Sequence[Snapshot],
    in_transit: Sequence[Sequence[Request]],
    one: Request,
    now: float,
    *,
    compressed: bool = True,
    blocks: int = BLOCKS,
) -> list[Forecast]:
    return predictor_for(config, LATENCY, blocks, compressed=compressed).forecasts(snapshots, in_transit, one, now)


def approx(forecast: Forecast) -> Any:
    return pytest.approx(forecast, rel=1e-9, abs=1e-12)


# ---------------------------------------------------------------------------------------------------- by hand


def test_an_idle_instance_by_hand() -> None:
    predictor = predictor_for(engine_config("v1"), constant_latency(0.5), 16)
    idle = lone_engine(engine_config("v1"), constant_latency(0.5), 16).snapshot(0, 10.0)
    # 20 tokens in chunks of 16 and 4; the second yields the first of three tokens.
    assert predictor.forecasts([idle], [[]], request(9, 20, 99, predicted=3), 10.0) == [Forecast(1.0, 2.0)]


def test_the_step_in_flight_is_finished_first() -> None:
    config = engine_config("v1")
    engine = lone_engine(config, constant_latency(1.0), 16)
    engine.add(request(0, 4, 3), 10.0)
    # At 10.25 the step in flight has 0.75 s to go; then the candidate's prompt runs beside 0's decode, then a decode.
    (forecast,) = predictor_for(config, constant_latency(1.0), 16).forecasts(
        [engine.snapshot(0, 10.25)], [[]], request(1, 4, 2), 10.25
    )
    assert forecast == Forecast(1.75, 2.75)


def test_a_step_that_should_have_ended_ends_now() -> None:
    config = engine_config("v1")
    engine = lone_engine(config, constant_latency(1.0), 16, noise=np.array([3.0]))
    engine.add(request(0, 4, 3), 0.0)
    # The model says that the step ended at 1.0. It has not by 2.0, so it is expected at any moment.
    (forecast,) = predictor_for(config, constant_latency(1.0), 16).forecasts(
        [engine.snapshot(0, 2.0)], [[]], request(1, 4, 2), 2.0
    )
    assert forecast == Forecast(1.0, 2.0)


@pytest.mark.parametrize("compressed", [True, False])
def test_an_outrun_estimate_becomes_what_is_there_plus_the_margin(compressed: bool) -> None:
    config = engine_config("v1", max_num_seqs=1)
    engine = lone_engine(config, constant_latency(1.0), 16)
    engine.add(request(0, 4, 50, predicted=2), 0.0)
    list(engine.advance(5.0))
    snapshot = engine.snapshot(0, 5.0)
    assert snapshot.seqs[NUM_OUTPUT_TOKENS].tolist() == [5]
    # 5 of 2 expected tokens are there. At 5 + OUTRUN_MARGIN tokens it makes way, and the candidate has one step to run.
    predictor = predictor_for(config, constant_latency(1.0), 16, compressed=compressed)
    assert predictor.forecasts([snapshot], [[]], request(1, 4, 1), 5.0) == [Forecast(11.0, 11.0)]
    assert OUTRUN_MARGIN == 10


def test_an_estimate_that_is_just_reached_is_outrun_too() -> None:
    config = engine_config("v1", max_num_seqs=1)
    engine = lone_engine(config, constant_latency(1.0), 16)
    engine.add(request(0, 4, 50, predicted=5), 0.0)
    list(engine.advance(4.0))
    predictor = predictor_for(config, constant_latency(1.0), 16)
    assert predictor.forecasts([engine.snapshot(0, 4.0)], [[]], request(1, 4, 1), 4.0) == [Forecast(2.0, 2.0)]
    list(engine.advance(5.0))
    assert predictor.forecasts([engine.snapshot(0, 5.0)], [[]], request(1, 4, 1), 5.0) == [Forecast(11.0, 11.0)]


@pytest.mark.parametrize(("share", "more"), [(0.0, 10), (0.25, 10), (0.5, 20), (1.0, 40)])
def test_an_outrun_estimate_goes_on_for_a_share_of_what_is_there_and_the_margin_at_least(
    share: float, more: int
) -> None:
    config = engine_config("v1", max_num_seqs=1, max_model_len=200)
    engine = lone_engine(config, constant_latency(1.0), 60)
    engine.add(request(0, 4, 100, predicted=2), 0.0)
    list(engine.advance(40.0))
    snapshot = engine.snapshot(0, 40.0)
    assert snapshot.seqs[NUM_OUTPUT_TOKENS].tolist() == [40]
    plain = predictor_for(config, constant_latency(1.0), 60)
    for predictor in (
        predictor_for(config, constant_latency(1.0), 60, outrun_share=share),
        plain.with_outrun_share(share),
    ):
        assert predictor.forecasts([snapshot], [[]], request(1, 4, 1), 40.0) == [Forecast(more + 1.0, more + 1.0)]
    assert plain.forecasts([snapshot], [[]], request(1, 4, 1), 40.0) == [Forecast(11.0, 11.0)]


@pytest.mark.parametrize("guess", [0, 1])
def test_an_estimate_below_one_token_counts_as_one(guess: int) -> None:
    predictor = predictor_for(engine_config("v1"), constant_latency(1.0), 16)
    idle = lone_engine(engine_config("v1"), constant_latency(1.0), 16).snapshot(0, 0.0)
    assert predictor.forecasts([idle], [[]], request(9, 4, 9, predicted=guess), 0.0) == [Forecast(1.0, 1.0)]


def test_requests_in_transit_go_first() -> None:
    config = engine_config("v1", max_num_seqs=1)
    predictor = predictor_for(config, constant_latency(1.0), 16)
    idle = lone_engine(config, constant_latency(1.0), 16).snapshot(0, 0.0)
    in_transit = [request(1, 4, 3), request(2, 4, 9, predicted=2)]
    # One at a time: 3 steps, 2 steps (as tagged, not in truth), then the candidate's one.
    assert predictor.forecasts([idle], [in_transit], request(3, 4, 1), 0.0) == [Forecast(6.0, 6.0)]


def test_the_true_length_plays_no_part() -> None:
    config = small("v0")
    engine, now, _ = busy_engine(config, 3, 12, truth=False)
    snapshot = engine.snapshot(0, now)
    lied = snapshot._replace(seqs=snapshot.seqs.copy())
    lied.seqs[[TARGET, MAX_TOKENS]] = 1
    one = request(99, 30, 20)
    assert forecasts(config, [snapshot], [[]], one, now) == forecasts(config, [lied], [[]], one, now)


def test_a_forecast_leaves_its_snapshot_alone() -> None:
    config = small("v0")
    engine, now, _ = busy_engine(config, 3, 12, truth=True)
    snapshot = engine.snapshot(0, now)
    before = snapshot.seqs.copy()
    forecasts(config, [snapshot], [[request(50, 5, 5)]], request(99, 30, 20), now)
    np.testing.assert_array_equal(snapshot.seqs, before)


# ---------------------------------------------------------------------------------------------------- exact


def actual(engine: Engine, one: Request, now: float) -> Forecast:
    """What the engine does with `one` if nothing else arrives."""
    engine.add(one, now)
    (done,) = [done for done in engine.advance(1e9) if done.id == one.id]
    return Forecast(done.first_token - now, done.finished - now)


@pytest.mark.parametrize("compressed", [True, False])
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=examples(150, 5))
@given(seed=st.integers(0, 10**6), count=st.integers(0, 25), prompt=st.integers(1, 100), output=st.integers(1, 80))
def test_with_true_lengths_a_forecast_is_what_then_happens(
    kind: str, compressed: bool, seed: int, count: int, prompt: int, output: int
) -> None:
    config = small(kind)
    engine, now, in_transit = busy_engine(config, seed, count, truth=True)
    snapshot = engine.snapshot(0, now)
    one = request(999, prompt, output)
    (forecast,) = forecasts(config, [snapshot], [in_transit], one, now, compressed=compressed)
    preempted = snapshot.seqs[:, snapshot.running : snapshot.running + snapshot.stale]
    lost = bool(((preempted[NUM_SCHEDULED_TOKENS] > 0) & (preempted[NUM_OUTPUT_PLACEHOLDERS] == 0)).any())
    happened = actual(engine, one, now)
    if lost:
        # What a sequence preempted in the middle of its prefill reads in the step in flight is not in the snapshot any
        # more: that step, and so every later one, is expected earlier by the attention of that chunk.
        late = happened.ttft - forecast.ttft
        assert happened.e2e - forecast.e2e == pytest.approx(late, rel=1e-6)
        assert -1e-9 < late < 0.02
    elif compressed:
        assert forecast == approx(happened)
    else:
        assert forecast == happened


@pytest.mark.parametrize("compressed", [True, False])
def test_a_forecast_is_exact_when_v0_preempts_a_prompt_with_one_token_left(compressed: bool) -> None:
    """A corner that random states seldom hit; what happens there is in the tests of the scheduler."""
    config = engine_config("v0", max_num_batched_tokens=4, max_model_len=8)
    engine = lone_engine(config, LATENCY, 3)
    engine.add(request(1, 3, 5), 0.0)
    one = request(2, 4, 2)
    (forecast,) = forecasts(config, [engine.snapshot(0, 0.0)], [[]], one, 0.0, compressed=compressed, blocks=3)
    assert forecast == approx(actual(engine, one, 0.0))


# ---------------------------------------------------------------------------------------------- compressed = naive


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=examples(400, 6))
@given(
    seed=st.integers(0, 10**6),
    count=st.integers(0, 40),
    gap=st.sampled_from([0.02, 0.1, 0.5]),
    truth=st.booleans(),
    blocks=st.sampled_from([34, 50, 120]),
    lengths=st.tuples(st.integers(1, 110), st.integers(1, 130)),
    in_transit=st.lists(st.tuples(st.integers(1, 100), st.integers(1, 60)), max_size=4),
    unruly=st.booleans(),
)
def test_compressed_and_step_by_step_forecasts_are_the_same(
    kind: str,
    seed: int,
    count: int,
    gap: float,
    truth: bool,
    blocks: int,
    lengths: tuple[int, int],
    in_transit: list[tuple[int, int]],
    unruly: bool,
) -> None:
    config = small(kind)
    engine, now, extra = busy_engine(config, seed, count, truth=truth, gap=gap, blocks=blocks, unruly=unruly)
    extra += [request(1000 + i, p, o) for i, (p, o) in enumerate(in_transit)]
    snapshot = engine.snapshot(0, now)
    one = request(9999, *lengths)
    fast, slow = (
        forecasts(config, [snapshot], [extra], one, now, compressed=compressed, blocks=blocks)[0]
        for compressed in (True, False)
    )
    assert fast == approx(slow)
    assert 0 < fast.ttft <= fast.e2e


@pytest.mark.parametrize("kind", ["v0", "v1", "v1-async"])
def test_forecasts_are_the_same_under_preemption_with_long_sequences(kind: str) -> None:
    config = EngineConfig(max_model_len=2000, max_num_seqs=24, **KINDS[kind])
    latency = round_latency()
    fast, slow = (predictor_for(config, latency, 180, compressed=compressed) for compressed in (True, False))
    preempted = 0
    for seed in range(examples(6, 1)):
        rng = Random(seed)
        engine = lone_engine(config, latency, 180)
        now = 0.0
        for i in range(examples(120, 20)):
            now += rng.expovariate(4.0)
            list(engine.advance(now))
            output = 1 + int(rng.expovariate(1 / 300)) % 900
            guess = max(1, output - rng.randint(-50, 50))
            one = request(i, 1 + int(rng.expovariate(1 / 100)) % 1000, output, predicted=guess)
            snapshot = [engine.snapshot(0, now)]
            assert fast.forecasts(snapshot, [[]], one, now)[0] == approx(slow.forecasts(snapshot, [[]], one, now)[0])
            engine.add(one, now)
        preempted += engine.snapshot(0, now).preemptions
    assert preempted > examples(50, -1), "memory is too plentiful for this test to say anything"


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_is_its_members_one_by_one(kind: str) -> None:
    config = small(kind)
    engines = [busy_engine(config, seed, 3 * seed, truth=False) for seed in range(9)]
    now = max(at for _, at, _ in engines)
    for engine, _, _ in engines:
        list(engine.advance(now))
    snapshots = [engine.snapshot(i, now) for i, (engine, _, _) in enumerate(engines)]
    in_transit = [[request(100 + j, 10 + j, 5 + i) for j in range(i % 3)] for i in range(9)]
    one = request(999, 40, 30)
    predictor = predictor_for(config, LATENCY, BLOCKS)
    together = predictor.forecasts(snapshots, in_transit, one, now)
    alone = [predictor.forecasts([s], [u], one, now)[0] for s, u in zip(snapshots, in_transit, strict=True)]
    fresh = [forecasts(config, [s], [u], one, now)[0] for s, u in zip(snapshots, in_transit, strict=True)]
    assert together == alone == fresh
    assert together[::-1] == predictor.forecasts(snapshots[::-1], in_transit[::-1], one, now)
    assert len(set(together)) > 1


# ---------------------------------------------------------------------------------------------------- whole runs


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["v0", "v1", "v1-async"])
def test_all_decisions_of_a_run_are_the_same(kind: str) -> None:
    config = EngineConfig(max_model_len=1000, max_num_seqs=24, **KINDS[kind])
    requests = poisson(examples(1500, 30), 12.0, 5, prompt=200, output=100)
    runs = [
        simulate(
            requests,
            Block(),
            config=config,
            latency=LATENCY,
            instances=4,
            total_blocks=300,
            noise=0.05,
            delay_s=0.02,
            compressed=compressed,
        )
        for compressed in (True, False)
    ]
    assert runs[0].chosen == runs[1].chosen
    assert [r.finished for r in runs[0].records] == [r.finished for r in runs[1].records]
    for fast, slow in zip(runs[0].records, runs[1].records, strict=True):
        assert fast.forecast is not None
        assert slow.forecast is not None
        assert fast.forecast == approx(slow.forecast)
    if len(requests) > 1000:
        assert sum(r.preemptions for r in runs[0].records) > 100


def test_instances_that_differ_go_on_alike_and_those_alike_share_a_predictor() -> None:
    config = engine_config("v1", max_num_seqs=1, max_model_len=200)
    engine = lone_engine(config, constant_latency(1.0), 60)
    engine.add(request(0, 4, 100, predicted=2), 0.0)
    list(engine.advance(40.0))
    fast, slow = (predictor_for(config, constant_latency(seconds), 60) for seconds in (1.0, 2.0))
    several = Predictors([fast, slow, fast]).with_outrun_share(0.5)
    shown = [engine.snapshot(i, 40.0) for i in range(3)]
    found = several.forecasts(shown, [[], [], []], request(1, 4, 1), 40.0)
    assert [one.e2e for one in found] == [21.0, 42.0, 21.0]
    assert several._of[0] is several._of[2]


# ------------------------------------------------------------------------------------------------------ prefix caching


class Sharing:
    """An engine with a prefix cache that is busy with prompts that begin alike, at time `now`, and some that may come.

    in_transit: what it has received and does not show; held: hits of all that it received, when they came.
    """

    def __init__(self, seed: int, blocks: int) -> None:
        self.now, self.held = 0.0, {}
        self.coming: list[Request] = []
        self.config = replace(small("v1"), enable_prefix_caching=True, max_model_len=200)
        self.engine = lone_engine(self.config, LATENCY, blocks)
        received = {}
        for one, gap in self._requests(Random(seed)):
            if one.id >= 30:
                self.coming.append(one)
                continue
            self.now += gap
            for done in self.engine.advance(self.now):
                received.pop(done.id)
            self.held[one.id] = self.hits(one)
            self.engine.add(one, self.now)
            received[one.id] = one
        visible = set(self.engine.snapshot(0, self.now).seqs[ID].tolist())
        self.in_transit = [one for one in received.values() if one.id not in visible]

    @staticmethod
    def _requests(rng: Random) -> Iterator[tuple[Request, float]]:
        said: list[list[int]] = [[], []]
        number = 0
        for i in range(40):
            begin = list(rng.choice(said))[: rng.randint(0, 30)]
            prompt, output = 4 * len(begin) + rng.randint(1, 40), rng.randint(1, 40)
            hashes = begin + [(number := number + 1) for _ in range((prompt + output) // 4 - len(begin))]
            if prompt + output <= 190:
                said.append(hashes[: prompt // 4])  # nobody goes on from what is not yet said
                yield (
                    replace(request(i, prompt, output), block_hashes=np.array(hashes, dtype=np.int64)),
                    rng.expovariate(9.0),
                )

    def hits(self, one: Request) -> tuple[int, int]:
        assert one.block_hashes is not None
        blocks, shared = self.engine.batch.cached_blocks([0], one.block_hashes, (one.prompt_tokens - 1) // 4, self.now)[
            0
        ].tolist()
        return 4 * blocks, shared

    def shown(self, one: Request) -> Snapshots:
        shown = Snapshots.of([self.engine.snapshot(0, self.now)])
        shown.hits = Hits(np.array([self.hits(one)]), self.held)
        return shown


def test_hits_are_those_that_the_engine_then_has() -> None:
    hits = 0
    for seed in range(examples(40, 2)):
        busy = Sharing(seed, 400)
        busy.engine.advance(1e6)
        for one in busy.coming:
            copy = busy.engine.copy()
            copy.add(one, 1e6)
            (done,) = copy.advance(math.inf)
            assert done.cached_tokens == busy.hits(one)[0]
            hits += done.cached_tokens > 0
    assert hits > examples(100, 5)


@pytest.mark.parametrize(("blocks", "median", "mean"), [(400, 0.0, 0.002), (90, 0.012, 0.08)])
def test_with_its_hits_a_forecast_is_near_what_then_happens(blocks: int, median: float, mean: float) -> None:
    """Nearly exact where memory is plentiful, and to a few per cent where blocks are lost on the way."""
    errors, without = [], []
    for seed in range(examples(60, 2)):
        busy = Sharing(seed, blocks)
        predictor = predictor_for(busy.config, LATENCY, blocks)
        for one in busy.coming:
            shown = busy.shown(one)
            (forecast,) = predictor.forecasts(shown, [busy.in_transit], one, busy.now)
            shown.hits = None
            (blind,) = predictor.forecasts(shown, [busy.in_transit], one, busy.now)
            happened = actual(busy.engine.copy(), one, busy.now)
            errors.append(np.abs(np.divide(forecast, happened) - 1))
            without.append(np.abs(np.divide(blind, happened) - 1))
    if COMPILED:  # else there are too few for that
        assert (np.median(errors, axis=0) <= median + 1e-9).all()
        assert (np.mean(errors, axis=0) < mean).all()
        assert np.mean(without, axis=0)[0] > 0.2


@pytest.mark.parametrize("blocks", [55, 90, 400])
def test_compressed_and_step_by_step_forecasts_with_hits_are_the_same(blocks: int) -> None:
    """Under preemption too, and where those who shared blocks have left."""
    preempted = 0
    for seed in range(examples(60, 2)):
        busy = Sharing(seed, blocks)
        preempted += int(busy.engine.snapshot(0, busy.now).preemptions)
        for one in busy.coming[:4]:
            shown = busy.shown(one)
            (quick,), (stepped,) = (
                predictor_for(busy.config, LATENCY, blocks, compressed=compressed).forecasts(
                    shown, [busy.in_transit], one, busy.now
                )
                for compressed in (True, False)
            )
            assert quick == approx(stepped)
            assert math.isfinite(quick.e2e)
    assert preempted or blocks > 55 or not COMPILED


def test_a_forecast_frees_all_blocks_though_those_who_shared_them_have_left() -> None:
    """A sequence was admitted sharing 60 of 62 blocks; the other one has ended. It gives back all of them."""
    config = replace(small("v1"), enable_prefix_caching=True, max_model_len=300)
    seqs = np.zeros((FIELDS, 1), dtype=np.int64)
    seqs[[NUM_PROMPT_TOKENS, EXPECTED, NUM_OUTPUT_TOKENS, NUM_COMPUTED_TOKENS], 0] = 240, 10, 5, 245
    seqs[[NUM_BLOCKS, NUM_SHARED_BLOCKS, NUM_SCHEDULED_TOKENS, NUM_OUTPUT_PLACEHOLDERS], 0] = 62, 60, 1, 1
    shown = Snapshot(0, 0.0, 0.0, 1, 0, 38, 0, seqs)
    (forecast,) = predictor_for(config, LATENCY, 100).forecasts([shown], [[]], request(1, 200, 5), 0.0)
    assert math.isfinite(forecast.e2e)


def test_work_is_the_compute_of_what_is_not_cached() -> None:
    config = replace(small("v1"), enable_prefix_caching=True)
    idle = Snapshots.of(
        [Snapshot(i, 0.0, math.nan, 0, 0, BLOCKS, 0, np.zeros((FIELDS, 0), dtype=np.int64)) for i in (0, 1)]
    )
    idle.hits = Hits(np.array([(0, 0), (40, 3)]), {})
    found = predictor_for(config, LATENCY, BLOCKS).forecasts(idle, [[], []], request(1, 80, 5), 0.0)
    chunk = LATENCY.linear[32]
    attention = [prefill_time(LATENCY.pack(), 32, context) for context in (0, 32, 40)]
    last = [prefill_time(LATENCY.pack(), tokens, context) for tokens, context in ((16, 64), (8, 72))]
    assert found.work == pytest.approx(
        [2.5 * chunk + attention[0] + attention[1] + last[0], 1.25 * chunk + attention[2] + last[1]]
    )
    assert found.ttft[1] < found.ttft[0]
    plain = predictor_for(small("v1"), LATENCY, BLOCKS).forecasts(idle, [[], []], request(1, 80, 5), 0.0)
    assert plain.work == [0.0, 0.0]
