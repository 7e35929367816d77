"""The engine: its settings, how long its steps take, what it tells of the future and what it publishes."""

from __future__ import annotations

import math
from dataclasses import replace
from random import Random
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import ReferenceScheduler
from testbed import constant_latency, engine_config, examples, lone_engine, next_finish, request, round_latency

from block.core.snapshot import EXPECTED, ID, NUM_PROMPT_TOKENS
from block.core.types import Request
from block.engine.batch import Finished
from block.engine.config import EngineConfig
from block.engine.engine import Engine
from block.engine.scheduler import complete_step
from block.engine.state import ALL_PREEMPTIONS, BEGIN, END

KINDS: dict[str, dict[str, Any]] = {
    "v0": {"version": "v0", "watermark": 0.02},
    "v0-unchunked": {"version": "v0", "watermark": 0.02, "enable_chunked_prefill": False},
    "v1": {"version": "v1"},
    "v1-async": {"version": "v1", "async_scheduling": True},
}


def tokens(kind: str, budget: int) -> int:
    """The token budget of a step: without chunks, it must hold any prompt."""
    return 100 if kind == "v0-unchunked" else budget


# ---------------------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("changes", "key", "advice"),
    [
        ({"version": "v2"}, "engine.version=v2", "v0 or v1"),
        ({"max_num_seqs": 0}, "engine.max_num_seqs=0", "at least 1"),
        ({"max_num_batched_tokens": 0}, "engine.max_num_batched_tokens=0", "at least 1"),
        ({"num_gpu_blocks": 0}, "engine.num_gpu_blocks=0", "at least 1"),
        ({"block_size": 12}, "engine.block_size=12", "power of two"),
        ({"max_model_len": 1}, "engine.max_model_len=1", "at least 2"),
        ({"long_prefill_token_threshold": -1}, "engine.long_prefill_token_threshold=-1", "0 or more"),
        ({"watermark": 1.0}, "engine.watermark=1.0", "less than 1"),
        ({"watermark": -0.1}, "engine.watermark=-0.1", "at least 0"),
        ({"gpu_memory_utilization": 0.0}, "engine.gpu_memory_utilization=0.0", "(0, 1]"),
        ({"version": "v0", "async_scheduling": True}, "engine.async_scheduling=True", "v1"),
        ({"version": "v1", "enable_chunked_prefill": False}, "engine.enable_chunked_prefill=False", "take v0"),
        ({"enable_chunked_prefill": False}, "engine.max_num_batched_tokens=512", "at least 4096"),
    ],
)
def test_a_wrong_setting_is_refused_by_name(changes: dict[str, Any], key: str, advice: str) -> None:
    with pytest.raises(ValueError, match=r"engine\.") as refused:
        EngineConfig(**changes)
    assert key in str(refused.value)
    assert advice in str(refused.value)
    assert "\n" not in str(refused.value)


def test_an_engine_must_hold_its_longest_sequence_above_the_watermark() -> None:
    config = EngineConfig(max_model_len=160, block_size=16, watermark=0.5)  # 10 blocks, and half of all
    with pytest.raises(ValueError, match=r"num_gpu_blocks=18: .*max_model_len=160 tokens needs 19 KV blocks"):
        lone_engine(config, constant_latency(), 18)
    lone_engine(config, constant_latency(), 20)


def test_v0_needs_a_block_more_than_its_longest_sequence_even_without_a_watermark() -> None:
    """Without it a lone sequence that holds them all would preempt itself, be admitted again, and so on for ever."""
    config = engine_config("v0", max_model_len=32, max_num_batched_tokens=8)  # 8 blocks of 4
    with pytest.raises(ValueError, match=r"num_gpu_blocks=8: .* needs 9 KV blocks"):
        lone_engine(config, constant_latency(), 8)
    engine = lone_engine(config, constant_latency(), 9)
    engine.add(request(0, 30, 2), 0.0)
    assert next_finish(engine) == 5.0  # four chunks, a decode
    lone_engine(engine_config("v1", max_model_len=32), constant_latency(), 8)


def test_v1_needs_no_more_than_its_longest_sequence_whatever_the_watermark() -> None:
    """It does not count for a sequence that is alone."""
    config = engine_config("v1", max_model_len=32, watermark=0.5)
    engine = lone_engine(config, constant_latency(), 8)
    engine.add(request(0, 30, 9), 0.0)
    assert next_finish(engine) == 3.0  # two chunks, a decode


@pytest.mark.parametrize("prompt", [60, 61])
def test_a_prompt_that_leaves_no_room_for_a_response_is_refused(prompt: int) -> None:
    engine = lone_engine(engine_config("v1", max_model_len=60), constant_latency(), 16)
    with pytest.raises(ValueError, match=rf"^request 7: a prompt of {prompt} tokens .* engine\.max_model_len=60$"):
        engine.add(request(7, prompt, 5), 0.0)
    engine.add(request(8, 59, 5), 0.0)
    assert [done.id for done in engine.advance(99.0)] == [8]


# ---------------------------------------------------------------------------------------------------- time


def crowd(seed: int, count: int, spread: float) -> list[Request]:
    rng = Random(seed)
    arrival = 0.0
    requests = []
    for i in range(count):
        arrival += rng.expovariate(1 / spread)
        requests.append(request(i, rng.randint(1, 50), rng.randint(1, 40), arrival))
    return requests


def through_engine(engine: Engine, requests: list[Request]) -> list[Finished]:
    finished: list[Finished] = []
    for one in requests:
        finished += engine.advance(one.arrival)
        engine.add(one, one.arrival)
    finished += engine.advance(1e9)
    return finished


def through_reference(
    config: EngineConfig, blocks: int, requests: list[Request], noise: list[float]
) -> list[tuple[int, float, float, int, int]]:
    reference = ReferenceScheduler(config, blocks)
    pending = list(requests)
    steps = 0
    ends = math.inf

    def started(now: float) -> float:
        nonlocal steps
        if reference.in_flight is None:
            return math.inf
        steps += 1
        return now + reference.in_flight.seconds * noise[(steps - 1) % len(noise)]

    while pending or reference.busy:
        if pending and pending[0].arrival < ends:
            one = pending.pop(0)
            reference.add(one)
            if not reference.busy:
                reference.begin()
                ends = started(one.arrival)
        else:
            now = ends
            reference.complete(now)
            ends = started(now)
    return reference.finished


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("noise", [[1.0], [1.5, 0.5, 1.0, 2.0, 0.75]])
def test_steps_take_what_the_latency_model_says_times_their_noise(kind: str, noise: list[float]) -> None:
    config = engine_config(**KINDS[kind], max_model_len=100, max_num_seqs=8, max_num_batched_tokens=tokens(kind, 40))
    for seed in range(examples(10, 2)):
        requests = crowd(seed, 60, 0.4)
        engine = lone_engine(config, round_latency(), 50, np.array(noise))
        actual = through_engine(engine, requests)
        expected = through_reference(config, 50, requests, noise)
        assert [done.id for done in actual] == [done[0] for done in expected]
        assert [done[3:5] for done in actual] == [done[3:] for done in expected]
        for done, wanted in zip(actual, expected, strict=True):
            assert done.first_token == pytest.approx(wanted[1], rel=1e-9)
            assert done.finished == pytest.approx(wanted[2], rel=1e-9)


def test_a_lone_request_by_hand() -> None:
    # 20 tokens in chunks of 16 and 4, then two decodes over 21 and 22 tokens of KV.
    first = 0.010 + 16 * 0.001 + 16 * (0.0001 + 0 * 0.000001)
    second = 0.010 + 4 * 0.001 + 4 * (0.0001 + 16 * 0.000001)
    decode = [0.010 + 0.001 + 0.002 + 0.0005 + kv * 0.00001 for kv in (21, 22)]
    engine = lone_engine(engine_config("v1"), round_latency(), 16)
    engine.add(request(7, 20, 3), 5.0)
    (done,) = engine.advance(100.0)
    assert done.first_token == pytest.approx(5.0 + first + second, rel=1e-12)
    assert done.finished == pytest.approx(5.0 + first + second + sum(decode), rel=1e-12)


# ---------------------------------------------------------------------------------------------------- the future


def test_an_idle_engine_expects_nothing() -> None:
    engine = lone_engine(engine_config("v1"), constant_latency(), 16)
    assert next_finish(engine) == math.inf
    assert list(engine.advance(100.0)) == []
    snapshot = engine.snapshot(3, 100.0)
    assert (snapshot.instance_id, snapshot.taken_at, snapshot.running, snapshot.free_blocks) == (3, 100.0, 0, 16)
    assert math.isnan(snapshot.step_started)
    assert snapshot.seqs.shape[1] == 0


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=examples(60, 4))
@given(seed=st.integers(0, 10**6), spread=st.sampled_from([0.05, 0.3, 2.0]))
def test_next_finish_is_what_then_happens(kind: str, seed: int, spread: float) -> None:
    config = engine_config(**KINDS[kind], max_model_len=100, max_num_seqs=6, max_num_batched_tokens=tokens(kind, 32))
    engine = lone_engine(config, round_latency(), 40, np.array([1.0, 1.2, 0.9]))
    requests = crowd(seed, 30, spread)
    while requests:
        if next_finish(engine) < requests[0].arrival:
            promised = next_finish(engine)
            assert next_finish(engine) == promised, "looking ahead changes nothing"
            assert list(engine.advance(np.nextafter(promised, 0.0))) == []
            assert {done.finished for done in engine.advance(promised)} == {promised}
        else:
            one = requests.pop(0)
            assert list(engine.advance(one.arrival)) == []
            engine.add(one, one.arrival)


@pytest.mark.parametrize("kind", KINDS)
def test_looking_often_or_seldom_makes_no_difference(kind: str) -> None:
    config = engine_config(**KINDS[kind], max_model_len=100, max_num_seqs=6, max_num_batched_tokens=tokens(kind, 32))
    requests = crowd(1, 40, 0.3)
    seldom = through_engine(lone_engine(config, round_latency(), 40), requests)
    engine = lone_engine(config, round_latency(), 40)
    often: list[Finished] = []
    last = 0.0
    for one in requests:
        for now in np.linspace(last, one.arrival, 5).tolist():
            often += engine.advance(now)
            engine.snapshot(0, now)
            next_finish(engine)
        engine.add(one, one.arrival)
        last = one.arrival
    often += engine.advance(1e9)
    assert often == seldom


def plainly(engine: Engine, until: float, most: int = 10**6) -> list[Finished]:
    """What `advance` does, every step by the scheduler itself."""
    found = 0
    while engine.step_ends <= until and engine.step_ends < math.inf and found < most:
        found = int(complete_step(engine.state, found))
    engine.batch.look_ahead(0)
    return list(engine.batch.finished(0, found))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("blocks", [26, 160])
@pytest.mark.parametrize("spread", [0.05, 0.6])
def test_runs_of_decoding_leave_every_number_as_plain_steps_do(kind: str, blocks: int, spread: float) -> None:
    """Bit for bit: an engine may take many steps at once, but nobody can tell."""
    config = engine_config(**KINDS[kind], max_model_len=100, max_num_seqs=6, max_num_batched_tokens=tokens(kind, 32))
    noise = np.array([1.0, 1.2, 0.9])
    preemptions = 0
    for seed in range(examples(20, 1)):
        engine, plain = (lone_engine(config, round_latency(), blocks, noise) for _ in range(2))

        def look(now: float, engine: Engine = engine, plain: Engine = plain) -> None:
            assert list(engine.advance(now)) == plainly(plain, now)
            np.testing.assert_array_equal(engine.state.counters, plain.state.counters)
            np.testing.assert_array_equal(engine.state.times, plain.state.times)
            assert engine.next_event == plain.next_event
            live = slice(engine.state.counters[BEGIN], engine.state.counters[END])
            np.testing.assert_array_equal(engine.state.seqs[:, live], plain.state.seqs[:, live])
            np.testing.assert_array_equal(engine.state.first_token_time[live], plain.state.first_token_time[live])
            ahead = plainly(plain.copy(), math.inf, 1)
            assert next_finish(engine) == (ahead[0].finished if ahead else math.inf)

        last = 0.0
        for one in crowd(seed, 40, spread):
            for now in np.linspace(last, one.arrival, 4).tolist():
                look(now)
            engine.add(one, one.arrival)
            plain.add(one, one.arrival)
            last = one.arrival
        look(last + 1.0)
        look(1e9)
        preemptions += int(engine.state.counters[ALL_PREEMPTIONS])
    assert (preemptions > 0) == (blocks == 26)


def test_finishes_come_in_order_of_time_and_once() -> None:
    config = engine_config("v0", watermark=0.02, max_model_len=100, max_num_seqs=6, max_num_batched_tokens=32)
    finished = through_engine(lone_engine(config, round_latency(), 60), crowd(2, 100, 0.2))
    times = [done.finished for done in finished]
    assert times == sorted(times)
    assert sorted(done.id for done in finished) == list(range(100))


# ---------------------------------------------------------------------------------------------------- what it shows


def test_a_snapshot_shows_what_the_scheduler_knew_when_it_last_ran() -> None:
    engine = lone_engine(engine_config("v1"), constant_latency(), 16)
    engine.add(request(1, 5, 4, predicted=6), 0.0)
    engine.add(request(2, 7, 2), 0.25)
    before = engine.snapshot(0, 0.5)
    assert before.seqs[ID].tolist() == [1]
    assert before.seqs[NUM_PROMPT_TOKENS].tolist() == [5]
    assert before.seqs[EXPECTED].tolist() == [6]
    assert before.step_started == 0.0
    list(engine.advance(1.0))
    after = engine.snapshot(0, 1.0)
    assert after.seqs[ID].tolist() == [1, 2]
    assert (after.running, after.step_started) == (2, 1.0)


def test_an_engine_holds_any_number_of_sequences() -> None:
    config = engine_config("v1", max_num_seqs=3)
    engine = lone_engine(config, constant_latency(), 16)
    finished: list[Finished] = []
    ids = 0
    for wave in range(4):  # queues of 300 and more, emptied in between, so that columns are used again
        for _ in range(300):
            engine.add(request(ids, 1 + ids % 7, 1 + ids % 3), wave * 1000.0)
            ids += 1
        assert engine.snapshot(0, wave * 1000.0).running <= 3
        finished += engine.advance(wave * 1000.0 + 999.0)
    assert [done.id for done in sorted(finished)] == list(range(ids))
    assert [done.output_tokens for done in sorted(finished)] == [1 + i % 3 for i in range(ids)]
    assert engine.snapshot(0, 4000.0).free_blocks == 16


# ------------------------------------------------------------------------------------------------------- prefix cache


def cached_run(requests: list[Request], blocks: int = 40, **changes: Any) -> list[Finished]:
    """What an engine with a prefix cache finishes of these requests; all its blocks are free afterwards."""
    config = engine_config("v1", enable_prefix_caching=True, **changes)
    engine = lone_engine(config, constant_latency(), blocks)
    found: list[Finished] = []
    for one in requests:
        found += engine.advance(one.arrival)
        engine.add(one, one.arrival)
    found += engine.advance(math.inf)
    assert engine.snapshot(0, 1e6).free_blocks == blocks
    return found


def hashed(one: Request, *hashes: int) -> Request:
    return replace(one, block_hashes=np.array(hashes, dtype=np.int64))


def test_a_prompt_that_was_there_before_is_not_computed_again_but_for_its_last_block() -> None:
    first = hashed(request(0, 16, 2), 1, 2, 3, 4)
    again = hashed(request(1, 16, 2, 5.0), 1, 2, 3, 4)
    assert [one.cached_tokens for one in cached_run([first, again])] == [0, 12]  # of 4 blocks of 4 tokens, all but one


def test_a_response_is_found_again_as_the_next_prompt_s_beginning() -> None:
    first = hashed(request(0, 8, 9), 1, 2, 3, 4)  # 16 of its 17 tokens are computed
    following = hashed(request(1, 20, 2, 20.0), 1, 2, 3, 4, 5)
    assert [one.cached_tokens for one in cached_run([first, following])] == [0, 16]


def test_what_was_used_longest_ago_is_lost_first_and_a_tail_before_its_head() -> None:
    old, new = hashed(request(0, 12, 1), 1, 2, 3), hashed(request(1, 12, 1, 5.0), 4, 5, 6)
    large = request(2, 16, 1, 10.0)  # takes all but two cached blocks: 10 − 4 − 6 free
    of_old, of_new = hashed(request(3, 13, 1, 15.0), 1, 2, 3), hashed(request(4, 13, 1, 20.0), 4, 5, 6)
    found = cached_run([old, new, replace(large, prompt_tokens=28), of_new, of_old], blocks=10, max_model_len=40)
    assert [one.cached_tokens for one in found][3:] == [12, 0]


def test_requests_that_share_need_less_memory() -> None:
    alike = [hashed(request(i, 33, 4, 40.0 * (i > 0)), *range(1, 9)) for i in range(4)]
    apart = [request(i, 33, 4, 40.0 * (i > 0)) for i in range(4)]
    times = [[one.finished for one in cached_run(some, blocks=16)] for some in (alike, apart)]
    assert max(times[0]) < max(times[1])


@pytest.mark.parametrize("asynchronous", [False, True])
def test_where_nothing_is_shared_a_cache_changes_nothing(asynchronous: bool) -> None:
    rng = np.random.default_rng(3)
    requests = [request(i, int(rng.integers(1, 40)), int(rng.integers(1, 19)), 2.0 * i) for i in range(200)]
    config = engine_config("v1", async_scheduling=asynchronous)
    plain = lone_engine(config, constant_latency(), 400)
    for one in requests:
        plain.advance(one.arrival)
        plain.add(one, one.arrival)
    last = plain.advance(math.inf)
    assert last == cached_run(requests, blocks=400, async_scheduling=asynchronous)[-len(last) :]


def test_records_of_many_sequences_are_made_room_for() -> None:
    requests = [hashed(request(i, 40, 10, 7.0 * i), *range(50 * i + 1, 50 * i + 11)) for i in range(300)]
    assert len(cached_run(requests)) == 300
