"""The dispatcher with scripted instances: its books, its ledger, what it shows to policies and what it records."""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random as Stream
from typing import Any, ClassVar

import numpy as np
import pytest
from testbed import constant_latency, engine_config, open_loop, request, round_latency, serve

from block.core import clock
from block.core.snapshot import FIELDS, ID, Snapshot
from block.core.types import Decision, Forecast, InstanceView, Request, RequestRecord
from block.dispatch.core import DispatchConfig, Dispatcher
from block.dispatch.instance import InstanceFailed, RequestFailed
from block.dispatch.policies import Block, INFaaS, LeastRequests, MinQPM, Needs, Random, RoundRobin
from block.engine.config import EngineConfig
from block.engine.predictor import Predictor


@dataclass
class Scripted:
    """An instance that shows what it is told to show, and serves a request in `service` seconds or fails."""

    instance_id: int
    service: float = 10.0
    fails: bool = False
    shows: list[int] = field(default_factory=list)
    looks: int = 0

    def snapshot(self) -> Snapshot:
        self.looks += 1
        seqs = np.zeros((FIELDS, len(self.shows)), dtype=np.int64)
        seqs[ID] = self.shows
        return Snapshot(self.instance_id, clock.now(), math.nan, len(self.shows), 0, 100, 0, seqs)

    async def generate(self, request: Request, record: RequestRecord) -> None:
        record.first_token = clock.now() + 1.0
        await clock.sleep(self.service)
        if self.fails:
            raise InstanceFailed(f"instance {self.instance_id} went away")
        record.finished = clock.now()
        record.output_tokens = request.output_tokens


@dataclass
class Spy:
    """A policy that takes the first candidate and keeps what it was shown, lists copied."""

    needs: ClassVar[Needs] = Needs.SNAPSHOT
    views: list[list[InstanceView]] = field(default_factory=list)
    target: int = 0

    def candidates(self, instances: int, turn: int, stream: Stream) -> Sequence[int]:
        return range(instances)

    def choose(self, request: Request, views: Sequence[InstanceView], stream: Stream) -> Decision:
        self.views.append([view._replace(underway=[one.id for one in view.underway]) for view in views])
        return Decision(self.target, [view.instance_id for view in views], [0.0] * len(views))


class SpyOnCounts(Spy):
    needs: ClassVar[Needs] = Needs.COUNTS


def dispatch(
    instances: Sequence[Any], policy: Any, requests: Sequence[Request], delay_s: float = 0.0, **config: Any
) -> Dispatcher:
    async def main() -> Dispatcher:
        dispatcher = Dispatcher(instances, policy, None, DispatchConfig(**config), Stream(0), delay_s=delay_s)
        await open_loop(requests, dispatcher)
        return dispatcher

    return clock.run(main(), virtual=True)


def arrivals(*times: float) -> list[Request]:
    return [request(i, 10, 5, at) for i, at in enumerate(times)]


# ---------------------------------------------------------------------------------------------------- records


def test_a_record_tells_where_and_when() -> None:
    dispatcher = dispatch([Scripted(0), Scripted(1)], RoundRobin(), arrivals(1.0, 2.5))
    first, second = dispatcher.records
    assert (first.instance_id, first.dispatched, first.finished, first.status) == (0, 1.0, 11.0, "ok")
    assert (second.instance_id, second.dispatched, second.finished, second.status) == (1, 2.5, 12.5, "ok")
    assert first.output_tokens == 5
    assert first.forecast is None


def test_the_delay_lies_between_decision_and_dispatch() -> None:
    dispatcher = dispatch([Scripted(0)], RoundRobin(), arrivals(1.0), delay_s=0.25)
    assert [at for at, _, _ in dispatcher.decisions] == [1.0]
    assert dispatcher.records[0].dispatched == 1.25
    assert dispatcher.records[0].finished == 11.25


def test_decisions_are_kept_with_their_time_scores_and_request() -> None:
    dispatcher = dispatch([Scripted(0), Scripted(1)], LeastRequests(), arrivals(0.0, 1.0, 20.0))
    assert [(at, list(d.candidates), d.scores, i) for at, d, i in dispatcher.decisions] == [
        (0.0, [0, 1], [0.0, 0.0], 0),
        (1.0, [0, 1], [1.0, 0.0] if dispatcher.records[0].instance_id == 0 else [0.0, 1.0], 1),
        (20.0, [0, 1], [0.0, 0.0], 2),
    ]
    assert {dispatcher.records[0].instance_id, dispatcher.records[1].instance_id} == {0, 1}


def test_a_request_that_an_instance_lost_goes_to_another_and_the_instance_gets_no_more() -> None:
    broken, sound = Scripted(0, service=3.0, fails=True), Scripted(1)
    dispatcher = dispatch([broken, sound], RoundRobin(), arrivals(0.0, 1.0, 30.0))
    first, second, third = dispatcher.records
    assert [record.status for record in (first, second, third)] == ["ok"] * 3
    assert [record.instance_id for record in (first, second, third)] == [1, 1, 1]
    assert (first.retries, second.retries, third.retries) == (1, 0, 0)
    assert first.dispatched == 3.0  # begun anew when the first instance was lost
    assert first.first_token == 4.0
    assert first.error == "instance 0 went away"
    assert list(dispatcher.ejections) == [(3.0, 0, "instance 0 went away")]
    assert [chosen.instance_id for _, chosen, _ in dispatcher.decisions] == [0, 1, 1, 1]
    assert [dispatcher.outstanding(i) for i in (0, 1)] == [0, 0]


def test_a_request_fails_when_no_instance_is_left() -> None:
    dispatcher = dispatch([Scripted(0, fails=True), Scripted(1, fails=True)], RoundRobin(), arrivals(0.0, 30.0))
    lost, late = dispatcher.records
    assert (lost.status, lost.retries, lost.error) == ("failed", 2, "instance 1 went away")
    assert (late.status, late.retries, late.error) == ("failed", 0, "no instance is left")
    assert math.isnan(lost.finished)


def test_a_refused_request_is_not_retried_and_its_instance_stays() -> None:
    async def refuse(instance: Any, record: RequestRecord) -> None:
        raise RequestFailed("prompt too long")

    async def main() -> None:
        dispatcher = Dispatcher([Scripted(0), Scripted(1)], RoundRobin(), None, DispatchConfig(), Stream(0))
        record = await dispatcher.submit(request(0, 1, 1), refuse)
        assert (record.status, record.retries, record.error) == ("failed", 0, "prompt too long")
        assert list(dispatcher.active) == [0, 1]

    clock.run(main(), virtual=True)


def test_an_instance_that_turned_a_request_away_is_passed_over_and_stays() -> None:
    tried = []

    async def deliver(instance: Any, record: RequestRecord) -> None:
        tried.append(instance.instance_id)
        if instance.instance_id != 2:
            raise InstanceFailed(f"instance {instance.instance_id} is full", gone=False)

    async def main() -> None:
        dispatcher = Dispatcher([Scripted(i) for i in range(3)], RoundRobin(), None, DispatchConfig(), Stream(0))
        first = await dispatcher.submit(request(0, 1, 1), deliver)
        second = await dispatcher.submit(request(1, 1, 1), deliver)
        assert (first.status, first.retries, first.error) == ("ok", 2, "instance 1 is full")
        assert (second.status, second.retries) == ("ok", 1)
        assert tried == [0, 1, 2, 1, 2]  # a retry does not take the next request's turn
        assert list(dispatcher.active) == [0, 1, 2]
        assert [dispatcher.ejected(i) for i in range(3)] == [0, 0, 0]
        assert [dispatcher.outstanding(i) for i in range(3)] == [0, 0, 0]

    clock.run(main(), virtual=True)


def test_a_request_fails_when_all_turn_it_away() -> None:
    async def deliver(instance: Any, record: RequestRecord) -> None:
        raise InstanceFailed(f"instance {instance.instance_id} is full", gone=False)

    async def main() -> None:
        dispatcher = Dispatcher([Scripted(0), Scripted(1)], Random(), None, DispatchConfig(), Stream(0))
        record = await dispatcher.submit(request(0, 1, 1), deliver)
        assert (record.status, record.retries) == ("failed", 2)
        assert list(dispatcher.active) == [0, 1]

    clock.run(main(), virtual=True)


def test_an_instance_is_used_again_once_readmitted() -> None:
    async def main() -> None:
        dispatcher = Dispatcher([Scripted(0), Scripted(1)], RoundRobin(), None, DispatchConfig(), Stream(0))
        dispatcher.eject(0, "no answer")
        dispatcher.eject(0, "still no answer")
        assert len(dispatcher.ejections) == 1
        assert dispatcher.ejected(0) == 1
        assert [(await dispatcher.submit(request(i, 1, 1))).instance_id for i in range(2)] == [1, 1]
        dispatcher.readmit(0)
        dispatcher.readmit(0)
        assert list(dispatcher.active) == [0, 1]
        assert sorted([(await dispatcher.submit(request(i, 1, 1))).instance_id for i in range(2, 4)]) == [0, 1]

    clock.run(main(), virtual=True)


def test_the_history_can_be_bounded() -> None:
    async def main() -> None:
        dispatcher = Dispatcher([Scripted(0)], RoundRobin(), None, DispatchConfig(), Stream(0), history=2)
        for i in range(5):
            await dispatcher.submit(request(i, 1, 1))
        assert [record.request.id for record in dispatcher.records] == [3, 4]
        assert len(dispatcher.decisions) == 2

    clock.run(main(), virtual=True)


def test_another_error_is_not_hidden_and_the_books_are_clean_after_it() -> None:
    class Broken(Scripted):
        async def generate(self, request: Request, record: RequestRecord) -> None:
            raise ZeroDivisionError

    async def main() -> None:
        spy = Spy()
        dispatcher = Dispatcher([Broken(0)], spy, None, DispatchConfig(), Stream(0))
        for _ in range(2):
            with pytest.raises(ZeroDivisionError):
                await dispatcher.submit(request(0, 1, 1))
        assert spy.views[1][0].outstanding == 0
        assert spy.views[1][0].underway == []
        assert dispatcher.records[0].status == "pending"

    clock.run(main(), virtual=True)


# ---------------------------------------------------------------------------------------------------- views


def test_outstanding_counts_from_the_decision_to_the_last_token() -> None:
    spy = SpyOnCounts()
    dispatch([Scripted(0), Scripted(1)], spy, arrivals(0.0, 0.0, 4.0, 10.5, 11.5), delay_s=1.0)
    # Service takes 10 s after a delay of 1 s: the first two end at 11.
    assert [views[0].outstanding for views in spy.views] == [0, 1, 2, 3, 2]
    assert [views[1].outstanding for views in spy.views] == [0] * 5


@pytest.mark.parametrize("candidates", [range(0, 4, 2), range(3, -1, -1), range(1, 3), [3, 0]])
def test_views_are_of_the_candidates_whatever_sequence_a_policy_names_them_by(candidates: Sequence[int]) -> None:
    class Some(Spy):
        def candidates(self, instances: int, turn: int, stream: Stream) -> Sequence[int]:
            return candidates

    spy = Some(target=candidates[-1])
    dispatch([Scripted(i) for i in range(4)], spy, arrivals(0.0, 1.0), delay_s=5.0)
    assert [view.instance_id for view in spy.views[1]] == list(candidates)
    assert [view.outstanding for view in spy.views[1]] == [0] * (len(candidates) - 1) + [1]
    assert [view.underway for view in spy.views[1]] == [[]] * (len(candidates) - 1) + [[0]]
    assert [view.snapshot.instance_id for view in spy.views[1] if view.snapshot] == list(candidates)


def test_recent_counts_the_last_sixty_seconds() -> None:
    spy = SpyOnCounts()
    dispatch([Scripted(0), Scripted(1)], spy, arrivals(0.0, 30.0, 59.9, 60.0, 89.9, 90.0, 200.0))
    assert [views[0].recent for views in spy.views] == [0, 1, 2, 2, 3, 3, 0]


def test_min_qpm_levels_requests_though_some_take_longer() -> None:
    dispatcher = dispatch([Scripted(0, 1.0), Scripted(1, 50.0)], MinQPM(), arrivals(*(0.1 * i for i in range(100))))
    assert Counter(record.instance_id for record in dispatcher.records) == {0: 50, 1: 50}


def test_the_ledger_lists_what_no_snapshot_has_shown_yet() -> None:
    spy = Spy()
    instance = Scripted(0, service=100.0)

    async def main() -> None:
        dispatcher = Dispatcher([instance], spy, None, DispatchConfig(), Stream(0))
        async with asyncio.TaskGroup() as group:
            for i in range(5):
                if i == 3:
                    instance.shows = [0, 2]
                group.create_task(dispatcher.submit(request(i, 1, 1)))
                await clock.sleep(1.0)

    clock.run(main(), virtual=True)
    assert [views[0].underway for views in spy.views] == [[], [0], [0, 1], [1], [1, 3]]


def test_without_a_ledger_nothing_is_underway() -> None:
    spy = Spy()
    dispatch([Scripted(0)], spy, arrivals(0.0, 1.0, 2.0), ledger=False)
    assert [views[0].underway for views in spy.views] == [[], [], []]
    assert [views[0].outstanding for views in spy.views] == [0, 1, 2]


def test_a_policy_pays_only_for_what_it_needs() -> None:
    instances = [Scripted(0), Scripted(1)]
    spy = SpyOnCounts()
    dispatch(instances, spy, arrivals(0.0, 1.0))
    assert [instance.looks for instance in instances] == [0, 0]
    assert all(view.snapshot is None and view.forecast is None for views in spy.views for view in views)
    snapshots = dispatch(instances, INFaaS(), arrivals(0.0, 1.0))
    assert [instance.looks for instance in instances] == [2, 2]
    assert not snapshots.forecast_s


def test_only_sampled_instances_are_looked_at() -> None:
    looks = Counter[int]()
    config = engine_config("v1")
    instances = [Scripted(i) for i in range(8)]

    async def main() -> Dispatcher:
        predictor = Predictor(config, constant_latency(), 16)
        dispatcher = Dispatcher(instances, Block(k=2), predictor, DispatchConfig(), Stream(0))
        await open_loop(arrivals(*range(10)), dispatcher)
        return dispatcher

    dispatcher = clock.run(main(), virtual=True)
    looks.update({instance.instance_id: instance.looks for instance in instances})
    assert sum(looks.values()) == 20
    for _, decision, _ in dispatcher.decisions:
        assert len(decision.candidates) == 2


def test_a_policy_that_needs_forecasts_needs_a_predictor() -> None:
    with pytest.raises(ValueError, match="Block needs a predictor"):
        Dispatcher([Scripted(0)], Block(), None, DispatchConfig(), Stream(0))
    Dispatcher([Scripted(0)], Random(), None, DispatchConfig(), Stream(0))


# ---------------------------------------------------------------------------------------------------- stale snapshots


def test_a_snapshot_is_used_again_until_it_is_that_old() -> None:
    instance = Scripted(0, service=100.0)
    spy = Spy()
    dispatch([instance], spy, arrivals(0.0, 0.5, 1.5, 2.0, 3.9, 4.0), snapshot_interval_s=2.0)
    assert [views[0].snapshot.taken_at for views in spy.views if views[0].snapshot] == [0.0, 0.0, 0.0, 2.0, 2.0, 4.0]
    assert instance.looks == 3


def test_the_ledger_covers_what_an_old_snapshot_does_not_show() -> None:
    instance = Scripted(0, service=100.0)
    spy = Spy()

    async def main() -> None:
        dispatcher = Dispatcher([instance], spy, None, DispatchConfig(snapshot_interval_s=10.0), Stream(0))
        async with asyncio.TaskGroup() as group:
            for i in range(4):
                group.create_task(dispatcher.submit(request(i, 1, 1)))
                await clock.sleep(1.0)
                instance.shows = list(range(i + 1))  # visible to who looks, but nobody does for 10 s

            await clock.sleep(7.0)
            group.create_task(dispatcher.submit(request(9, 1, 1)))

    clock.run(main(), virtual=True)
    assert [views[0].underway for views in spy.views] == [[], [0], [0, 1], [0, 1, 2], []]


def test_an_old_snapshot_does_not_change_with_the_engine() -> None:
    @dataclass
    class Memory(Spy):
        then: list[bytes] = field(default_factory=list)

        def choose(self, request: Request, views: Sequence[InstanceView], stream: Stream) -> Decision:
            assert views[0].snapshot is not None
            self.then.append(views[0].snapshot.seqs.tobytes())
            return super().choose(request, views, stream)

    memory = Memory()
    serve(
        [request(i, 10, 20, 0.5 * i) for i in range(9)],
        memory,
        config=engine_config("v1"),
        latency=constant_latency(),
        instances=1,
        total_blocks=64,
        dispatch=DispatchConfig(snapshot_interval_s=2.0),
    )
    shown = [views[0].snapshot for views in memory.views]
    assert [s.taken_at for s in shown if s is not None] == [0.0] * 4 + [2.0] * 4 + [4.0]
    assert shown[4] is not None
    assert shown[4].seqs.shape[1] == 4
    assert [s.seqs.tobytes() for s in shown if s is not None] == memory.then


@pytest.mark.parametrize("value", [-1.0, math.inf, math.nan])
def test_a_wrong_interval_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match=r"dispatch\.snapshot_interval_s=.*must be 0 or more seconds"):
        DispatchConfig(snapshot_interval_s=value)


# ---------------------------------------------------------------------------------------------------- forecasts


def block_run(requests: Sequence[Request], instances: int, **options: Any) -> Any:
    config = EngineConfig(max_model_len=512, max_num_seqs=8)
    return serve(
        requests, Block(), config=config, latency=round_latency(), instances=instances, total_blocks=200, **options
    )


def test_simultaneous_requests_spread_over_idle_instances_with_the_ledger() -> None:
    burst = [request(i, 100, 50) for i in range(8)]
    assert sorted(block_run(burst, 8, delay_s=0.1).chosen) == list(range(8))
    assert sorted(block_run(burst, 8).chosen) == list(range(8))


def test_without_the_ledger_they_herd() -> None:
    # Instance 0 is busy. The burst sees instance 1 idle for as long as the delay hides it, and all of it goes there.
    requests = [request(0, 100, 400), *(request(i, 100, 50, 1.0) for i in range(1, 9))]
    without = block_run(requests, 2, delay_s=0.1, dispatch=DispatchConfig(ledger=False))
    busy = without.chosen[0]
    assert without.chosen[1:] == [1 - busy] * 8
    assert set(block_run(requests, 2, delay_s=0.1).chosen[1:]) == {0, 1}


def test_a_records_forecast_is_that_of_the_chosen_instance_plus_the_delay() -> None:
    run = block_run([request(i, 100, 50, 0.3 * i) for i in range(20)], 3, delay_s=0.1)
    for record, (_, decision, _) in zip(run.records, run.dispatcher.decisions, strict=True):
        assert record.forecast is not None
        assert record.forecast.e2e == pytest.approx(min(decision.scores) + 0.1)
        assert record.forecast.ttft <= record.forecast.e2e
    assert len(run.dispatcher.forecast_s) == 20
    assert all(seconds > 0 for seconds in run.dispatcher.forecast_s)


def test_a_lone_requests_forecast_comes_true() -> None:
    run = block_run([request(0, 100, 50, 2.0)], 1, delay_s=0.1)
    (record,) = run.records
    assert isinstance(record.forecast, Forecast)
    assert record.first_token - 2.0 == pytest.approx(record.forecast.ttft, rel=1e-9)
    assert record.finished - 2.0 == pytest.approx(record.forecast.e2e, rel=1e-9)


def test_a_replica_knows_nothing_of_what_the_others_placed() -> None:
    instances, spy = [Scripted(0)], Spy()

    async def main() -> Dispatcher:
        first = Dispatcher(instances, spy, None, DispatchConfig(), Stream(0))
        second = first.replica(spy, Stream(1))
        for i, dispatcher in enumerate((first, second, first)):
            asyncio.get_running_loop().create_task(dispatcher.submit(request(i, 10, 5)))
            await clock.sleep(1.0)
        await clock.sleep(20.0)
        assert second.records is first.records
        return first

    dispatcher = clock.run(main(), virtual=True)
    assert [[view.underway for view in views] for views in spy.views] == [[[]], [[]], [[0]]]
    assert [views[0].outstanding for views in spy.views] == [0, 0, 1]
    assert [record.request.id for record in dispatcher.records] == [0, 1, 2]
