"""The heap of events: what happens when, in which order, and what is said if nothing more will."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

import pytest
from testbed import constant_latency, engine_config, request

from block.cluster.simulation import Simulation, SimulationStalled
from block.core.types import RequestRecord
from block.dispatch.config import DispatchConfig
from block.dispatch.core import Dispatcher
from block.dispatch.policies import RoundRobin
from block.engine.batch import EngineBatch, EngineSpec
from block.engine.state import FREE_BLOCKS


def simulation(instances: int = 1, delay_s: float = 0.0, total_blocks: int = 16) -> Simulation:
    """Engines of which each step takes a second."""
    spec = EngineSpec(engine_config("v1").settings(total_blocks), constant_latency())
    return Simulation(EngineBatch([spec] * instances), delay_s)


def round_robin(instances: int = 1) -> Dispatcher:
    return Dispatcher(instances, RoundRobin(), None, DispatchConfig(), Random(0))


def test_a_request_is_served_in_the_engines_time() -> None:
    one, dispatcher = simulation(), round_robin()
    one.run([(request(0, 20, 3, 10.0), dispatcher)])
    (record,) = dispatcher.history.records
    # Two chunks, then two decodes, of a second each.
    assert (record.dispatched, record.first_token, record.finished) == (10.0, 12.0, 14.0)
    assert (record.status, record.output_tokens, record.preemptions) == ("ok", 3, 0)
    assert one.now == 14.0


def test_the_delay_lies_between_decision_and_delivery() -> None:
    one, dispatcher = simulation(delay_s=0.25), round_robin()
    one.run([(request(0, 4, 3, 1.0), dispatcher)])
    assert [at for at, _, _ in dispatcher.history.decisions] == [1.0]
    (record,) = dispatcher.history.records
    assert (record.dispatched, record.finished) == (1.25, 4.25)


def test_what_is_set_for_the_same_moment_happens_in_the_order_in_which_it_was_set() -> None:
    one, log = simulation(), []
    for name, when in (("c", 2.0), ("a", 1.0), ("d", 2.0), ("b", 1.0)):
        one.at(when, log.append, name)
    one.run([(request(0, 4, 5), round_robin())])
    assert log == ["a", "b", "c", "d"]


def test_a_sequence_that_finishes_at_the_moment_of_an_event_has_finished_before_it() -> None:
    one, dispatcher, seen = simulation(), round_robin(), []
    one.at(3.0, lambda: seen.append(dispatcher.history.records[0].status))
    one.run([(request(0, 4, 3), dispatcher), (request(1, 4, 3, 5.0), dispatcher)])
    assert seen == ["ok"]


def test_requests_are_told_before_they_are_placed_and_once_they_have_ended() -> None:
    one, dispatcher = simulation(), round_robin()
    before: list[tuple[float, int, int]] = []
    ended: list[RequestRecord] = []
    requests = [request(i, 4, 3, 0.5 * i) for i in range(3)]
    one.run(
        ((each, dispatcher) for each in requests),
        lambda now, id_: before.append((now, id_, len(dispatcher.history.records))),
        ended.append,
    )
    assert before == [(0.0, 0, 0), (0.5, 1, 1), (1.0, 2, 2)]
    assert sorted(record.request.id for record in ended) == [0, 1, 2]


def test_a_process_goes_on_when_it_is_time() -> None:
    one, log = simulation(), []

    def process() -> Iterator[float]:
        log.append(one.now)
        yield 1.5
        log.append(one.now)
        yield from (one.now + 0.25 for _ in range(2))
        log.append(one.now)

    one.start(process())  # type: ignore[arg-type]
    one.run([(request(0, 4, 5), round_robin())])
    assert log == [0.0, 1.5, 2.0]


def test_a_run_ends_with_its_last_request_whatever_is_set_for_later() -> None:
    one, log = simulation(), []
    one.at(100.0, log.append, "never")
    one.run([(request(0, 4, 3), round_robin())])
    assert (one.now, log) == (3.0, [])


def test_requests_that_nothing_will_ever_finish_are_an_error() -> None:
    one, dispatcher = simulation(total_blocks=16), round_robin()
    one.engines.arrays.counters[0, FREE_BLOCKS] = 0  # no block is free, and none will be
    with pytest.raises(SimulationStalled, match="requests are left, and nothing more will happen"):
        one.run([(request(0, 4, 3), dispatcher)])


def test_a_request_for_which_no_instance_is_left_has_ended_at_once() -> None:
    one, dispatcher = simulation(), round_robin()
    dispatcher.instance_down(0, "gone", 0.0)
    one.run([(request(0, 4, 3), dispatcher)])
    (record,) = dispatcher.history.records
    assert (record.status, record.error) == ("failed", "no instance is left")
