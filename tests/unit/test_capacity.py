"""Capacity: where a known curve crosses its objective."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from block.run.capacity import CapacityConfig, NoSuchRate, crossings


def exponential(qps: float, at: float = 30.0, per: float = 2.0) -> float:
    """A latency of 1 s at `at` requests/s, e times as long every `per` requests/s."""
    return math.exp(min((qps - at) / per, 700.0))  # no float is larger


def settings(*slo_s: float, **changes: Any) -> CapacityConfig:
    return CapacityConfig(slo_s=slo_s, **changes)


# ---------------------------------------------------------------------------------------------------------- crossings


def test_an_exponential_curve_is_met_exactly() -> None:
    rates, *_ = crossings(exponential, settings(3.0, 10.0))
    assert rates == pytest.approx([30 + 2 * math.log(3), 30 + 2 * math.log(10)])


@pytest.mark.parametrize(
    ("latency", "slo", "crossing"),
    [
        (lambda qps: 1 / (40 - qps) if qps < 40 else 1e6, 0.5, 38.0),  # a queue that saturates
        (
            lambda qps: 0.0 if qps < 31.25 else 50.0,
            1.0,
            31.25,
        ),  # a cliff; zero has no logarithm
        (lambda qps: qps / 10, 3.0, 30.0),
    ],
)
def test_other_curves_are_met_within_the_tolerance(
    latency: Callable[[float], float], slo: float, crossing: float
) -> None:
    (rate,), *_ = crossings(latency, settings(slo, tolerance=0.1))
    assert rate == pytest.approx(crossing, abs=0.1)


@pytest.mark.parametrize("at", [0.5, 10.0, 23.9, 24.0, 36.0, 36.1, 100.0, 1000.0])
def test_the_bracket_is_widened_until_the_crossing_is_in_it(at: float) -> None:
    (rate,), points, _ = crossings(lambda qps: exponential(qps, at, at / 15), settings(1.0, low=24, high=36))
    assert rate == pytest.approx(at)
    tried = [point.qps for point in points]
    assert min(tried) <= at <= max(tried)
    assert len(tried) < 30  # each is a whole run


def test_an_objective_that_is_crossed_nowhere_is_a_gap_that_tells_how_far_it_looked() -> None:
    (rate,), points, reasons = crossings(lambda qps: 0.1, settings(3.0, metric="e2e_p99_s"))
    assert math.isnan(rate)
    assert re.fullmatch(r"e2e_p99_s meets 3 s even at 3,600 requests/s", reasons[3.0])
    assert len(points) < 10  # each is a whole run
    (rate,), _, reasons = crossings(lambda qps: 9.0, settings(3.0))
    assert math.isnan(rate)
    assert re.fullmatch(r"ttft_p99_s misses 3 s even at 0\.\d+ requests/s", reasons[3.0])


def test_a_rate_that_no_workload_has_ends_the_search_as_a_gap() -> None:
    def latency(qps: float) -> float:
        if qps > 500:
            raise NoSuchRate("workload.gap_s=30.0: too many turns")
        return 0.1

    (rate,), points, reasons = crossings(latency, settings(3.0))
    assert math.isnan(rate)
    said = f"ttft_p99_s meets 3 s even at {points[-1].qps:g} requests/s; workload.gap_s=30.0: too many turns"
    assert reasons[3.0] == said
    with pytest.raises(NoSuchRate):
        crossings(lambda qps: latency(1000), settings(3.0))


def test_one_objective_that_is_crossed_nowhere_leaves_the_other() -> None:
    rates, _, reasons = crossings(lambda qps: min(qps / 10, 5.0), settings(3.0, 10.0))
    assert rates[0] == pytest.approx(30.0)
    assert math.isnan(rates[1])
    assert list(reasons) == [10.0]


def test_rates_are_multiples_of_the_tolerance_and_few() -> None:
    """So that searches that begin elsewhere try the same rates."""
    found = [crossings(exponential, settings(3.0, 10.0, low=low, high=low + 4)) for low in (28.0, 30.0, 33.0)]
    assert found[0][0] == pytest.approx(found[1][0])
    assert all(point.qps % 0.5 == 0 for one in found for point in one.points)
    assert all(len(one.points) <= 7 for one in found)


def test_objectives_share_what_was_tried_and_each_rate_is_tried_once() -> None:
    calls: list[float] = []

    def latency(qps: float) -> float:
        calls.append(qps)
        return exponential(qps)

    _, points, _ = crossings(latency, settings(3.0, 10.0, 3.1))
    assert len(calls) == len(set(calls))
    assert [point.qps for point in points] == sorted(calls)
    assert all(point.latency_s == exponential(point.qps) for point in points)
    alone = sum(len(crossings(exponential, settings(slo))[1]) for slo in (3.0, 10.0, 3.1))
    assert len(calls) < alone


@given(
    slos=st.lists(st.floats(0.05, 50), min_size=1, max_size=4),
    at=st.floats(2, 300),
    low=st.floats(5, 50),
    width=st.floats(0.5, 50),
)
def test_objectives_in_any_order_and_any_first_bracket_give_the_same(
    slos: list[float], at: float, low: float, width: float
) -> None:
    config = settings(*slos, low=low, high=low + width, tolerance=0.1)
    rates, *_ = crossings(lambda qps: exponential(qps, at, at / 10), config)
    assert rates == pytest.approx([at + at / 10 * math.log(slo) for slo in slos])


# ------------------------------------------------------------------------------------------------------ configuration


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metric": "preemptions"}, r"capacity\.metric=preemptions: choose from ttft_mean_s, .*e2e_p99_s"),
        ({"slo_s": ()}, r"capacity\.slo_s=\[\]: must be seconds greater than 0"),
        ({"slo_s": (3.0, 0.0)}, r"capacity\.slo_s=\[3\.0, 0\.0\]: must be seconds"),
        ({"slo_s": (math.inf,)}, r"capacity\.slo_s=\[inf\]: must be seconds"),
        ({"tolerance": 0.0}, r"capacity\.tolerance=0\.0: must be greater than 0"),
        ({"low": -1.0}, r"capacity\.low=-1\.0: must be greater than 0"),
        ({"high": 24.0}, r"capacity\.high=24\.0: must be greater than capacity\.low=24\.0"),
        ({"seeds": 0}, r"capacity\.seeds=0: must be at least 1"),
    ],
)
def test_values_out_of_range_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CapacityConfig(**changes)
