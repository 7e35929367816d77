"""The twin against vLLM itself: both get the same requests and aborts, and are compared at every step.

Every step takes a second. Skipped where vLLM is not installed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from testbed import constant_latency, engine_config, lone_engine, request

from block.core.snapshot import (
    ID,
    NUM_BLOCKS,
    NUM_COMPUTED_TOKENS,
    NUM_OUTPUT_PLACEHOLDERS,
    NUM_OUTPUT_TOKENS,
    NUM_PREEMPTIONS,
    NUM_SCHEDULED_NEXT,
    NUM_SCHEDULED_TOKENS,
    Snapshot,
)
from block.core.types import Request
from block.engine.batch import Finished
from block.engine.config import EngineConfig

MODES = pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])

MakeReal = Callable[..., Any]  # (settings, usable blocks, elapse) -> VirtualEngine


@dataclass(frozen=True)
class Workload:
    """Requests with their arrivals, and (time, id) of aborts, for an engine."""

    config: EngineConfig
    total_blocks: int
    requests: list[Request]
    aborts: list[tuple[float, int]] = field(default_factory=list)

    @property
    def events(self) -> list[tuple[float, Request | int]]:
        """Arrivals and aborts in order of time."""
        arrivals: list[tuple[float, Request | int]] = [(one.arrival, one) for one in self.requests]
        return sorted([*arrivals, *self.aborts], key=lambda event: event[0])


class Pair:
    """The twin and vLLM on one workload. `seen` counts what they have met."""

    def __init__(self, make_real: MakeReal, workload: Workload, seen: Counter[str]) -> None:
        self.events = workload.events
        self.total_blocks = workload.total_blocks
        self.twin = lone_engine(workload.config, constant_latency(), workload.total_blocks)
        self.real = make_real(workload.config, workload.total_blocks, self.elapse)
        self.preempted: dict[int, int] = {}  # how often, of each sequence that the twin showed last
        self.finished: list[Finished] = []
        self.seen = seen

    def run(self) -> None:
        """To the end, comparing at every step."""
        while self.events or self.real.busy:
            if not self.real.busy:
                self.real.now = self.events[0][0]
                self.happen()
            self.real.turn()
        self.advance()
        assert self.twin.snapshot(0, self.real.now).free_blocks == self.total_blocks
        self.seen.update(one.status.name for one in self.real.known.values())
        self.seen["workloads"] += 1

    def happen(self) -> None:
        """The next arrival or abort."""
        at, event = self.events.pop(0)
        self.finished += self.twin.advance(at)
        if isinstance(event, Request):
            self.twin.add(event, at)
            self.real.receive(event)
        else:
            if event in self.real.known:
                self.seen[f"abort while {self.real.known[event].status.name}"] += 1
            self.twin.abort(event, at)
            self.real.cancel(event)

    def elapse(self, batch: Any) -> None:
        """A step has begun. What happens during it follows when both have been seen to agree on it."""
        self.advance()
        self.compare(self.twin.snapshot(0, self.real.now), batch)
        ends = self.real.now + 1.0
        while self.events and self.events[0][0] < ends:
            self.happen()
        self.real.now = ends

    def advance(self) -> None:
        """Take the twin to the time at which vLLM is; they have finished the same by then."""
        self.finished += self.twin.advance(self.real.now)
        assert sorted(self.finished) == sorted(self.real.finished)

    def compare(self, snapshot: Snapshot, batch: Any) -> None:
        """All that the twin says of the step in flight, of the one behind it, and of every sequence."""
        scheduler = self.real.scheduler
        assert not scheduler.kv_holding_waiting
        running, waiting = ([int(one.request_id) for one in queue] for queue in (scheduler.running, scheduler.waiting))
        columns = snapshot.seqs[ID].tolist()
        assert columns[: snapshot.running] == running
        assert columns[snapshot.running :] == waiting
        memory = scheduler.kv_cache_manager
        assert snapshot.free_blocks == memory.block_pool.get_num_free_blocks()

        batches = [batch, *self.real.queued]
        requests = [scheduler.requests[str(id_)] for id_ in columns]
        for row, expected in (
            (NUM_SCHEDULED_TOKENS, [batch.tokens.get(id_, 0) for id_ in columns]),
            (NUM_SCHEDULED_NEXT, [sum(one.tokens.get(id_, 0) for one in batches[1:]) for id_ in columns]),
            (NUM_OUTPUT_PLACEHOLDERS, [sum(id_ in one.samples for one in batches) for id_ in columns]),
            (NUM_COMPUTED_TOKENS, [one.num_computed_tokens for one in requests]),
            (NUM_OUTPUT_TOKENS, [one.num_output_tokens for one in requests]),
            (NUM_PREEMPTIONS, [one.num_preemptions for one in requests]),
            (NUM_BLOCKS, [len(memory.get_block_ids(one.request_id)[0]) for one in requests]),
        ):
            assert snapshot.seqs[row].tolist() == expected, f"row {row} of {columns}"

        preempted = dict(zip(columns, snapshot.seqs[NUM_PREEMPTIONS].tolist(), strict=True))
        assert {id_ for id_, times in preempted.items() if times > self.preempted.get(id_, 0)} == self.real.preempted
        self.preempted = preempted
        self.seen["steps"] += 1
        self.seen["steps for nobody"] += batch.tokens.keys().isdisjoint(columns)
        self.seen["preemptions"] += len(self.real.preempted)
        self.real.preempted.clear()


# ---------------------------------------------------------------------------------------------------- any workload


@st.composite
def workloads(draw: st.DrawFn, asynchronous: bool) -> Workload:
    """All settings, little memory; responses that stop early, on time or at max_model_len, and clients that leave."""
    block_size = draw(st.sampled_from([1, 4, 16]))
    max_model_len = draw(st.integers(2, 12) | st.integers(13, 90))
    config = engine_config(
        "v1",
        async_scheduling=asynchronous,
        block_size=block_size,
        max_model_len=max_model_len,
        max_num_seqs=draw(st.integers(1, 8)),
        max_num_batched_tokens=draw(st.integers(1, 40)),
        watermark=draw(st.sampled_from([0.0, 0.0, 0.03, 0.1, 0.3])),
        long_prefill_token_threshold=draw(st.sampled_from([0, 0, 1, 4, 9])),
        scheduler_reserve_full_isl=draw(st.booleans()),
    )
    least = -(-max_model_len // block_size)
    requests = []
    arrival = 0.0
    for i in range(draw(st.integers(1, 14))):
        arrival += draw(st.sampled_from([0.0, 0.0, 0.25, 1.0, 3.5]))
        prompt = draw(st.integers(1, max_model_len - 1) | st.just(max_model_len - 1))
        output = draw(st.integers(1, max_model_len + 5))
        most = draw(st.none() | st.integers(output, output + 6) | st.integers(1, 99))
        requests.append(request(i, prompt, output, arrival, max_tokens=most))
    moments = st.floats(0.0, arrival + 60.0, width=16)
    aborts = draw(st.lists(st.tuples(moments, st.integers(0, len(requests))), max_size=6))
    return Workload(config, draw(st.integers(least, 3 * least + 4)), requests, aborts)


@MODES
@settings(max_examples=200)
@given(data=st.data())
def test_the_twin_does_what_vllm_does_for_any_workload(
    make_real: MakeReal, asynchronous: bool, data: st.DataObject
) -> None:
    Pair(make_real, data.draw(workloads(asynchronous)), Counter()).run()


# ---------------------------------------------------------------------------------------------------- crowds


def crowd(seed: int, asynchronous: bool) -> Workload:
    """Sixty requests that want more memory than there is, many with prompts of many steps."""
    rng = Random(seed)
    block_size = rng.choice([4, 16])
    max_model_len = rng.choice([64, 200, 500])
    config = engine_config(
        "v1",
        async_scheduling=asynchronous,
        block_size=block_size,
        max_model_len=max_model_len,
        max_num_seqs=rng.choice([6, 12, 24]),
        max_num_batched_tokens=rng.choice([16, 64, 200]),
        watermark=rng.choice([0.0, 0.01, 0.1]),
        long_prefill_token_threshold=rng.choice([0, 0, 8, 50]),
        scheduler_reserve_full_isl=rng.random() < 0.5,
    )
    total_blocks = round(rng.uniform(1.0, 3.0) * -(-max_model_len // block_size))
    requests = []
    aborts = []
    arrival = 0.0
    for i in range(60):
        arrival += rng.expovariate(0.2)
        prompt = rng.randint(1, rng.choice([max_model_len // 8, max_model_len // 4, max_model_len - 1]))
        output = rng.randint(1, max_model_len // 3)
        most = rng.choice([None, None, output + rng.randint(0, 3), max_model_len])
        requests.append(request(i, prompt, output, arrival, max_tokens=most))
        if rng.random() < 0.2:
            aborts.append((arrival + rng.expovariate(0.03), i))
    return Workload(config, total_blocks, requests, aborts)


@MODES
def test_the_twin_does_what_vllm_does_for_crowds(make_real: MakeReal, asynchronous: bool) -> None:
    seen: Counter[str] = Counter()
    for seed in range(40):
        Pair(make_real, crowd(seed, asynchronous), seen).run()
    # Plenty of everything, or these workloads would say little.
    assert seen["steps"] > 20_000
    assert seen["preemptions"] > 1_000
    assert seen["FINISHED_STOPPED"] > 500
    assert seen["FINISHED_LENGTH_CAPPED"] > 500
    assert seen["abort while WAITING"] > 50
    assert seen["abort while PREEMPTED"] >= 5
    assert seen["abort while RUNNING"] > 50
    assert (seen["steps for nobody"] > 0) == asynchronous, "a step queued for a sequence that then stopped or left"
