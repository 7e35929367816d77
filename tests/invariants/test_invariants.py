"""What holds for every run, whatever the workload, policy, engine and cluster. Hypothesis makes the runs."""

from __future__ import annotations

import math
import os
import random
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from testbed import Run, engine_config, examples, lone_engine, request, round_latency, simulate

from block.core.snapshot import (
    ID,
    NUM_BLOCKS,
    NUM_COMPUTED_TOKENS,
    NUM_OUTPUT_PLACEHOLDERS,
    NUM_OUTPUT_TOKENS,
    NUM_PREEMPTIONS,
    NUM_PROMPT_TOKENS,
    NUM_SCHEDULED_NEXT,
    NUM_SCHEDULED_TOKENS,
    TARGET,
    Snapshot,
)
from block.core.types import Request, RequestRecord, Views
from block.dispatch.config import DispatchConfig
from block.dispatch.core import Dispatcher, Observer
from block.dispatch.policies import (
    Block,
    INFaaS,
    LeastRequests,
    LeastTokens,
    LlumnixMinus,
    MinQPM,
    Policy,
    Random,
    RoundRobin,
)
from block.engine.config import EngineConfig
from block.lengths import Noisy, tag
from block.workload import spec as workload

POLICIES: list[Policy] = [
    Random(),
    RoundRobin(),
    MinQPM(),
    LeastRequests(),
    LeastRequests(k=2),
    INFaaS(),
    LlumnixMinus(block_size=4),
    LeastTokens(),
    Block(),
    Block(k=2),
]
ENGINES: dict[str, dict[str, Any]] = {
    "v0": {"version": "v0", "watermark": 0.03},
    "v0-unchunked": {"version": "v0", "watermark": 0.03, "enable_chunked_prefill": False},
    "v1": {"version": "v1"},
    "v1-long-prefill": {"version": "v1", "long_prefill_token_threshold": 8},
    "v1-async": {"version": "v1", "async_scheduling": True},
}


@dataclass(frozen=True)
class Case:
    """A run, as hypothesis makes one up."""

    policy: Policy
    config: EngineConfig
    instances: int
    total_blocks: int
    requests: tuple[Request, ...]
    options: dict[str, Any]

    def simulate(self, requests: list[Request] | None = None, observers: Sequence[Observer] = ()) -> Run:
        return simulate(
            list(self.requests) if requests is None else requests,
            self.policy,
            config=self.config,
            latency=round_latency(),
            instances=self.instances,
            total_blocks=self.total_blocks,
            observers=observers,
            **self.options,
        )


def crowd(seed: int, count: int, gap: float) -> tuple[Request, ...]:
    rng = random.Random(seed)
    at = 0.0
    requests = []
    for i in range(count):
        at += rng.expovariate(1 / gap) if gap else 0.0
        output = rng.randint(1, 50)
        guess = max(1, round(output * rng.uniform(0.3, 1.6)))
        requests.append(request(i, rng.randint(1, 60), output, at, predicted=guess))
    return tuple(requests)


def workloads(most: int = 40) -> st.SearchStrategy[tuple[Request, ...]]:
    return st.builds(crowd, st.integers(0, 10**6), st.integers(1, most), st.sampled_from([0.0, 0.02, 0.1, 1.0]))


def engine_of(kind: str, seqs: int, tokens: int) -> EngineConfig:
    if kind == "v0-unchunked":
        tokens += 112  # a step must hold any prompt
    return engine_config(**ENGINES[kind], max_model_len=112, max_num_seqs=seqs, max_num_batched_tokens=tokens)


def engines() -> st.SearchStrategy[EngineConfig]:
    return st.builds(
        engine_of,
        st.sampled_from(sorted(ENGINES)),
        st.integers(1, 8),
        st.integers(9, 64),
    )


@st.composite
def cases(draw: st.DrawFn) -> Case:
    return Case(
        draw(st.sampled_from(POLICIES)),
        draw(engines()),
        draw(st.integers(1, 4)),
        draw(st.sampled_from([34, 50, 90])),
        draw(workloads()),
        {
            "seed": draw(st.integers(0, 1000)),
            "noise": draw(st.sampled_from([0.0, 0.1])),
            "delay_s": draw(st.sampled_from([0.0, 0.07])),
            "dispatch": DispatchConfig(draw(st.booleans()), draw(st.sampled_from([0.0, 0.3]))),
        },
    )


def at_every_step(config: EngineConfig, total: int, requests: tuple[Request, ...], see: Callable[..., None]) -> None:
    """Run one engine and call ``see(snapshot, received, finished)`` after every arrival and every few milliseconds."""
    engine = lone_engine(config, round_latency(), total)
    pending = list(requests)
    received: list[Request] = []
    finished: list[int] = []
    time = 0.0
    while pending or len(finished) < len(received):
        time += 0.009  # every step lasts longer
        while pending and pending[0].arrival <= time:
            one = pending.pop(0)
            finished += [done.id for done in engine.advance(one.arrival)]
            engine.add(one, one.arrival)
            received.append(one)
            see(engine.snapshot(0, one.arrival), received, finished)
        finished += [done.id for done in engine.advance(time)]
        see(engine.snapshot(0, time), received, finished)


many = settings(max_examples=examples(100, 20))
some = settings(max_examples=examples(25, 5))  # with a look at every step


# ---------------------------------------------------------------------------------------------------- conservation


@many
@given(case=cases())
def test_requests_are_conserved(case: Case) -> None:
    """INV-1: every request sent is finished, once, with all of its tokens, on the instance that was chosen for it."""
    run = case.simulate()
    assert [record.request for record in run.records] == list(case.requests)
    for record, one in zip(run.records, case.requests, strict=True):
        assert record.status == "ok"
        assert record.output_tokens == min(one.output_tokens, case.config.max_model_len - one.prompt_tokens)
    chosen = {i: decision.instance_id for _, decision, i in run.dispatcher.history.decisions}
    assert len(run.dispatcher.history.decisions) == len(case.requests)
    assert all(record.instance_id == chosen[record.request.id] for record in run.records)
    for engine in run.engines:
        left = engine.snapshot(0, math.inf)
        assert left.seqs.shape[1] == 0
        assert left.free_blocks == case.total_blocks


@some
@given(config=engines(), total=st.sampled_from([34, 50]), requests=workloads(most=16))
def test_kv_blocks_are_conserved_at_every_step(config: EngineConfig, total: int, requests: tuple[Request, ...]) -> None:
    """INV-2: free and held blocks add up to all; a sequence holds what its tokens fill, and who waits holds none."""

    def see(snapshot: Snapshot, received: list[Request], finished: list[int]) -> None:
        seqs, running = snapshot.seqs, snapshot.running
        assert snapshot.free_blocks + seqs[NUM_BLOCKS].sum() == total
        filled = -(-seqs[NUM_COMPUTED_TOKENS] // config.block_size)
        if config.version == "v0":  # a prompt's blocks are there before its tokens
            assert (seqs[NUM_BLOCKS, :running] >= filled[:running]).all()
            assert (
                seqs[NUM_BLOCKS] <= -(-(seqs[NUM_PROMPT_TOKENS] + seqs[NUM_OUTPUT_TOKENS]) // config.block_size)
            ).all()
        else:
            assert (seqs[NUM_BLOCKS, :running] == filled[:running]).all()
        assert (seqs[[NUM_BLOCKS, NUM_COMPUTED_TOKENS], running:] == 0).all()
        # The same for requests: what came in is either out or visible, except what came in during this step.
        visible = seqs[ID].tolist()
        assert len(set(visible)) == len(visible)
        assert set(visible).isdisjoint(finished)
        assert set(visible) | set(finished) <= {one.id for one in received}

    at_every_step(config, total, requests, see)


@many
@given(case=cases())
def test_a_life_goes_forward(case: Case) -> None:
    """INV-3: arrival ≤ dispatched < first token ≤ last token; a token takes a step each, and no step is instant."""
    for record in case.simulate().records:
        assert record.dispatched == pytest.approx(record.request.arrival + case.options["delay_s"], abs=1e-9)
        assert record.request.arrival <= record.dispatched < record.first_token <= record.finished
        shortest = 0.5 * (0.010 + 0.001)  # half of a step with one token
        assert record.finished - record.first_token >= (record.output_tokens - 1) * shortest - 1e-9


@some
@given(config=engines(), total=st.sampled_from([34, 50]), requests=workloads(most=16))
def test_nothing_is_negative_or_over_its_limit(config: EngineConfig, total: int, requests: tuple[Request, ...]) -> None:
    """INV-4: no count is negative; steps, batches and sequences stay within the engine's limits."""

    def see(snapshot: Snapshot, received: list[Request], finished: list[int]) -> None:
        seqs = snapshot.seqs
        assert (seqs >= 0).all()
        assert 0 <= snapshot.free_blocks <= total
        assert 0 <= snapshot.running <= config.max_num_seqs
        assert 0 <= snapshot.stale <= seqs.shape[1] - snapshot.running
        assert snapshot.preemptions >= seqs[NUM_PREEMPTIONS].sum()
        for row in (NUM_SCHEDULED_TOKENS, NUM_SCHEDULED_NEXT):
            assert seqs[row].sum() <= config.max_num_batched_tokens
        assert (seqs[NUM_OUTPUT_TOKENS] < seqs[TARGET]).all()
        assert (seqs[NUM_PROMPT_TOKENS] + seqs[NUM_OUTPUT_TOKENS] < config.max_model_len).all()
        assert (
            seqs[NUM_COMPUTED_TOKENS]
            <= seqs[NUM_PROMPT_TOKENS] + seqs[NUM_OUTPUT_TOKENS] + seqs[NUM_OUTPUT_PLACEHOLDERS]
        ).all()
        assert (seqs[NUM_OUTPUT_PLACEHOLDERS] <= (2 if config.async_scheduling else 1)).all()

    at_every_step(config, total, requests, see)


@some
@given(config=engines(), total=st.sampled_from([34, 50]), requests=workloads(most=16))
def test_work_is_conserved(config: EngineConfig, total: int, requests: tuple[Request, ...]) -> None:
    """INV-5: an engine with an unfinished request is in a step, with a token in it; one without has none."""

    def see(snapshot: Snapshot, received: list[Request], finished: list[int]) -> None:
        idle = math.isnan(snapshot.step_started)
        assert idle == (len(finished) == len(received))
        assert idle == (snapshot.seqs[NUM_SCHEDULED_TOKENS].sum() == 0)

    at_every_step(config, total, requests, see)


# ---------------------------------------------------------------------------------------------------- causality


@many
@given(case=cases(), data=st.data())
def test_a_decision_uses_nothing_of_the_future(case: Case, data: st.DataObject) -> None:
    """INV-6: other requests after the i-th leave decisions, scores and forecasts up to the i-th as they were."""
    i = data.draw(st.integers(0, len(case.requests) - 1))
    past = list(case.requests[: i + 1])
    gap = data.draw(st.sampled_from([0.0, 0.01, 1.0]))
    future = [request(1000 + n, 60, 50, past[-1].arrival + gap) for n in range(data.draw(st.integers(0, 5)))]
    before, after = case.simulate(), case.simulate(past + future)
    assert list(before.dispatcher.history.decisions)[: i + 1] == list(after.dispatcher.history.decisions)[: i + 1]
    for old, new in zip(before.records[: i + 1], after.records[: i + 1], strict=True):
        assert old.forecast == new.forecast


@many
@given(case=cases())
def test_a_decision_does_not_know_true_lengths(case: Case) -> None:
    """INV-6: the true length of the request itself, and of all that no engine has finished, changes no decision."""
    last = case.requests[-1]
    longer = [*case.requests[:-1], replace(last, output_tokens=last.output_tokens + 40)]
    before, after = case.simulate(), case.simulate(longer)
    assert before.dispatcher.history.decisions == after.dispatcher.history.decisions
    assert [r.forecast for r in before.records] == [r.forecast for r in after.records]


# ---------------------------------------------------------------------------------------------------- determinism

SCRIPT = """
import sys
from testbed import engine_config, poisson, round_latency, simulate
from block.dispatch.policies import Block
from block.store.writer import RunWriter
config = engine_config("v0", watermark=0.03, max_model_len=512, max_num_batched_tokens=64)
run = simulate(poisson(120, 4.0, 3, prompt=60, output=40), Block(k=2), config=config, latency=round_latency(),
               instances=3, total_blocks=140, seed=7, noise=0.1, delay_s=0.02)
with RunWriter({"seed": 7}, root=sys.argv[1]) as writer:
    writer.store(run.records, run.dispatcher.history.decisions, {"time": [0.0]})
print(writer.path)
"""


@many
@given(case=cases())
def test_the_same_seed_makes_the_same_run(case: Case) -> None:
    """INV-7: two runs of one configuration are equal to the last bit."""
    first, second = case.simulate(), case.simulate()
    assert first.dispatcher.history.decisions == second.dispatcher.history.decisions
    assert first.records == second.records


def test_the_same_seed_makes_the_same_run_however_python_hashes(tmp_path: Path) -> None:
    """INV-7: another process with another hash seed stores the same requests and the same decisions."""
    folders = []
    for hash_seed in ("1", "2"):
        root = Path(__file__).parents[1]
        environment = os.environ | {"PYTHONHASHSEED": hash_seed, "PYTHONPATH": str(root)}
        command = [sys.executable, "-c", SCRIPT, str(tmp_path / hash_seed)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr
        folders.append(Path(done.stdout.strip()))
    for name in ("requests.parquet", "decisions.parquet"):
        first, second = (pq.read_table(folder / name) for folder in folders)
        assert first.num_rows == 120
        assert first.equals(second), name


# ---------------------------------------------------------------------------------------------------- order


@many
@given(case=cases())
def test_the_clock_never_goes_back(case: Case) -> None:
    """INV-8: decisions are made at the arrivals, in their order, and the clock runs on to the last finish."""
    run = case.simulate()
    times = [at for at, _, _ in run.dispatcher.history.decisions]
    assert times == sorted(times)
    assert times == [one.arrival for one in case.requests]
    assert [i for _, _, i in run.dispatcher.history.decisions] == [one.id for one in case.requests]


@many
@given(case=cases())
def test_events_are_told_in_order_of_time(case: Case) -> None:
    """INV-8: whoever is told of events is never told of an earlier one later."""
    seen: list[float] = []

    class Watching(Observer):
        def placed(self, dispatcher: Dispatcher, record: RequestRecord, views: Views, now: float) -> None:
            seen.append(now)

        def delivered(self, dispatcher: Dispatcher, record: RequestRecord, now: float) -> None:
            seen.append(now)

        def left(self, dispatcher: Dispatcher, record: RequestRecord, now: float) -> None:
            seen.append(now)

    case.simulate(observers=[Watching()])
    assert seen == sorted(seen)
    assert len(seen) == 3 * len(case.requests)


@some
@given(config=engines(), total=st.sampled_from([34, 50]), requests=workloads(most=16))
def test_admission_is_first_come_first_served(config: EngineConfig, total: int, requests: tuple[Request, ...]) -> None:
    """INV-9: an instance admits requests for the first time in the order in which they came."""
    admitted: list[int] = []

    def see(snapshot: Snapshot, received: list[Request], finished: list[int]) -> None:
        for id_ in snapshot.seqs[ID, : snapshot.running].tolist():
            if id_ not in admitted:
                admitted.append(id_)

    at_every_step(config, total, requests, see)
    # A request that comes and goes between two looks is not seen; none does, as a look is shorter than a step.
    assert admitted == [one.id for one in requests]


# ---------------------------------------------------------------------------------------------------- independence


def test_no_policy_moves_what_arrives() -> None:
    """INV-10: arrivals, lengths and estimates are the same whatever policy serves them, and whatever it draws."""
    load = workload.Workload(num_requests=200, qps=5.0, max_total_tokens=1000)
    config = EngineConfig(max_model_len=1000)
    seen = []
    for policy in POLICIES:
        requests = tag(workload.generate(load, 3), Noisy(), 3)
        run = simulate(requests, policy, config=config, latency=round_latency(), instances=3, total_blocks=300, seed=3)
        seen.append([record.request for record in run.records])
    assert all(requests == seen[0] for requests in seen)
    assert len(seen[0]) == 200


def test_no_length_estimator_moves_what_arrives() -> None:
    """INV-10: estimates draw from a generator of their own: prompts, responses and arrivals do not notice."""
    load = workload.Workload(num_requests=200)
    plain = workload.generate(load, 3)
    tagged = tag(workload.generate(load, 3), Noisy(spread=0.5), 3)
    assert [replace(one, predicted_output_tokens=one.output_tokens) for one in tagged] == plain
    assert tagged != plain


@many
@given(case=cases())
def test_the_chosen_instance_has_the_least_score(case: Case) -> None:
    """INV-11: a decision's instance is a candidate, and none scores lower; no score is infinite without a fallback."""
    for _, decision, _ in case.simulate().dispatcher.history.decisions:
        scores = dict(zip(decision.candidates, decision.scores, strict=True))
        assert scores[decision.instance_id] == min(scores.values())
        assert decision.fallback is None
        assert all(math.isfinite(score) for score in decision.scores)


@many
@given(case=cases())
def test_nothing_is_left_at_the_end(case: Case) -> None:
    """INV-12: when all is done nothing is outstanding and no ledger holds anything."""
    state = case.simulate().dispatcher._state
    assert state.outstanding == [0] * case.instances
    assert state.in_transit == [[]] * case.instances
    assert state.delivered == [set()] * case.instances


@pytest.mark.parametrize("kind", ENGINES)
def test_the_cases_are_worth_their_while(kind: str) -> None:
    """The engines of these tests do run out of memory: runs like theirs preempt."""
    config = engine_of(kind, 8, 16)
    preemptions = 0
    for seed in range(10):
        case = Case(Block(), config, 1, 34, crowd(seed, 40, 0.1), {})
        preemptions += sum(record.preemptions for record in case.simulate().records)
    assert preemptions > 50
