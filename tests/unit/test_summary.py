"""Summary metrics against numbers worked out by hand, and against the standard library on random tables."""

from __future__ import annotations

import json
import math
import statistics

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from block.store.summary import goodput, imbalance, interval, summarise

NAN = float("nan")


def columns(rows, **override):
    """Rows of (arrival, first, finished, prompt, output, preemptions, forecast_e2e, status) as columns."""
    names = ["arrival", "first_token", "finished", "prompt_tokens", "output_tokens", "preemptions", "forecast_e2e"]
    out = {name: np.array([row[i] for row in rows], dtype=float) for i, name in enumerate(names)}
    out["status"] = np.array([row[7] for row in rows], dtype=str)
    return {**out, **override}


THREE = [
    (0.0, 1.0, 3.0, 100, 21, 0, 2.0, "ok"),  # TTFT 1, TPOT 0.1, E2E 3, error 1/3
    (2.0, 2.5, 2.5, 10, 1, 1, NAN, "ok"),  # TTFT 0.5, no TPOT, E2E 0.5, no forecast
    (4.0, 7.0, 10.0, 50, 11, 2, 9.0, "ok"),  # TTFT 3, TPOT 0.3, E2E 6, error 1/2
    (1.0, NAN, NAN, 999, 0, 7, 1.0, "failed"),
    (9.0, NAN, NAN, 999, 0, 0, NAN, "pending"),
]


def test_goodput_is_the_share_of_all_that_met_both_objectives():
    assert goodput(columns(THREE), 1.0, 0.1) == 2 / 5  # the second has no TPOT to miss; two never ended
    assert goodput(columns(THREE), 0.9, 0.1) == goodput(columns(THREE), 1.0, 0.09) == 1 / 5
    assert goodput(columns(THREE), 3.0, 0.3) == 3 / 5
    assert goodput(columns([]), 3.0, 0.3) is None


def test_imbalance_is_what_the_fullest_has_over_the_mean():
    rows = [(0.0, 1.0, finished, 1, 1, 0, NAN, "ok") for finished in (4.0, 3.5, 9.0, 5.0)]
    where = {"dispatched": np.array([0.0, 1.0, 2.0, 4.0]), "instance_id": np.array([0, 0, 1, 1])}
    # At 0, 1, 2 and 4 s the first has 1, 2, 2 and 0 (one ends at 4, too), the second 0, 0, 1 and 2, the third none.
    assert imbalance(columns(rows, **where), 3) == pytest.approx((1 + 2 + 2 + 2) / (1 + 2 + 3 + 2) * 3)
    assert imbalance(columns([], dispatched=np.array([]), instance_id=np.array([])), 3) is None


def test_a_summary_is_what_was_worked_out_by_hand():
    got = summarise(columns(THREE), dispatch_overhead_s=[0.1, 0.3], forecast_us=[5, 7, 100], wall_time_s=2, compile_s=5)
    # Three sorted values a ≤ b ≤ c have P99 = b + 0.98 (c − b); two have a + 0.99 (b − a).
    assert got == pytest.approx(
        {
            "ttft_mean_s": 1.5,
            "ttft_p50_s": 1.0,
            "ttft_p99_s": 1.0 + 0.98 * 2.0,
            "tpot_mean_s": 0.2,
            "tpot_p50_s": 0.2,
            "tpot_p99_s": 0.298,
            "e2e_mean_s": 9.5 / 3,
            "e2e_p50_s": 3.0,
            "e2e_p99_s": 3.0 + 0.98 * 3.0,
            "request_throughput_rps": 0.3,
            "token_throughput_tps": (160 + 33) / 10,
            "output_throughput_tps": 3.3,
            "preemptions": 3,
            "prefix_hit_rate": None,
            "e2e_error_mean": 5 / 12,
            "e2e_error_p50": 5 / 12,
            "dispatch_overhead_mean_s": 0.2,
            "dispatch_overhead_p99_s": 0.298,
            "forecast_mean_us": pytest.approx(112 / 3),
            "forecast_p50_us": 7.0,
            "forecast_p99_us": 7 + 0.98 * 93,
            "wall_time_s": 2.0,
            "compile_s": 5.0,
            "peak_memory_mib": None,
        }
    )


def test_the_hit_rate_is_the_share_of_prompt_tokens_that_caches_had():
    table = columns(THREE)
    table["cached_tokens"] = np.array([30, 0, 50] + [99] * (len(THREE) - 3))
    prompts = int(table["prompt_tokens"][np.asarray(table["status"]) == "ok"].sum())
    expected = int(table["cached_tokens"][np.asarray(table["status"]) == "ok"].sum()) / prompts
    assert summarise(table)["prefix_hit_rate"] == pytest.approx(expected)
    assert expected > 0


def test_what_was_not_measured_is_none():
    got = summarise(columns(THREE))
    assert {key for key, value in got.items() if value is None} == {
        "prefix_hit_rate",
        "dispatch_overhead_mean_s",
        "dispatch_overhead_p99_s",
        "forecast_mean_us",
        "forecast_p50_us",
        "forecast_p99_us",
        "wall_time_s",
        "compile_s",
        "peak_memory_mib",
    }


@pytest.mark.parametrize("rows", [[], THREE[3:]], ids=["empty", "none ok"])
def test_without_an_ok_request_there_are_no_numbers(rows):
    got = summarise(columns(rows))
    assert got.pop("preemptions") == 0
    assert set(got.values()) == {None}


def test_forecasts_of_no_request_are_none():
    got = summarise(columns([THREE[1]]))
    assert (got["e2e_error_p50"], got["tpot_p50_s"]) == (None, None)
    assert got["e2e_p50_s"] == 0.5


def test_one_instant_has_no_throughput():
    assert summarise(columns([(1.0, 1.0, 1.0, 5, 1, 0, NAN, "ok")]))["request_throughput_rps"] is None


@pytest.mark.parametrize("name", ["arrival", "first_token", "finished"])
def test_an_ok_request_without_a_time_is_refused(name):
    table = columns(THREE)
    table[name][0] = NAN
    with pytest.raises(ValueError, match=f"1 requests have status 'ok' but no {name}"):
        summarise(table)


def test_a_measurement_that_is_not_a_number_is_refused():
    with pytest.raises(ValueError, match="forecast: every value must be finite"):
        summarise(columns(THREE), forecast_us=[1.0, NAN])


times = st.floats(0, 1e4)
rows = st.tuples(
    times, times, times, st.integers(1, 4000), st.integers(1, 4000), st.integers(0, 9), times | st.just(NAN)
)


@given(st.lists(st.tuples(rows, st.sampled_from(["ok", "failed"])), max_size=30))
def test_percentiles_agree_with_the_standard_library(drawn):
    # Gaps, not instants, are drawn: arrival, then first token, then the last.
    table = [(a, a + f, a + f + g, p, o, n, x, status) for (a, f, g, p, o, n, x), status in drawn]
    got = summarise(columns(table))
    json.dumps(got, allow_nan=False)
    ok = [row for row in table if row[7] == "ok"]
    assert got["preemptions"] == sum(row[5] for row in ok)
    for name, values in {
        "ttft": [row[1] - row[0] for row in ok],
        "e2e": [row[2] - row[0] for row in ok],
        "tpot": [(row[2] - row[1]) / (row[4] - 1) for row in ok if row[4] > 1],
    }.items():
        if not values:
            assert got[f"{name}_p50_s"] is got[f"{name}_p99_s"] is got[f"{name}_mean_s"] is None
            continue
        assert got[f"{name}_mean_s"] == pytest.approx(statistics.fmean(values))
        assert got[f"{name}_p50_s"] == pytest.approx(statistics.median(values))
        # The 99th percentile lies between the order statistics around rank 0.99 (n − 1).
        rank = 0.99 * (len(values) - 1)
        low, high = (sorted(values)[f(rank)] for f in (math.floor, math.ceil))
        assert got[f"{name}_p99_s"] == pytest.approx(low + (rank % 1) * (high - low))
    errors = [abs(row[6] - (row[2] - row[0])) / (row[2] - row[0]) for row in ok if row[6] == row[6] and row[2] > row[0]]
    assert got["e2e_error_p50"] == (pytest.approx(statistics.median(errors)) if errors else None)


# ----------------------------------------------------------------------------------------------------------- interval


def test_one_value_has_no_interval() -> None:
    assert interval([31.5]) == (31.5, None)


@pytest.mark.parametrize(
    ("values", "mean", "half"),
    [
        ([10.0, 12.0], 11.0, 12.706),  # standard error 1
        ([1.0, 2.0, 3.0], 2.0, 4.303 / math.sqrt(3)),  # standard deviation 1
        ([5.0, 5.0, 5.0, 5.0], 5.0, 0.0),
        ([4.0, 8.0, 6.0, 5.0, 3.0, 7.0], 5.5, 2.571 * math.sqrt(3.5 / 6)),  # squares 17.5 / 5 = variance 3.5
    ],
)
def test_interval_by_hand(values: list[float], mean: float, half: float) -> None:
    assert interval(values) == pytest.approx((mean, half), rel=1e-3)


@pytest.mark.parametrize(("count", "t"), [(16, 2.131), (17, 2.120), (21, 2.086), (31, 2.042), (101, 1.984)])
def test_many_values_use_the_tabulated_t(count: int, t: float) -> None:
    values = [(-1.0) ** i for i in range(count)]
    mean = sum(values) / count
    deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / (count - 1))
    assert interval(values)[1] == pytest.approx(t * deviation / math.sqrt(count), rel=5e-4)
