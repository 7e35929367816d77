"""The dispatcher, told what happens: where requests go, its ledger, what it shows to policies and what it records."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from heapq import heappop, heappush
from typing import Any, ClassVar

import numpy as np
import pytest
from testbed import constant_latency, engine_config, predictor_for, request, round_latency, simulate

from block.core.snapshot import FIELDS, ID, Snapshot, Snapshots
from block.core.types import Decision, Forecast, Forecasts, InstanceView, Request, RequestRecord, Views, shared_blocks
from block.dispatch.config import DispatchConfig
from block.dispatch.core import Dispatcher, History, Observer
from block.dispatch.policies import Block, INFaaS, LeastRequests, MinQPM, Needs, Random, RoundRobin
from block.engine.config import EngineConfig


class Shown:
    """Instances that show what they are told to show, and count how often each was looked at."""

    def __init__(self, instances: int) -> None:
        self.requests: list[list[int]] = [[] for _ in range(instances)]
        self.looks = [0] * instances

    def __call__(self, ids: Sequence[int], now: float) -> list[Snapshot]:
        found = []
        for i in ids:
            self.looks[i] += 1
            seqs = np.zeros((FIELDS, len(self.requests[i])), dtype=np.int64)
            seqs[ID] = self.requests[i]
            found.append(Snapshot(i, now, math.nan, len(self.requests[i]), 0, 100, 0, seqs))
        return found


@dataclass
class Spy:
    """A policy that takes instance `target` and keeps what it was shown, lists copied."""

    needs: ClassVar[Needs] = Needs.SNAPSHOT
    views: list[list[InstanceView]] = field(default_factory=list)
    target: int = 0

    def candidates(self, instances: int, request_index: int, rng: random.Random) -> Sequence[int]:
        return range(instances)

    def choose(self, request: Request, views: Sequence[InstanceView], rng: random.Random) -> Decision:
        self.views.append([view._replace(in_transit=[one.id for one in view.in_transit]) for view in views])
        return Decision(self.target, [view.instance_id for view in views], [0.0] * len(views))


class SpyOnCounts(Spy):
    needs: ClassVar[Needs] = Needs.COUNTS


def dispatcher_for(instances: int, policy: Any, **options: Any) -> Dispatcher:
    """One whose instances show nothing, unless `snapshot_many` is given."""
    dispatch = DispatchConfig(**options.pop("config", {}))
    forecaster = options.pop("forecaster", None)
    return Dispatcher(
        instances, policy, forecaster, dispatch, random.Random(0), **{"snapshot_many": Shown(instances)} | options
    )


def play(
    dispatcher: Dispatcher,
    requests: Sequence[Request],
    service: Sequence[float],
    fails: Sequence[int] = (),
    delay_s: float = 0.0,
) -> list[RequestRecord]:
    """Tell a dispatcher of requests that instance i serves in service[i] seconds, or fails after as many."""
    heap: list[tuple[float, int, str, Any]] = []
    for number, one in enumerate(requests):
        heappush(heap, (one.arrival, number, "arrives", one))
    records = []
    number = len(requests)

    def then(when: float, what: str, record: RequestRecord) -> None:
        nonlocal number
        number += 1
        heappush(heap, (when, number, what, record))

    while heap:
        now, _, what, it = heappop(heap)
        if what == "arrives":
            it = dispatcher.arrived(it, now)
            records.append(it)
            what = "placed"
        if what == "placed" and it.status == "pending":
            then(now + delay_s, "gets there", it)
        elif what == "gets there":
            dispatcher.delivered(it, now)
            then(now + service[it.instance_id], "ends", it)
        elif what == "ends" and it.instance_id in fails:
            if dispatcher.failed(it, f"instance {it.instance_id} went away", now):
                then(now, "placed", it)
        elif what == "ends":
            dispatcher.first_token(it, it.dispatched + 1.0)
            dispatcher.finished(it, now)
    return records


def arrivals(*times: float) -> list[Request]:
    return [request(i, 10, 5, at) for i, at in enumerate(times)]


# ---------------------------------------------------------------------------------------------------- records


def test_a_record_tells_where_and_when() -> None:
    first, second = play(dispatcher_for(2, RoundRobin()), arrivals(1.0, 2.5), [10.0, 10.0])
    assert (first.instance_id, first.dispatched, first.first_token, first.finished) == (0, 1.0, 2.0, 11.0)
    assert (second.instance_id, second.dispatched, second.first_token, second.finished) == (1, 2.5, 3.5, 12.5)
    assert (first.status, second.status, first.forecast) == ("ok", "ok", None)


def test_decisions_are_kept_with_their_time_scores_and_request() -> None:
    dispatcher = dispatcher_for(2, LeastRequests())
    first, second, _ = play(dispatcher, arrivals(0.0, 1.0, 20.0), [10.0, 10.0])
    assert [(at, list(d.candidates), d.scores, i) for at, d, i in dispatcher.history.decisions] == [
        (0.0, [0, 1], [0.0, 0.0], 0),
        (1.0, [0, 1], [1.0, 0.0] if first.instance_id == 0 else [0.0, 1.0], 1),
        (20.0, [0, 1], [0.0, 0.0], 2),
    ]
    assert {first.instance_id, second.instance_id} == {0, 1}


def test_a_request_that_an_instance_lost_goes_to_another_and_the_instance_gets_no_more() -> None:
    dispatcher = dispatcher_for(2, RoundRobin())
    first, second, third = play(dispatcher, arrivals(0.0, 1.0, 30.0), [3.0, 10.0], fails=[0])
    assert [record.status for record in (first, second, third)] == ["ok"] * 3
    assert [record.instance_id for record in (first, second, third)] == [1, 1, 1]
    assert (first.retries, second.retries, third.retries) == (1, 0, 0)
    assert first.dispatched == 3.0  # begun anew when the first instance was lost
    assert first.first_token == 4.0
    assert first.error == "instance 0 went away"
    assert list(dispatcher.history.ejections) == [(3.0, 0, "instance 0 went away")]
    assert [chosen.instance_id for _, chosen, _ in dispatcher.history.decisions] == [0, 1, 1, 1]
    assert [dispatcher.outstanding(i) for i in (0, 1)] == [0, 0]


def test_a_request_fails_when_no_instance_is_left() -> None:
    lost, late = play(dispatcher_for(2, RoundRobin()), arrivals(0.0, 30.0), [1.0, 1.0], fails=[0, 1])
    assert (lost.status, lost.retries, lost.error) == ("failed", 1, "instance 1 went away")
    assert (late.status, late.retries, late.error) == ("failed", 0, "no instance is left")
    assert math.isnan(lost.finished)


def test_a_request_is_begins_anew_three_times_at_most_and_then_fails() -> None:
    (record,) = play(dispatcher_for(6, RoundRobin()), arrivals(0.0), [1.0] * 6, fails=range(6))
    assert (record.status, record.retries, record.error) == ("failed", 3, "instance 3 went away")


def test_a_refused_request_is_not_retried_and_its_instance_stays() -> None:
    dispatcher = dispatcher_for(2, RoundRobin())
    record = dispatcher.arrived(request(0, 1, 1), 0.0)
    dispatcher.refused(record, "prompt too long", 0.0)
    assert (record.status, record.retries, record.error) == ("failed", 0, "prompt too long")
    assert list(dispatcher.active) == [0, 1]
    assert dispatcher.outstanding(0) == 0


def test_an_instance_that_turned_a_request_away_is_passed_over_and_stays() -> None:
    dispatcher = dispatcher_for(3, RoundRobin())
    tried = []
    for i in range(2):
        record = dispatcher.arrived(request(i, 1, 1), 0.0)
        while tried.append(record.instance_id) or record.instance_id != 2:
            assert dispatcher.failed(record, f"instance {record.instance_id} is full", 0.0, gone=False)
        dispatcher.finished(record, 0.0)
    assert tried == [0, 1, 2, 1, 2]  # a retry does not take the next request's turn
    first, second = dispatcher.history.records
    assert (first.status, first.retries, first.error) == ("ok", 2, "instance 1 is full")
    assert (second.status, second.retries) == ("ok", 1)
    assert list(dispatcher.active) == [0, 1, 2]
    assert [dispatcher.ejected(i) for i in range(3)] == [0, 0, 0]
    assert [dispatcher.outstanding(i) for i in range(3)] == [0, 0, 0]


def test_a_request_fails_when_all_turn_it_away() -> None:
    dispatcher = dispatcher_for(2, Random())
    record = dispatcher.arrived(request(0, 1, 1), 0.0)
    assert dispatcher.failed(record, "full", 0.0, gone=False)
    assert not dispatcher.failed(record, "full", 0.0, gone=False)
    assert (record.status, record.retries) == ("failed", 1)
    assert list(dispatcher.active) == [0, 1]


def test_an_instance_is_used_again_once_it_is_up() -> None:
    dispatcher = dispatcher_for(2, RoundRobin())
    dispatcher.instance_down(0, "no answer", 1.0)
    dispatcher.instance_down(0, "still no answer", 2.0)
    assert list(dispatcher.history.ejections) == [(1.0, 0, "no answer")]
    assert dispatcher.ejected(0) == 1
    assert list(dispatcher.lost) == [0]
    assert [dispatcher.arrived(request(i, 1, 1), 3.0).instance_id for i in range(2)] == [1, 1]
    for _ in range(2):
        dispatcher.instance_up(0, 4.0)
    assert list(dispatcher.history.readmissions) == [(4.0, 0)]
    assert not dispatcher.lost
    assert list(dispatcher.active) == [0, 1]
    assert sorted(dispatcher.arrived(request(i, 1, 1), 5.0).instance_id for i in range(2, 4)) == [0, 1]


def test_the_history_can_be_bounded() -> None:
    dispatcher = dispatcher_for(1, RoundRobin(), history=History(2))
    play(dispatcher, arrivals(*range(5)), [0.5])
    assert [record.request.id for record in dispatcher.history.records] == [3, 4]
    assert len(dispatcher.history.decisions) == 2


def test_a_cancelled_request_leaves_nothing_behind_and_its_record_as_it_was() -> None:
    spy = Spy()
    dispatcher = dispatcher_for(1, spy)
    for _ in range(2):
        dispatcher.cancelled(dispatcher.arrived(request(0, 1, 1), 0.0), 0.0)
    assert spy.views[1][0].outstanding == 0
    assert spy.views[1][0].in_transit == []
    assert dispatcher.history.records[0].status == "pending"
    assert dispatcher._index == {}


def test_what_ended_in_any_way_is_forgotten() -> None:
    dispatcher = dispatcher_for(3, RoundRobin())
    play(dispatcher, arrivals(*(0.1 * i for i in range(30))), [1.0, 2.0, 0.5], fails=[0])
    assert (dispatcher._index, dispatcher._lost_on, dispatcher._moved) == ({}, {}, {})


def test_observers_are_told_of_each_event_in_order() -> None:
    log: list[tuple[str, int | str]] = []

    class Logging(Observer):
        def arriving(self, dispatcher: Dispatcher, views: Views, now: float) -> int | None:
            log.append(("arriving", len(views)))
            return None

        def placed(self, dispatcher: Dispatcher, record: RequestRecord, views: Views, now: float) -> None:
            log.append(("placed", record.instance_id))

        def delivered(self, dispatcher: Dispatcher, record: RequestRecord, now: float) -> None:
            log.append(("delivered", record.instance_id))

        def left(self, dispatcher: Dispatcher, record: RequestRecord, now: float) -> None:
            log.append(("left", record.status))

        def instance_up(self, dispatcher: Dispatcher, instance_id: int, now: float) -> None:
            log.append(("up", instance_id))

        def instance_down(self, dispatcher: Dispatcher, instance_id: int, reason: str, now: float) -> None:
            log.append(("down", instance_id))

    dispatcher = dispatcher_for(2, RoundRobin(), observers=[Logging()])
    record = dispatcher.arrived(request(0, 1, 1), 0.0)
    dispatcher.delivered(record, 0.0)
    dispatcher.failed(record, "it is full", 1.0, gone=False)
    dispatcher.instance_down(1, "lost", 1.0)
    dispatcher.instance_up(1, 2.0)
    assert log == [
        ("arriving", 1),
        ("placed", 0),
        ("delivered", 0),
        ("left", "pending"),
        ("arriving", 1),
        ("placed", 1),
        ("down", 1),
        ("up", 1),
    ]


# ---------------------------------------------------------------------------------------------------- views


def test_outstanding_counts_from_the_decision_to_the_last_token() -> None:
    spy = SpyOnCounts()
    play(dispatcher_for(2, spy), arrivals(0.0, 0.0, 4.0, 10.5, 11.5), [10.0, 10.0], delay_s=1.0)
    # Service takes 10 s after a delay of 1 s: the first two end at 11.
    assert [views[0].outstanding for views in spy.views] == [0, 1, 2, 3, 2]
    assert [views[1].outstanding for views in spy.views] == [0] * 5


@pytest.mark.parametrize("candidates", [range(0, 4, 2), range(3, -1, -1), range(1, 3), [3, 0]])
def test_views_are_of_the_candidates_whatever_sequence_a_policy_names_them_by(candidates: Sequence[int]) -> None:
    class Some(Spy):
        def candidates(self, instances: int, request_index: int, rng: random.Random) -> Sequence[int]:
            return candidates

    spy = Some(target=candidates[-1])
    play(dispatcher_for(4, spy), arrivals(0.0, 1.0), [10.0] * 4, delay_s=5.0)
    assert [view.instance_id for view in spy.views[1]] == list(candidates)
    assert [view.outstanding for view in spy.views[1]] == [0] * (len(candidates) - 1) + [1]
    assert [view.in_transit for view in spy.views[1]] == [[]] * (len(candidates) - 1) + [[0]]
    assert [view.snapshot.instance_id for view in spy.views[1] if view.snapshot] == list(candidates)


def test_recent_counts_the_last_sixty_seconds() -> None:
    spy = SpyOnCounts()
    play(dispatcher_for(2, spy), arrivals(0.0, 30.0, 59.9, 60.0, 89.9, 90.0, 200.0), [10.0, 10.0])
    assert [views[0].recent for views in spy.views] == [0, 1, 2, 2, 3, 3, 0]


def test_min_qpm_levels_requests_though_some_take_longer() -> None:
    records = play(dispatcher_for(2, MinQPM()), arrivals(*(0.1 * i for i in range(100))), [1.0, 50.0])
    assert Counter(record.instance_id for record in records) == {0: 50, 1: 50}


def test_the_ledger_lists_what_no_snapshot_has_shown_yet() -> None:
    spy, shown = Spy(), Shown(1)
    dispatcher = dispatcher_for(1, spy, snapshot_many=shown)
    for i in range(5):
        if i == 3:
            shown.requests[0] = [0, 2]
        dispatcher.delivered(dispatcher.arrived(request(i, 1, 1), float(i)), float(i))
    assert [views[0].in_transit for views in spy.views] == [[], [0], [0, 1], [1], [1, 3]]


def test_a_request_that_has_not_got_there_is_in_transit_whatever_a_snapshot_shows() -> None:
    spy, shown = Spy(), Shown(1)
    dispatcher = dispatcher_for(1, spy, snapshot_many=shown)
    dispatcher.arrived(request(0, 1, 1), 0.0)
    shown.requests[0] = [0]  # of an earlier attempt, say
    dispatcher.arrived(request(1, 1, 1), 1.0)
    assert spy.views[1][0].in_transit == [0]


def test_all_sequences_of_a_request_are_in_transit_and_leave_together() -> None:
    spy, shown = Spy(), Shown(1)
    dispatcher = dispatcher_for(1, spy, snapshot_many=shown)
    one = replace(request(7, 1, 1), sequences=3)
    record = dispatcher.arrived(one, 0.0)
    dispatcher.delivered(record, 0.0)
    dispatcher.arrived(request(1, 1, 1), 1.0)
    assert spy.views[-1][0].in_transit == [7, ~7, ~7]
    assert spy.views[-1][0].outstanding == 3
    shown.requests[0] = [7, 7, 7]
    dispatcher.arrived(request(2, 1, 1), 2.0)
    assert spy.views[-1][0].in_transit == [1]
    dispatcher.finished(record, 3.0)
    assert dispatcher.outstanding(0) == 2
    dispatcher.cancelled(dispatcher.arrived(replace(one, id=8), 4.0), 5.0)
    dispatcher.arrived(request(3, 1, 1), 6.0)
    assert spy.views[-1][0].in_transit == [1, 2]
    assert (one.number, one.siblings()[0].number) == (7, 7)


def test_without_a_ledger_nothing_is_in_transit() -> None:
    spy = Spy()
    play(dispatcher_for(1, spy, config={"ledger": False}), arrivals(0.0, 1.0, 2.0), [10.0])
    assert [views[0].in_transit for views in spy.views] == [[], [], []]
    assert [views[0].outstanding for views in spy.views] == [0, 1, 2]


def test_a_policy_pays_only_for_what_it_needs() -> None:
    spy, shown = SpyOnCounts(), Shown(2)
    play(dispatcher_for(2, spy, snapshot_many=shown), arrivals(0.0, 1.0), [10.0, 10.0])
    assert shown.looks == [0, 0]
    assert all(view.snapshot is None and view.forecast is None for views in spy.views for view in views)
    dispatcher = dispatcher_for(2, INFaaS(), snapshot_many=shown)
    play(dispatcher, arrivals(0.0, 1.0), [10.0, 10.0])
    assert shown.looks == [2, 2]
    assert not dispatcher.history.forecast_s


def test_only_sampled_instances_are_looked_at() -> None:
    shown = Shown(8)
    predictor = predictor_for(engine_config("v1"), constant_latency(), 16)
    dispatcher = dispatcher_for(8, Block(k=2), forecaster=predictor, snapshot_many=shown)
    play(dispatcher, arrivals(*range(10)), [10.0] * 8)
    assert sum(shown.looks) == 20
    assert all(len(decision.candidates) == 2 for _, decision, _ in dispatcher.history.decisions)


def test_a_policy_gets_what_it_needs_or_is_refused() -> None:
    with pytest.raises(ValueError, match="Block needs a forecaster"):
        dispatcher_for(1, Block())
    with pytest.raises(ValueError, match="INFaaS needs snapshots"):
        dispatcher_for(1, INFaaS(), snapshot_many=None)
    dispatcher_for(1, Random(), snapshot_many=None)


# ---------------------------------------------------------------------------------------------------- stale snapshots


def test_a_snapshot_is_used_again_until_it_is_that_old() -> None:
    spy, shown = Spy(), Shown(1)
    dispatcher = dispatcher_for(1, spy, snapshot_many=shown, config={"snapshot_interval_s": 2.0})
    play(dispatcher, arrivals(0.0, 0.5, 1.5, 2.0, 3.9, 4.0), [100.0])
    assert [views[0].snapshot.taken_at for views in spy.views if views[0].snapshot] == [0.0, 0.0, 0.0, 2.0, 2.0, 4.0]
    assert shown.looks == [3]


def test_the_ledger_covers_what_an_old_snapshot_does_not_show() -> None:
    spy, shown = Spy(), Shown(1)
    dispatcher = dispatcher_for(1, spy, snapshot_many=shown, config={"snapshot_interval_s": 10.0})
    for i in range(4):
        dispatcher.delivered(dispatcher.arrived(request(i, 1, 1), float(i)), float(i))
        shown.requests[0] = list(range(i + 1))  # visible to who looks, but nobody does for 10 s
    dispatcher.arrived(request(9, 1, 1), 11.0)
    assert [views[0].in_transit for views in spy.views] == [[], [0], [0, 1], [0, 1, 2], []]


def test_an_old_snapshot_does_not_change_with_the_engine() -> None:
    @dataclass
    class Memory(Spy):
        then: list[bytes] = field(default_factory=list)

        def choose(self, request: Request, views: Sequence[InstanceView], rng: random.Random) -> Decision:
            assert views[0].snapshot is not None
            self.then.append(views[0].snapshot.seqs.tobytes())
            return super().choose(request, views, rng)

    memory = Memory()
    simulate(
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
    return simulate(
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
    for record, (_, decision, _) in zip(run.records, run.dispatcher.history.decisions, strict=True):
        assert record.forecast is not None
        assert record.forecast.e2e == pytest.approx(min(decision.scores) + 0.1)
        assert record.forecast.ttft <= record.forecast.e2e
    assert len(run.dispatcher.history.forecast_s) == 20
    assert all(seconds > 0 for seconds in run.dispatcher.history.forecast_s)


def test_a_lone_requests_forecast_comes_true() -> None:
    run = block_run([request(0, 100, 50, 2.0)], 1, delay_s=0.1)
    (record,) = run.records
    assert isinstance(record.forecast, Forecast)
    assert record.first_token - 2.0 == pytest.approx(record.forecast.ttft, rel=1e-9)
    assert record.finished - 2.0 == pytest.approx(record.forecast.e2e, rel=1e-9)


def test_dispatchers_that_share_a_history_know_nothing_of_what_the_others_placed() -> None:
    spy, history = Spy(), History()
    first, second = (dispatcher_for(1, spy, history=history) for _ in range(2))
    for i, dispatcher in enumerate((first, second, first)):
        dispatcher.delivered(dispatcher.arrived(request(i, 10, 5), float(i)), float(i))
    assert [[view.in_transit for view in views] for views in spy.views] == [[[]], [[]], [[0]]]
    assert [views[0].outstanding for views in spy.views] == [0, 0, 1]
    assert [record.request.id for record in history.records] == [0, 1, 2]


# ------------------------------------------------------------------------------------------------------ prefix caches


class Cached:
    """An index by which instance i has found[i] tokens of every request."""

    block_size = 4

    def __init__(self, *found: int) -> None:
        self.found = found

    def hits(self, request: Request, ids: Sequence[int]) -> np.ndarray[Any, Any]:
        return np.array([(self.found[i], 1) for i in ids], dtype=np.int64)


def sharing(id_: int, *hashes: int) -> Request:
    """A request of 4 tokens a block, and half of one more."""
    return Request(id_, 0.0, 4 * len(hashes) + 2, 5, 5, block_hashes=np.array(hashes, dtype=np.int64))


def test_a_policy_sees_what_instances_have_cached_of_a_request_and_what_is_on_its_way_to_them() -> None:
    spy = Spy(target=1)
    dispatcher = dispatcher_for(3, spy, prefixes=Cached(8, 0, 16))
    dispatcher.arrived(sharing(0, 1, 2, 3), 0.0)
    dispatcher.arrived(sharing(1, 1, 2, 3, 4), 0.1)  # of which three blocks are in transit to instance 1
    dispatcher.arrived(sharing(2, 5, 6), 0.2)  # and none of this one
    dispatcher.arrived(Request(3, 0.0, 9, 5, 5), 0.3)  # of which nothing is known
    seen = [[view.cached_tokens for view in views] for views in spy.views]
    assert seen == [[8, 0, 16], [8, 12, 16], [8, 0, 16], [0, 0, 0]]


def test_forecasts_are_made_with_the_hits_of_what_is_in_transit() -> None:
    seen = []

    class Forecasting:
        def forecasts(self, snapshots: Snapshots, in_transit: Any, request: Request, now: float) -> Forecasts:
            assert snapshots.hits is not None
            seen.append((snapshots.hits.found.tolist(), dict(snapshots.hits.in_transit)))
            return Forecasts([1.0, 1.0], [2.0, 3.0])

    dispatcher = dispatcher_for(2, Block(), forecaster=Forecasting(), prefixes=Cached(4, 0))
    first = dispatcher.arrived(sharing(0, 1, 2), 0.0)
    dispatcher.arrived(sharing(1, 1, 2, 3), 0.1)
    assert seen == [([[4, 1], [0, 1]], {}), ([[8, 2], [0, 1]], {0: (4, 1)})]
    dispatcher.delivered(first, 0.2)
    dispatcher.finished(first, 0.3)
    dispatcher.arrived(sharing(2, 9), 0.4)
    assert seen[-1][1] == {1: (8, 2)}


def test_of_several_sequences_the_last_is_forecast_and_all_but_one_find_the_prompt() -> None:
    seen = []

    class Forecasting:
        def forecasts(self, snapshots: Snapshots, in_transit: Any, request: Request, now: float) -> Forecasts:
            assert snapshots.hits is not None
            ids = [[one.id for one in requests] for requests in in_transit]
            seen.append((ids, snapshots.hits.found.tolist(), dict(snapshots.hits.in_transit)))
            return Forecasts([1.0, 1.0], [2.0, 3.0])

    dispatcher = dispatcher_for(2, Block(), forecaster=Forecasting(), prefixes=Cached(4, 0))
    first = dispatcher.arrived(replace(sharing(5, 1, 2), sequences=3), 0.0)
    assert seen == [([[~5, ~5]] * 2, [[4, 1], [0, 1]], {~5: (8, 2)})]
    dispatcher.arrived(sharing(6, 9), 0.1)
    assert seen[-1] == ([[5, ~5, ~5], []], [[4, 1], [0, 1]], {5: (4, 1), ~5: (8, 2)})
    dispatcher.delivered(first, 0.2)
    dispatcher.finished(first, 0.3)
    dispatcher.arrived(sharing(7, 9), 0.4)
    assert seen[-1][2] == {6: (4, 1)}


def test_the_blocks_that_two_requests_share_are_counted() -> None:
    one = sharing(0, 1, 2, 3, 4, 5)
    for other, most, expected in (
        (sharing(1, 1, 2, 3, 9, 10), 9, 3),
        (sharing(1, 1, 2, 3, 9, 10), 2, 2),
        (sharing(1, 1, 2, 3, 4, 5, 6), 9, 5),
        (sharing(1, 7), 9, 0),
        (Request(1, 0.0, 5, 5, 5), 9, 0),
    ):
        assert shared_blocks(one, other, most) == shared_blocks(other, one, most) == expected


def test_turns_are_taken_among_those_that_may_serve_and_by_each_policy_for_itself() -> None:
    dispatcher = dispatcher_for(4, RoundRobin())
    least = LeastRequests()
    where: dict[str, list[int]] = {"all": [], "few": [], "other": []}
    for n in range(12):
        kind = ("all", "few", "other")[n % 3]
        record = dispatcher.arrived(
            request(n, 1, 1),
            0.0,
            by=least if kind == "other" else None,
            among=frozenset({1, 3}) if kind == "few" else None,
        )
        where[kind].append(record.instance_id)
        dispatcher.delivered(record, 0.0)
        dispatcher.finished(record, 1.0)
    assert where["all"] == [0, 1, 2, 3]
    assert where["few"] == [1, 3, 1, 3]
    assert set(where["other"]) <= {0, 1, 2, 3}


def test_a_request_that_only_some_may_serve_begins_anew_among_them_and_fails_there() -> None:
    dispatcher = dispatcher_for(3, RoundRobin())
    record = dispatcher.arrived(request(0, 1, 1), 0.0, among=frozenset({0, 2}))
    assert record.instance_id == 0
    assert dispatcher.has_another(record)
    assert dispatcher.failed(record, "lost", 1.0)
    assert record.instance_id == 2
    assert not dispatcher.has_another(record)
    assert not dispatcher.failed(record, "lost", 2.0, gone=False)
    assert (record.status, record.retries) == ("failed", 1)
    assert dispatcher.arrived(request(1, 1, 1), 3.0, among=frozenset({0})).error == "no instance is left"


def test_a_policy_that_raises_leaves_nothing_behind() -> None:
    class Once(RoundRobin):
        broken = False

        def choose(self, request: Request, views: Any, rng: random.Random) -> Decision:
            if self.broken:
                raise ZeroDivisionError
            return super().choose(request, views, rng)

    policy = Once()
    dispatcher = dispatcher_for(2, policy)
    record = dispatcher.arrived(request(0, 1, 1), 0.0)
    Once.broken = True
    with pytest.raises(Exception, match="ZeroDivisionError"):
        dispatcher.failed(record, "full", 1.0, gone=False)
    assert record.status == "failed"
    with pytest.raises(Exception, match="ZeroDivisionError"):
        dispatcher.arrived(request(1, 1, 1), 2.0)
    assert [dispatcher.outstanding(i) for i in (0, 1)] == [0, 0]
    assert [one.status for one in dispatcher.history.records] == ["failed", "failed"]
