"""A batch of engines does what each of them would do alone, event by event, and looking at it changes nothing."""

from __future__ import annotations

import math
from dataclasses import replace
from random import Random

import numpy as np
import pytest
from testbed import constant_latency, engine_config, lone_engine, request, round_latency

from block.core.snapshot import ID, Snapshot
from block.core.types import Request
from block.engine.batch import EngineBatch, EngineSpec, Finished
from block.engine.engine import Engine

CROWDED = engine_config("v0", max_model_len=100, max_num_seqs=8, max_num_batched_tokens=40, watermark=0.02)


def crowd(instances: int) -> EngineBatch:
    return EngineBatch([EngineSpec(CROWDED.settings(51), round_latency())] * instances)


def arrivals(count: int, rate: float, seed: int) -> list[tuple[int, Request]]:
    """Requests for three engines, most of them for the last, whose queue outgrows its row."""
    rng, at, found = Random(seed), 0.0, []
    for i in range(count):
        at += rng.expovariate(rate)
        row = 2 if rng.random() < 0.8 else rng.randrange(3)
        found.append((row, request(i, rng.randint(1, 50), rng.randint(1, 40), at)))
    return found


def through(batch: EngineBatch, requests: list[tuple[int, Request]], looks: Random | None = None) -> list[Finished]:
    """Serve all, looking at some of the engines now and then; what finished, in order."""
    done: list[Finished] = []
    for row, one in requests:
        while found := batch.advance_all(one.arrival):
            done += found
        batch.receive(row, one, one.arrival)
        if looks is not None:
            batch.snapshots(looks.sample(range(3), looks.randint(1, 3)), one.arrival)
    while found := batch.advance_all(math.inf):
        done += found
    return done


def test_engines_of_a_batch_do_what_each_would_do_alone() -> None:
    requests = arrivals(300, 20.0, 7)
    batch = crowd(3)
    together = through(batch, requests)
    assert batch.arrays.seqs.shape[2] > 64, "the arrays have grown"
    alone: list[Finished] = []
    for row in range(3):
        engine = lone_engine(CROWDED, round_latency(), 51)
        for its, one in requests:
            if its == row:
                alone += engine.advance(one.arrival)
                engine.add(one, one.arrival)
        alone += engine.advance(1e9)
    assert sorted(together) == sorted(alone)
    assert sum(one.preemptions for one in alone) > 10


def test_sequences_finish_in_order_of_time_and_each_advance_stops_at_one_moment() -> None:
    requests = arrivals(100, 20.0, 3)
    batch, moments = crowd(3), []
    for row, one in requests:
        batch.advance(row, 0.0)
        batch.receive(row, replace(one, arrival=0.0), 0.0)
    while found := batch.advance_all(math.inf):
        assert len({one.finished for one in found}) == 1
        assert batch.next_event >= found[0].finished
        moments.append(found[0].finished)
    assert moments == sorted(moments)
    assert batch.next_event == math.inf


def test_nothing_finishes_before_the_next_event() -> None:
    batch = crowd(3)
    for row, one in arrivals(60, 20.0, 5):
        while batch.next_event <= one.arrival:
            promised = batch.next_event
            for finished in batch.advance_all(one.arrival):
                assert finished.finished >= promised
        assert not batch.advance_all(one.arrival)
        batch.receive(row, one, one.arrival)


def test_looking_does_not_change_the_course() -> None:
    requests = arrivals(300, 20.0, 7)
    assert through(crowd(3), requests) == through(crowd(3), requests, looks=Random(1))


def test_many_snapshots_are_those_of_each_engine() -> None:
    batch = crowd(3)
    engines = [lone_engine(CROWDED, round_latency(), 51) for _ in range(3)]
    for row, one in arrivals(200, 20.0, 9):
        while batch.advance_all(one.arrival):
            pass
        batch.receive(row, one, one.arrival)
        engines[row].advance(one.arrival)
        engines[row].add(one, one.arrival)
        order = [2, 0, 1]
        for i, seen in zip(order, batch.snapshots(order, one.arrival), strict=True):
            engines[i].advance(one.arrival)
            alone: Snapshot = engines[i].snapshot(i, one.arrival)
            assert (seen.seqs == alone.seqs).all()
            assert seen[:-1] == pytest.approx(alone[:-1], nan_ok=True)


def test_a_snapshot_is_taken_now_and_shows_the_step_in_flight() -> None:
    batch = EngineBatch([EngineSpec(engine_config("v1").settings(16), constant_latency())] * 2)
    assert math.isnan(batch.snapshots([1], 0.0)[0].step_started)
    batch.receive(1, request(7, 4, 5), 0.0)
    batch.advance_all(2.5)
    (seen,) = batch.snapshots([1], 2.5)
    assert (seen.instance_id, seen.taken_at, seen.step_started) == (1, 2.5, 2.0)
    assert seen.seqs[ID].tolist() == [7]
    assert [one.finished for one in batch.advance_all(9.0)] == [5.0]
    assert batch.snapshots([1], 9.0)[0].seqs.shape[1] == 0


def test_a_copy_of_an_engine_goes_on_as_it_does_and_apart_from_it() -> None:
    batch = crowd(2)
    engine = Engine(batch, 1)
    for i in range(100):
        engine.add(request(i, 10, 5 + i % 7), 0.0)
    engine.advance(0.2)
    ahead = engine.copy().advance(1e9)
    assert len(engine.snapshot(0, 0.2).seqs[ID]) > 0
    assert engine.advance(1e9) == ahead
    assert Engine(batch, 0).step_ends == math.inf


def test_engines_that_differ_share_a_batch_and_run_as_they_would_alone() -> None:
    """A short and a long latency table: steps beyond the short one take what its last slope says."""
    config = engine_config("v1", max_num_seqs=8, max_num_batched_tokens=60)
    short = round_latency()
    short = replace(short, linear=short.linear[:20] ** 2 * 100)
    noise = np.linspace(0.8, 1.2, 7)
    models = [(short, None), (round_latency(), noise), (short, noise[::-1])]
    batch = EngineBatch([EngineSpec(config.settings(60), latency, factors) for latency, factors in models])
    for row, (latency, factors) in enumerate(models):
        alone, shared = lone_engine(config, latency, 60, factors), Engine(batch, row)
        for engine in (shared, alone):
            for i in range(12):
                engine.add(request(i, 5 + 4 * i, 3 + i), 0.0)
        assert shared.advance(1e9) == alone.advance(1e9)


def test_a_prompt_that_leaves_no_room_for_a_response_is_refused() -> None:
    with pytest.raises(ValueError, match=r"request 3: a prompt of 100 tokens leaves no room .*max_model_len=100"):
        crowd(1).receive(0, request(3, 100, 1), 0.0)


@pytest.mark.parametrize("output", range(1, 50))
def test_a_bound_is_not_above_the_finish_though_sums_of_steps_are_rounded(output: int) -> None:
    """Eight steps of a tenth of a second end at 0.7999999999999999."""
    batch = EngineBatch([EngineSpec(engine_config("v1").settings(16), constant_latency(0.1))])
    batch.receive(0, request(0, 4, output), 0.0)
    promised = batch.next_event
    (finished,) = batch.advance_all(math.inf)
    assert promised <= finished.finished
