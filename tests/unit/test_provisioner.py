"""Provisioners decide, the scaler acts: when instances join and leave, where the request goes, what it costs."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, ClassVar

import pytest
from testbed import constant_latency, engine_config, poisson, predictor_for, request, round_latency

from block.cluster.provisioner import Elastic, Preempt, Relief
from block.cluster.scaler import Scaler
from block.cluster.simulation import Simulation
from block.core.types import Decision, Forecast, InstanceView, Request, RequestRecord
from block.dispatch.config import DispatchConfig
from block.dispatch.core import Dispatcher
from block.dispatch.monitor import Monitor
from block.dispatch.policies import Block, Needs, RoundRobin
from block.engine.batch import EngineBatch, EngineSpec
from block.engine.config import EngineConfig


def views(*forecasts: tuple[float, float] | None) -> list[InstanceView]:
    """A view for each forecast of (TTFT, E2E)."""
    return [InstanceView(i, [], 0, 0, None, None if one is None else Forecast(*one)) for i, one in enumerate(forecasts)]


# ---------------------------------------------------------------------------------------------------- what is decided


def test_preempt_goes_by_the_best_prediction() -> None:
    preempt = Preempt(threshold_s=10.0, initial=1)
    assert preempt.foreseen(views((1, 10.0), (1, 99.0))) is None
    assert preempt.foreseen(views((1, 10.5), (1, 99.0))) == "best predicted latency 10.5 s"
    assert preempt.foreseen(views(None, (1, 10.5))) is not None
    assert preempt.foreseen(views(None)) is None
    assert preempt.measured(1000.0) is None


def test_relief_goes_by_what_was_measured() -> None:
    relief = Relief(threshold_s=10.0, initial=1)
    assert relief.foreseen(views((1, 99.0))) is None
    assert relief.measured(10.0) is None
    assert relief.measured(10.5) == "measured latency 10.5 s"


def test_a_cluster_is_idle_if_a_request_would_begin_in_time_even_at_the_fullest_instance() -> None:
    for provisioner in (Preempt(10.0, 1, drain_ttft_s=2.0), Relief(10.0, 1, drain_ttft_s=2.0)):
        assert provisioner.idle(views((2.0, 50), (0.1, 1)))
        assert not provisioner.idle(views((2.1, 2.2), (0.1, 1)))
        assert not provisioner.idle(views((math.nan, math.nan), (0.1, 1)))
        assert not provisioner.idle(views(None, (0.1, 1)))


def test_forecasts_are_asked_for_where_they_are_used() -> None:
    assert Preempt(1.0, 1).forecasts
    assert not Relief(1.0, 1).forecasts
    assert Relief(1.0, 1, drain_after_s=5.0).forecasts


# -------------------------------------------------------------------------------------------------------- what is done


class Servers(Simulation):
    """A simulation whose instances take `takes` seconds to start, and some of which do not come up."""

    def __init__(self, engines: EngineBatch, delay_s: float, takes: float, bad: Sequence[int]) -> None:
        super().__init__(engines, delay_s)
        self.takes, self.bad = takes, bad

    def start_instance(self, instance_id: int, dispatcher: Dispatcher, ready_at: float) -> None:
        if instance_id in self.bad:
            self.at(self.now + self.takes, self.lose, instance_id, dispatcher)
        else:
            super().start_instance(instance_id, dispatcher, max(ready_at, self.now + self.takes))

    def lose(self, instance_id: int, dispatcher: Dispatcher) -> None:
        dispatcher.instance_down(instance_id, f"{instance_id} is bad", self.now)
        for record, its in self._held.pop(instance_id, ()):
            its.failed(record, f"instance {instance_id} did not start", self.now)
            self._send(record, its)


@dataclass
class Played:
    """A run with a scaler, on engines of two sequences at a time with steps of one second: n tokens take n seconds."""

    dispatcher: Dispatcher
    scaler: Scaler
    monitor: Monitor
    ended_at: float

    @property
    def records(self) -> list[RequestRecord]:
        return list(self.dispatcher.history.records)

    @property
    def instance_seconds(self) -> float:
        return self.scaler.instance_seconds(self.ended_at)

    @property
    def changes(self) -> list[tuple[float, int, str]]:
        return [(round(one.time, 6), one.instance_id, one.change) for one in self.scaler.changes]

    def placed(self) -> list[int]:
        return [record.instance_id for record in sorted(self.records, key=lambda one: one.request.id)]


def play(
    provisioner: Elastic,
    requests: Sequence[Request],
    *,
    instances: int = 3,
    takes: float = 0.0,
    bad: Sequence[int] = (),
    policy: Any = None,
    config: EngineConfig | None = None,
    latency: Any = None,
    total_blocks: int = 100,
    delay_s: float = 0.0,
) -> Played:
    settings = config or engine_config("v0", max_num_seqs=2, max_num_batched_tokens=60)
    model = latency or constant_latency()

    simulation = Servers(
        EngineBatch([EngineSpec(settings.settings(total_blocks), model)] * instances), delay_s, takes, bad
    )
    scaler = Scaler(provisioner, instances, simulation)
    dispatcher = Dispatcher(
        instances,
        policy or Block(),
        predictor_for(settings, model, total_blocks),
        DispatchConfig(),
        random.Random(0),
        snapshot_many=simulation.snapshot_many,
        delay_s=delay_s,
        initial=provisioner.initial,
        observers=[scaler],
    )
    monitor = Monitor(simulation.snapshot_many, lambda: dispatcher.active, 0.0)
    simulation.run(((one, dispatcher) for one in requests), monitor.tick)
    return Played(dispatcher, scaler, monitor, simulation.now)


def long(*arrivals: float, tokens: int = 10) -> list[Request]:
    return [request(i, 5, tokens, at) for i, at in enumerate(arrivals)]


def test_preempt_adds_an_instance_for_the_request_that_would_wait_and_sends_it_there() -> None:
    # Two run for 10 s; the third would wait for them and take 20 s, as would the fifth.
    played = play(Preempt(threshold_s=15.0, initial=1), long(0.0, 0.0, 0.0, 0.0, 0.5))
    assert played.placed() == [0, 0, 1, 1, 2]
    assert played.changes == [(0.0, 1, "start"), (0.0, 1, "join"), (0.5, 2, "start"), (0.5, 2, "join")]
    assert played.scaler.changes[0].reason == "best predicted latency 20.0 s"
    forecasts = [record.forecast for record in played.records]
    assert [None if one is None else one.e2e for one in forecasts] == pytest.approx([10, 10, 10, 10, 10], abs=1.5)
    assert all(record.finished - record.request.arrival < 12.0 for record in played.records)


def test_relief_adds_one_when_a_request_has_been_late_and_no_sooner() -> None:
    played = play(Relief(threshold_s=15.0, initial=1), long(0.0, 0.0, 0.0, 20.5), policy=RoundRobin())
    assert played.placed()[:3] == [0, 0, 0]
    assert played.changes[:2] == [(20.0, 1, "start"), (20.0, 1, "join")]


def test_there_are_never_more_than_the_cluster_holds() -> None:
    played = play(Preempt(threshold_s=15.0, initial=2), long(*[0.0] * 20), instances=3)
    assert played.changes == [(0.0, 2, "start"), (0.0, 2, "join")]
    assert set(played.placed()) == {0, 1, 2}


def test_a_cool_down_keeps_joins_apart() -> None:
    arrivals = [0.1 * i for i in range(60)]
    played = play(Preempt(threshold_s=15.0, initial=1, cooldown_s=2.0), long(*arrivals), instances=10)
    joins = [at for at, _, change in played.changes if change == "join"]
    assert len(joins) == 3
    assert all(later - earlier >= 2.0 for earlier, later in pairwise(joins))


def test_the_request_waits_for_its_instance_unless_it_would_begin_sooner_elsewhere() -> None:
    # The third would begin after 10 s at the running instance.
    played = play(Preempt(threshold_s=15.0, initial=1, startup_s=4.0), long(0.0, 0.0, 0.0), delay_s=0.25)
    assert played.placed() == [0, 0, 1]
    assert played.changes == [(0.0, 1, "start"), (4.0, 1, "join")]
    third = played.records[2]
    assert (third.dispatched, third.finished) == (4.25, 14.25)
    assert third.forecast is None  # there was nothing to look at
    (_, decision, _) = played.dispatcher.history.decisions[2]
    assert list(decision.candidates) == [1]
    assert math.isnan(decision.scores[0])
    played = play(Preempt(threshold_s=15.0, initial=1, startup_s=14.0), long(0.0, 0.0, 0.0))
    assert played.placed() == [0, 0, 0]
    assert played.changes == [(0.0, 1, "start"), (14.0, 1, "join")]


def test_real_servers_take_their_time_or_the_stated_one_whichever_is_longer() -> None:
    for takes, stated, joined in ((3.0, 0.0, 3.0), (3.0, 5.0, 5.0), (6.0, 5.0, 6.0)):
        played = play(Preempt(15.0, 1, startup_s=stated), long(0.0, 0.0, 0.0), takes=takes)
        assert played.changes == [(0.0, 1, "start"), (joined, 1, "join")]
        assert played.records[2].dispatched == joined


def test_a_server_that_does_not_start_costs_the_request_nothing_but_time() -> None:
    played = play(Preempt(15.0, 1), long(0.0, 0.0, 0.0), takes=3.0, bad=[1], instances=2)
    assert played.changes == [(0.0, 1, "start"), (3.0, 1, "fail")]
    assert [record.status for record in played.records] == ["ok"] * 3
    assert played.placed() == [0, 0, 0]
    assert played.records[2].retries == 1
    assert list(played.dispatcher.history.ejections) == []
    assert played.instance_seconds == pytest.approx(20.0 + 3.0)


def test_a_run_does_not_wait_for_what_is_starting_at_its_end() -> None:
    played = play(Relief(5.0, 1), long(0.0), takes=1000.0, policy=RoundRobin())
    assert played.changes == [(10.0, 1, "start")]
    assert played.ended_at == 10.0


def idle_after_a_burst(provisioner: Elastic, **how: Any) -> Played:
    """Three at once, which two instances take; then one now and then."""
    return play(provisioner, long(0.0, 0.0, 0.0, *(12.0 + 3.0 * i for i in range(10)), tokens=10), **how)


def test_an_instance_is_drained_and_stopped_when_one_fewer_would_do() -> None:
    played = idle_after_a_burst(Preempt(15.0, 1, drain_after_s=6.0, drain_ttft_s=2.0))
    kinds = [change for _, _, change in played.changes]
    assert kinds[:4] == ["start", "join", "drain", "stop"]
    (drained,) = [at for at, _, change in played.changes[:3] if change == "drain"]
    assert drained >= 6.0


def test_while_it_drains_it_serves_what_it_has_and_gets_nothing_more() -> None:
    played = idle_after_a_burst(Preempt(15.0, 1, drain_after_s=6.0, drain_ttft_s=2.0))
    state: dict[int, str] = {0: "join"}
    events = [(one.time, one.instance_id, one.change) for one in played.scaler.changes]
    for at, i, change in events:
        if change == "stop":
            theirs = [record for record in played.records if record.instance_id == i]
            assert all(record.finished <= at for record in theirs if record.dispatched <= at)
            assert state[i] == "drain"
        state[i] = change
    for record in played.records:
        before = [change for at, i, change in events if i == record.instance_id and at <= record.dispatched]
        assert not before or before[-1] in ("start", "join")


def test_one_that_drains_joins_again_at_once_if_another_is_needed() -> None:
    """Each instance has one long request when there is little to do; then comes more than one can take."""
    tokens_at = [(10, 0.0), (40, 0.0), (40, 0.0), (1, 12.0), (30, 20.0), (30, 20.0)]
    requests = [request(i, 5, tokens, at) for i, (tokens, at) in enumerate(tokens_at)]
    provisioner = Preempt(45.0, 1, startup_s=3.0, drain_after_s=4.0, drain_ttft_s=3.0)
    played = play(provisioner, requests, instances=2)
    drained = 1 - played.placed()[3]
    assert played.changes == [(0.0, 1, "start"), (3.0, 1, "join"), (12.0, drained, "drain"), (20.0, drained, "join")]
    assert played.placed()[4:] == [1 - drained, drained]
    assert played.instance_seconds == pytest.approx(2 * max(one.finished for one in played.records))


def test_the_floor_is_the_initial_number() -> None:
    requests = long(*(1.0 * i for i in range(60)), tokens=1)
    played = play(Preempt(15.0, 2, drain_after_s=3.0, drain_ttft_s=5.0), requests)
    assert played.changes == []
    assert played.instance_seconds == pytest.approx(2 * max(r.finished for r in played.records))


def test_cost_is_the_time_from_start_to_stop_summed_over_instances() -> None:
    requests = poisson(300, 3.0, 5, prompt=100, output=60)
    played = play(
        Preempt(3.0, 1, startup_s=2.0, cooldown_s=3.0, drain_after_s=5.0, drain_ttft_s=1.0),
        requests,
        instances=5,
        config=EngineConfig(max_model_len=512, max_num_seqs=8, max_num_batched_tokens=256),
        latency=round_latency(),
        total_blocks=200,
    )
    kinds = [change for _, _, change in played.changes]
    assert kinds.count("start") >= 3
    assert kinds.count("stop") >= 1
    end = max(record.finished for record in played.records)
    cost, since = 0.0, {0: 0.0}
    for at, i, change, _ in played.scaler.changes:
        if change == "start":
            assert i not in since
            since[i] = at
        if change == "stop":
            cost += at - since.pop(i)
    assert played.instance_seconds == pytest.approx(cost + sum(end - at for at in since.values()))
    assert all(record.status == "ok" for record in played.records)


def test_the_time_series_shows_who_is_active() -> None:
    played = play(Preempt(threshold_s=15.0, initial=1), long(0.0, 0.0, 0.0, 0.5, 1.0))
    columns = played.monitor.columns()
    by_request: dict[int, list[int]] = {}
    for at, instance_id in zip(columns["request_id"].tolist(), columns["instance_id"].tolist(), strict=True):
        by_request.setdefault(at, []).append(instance_id)
    assert by_request == {0: [0], 1: [0], 2: [0], 3: [0, 1], 4: [0, 1]}


@dataclass
class Counting:
    """A policy that counts how it is asked."""

    needs: ClassVar[Needs] = Needs.FORECAST
    asked: list[list[int]] = field(default_factory=list)

    def candidates(self, instances: int, request_index: int, rng: random.Random) -> Sequence[int]:
        return range(instances)

    def choose(self, request: Request, views: Sequence[InstanceView], rng: random.Random) -> Decision:
        self.asked.append([view.instance_id for view in views])
        return Decision(views[0].instance_id, self.asked[-1], [0.0] * len(views))


def test_a_policy_is_asked_once_for_each_request() -> None:
    policy = Counting()
    played = play(Preempt(threshold_s=15.0, initial=1), long(0.0, 0.0, 0.0, 0.0), policy=policy)
    assert policy.asked == [[0], [0], [1], [0, 1]]
    assert played.placed() == [0, 0, 1, 0]
