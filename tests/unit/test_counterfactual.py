"""Counterfactuals: what is replayed is what would have happened, and replaying leaves the run as it is."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import pytest
from test_replay import run, served
from testbed import constant_latency, engine_config, request

from block.backends.simulated import Simulated
from block.cluster.simulation import Simulation
from block.core.types import Decision, InstanceView, Request
from block.dispatch import policies
from block.dispatch.config import DispatchConfig
from block.dispatch.core import Dispatcher
from block.dispatch.counterfactual import Counterfactuals, sample
from block.engine.batch import EngineBatch, EngineSpec


@dataclass(frozen=True)
class Always:
    """Instance `target`, whatever comes."""

    target: int
    needs: ClassVar[policies.Needs] = policies.Needs.SNAPSHOT

    def candidates(self, instances: int, request_index: int, rng: random.Random) -> Sequence[int]:
        return range(instances)

    def choose(self, request: Request, views: Sequence[InstanceView], rng: random.Random) -> Decision:
        return Decision(self.target, [view.instance_id for view in views], [0.0] * len(views))


def replays(requests: Sequence[Request], delay_s: float) -> dict[tuple[int, int], float]:
    """All requests go to instance 0 of two whose steps take a second: replayed E2E by (request, instance)."""
    simulation = Simulation(
        EngineBatch([EngineSpec(engine_config("v1").settings(50), constant_latency())] * 2), delay_s
    )
    replayed = Counterfactuals(simulation.engines, [one.id for one in requests], delay_s)
    dispatcher = Dispatcher(
        2,
        Always(0),
        None,
        DispatchConfig(),
        random.Random(0),
        snapshot_many=simulation.snapshot_many,
        delay_s=delay_s,
        observers=[replayed],
    )
    simulation.run((one, dispatcher) for one in requests)
    columns = replayed.columns()
    assert columns["chosen"].tolist() == (columns["instance_id"] == 0).tolist()
    assert np.isnan(columns["forecast_e2e"]).all()
    keys = zip(columns["request_id"].tolist(), columns["instance_id"].tolist(), strict=True)
    return dict(zip(keys, columns["replayed_e2e"].tolist(), strict=True))


def test_a_request_is_tried_beside_what_is_there_and_what_is_in_transit() -> None:
    # A prompt of 16 tokens fills a step of a second; two more tokens follow it.
    first, second, third = request(0, 16, 3, 0.0), request(1, 16, 3, 0.25), request(2, 16, 3, 0.5)
    assert replays([first, second, third], delay_s=0.0) == {
        (0, 0): 3.0,
        (0, 1): 3.0,
        # It waits for the step in flight; the first one's decode leaves 15 of the next step's 16 tokens to its prompt.
        (1, 0): 5.0 - 0.25,
        (1, 1): 3.0,
        # Two decodes and the last token of the second's prompt leave it less than a step, too.
        (2, 0): 6.0 - 0.5,
        (2, 1): 3.0,
    }
    # With a second's way to the instances all are in transit when the second and the third are placed: the same, later.
    assert replays([first, second, third], delay_s=1.0) == {
        (0, 0): 4.0,
        (0, 1): 4.0,
        (1, 0): 6.0 - 0.25,
        (1, 1): 4.0,
        (2, 0): 7.0 - 0.5,
        (2, 1): 4.0,
    }


def test_replaying_leaves_the_run_as_it_is() -> None:
    plain = run(policy=policies.Block(), backend=Simulated(dispatch_delay_s=0.2))
    with_replays = served(replace(plain, replay_share=0.5))
    without = served(plain)
    assert with_replays.history is not None
    assert without.history is not None
    assert list(with_replays.history.records) == list(without.history.records)
    assert list(with_replays.history.decisions) == list(without.history.decisions)
    assert without.counterfactuals is None


def test_replays_of_a_run_agree_with_what_happened_where_nothing_came_later() -> None:
    settings = run(policy=policies.Block(), backend=Simulated(dispatch_delay_s=0.2), replay_share=1.0)
    outcome = served(settings)
    assert outcome.history is not None
    assert outcome.counterfactuals is not None
    columns = outcome.counterfactuals.columns()
    records = {record.request.id: record for record in outcome.history.records}
    assert len(columns["request_id"]) == 40 * 2
    chosen = {
        int(columns["request_id"][row]): (float(columns["replayed_e2e"][row]), float(columns["forecast_e2e"][row]))
        for row in np.flatnonzero(columns["chosen"])
    }
    assert chosen.keys() == records.keys()
    assert [forecast for _, forecast in chosen.values()] == [r.forecast.e2e for r in records.values() if r.forecast]
    later = [r.finished - r.request.arrival - chosen[id_][0] for id_, r in sorted(records.items())]
    assert later[-1] == pytest.approx(0.0, abs=1e-9)
    assert np.mean(later) > 0.001, "what comes later delays a request"


def test_a_sample_is_a_share_without_repetition() -> None:
    requests = [request(i + 7, 1, 1) for i in range(200)]
    ids = sample(requests, 0.1, np.random.default_rng(3))
    assert len(set(ids)) == len(ids) == 20
    assert set(ids) <= {one.id for one in requests}
    assert ids == sample(requests, 0.1, np.random.default_rng(3))


def test_forecasts_are_of_those_who_were_asked() -> None:
    outcome = served(run(policy=policies.Block(k=1), replay_share=1.0))
    assert outcome.counterfactuals is not None
    columns = outcome.counterfactuals.columns()
    asked = [not math.isnan(forecast) for forecast in columns["forecast_e2e"].tolist()]
    assert asked == columns["chosen"].tolist()
