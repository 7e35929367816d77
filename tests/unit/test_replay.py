"""Serving: the requests of a run, their replay, and what is left of one that stops half-way."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, ClassVar

import pytest

from block.backends.simulated import Simulated
from block.cluster.spec import ClusterConfig, Mixed, Pool
from block.core.types import Decision, InstanceView, Request
from block.core.user_code import UserFault
from block.dispatch import policies
from block.dispatch.config import DispatchConfig
from block.engine.config import EngineConfig
from block.hardware.catalogue import Model
from block.lengths import Noisy, Oracle
from block.run.config import RunConfig
from block.run.replay import PROGRESS_EVERY, Outcome, replay, requests_of
from block.store.wandb import Tracking
from block.workload.spec import Workload

LLAMA = Model("llama2-7b", "meta-llama/Llama-2-7b-hf", 32, 4096, 11008, 32, 32, 128, 32000)


def run(**changes: Any) -> RunConfig:
    """Two GPUs, forty short requests, five a second."""
    parts: dict[str, Any] = {
        "policy": policies.RoundRobin(),
        "model": LLAMA,
        "cluster": ClusterConfig("a30", 2),
        "engine": EngineConfig(),
        "workload": Workload("synthetic", 40, 5.0, source="synthetic", prompt_mean=100.0, output_mean=20.0),
        "lengths": Oracle(),
        "backend": Simulated(),
        "dispatch": DispatchConfig(),
        "tracking": Tracking(mode="disabled"),
    }
    return RunConfig(**(parts | changes))


def served(settings: RunConfig, finished: Callable[[int], None] = lambda count: None) -> Outcome:
    outcome = Outcome()
    replay(settings, requests_of(settings)[0], outcome, finished)
    return outcome


def test_several_dispatchers_share_the_work_and_nothing_else() -> None:
    workload = Workload("synthetic", 200, 20.0, source="synthetic", prompt_mean=100.0, output_mean=20.0)
    settings = run(workload=workload, policy=policies.RoundRobin())
    one, four = (
        served(settings).history,
        served(replace(settings, dispatch=DispatchConfig(dispatchers=4))).history,
    )
    assert one is not None
    assert four is not None
    assert [record.request for record in four.records] == [record.request for record in one.records]
    assert {record.status for record in four.records} == {"ok"}
    assert len(four.decisions) == 200
    # One takes strict turns; four do so each for itself, and so together at random.
    assert [record.instance_id for record in one.records] == [0, 1] * 100
    repeated = sum(a.instance_id == b.instance_id for a, b in pairwise(four.records))
    assert 60 < repeated < 140


def test_instances_that_differ_are_forecast_and_served() -> None:
    settings = run(policy=policies.Block(), cluster=Mixed((Pool("a30", 1), Pool("a10", 1))))
    history = served(settings).history
    assert history is not None
    assert {record.status for record in history.records} == {"ok"}
    assert all(record.forecast is not None for record in history.records)


@dataclass(frozen=True)
class Stopping:
    """A policy that raises `error` when it sees request number `at`."""

    error: BaseException
    at: int = 30
    needs: ClassVar[policies.Needs] = policies.Needs.COUNTS

    def candidates(self, instances: int, request_index: int, rng: random.Random) -> Sequence[int]:
        return range(instances)

    def choose(self, request: Request, views: Sequence[InstanceView], rng: random.Random) -> Decision:
        if request.id == self.at:
            raise self.error
        return Decision(request.id % len(views), [], [])


# ------------------------------------------------------------------------------------------------------------ requests


def test_an_oracle_predicts_the_truth_and_noise_does_not() -> None:
    assert all(request.predicted_output_tokens == request.output_tokens for request in requests_of(run())[0])
    noisy = requests_of(run(lengths=Noisy(spread=0.5)))[0]
    assert any(request.predicted_output_tokens != request.output_tokens for request in noisy)


def test_what_arrives_depends_on_the_seed_and_on_nothing_about_the_servers() -> None:
    requests = requests_of(run())[0]
    others = run(policy=policies.Block(), cluster=ClusterConfig("h100", 5), backend=Simulated(step_noise=0.5))
    assert requests_of(others)[0] == requests
    assert requests_of(run(seed=1))[0] != requests


def test_estimates_do_not_move_lengths_or_arrivals() -> None:
    noisy = requests_of(run(lengths=Noisy()))[0]
    exact = [replace(request, predicted_output_tokens=request.output_tokens) for request in noisy]
    assert exact == requests_of(run())[0]


# ------------------------------------------------------------------------------------------------------------- serving


def test_every_request_is_replayed_at_its_arrival() -> None:
    outcome = served(run(backend=Simulated(dispatch_delay_s=0.25)))
    assert outcome.history is not None
    records = sorted(outcome.history.records, key=lambda record: record.request.id)
    assert [record.request for record in records] == requests_of(run())[0]
    assert [record.dispatched for record in records] == pytest.approx(
        [record.request.arrival + 0.25 for record in records]
    )
    assert [record.output_tokens for record in records] == [record.request.output_tokens for record in records]
    assert [record.instance_id for record in records] == [i % 2 for i in range(40)]
    assert 0 < outcome.wall_time_s < 60


def test_a_run_is_open_loop() -> None:
    slow = served(run(backend=Simulated(step_time_factor=50.0)))
    assert slow.history is not None
    records = slow.history.records
    assert max(record.finished for record in records) > 5 * max(record.dispatched for record in records)
    assert all(record.dispatched == pytest.approx(record.request.arrival) for record in records)


def test_the_same_run_twice_is_the_same() -> None:
    settings = run(policy=policies.Block(k=1), lengths=Noisy())
    one, two = served(settings), served(settings)
    assert one.history is not None
    assert two.history is not None
    assert one.history.records == two.history.records
    assert one.history.decisions == two.history.decisions
    other = served(replace(settings, seed=1))
    assert other.history is not None
    assert one.history.records != other.history.records


def test_the_monitor_samples_every_instance() -> None:
    outcome = served(run(sample_every_s=2.0))
    assert outcome.monitor is not None
    columns = outcome.monitor.columns()
    times = sorted(set(columns["time"].tolist()))
    assert set(columns["instance_id"].tolist()) == {0, 1}
    assert len(times) * 2 == len(columns["time"])
    assert 3 <= len(times) <= 5  # arrivals last 8 s
    assert all(later - earlier >= 2.0 - 1e-9 for earlier, later in pairwise(times))


@pytest.mark.parametrize("count", [1, PROGRESS_EVERY, 2 * PROGRESS_EVERY + 30])
def test_progress_adds_up_to_the_number_of_requests(count: int) -> None:
    told: list[int] = []
    served(run(workload=replace(run().workload, num_requests=count)), told.append)
    assert sum(told) == count
    assert max(told) <= PROGRESS_EVERY


# ---------------------------------------------------------------------------------------------------- stopping half-way


@pytest.mark.parametrize("error", [RuntimeError("broken"), KeyboardInterrupt(), SystemExit(1)])
def test_a_run_that_stops_keeps_what_it_has_finished(error: BaseException) -> None:
    settings = run(policy=Stopping(error))
    outcome = Outcome()
    told = KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else UserFault
    with pytest.raises(told) as raised:
        replay(settings, requests_of(settings)[0], outcome)
    assert raised.value.__cause__ is error or raised.value is error
    assert outcome.history is not None
    finished = [record for record in outcome.history.records if record.status == "ok"]
    stopped_at = requests_of(settings)[0][30].arrival
    assert finished
    assert all(record.request.id < 30 and record.finished <= stopped_at for record in finished)
    assert outcome.wall_time_s > 0
