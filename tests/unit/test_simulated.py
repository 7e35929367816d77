"""A simulated instance does on the clock what its engine does, and wakes only when somebody would notice."""

from __future__ import annotations

import asyncio
import math
from dataclasses import replace
from random import Random

import numpy as np
import pytest
from testbed import constant_latency, engine_config, request, round_latency

from block.core import clock
from block.core.snapshot import ID, Snapshot
from block.core.types import Request, RequestRecord
from block.dispatch.instance import Instance
from block.engine.batch import Bank
from block.engine.engine import Engine, Finished
from block.engine.simulated_instance import Looks, SimulatedInstance


def test_a_request_is_served_in_the_engines_time() -> None:
    async def main() -> tuple[RequestRecord, float]:
        instance: Instance = SimulatedInstance(3, Engine(engine_config("v1"), constant_latency(), 16))
        record = RequestRecord(request(0, 20, 3))
        await clock.sleep(10.0)
        await instance.generate(record.request, record)
        return record, clock.now()

    record, returned = clock.run(main(), virtual=True)
    # Two chunks, then two decodes, of a second each.
    assert (record.first_token, record.finished, returned) == (12.0, 14.0, 14.0)
    assert (record.output_tokens, record.preemptions) == (3, 0)


def test_many_requests_are_what_the_bare_engine_makes_of_them() -> None:
    config = engine_config("v0", max_model_len=100, max_num_seqs=8, max_num_batched_tokens=40, watermark=0.02)
    rng = Random(1)
    requests: list[Request] = []
    at = 0.0
    for i in range(120):
        at += rng.expovariate(8.0)
        requests.append(request(i, rng.randint(1, 50), rng.randint(1, 40), at))

    engine = Engine(config, round_latency(), 51)
    bare: list[Finished] = []
    for one in requests:
        bare += engine.advance(one.arrival)
        engine.add(one, one.arrival)
    bare += engine.advance(math.nextafter(math.inf, 0.0))

    async def serve_one(instance: SimulatedInstance, record: RequestRecord) -> None:
        await clock.sleep_until(record.request.arrival)
        await instance.generate(record.request, record)
        assert clock.now() == record.finished, "it returns when the last token is there"

    async def main() -> list[RequestRecord]:
        instance = SimulatedInstance(0, Engine(config, round_latency(), 51))
        records = [RequestRecord(one) for one in requests]
        await asyncio.gather(*(serve_one(instance, record) for record in records))
        return records

    records = clock.run(main(), virtual=True)
    assert sum(done.preemptions for done in bare) > 10
    assert [
        Finished(r.request.id, r.first_token, r.finished, r.preemptions, r.output_tokens) for r in records
    ] == sorted(bare)


def test_a_snapshot_is_taken_now_and_shows_the_step_in_flight() -> None:
    async def main() -> None:
        instance = SimulatedInstance(3, Engine(engine_config("v1"), constant_latency(), 16))
        assert math.isnan(instance.snapshot().step_started)
        record = RequestRecord(request(7, 4, 5))
        task = asyncio.create_task(instance.generate(record.request, record))
        await clock.sleep(2.5)
        snapshot = instance.snapshot()
        assert (snapshot.instance_id, snapshot.taken_at, snapshot.step_started) == (3, 2.5, 2.0)
        assert snapshot.seqs[ID].tolist() == [7]
        await task
        assert instance.snapshot().seqs.shape[1] == 0

    clock.run(main(), virtual=True)


def test_looking_does_not_change_the_course() -> None:
    def run(looks: int) -> list[RequestRecord]:
        async def main() -> list[RequestRecord]:
            instance = SimulatedInstance(0, Engine(engine_config("v1"), round_latency(), 16))
            records = [RequestRecord(request(i, 10, 20)) for i in range(5)]
            tasks = [asyncio.create_task(instance.generate(r.request, r)) for r in records]
            for _ in range(looks):
                await clock.sleep(0.013)
                instance.snapshot()
            await asyncio.gather(*tasks)
            return records

        return clock.run(main(), virtual=True)

    assert run(0) == run(60)


def test_it_does_not_wake_for_every_step() -> None:
    wakes = 0

    class Counting(Engine):
        def turn(self, now: float, arriving: Request | None = None):  # type: ignore[no-untyped-def]
            nonlocal wakes
            wakes += 1
            return super().turn(now, arriving)

    async def main() -> None:
        instance = SimulatedInstance(0, Counting(engine_config("v1"), constant_latency(), 16))
        record = RequestRecord(request(0, 4, 50))
        await instance.generate(record.request, record)

    clock.run(main(), virtual=True)
    assert wakes == 2  # its arrival and its finish, for 50 steps


def crowd(instances: int) -> tuple[Bank, list[SimulatedInstance]]:
    bank = Bank(instances)
    config = engine_config("v0", max_model_len=100, max_num_seqs=8, max_num_batched_tokens=40, watermark=0.02)
    return bank, [SimulatedInstance(i, Engine(config, round_latency(), 51, bank=bank)) for i in range(instances)]


def looked_at(*, together: bool) -> tuple[list[list[Snapshot]], list[RequestRecord]]:
    """Three crowded instances, of which two or three are looked at now and then, and what becomes of their requests."""

    async def main() -> tuple[list[list[Snapshot]], list[RequestRecord]]:
        bank, instances = crowd(3)
        looks = Looks(instances, bank)
        rng, shown, tasks, records = Random(7), [], [], []
        for i in range(300):
            await clock.sleep(rng.expovariate(20.0))
            records.append(RequestRecord(request(i, rng.randint(1, 50), rng.randint(1, 40))))
            # The last one is so crowded that its queue outgrows the bank's rows.
            chosen = instances[2 if rng.random() < 0.8 else rng.randrange(3)]
            tasks.append(asyncio.create_task(chosen.generate(records[-1].request, records[-1])))
            await clock.sleep(0.0)
            ids = range(2, -1, -1) if i % 7 == 0 else rng.sample(range(3), rng.randint(0, 3))
            seen = looks(ids) if together else [instances[i].snapshot() for i in ids]
            shown.append([one._replace(seqs=one.seqs.copy()) for one in seen])
        await asyncio.gather(*tasks)
        assert bank.seqs.shape[2] > 64
        return shown, records

    return clock.run(main(), virtual=True)


def test_looking_at_many_shows_what_looking_at_each_does() -> None:
    (together, one_future), (each, other_future) = looked_at(together=True), looked_at(together=False)
    assert one_future == other_future
    for many, single in zip(together, each, strict=True):
        for one, other in zip(many, single, strict=True):
            assert (one.seqs == other.seqs).all()
            assert one[:-1] == pytest.approx(other[:-1], nan_ok=True)


def test_a_copy_of_an_engine_goes_on_as_it_does_and_apart_from_it() -> None:
    bank, _ = crowd(2)
    engine = bank.engines[1]
    for i in range(100):
        engine.add(request(i, 10, 5 + i % 7), 0.0)
    engine.advance(0.2)
    copied = engine.copy()
    ahead = copied.advance(1e9)
    assert len(engine.snapshot(0, 0.2).seqs[ID]) > 0
    assert engine.advance(1e9) == ahead
    assert bank.engines[0].step_ends == math.inf


def test_engines_that_differ_share_a_bank_and_run_as_they_would_alone() -> None:
    """A short and a long latency table: steps beyond the short one take what its last slope says."""
    config = engine_config("v1", max_num_seqs=8, max_num_batched_tokens=60)
    short = round_latency()
    short = replace(short, linear=short.linear[:20] ** 2 * 100)
    noise = np.linspace(0.8, 1.2, 7)
    bank = Bank(3)
    models = [(short, None), (round_latency(), noise), (short, noise[::-1])]
    for latency, factors in models:
        Engine(config, latency, 60, factors, bank)
    for shared, (latency, factors) in zip(bank.engines, models, strict=True):
        alone = Engine(config, latency, 60, factors)
        for engine in (shared, alone):
            for i in range(12):
                engine.add(request(i, 5 + 4 * i, 3 + i), 0.0)
        assert shared.advance(1e9) == alone.advance(1e9)
