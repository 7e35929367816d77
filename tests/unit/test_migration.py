"""Migration: engines give up and take in running sequences, and the migrator moves the right ones, or nobody."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Any, ClassVar

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from testbed import constant_latency, engine_config, examples, lone_engine, predictor_for, request, round_latency

from block.cluster.migration import MigrationConfig, Migrator, candidate, pairs
from block.cluster.simulation import Simulation
from block.core.snapshot import ID, NUM_BLOCKS, NUM_COMPUTED_TOKENS, NUM_OUTPUT_TOKENS, NUM_PROMPT_TOKENS
from block.core.types import Decision, InstanceView, Request, RequestRecord
from block.dispatch.config import DispatchConfig
from block.dispatch.core import Dispatcher
from block.dispatch.policies import Llumnix, Needs, RoundRobin, freeness
from block.engine.batch import EngineBatch, EngineSpec, Finished
from block.engine.config import EngineConfig
from block.engine.engine import Engine

KINDS: dict[str, dict[str, Any]] = {
    "v0": {"version": "v0", "watermark": 0.02},
    "v0-unchunked": {"version": "v0", "watermark": 0.02, "enable_chunked_prefill": False},
    "v1": {"version": "v1"},
    "v1-long-prefill": {"version": "v1", "long_prefill_token_threshold": 8},
}


def small(kind: str, **changes: Any) -> EngineConfig:
    tokens = 100 if kind == "v0-unchunked" else 24
    return engine_config(**KINDS[kind] | {"max_model_len": 96, "max_num_batched_tokens": tokens} | changes)


# ---------------------------------------------------------------------------------------------------- two engines


def test_a_sequence_goes_on_elsewhere_where_it_stopped() -> None:
    one, other = (lone_engine(engine_config("v1"), constant_latency(), 16) for _ in range(2))
    one.add(request(0, 6, 5), 0.0)
    one.add(request(1, 6, 5), 0.0)
    assert one.halt() == 1.0
    assert list(one.advance(1.0)) == []
    taken = one.extract(0)
    assert taken is not None
    assert (taken.column[NUM_OUTPUT_TOKENS], taken.column[NUM_COMPUTED_TOKENS], taken.column[NUM_BLOCKS]) == (1, 6, 2)
    left = one.snapshot(0, 1.0)
    assert (left.seqs[ID].tolist(), left.free_blocks, one.reserved_blocks) == ([1], 12, 2)
    assert other.reserve(2, 1)
    assert (other.snapshot(1, 1.0).free_blocks, other.reserved_blocks) == (14, 2)
    other.insert(taken, 3.5)  # idle: it begins a step at once
    one.release(2, 1, 3.5)
    assert (one.reserved_blocks, other.reserved_blocks) == (0, 0)
    # One token of five was there; four steps of a second from 3.5 on. Its first token keeps its time.
    assert other.advance(20.0) == [Finished(0, 1.0, 7.5, 0, 5)]
    assert [done.id for done in one.advance(20.0)] == [1]
    assert [engine.snapshot(0, 20.0).free_blocks for engine in (one, other)] == [16, 16]


@pytest.mark.parametrize("why", ["finished", "waiting", "prefilling", "aborted", "unknown"])
def test_only_what_decodes_is_taken(why: str) -> None:
    engine = lone_engine(engine_config("v0", max_num_seqs=2), constant_latency(), 20)
    engine.add(request(0, 4, 2), 0.0)
    engine.add(request(1, 50, 9), 0.0)
    engine.add(request(2, 4, 9), 0.0)
    list(engine.advance(1.0))
    assert engine.halt() == 2.0
    if why == "aborted":
        engine.abort(0, 1.5)
    list(engine.advance(2.0))
    taken = engine.extract({"finished": 0, "waiting": 2, "prefilling": 1, "aborted": 0, "unknown": 7}[why])
    assert (taken, engine.reserved_blocks) == (None, 0)
    assert engine.snapshot(0, 2.0).step_started == 2.0, "it goes on"


def test_an_engine_holds_no_more_than_admission_would_give() -> None:
    engine = lone_engine(engine_config("v0", max_num_seqs=2, watermark=0.25), constant_latency(), 24)
    assert not engine.reserve(19, 1)
    assert engine.reserve(18, 1)
    assert not engine.reserve(1, 0)
    engine.add(request(0, 4, 3), 0.0)
    assert math.isnan(engine.snapshot(0, 0.0).step_started), "the blocks are kept from it"
    engine.release(18, 0, 2.0)
    assert engine.snapshot(0, 2.0).step_started == 2.0
    engine.add(request(1, 4, 3), 2.0)
    list(engine.advance(3.0))
    assert engine.snapshot(0, 3.0).running == 1, "and a seat still is"
    assert not engine.reserve(1, 1)
    engine.release(0, 1, 3.0)
    list(engine.advance(4.0))
    assert engine.snapshot(0, 4.0).running == 2


def test_a_sequence_that_comes_decodes_before_a_prompt_goes_on() -> None:
    one, other = (lone_engine(engine_config("v0"), constant_latency(), 20) for _ in range(2))
    one.add(request(0, 6, 5), 0.0)
    one.halt()
    list(one.advance(1.0))
    taken = one.extract(0)
    assert taken is not None
    other.add(request(1, 40, 3), 0.5)  # chunks of 16, 16 and 8
    assert other.reserve(2, 1)
    other.insert(taken, 1.0)
    list(other.advance(1.5))
    seen = other.snapshot(1, 1.5)
    assert (seen.seqs[ID].tolist(), seen.seqs[NUM_COMPUTED_TOKENS].tolist()) == ([0, 1], [7, 31])


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=examples(100, 10))
@given(seed=st.integers(0, 10**6))
def test_blocks_tokens_and_requests_survive_any_migrations(kind: str, seed: int) -> None:
    """Requests move at random between crowded engines: blocks add up, no token or request is lost or doubled."""
    rng = Random(seed)
    total = 40
    engines = [lone_engine(small(kind, max_num_seqs=5), round_latency(), total) for _ in range(3)]
    requests = [request(i, rng.randint(1, 50), rng.randint(1, 40)) for i in range(30)]
    pending = list(requests)
    done: list[Finished] = []
    tokens: dict[int, int] = {}
    now, moves = 0.0, 0

    def look() -> None:
        present: list[int] = []
        for engine in engines:
            seqs = engine.snapshot(0, now).seqs
            assert engine.snapshot(0, now).free_blocks + seqs[NUM_BLOCKS].sum() + engine.reserved_blocks == total
            assert engine.snapshot(0, now).free_blocks >= 0
            assert engine.snapshot(0, now).running <= 5
            for id_, output in zip(seqs[ID].tolist(), seqs[NUM_OUTPUT_TOKENS].tolist(), strict=True):
                assert output >= tokens.get(id_, 0), "tokens only become more"
                tokens[id_] = output
                present.append(id_)
        assert len(present) == len(set(present))
        assert set(present).isdisjoint(one.id for one in done)

    while len(done) < len(requests):
        for engine in engines:
            done += engine.advance(now)
        if pending and rng.random() < 0.4:
            engines[rng.randrange(3)].add(pending.pop(), now)
        source, target = rng.sample(engines, 2)
        snapshot = source.snapshot(0, now)
        if snapshot.running and rng.random() < 0.5:
            chosen = int(snapshot.seqs[ID, rng.randrange(snapshot.running)])
            now = source.halt()
            done += [one for engine in engines for one in engine.advance(now)]
            if (taken := source.extract(chosen)) is not None:
                blocks = int(taken.column[NUM_BLOCKS])
                look()
                if target.reserve(blocks, 1):
                    now += rng.uniform(0, 0.1)
                    done += [one for engine in engines for one in engine.advance(now)]
                    target.insert(taken, now)
                    source.release(blocks, 1, now)
                    moves += 1
                else:
                    source.insert(taken, now)
        look()
        now += rng.uniform(0, 0.05)
    assert sorted(one.id for one in done) == list(range(30))
    by_id = {one.id: one for one in requests}
    for one in done:
        assert one.output_tokens == min(by_id[one.id].output_tokens, 96 - by_id[one.id].prompt_tokens)
        assert one.first_token <= one.finished
    for engine in engines:
        assert (engine.snapshot(0, now).free_blocks, engine.reserved_blocks) == (total, 0)
        assert engine.step_ends == math.inf
    assert moves > 0 or len(tokens) < 3


# ---------------------------------------------------------------------------------------------------- the decision


def test_freeness_by_hand() -> None:
    engine = lone_engine(engine_config("v0", max_num_seqs=2, max_model_len=40), constant_latency(), 20)
    assert freeness([engine.snapshot(0, 0.0)], [()], 4) == [20], "an empty batch counts as one"
    for i, prompt in enumerate((8, 6, 9, 30)):
        engine.add(request(i, prompt, 9), 0.0)
    list(engine.advance(1.0))
    # 0 and 1 hold 3 and 2 blocks, 2 waits for 3, 3 behind it counts nothing; 7 tokens in transit are 2 blocks.
    assert freeness([engine.snapshot(0, 1.0)], [[request(9, 7, 1)]], 4) == [(15 - 3 - 2) / 2]


def test_the_least_free_is_paired_with_the_freest() -> None:
    config = MigrationConfig(out_below=3.0, in_above=5.0)
    assert pairs([1.0, 9.0, -2.0, 4.0, 7.0, 2.0], config) == [(2, 1), (0, 4)]
    assert pairs([4.0, 9.0], config) == []  # between the thresholds: neither source nor target
    assert pairs([1.0, 2.0], config) == []
    assert pairs([], config) == []


def test_the_shortest_that_decodes_is_chosen() -> None:
    engine = lone_engine(engine_config("v0", max_num_batched_tokens=20), constant_latency(), 40)
    for i, prompt in enumerate((9, 5, 5, 30)):
        engine.add(request(i, prompt, 20), 0.0)
    assert candidate(engine.snapshot(0, 0.0)) is None
    list(engine.advance(1.0))
    list(engine.advance(2.0))
    chosen = candidate(engine.snapshot(0, 2.0))
    assert chosen is not None
    assert (chosen[ID], chosen[NUM_PROMPT_TOKENS]) == (1, 5)


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"interval_s": -1.0}, "migration.interval_s=-1.0"),
        ({"downtime_s": math.inf}, "migration.downtime_s=inf"),
        ({"out_below": 4.0, "in_above": 3.0}, "migration.out_below=4.0"),
        ({"last_stage_blocks": 0}, "migration.last_stage_blocks=0"),
        ({"max_stages": 0}, "migration.max_stages=0"),
        ({"bandwidth": 0.0}, "migration.bandwidth=0.0"),
    ],
)
def test_a_wrong_setting_is_refused_by_name(changes: dict[str, Any], key: str) -> None:
    with pytest.raises(ValueError, match=r"^migration\.") as refused:
        MigrationConfig(**changes)
    assert key in str(refused.value)


# ---------------------------------------------------------------------------------------------------- the migrator

# A block takes a tenth of a second to copy, a request stands still for half a second besides.
SLOW = {"interval_s": 1.0, "out_below": 4.0, "in_above": 4.0, "bandwidth": 1.0, "downtime_s": 0.5}
BLOCK_BYTES = 1e8


class Noting(Dispatcher):
    """Notes migrations: (time, request, source, target)."""

    moved: list[tuple[float, int, int, int]]

    def migrated(self, record: RequestRecord, source: int, target: int, now: float) -> None:
        self.moved.append((now, record.request.id, source, target))
        super().migrated(record, source, target, now)


@dataclass(frozen=True)
class Halves:
    """The first so many requests go to instance 0, the others to instance 1."""

    first: int
    needs: ClassVar[Needs] = Needs.COUNTS

    def candidates(self, instances: int, request_index: int, rng: Random) -> Sequence[int]:
        return [int(request_index >= self.first)]

    def choose(self, request: Request, views: Sequence[InstanceView], rng: Random) -> Decision:
        return Decision(views[0].instance_id, [views[0].instance_id], [0.0])


def moves(
    options: dict[str, Any], first: list[Request], second: list[Request], total: int = 16, **engine: Any
) -> tuple[list[RequestRecord], Migrator, list[tuple[float, int, int, int]]]:
    """Serve `first` on instance 0 and `second` on instance 1 of steps of one second; records, migrator, what moved."""
    config = engine_config("v1", **engine)
    simulation = Simulation(EngineBatch([EngineSpec(config.settings(total), constant_latency())] * 2))
    migrator = Migrator(MigrationConfig(**SLOW | options), 4, BLOCK_BYTES, simulation)
    dispatcher = Noting(2, Halves(len(first)), None, DispatchConfig(), Random(0), observers=[migrator])
    dispatcher.moved = []
    # The last one comes when all that was being copied is there.
    last = request(99, 1, 1, 1000.0)
    simulation.run((one, dispatcher) for one in [*first, *second, last])
    free = [one.free_blocks for one in simulation.snapshot_many([0, 1], simulation.now)]
    assert free == [total, total]
    return list(dispatcher.history.records)[:-1], migrator, dispatcher.moved


def test_a_migration_by_hand() -> None:
    # At t = 1, 0 holds 6 blocks and 1, whose prompt has its step now, 4 of 16: freeness 3. 0 is the one that decodes.
    # It stops at t = 2 with 2 tokens and 21 of KV, 6 blocks, and goes on 0.5 + 0.6 s later on an idle engine.
    records, migrator, moved = moves({}, [request(0, 20, 9), request(1, 14, 6)], [], max_num_batched_tokens=40)
    assert moved == [(pytest.approx(3.1), 0, 0, 1)]
    assert migrator.counts == {"migrated": 1, "copied_blocks": 6, "stood_s": pytest.approx(1.1)}
    assert (records[0].first_token, records[0].output_tokens) == (1.0, 9)
    assert records[0].finished == pytest.approx(3.1 + 7)
    assert (records[1].first_token, records[1].finished) == (2.0, 7.0)


def test_a_sequence_decodes_on_while_full_blocks_are_copied() -> None:
    # From t = 1 on: 5 full blocks of 0's take 0.5 s; then 1 is left, and 0 stops at t = 2 for 0.5 + 0.1 s.
    records, migrator, moved = moves(
        {"last_stage_blocks": 1}, [request(0, 20, 9), request(1, 14, 6)], [], max_num_batched_tokens=40
    )
    assert moved == [(pytest.approx(2.6), 0, 0, 1)]
    assert migrator.counts == {"migrated": 1, "copied_blocks": 6, "stood_s": pytest.approx(0.6)}
    assert records[0].finished == pytest.approx(2.6 + 7)


def test_a_migration_is_given_up_if_the_request_finishes_meanwhile() -> None:
    records, migrator, moved = moves(
        {"last_stage_blocks": 1, "bandwidth": 0.1}, [request(0, 20, 4), request(1, 28, 3)], []
    )
    assert moved == []
    assert migrator.counts["preempted_or_finished"] >= 1
    assert [record.output_tokens for record in records] == [4, 3]


def test_a_migration_is_given_up_if_the_target_has_no_room() -> None:
    # 2 leaves the target a freeness of 6, above the threshold, and 0 wants 10 blocks and more.
    _, migrator, moved = moves(
        {}, [request(0, 40, 9), request(1, 15, 2)], [request(2, 38, 12)], max_num_batched_tokens=60
    )
    assert moved == []
    assert migrator.counts["no_room"] >= 1


def test_a_migration_is_given_up_if_decoding_is_faster_than_copying() -> None:
    # A block of 4 tokens takes five seconds to copy, in which five tokens come.
    options = {"last_stage_blocks": 1, "bandwidth": 0.02, "out_below": 30.0, "in_above": 30.0}
    _, migrator, moved = moves(options, [request(0, 9, 50), request(1, 9, 50), request(2, 9, 50)], [], total=60)
    assert moved == []
    assert migrator.counts["too_many_stages"] >= 1


def play(
    seed: int, kind: str, policy: Any, **options: Any
) -> tuple[list[tuple[Any, ...]], dict[str, float], Dispatcher]:
    """A run of 60 requests on three tight engines with migration: what became of each, and how it moved."""
    rng = Random(seed)
    at = 0.0
    requests = []
    for i in range(60):
        at += rng.expovariate(25.0)
        requests.append(request(i, rng.randint(1, 50), rng.randint(1, 40), at))
    config = small(kind, max_num_seqs=5)
    noise = [np.random.default_rng((seed, i)).normal(1, 0.05, 97) for i in range(3)]
    batch = EngineBatch([EngineSpec(config.settings(40), round_latency(), one) for one in noise])
    simulation = Simulation(batch, delay_s=0.03)
    wanted = MigrationConfig(**{"interval_s": 0.02, "downtime_s": 0.005, "last_stage_blocks": 2} | options)
    migrator = Migrator(wanted, 4, 1e6, simulation)
    dispatcher = Dispatcher(
        3,
        policy,
        predictor_for(config, round_latency(), 40),
        DispatchConfig(),
        Random(seed),
        snapshot_many=simulation.snapshot_many,
        delay_s=0.03,
        observers=[migrator],
    )
    last = request(60, 1, 1, at + 60.0)
    simulation.run((one, dispatcher) for one in [*requests, last])
    engines = [Engine(batch, i) for i in range(3)]
    for record in dispatcher.history.records:
        one = record.request
        assert record.status == "ok"
        assert record.output_tokens == min(one.output_tokens, 96 - one.prompt_tokens)
        assert one.arrival < record.dispatched < record.first_token <= record.finished
    for instance_id, engine in enumerate(engines):
        assert (engine.snapshot(0, simulation.now).free_blocks, engine.reserved_blocks) == (40, 0)
        assert dispatcher.outstanding(instance_id) == 0
        assert dispatcher._state.in_transit[instance_id] == []
    return (
        [(r.request.id, r.first_token, r.finished, r.preemptions) for r in dispatcher.history.records],
        dict(migrator.counts),
        dispatcher,
    )


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_runs_with_migration_lose_nothing_and_are_the_same_again(kind: str) -> None:
    migrated = 0.0
    for seed in range(examples(12, 2)):
        for policy in (Llumnix(block_size=4), RoundRobin()):
            rows, counts, _ = play(seed, kind, policy)
            assert (rows, counts) == play(seed, kind, policy)[:2]
            migrated += counts.get("migrated", 0)
    assert migrated > 5 * examples(12, 2)


def test_pairing_rests_while_there_is_nothing_to_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    pairings = []
    monkeypatch.setattr(Migrator, "_pairs", lambda migrator: pairings.append(1) or [])
    moves({"interval_s": 0.1}, [request(0, 4, 2)], [])
    assert 20 <= len(pairings) <= 40, "not at each tenth of the thousand seconds between two requests"
