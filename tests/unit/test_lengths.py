"""Response-length estimates: the truth, and a model of how a learned estimator errs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from testbed import request

from block.lengths import Injected, Lengths, Noisy, Oracle, tag

TRUTH = np.random.default_rng(0).geometric(1 / 250, 20_000)


def estimates(lengths: Lengths, seed: int = 1) -> np.ndarray[Any, Any]:
    return lengths.estimate(TRUTH, np.random.default_rng(seed))


def test_the_oracle_tells_the_truth() -> None:
    np.testing.assert_array_equal(estimates(Oracle()), TRUTH)


def test_noise_of_nothing_is_the_truth() -> None:
    np.testing.assert_array_equal(estimates(Noisy(spread=0.0, outliers=0.0)), TRUTH)


def test_spread_is_the_relative_standard_deviation() -> None:
    errors = estimates(Noisy(spread=0.2, outliers=0.0)) / TRUTH - 1
    assert np.std(errors[TRUTH > 50]) == pytest.approx(0.2, rel=0.03)
    assert np.mean(errors[TRUTH > 50]) == pytest.approx(0.0, abs=0.01)


def test_bias_is_the_mean_relative_error() -> None:
    errors = estimates(Noisy(spread=0.1, outliers=0.0, bias=0.3)) / TRUTH - 1
    assert np.mean(errors[TRUTH > 50]) == pytest.approx(0.3, abs=0.01)


def test_outliers_are_lengths_of_other_responses() -> None:
    guessed = estimates(Noisy(spread=0.0, outliers=1.0))
    np.testing.assert_array_equal(np.sort(guessed), np.sort(TRUTH))
    assert np.corrcoef(guessed, TRUTH)[0, 1] == pytest.approx(0.0, abs=0.03)
    some = estimates(Noisy(spread=0.0, outliers=0.25))
    assert np.mean(some != TRUTH) == pytest.approx(0.25, abs=0.015)


def test_estimates_are_whole_and_at_least_one() -> None:
    guessed = estimates(Noisy(spread=2.0))
    assert guessed.dtype == np.int64
    assert guessed.min() == 1
    assert guessed.shape == TRUTH.shape


def test_the_default_errs_as_much_as_the_papers_estimator() -> None:
    error_rate = np.abs(estimates(Noisy()) - TRUTH).sum() / TRUTH.sum()
    assert 0.10 < error_rate < 0.15


def test_injected_factors_are_gaussian_and_cut() -> None:
    long = np.full(20_000, 1000)
    np.testing.assert_array_equal(estimates(Injected()), TRUTH)
    factors = Injected(0.25).estimate(long, np.random.default_rng(1)) / 1000
    assert (np.mean(factors), np.std(factors)) == (pytest.approx(1.0, abs=0.01), pytest.approx(0.25, rel=0.02))
    factors = Injected(2.0).estimate(long, np.random.default_rng(1)) / 1000
    assert (factors.min(), factors.max()) == (0.1, 5.0)
    assert np.mean(factors == 0.1) == pytest.approx(0.326, abs=0.01)  # P(N(1, 2²) < 0.1)
    with pytest.raises(ValueError, match=r"lengths\.sigma=-1"):
        Injected(-1.0)


@pytest.mark.parametrize(
    ("changes", "key"),
    [({"spread": -0.1}, "spread=-0.1"), ({"outliers": 1.5}, "outliers=1.5"), ({"bias": -1.0}, "bias=-1.0")],
)
def test_a_wrong_value_is_refused_by_name(changes: dict[str, float], key: str) -> None:
    with pytest.raises(ValueError, match=f"lengths.{key}"):
        Noisy(**changes)


def test_tagging_sets_the_estimate_and_nothing_else() -> None:
    requests = [request(i, 10 + i, 5 + i, 0.5 * i, predicted=0) for i in range(50)]
    tagged = tag(requests, Oracle(), 3)
    assert [one.predicted_output_tokens for one in tagged] == [one.output_tokens for one in requests]
    noisy = tag(requests, Noisy(), 3)
    for before, after in zip(requests, noisy, strict=True):
        assert (after.id, after.arrival, after.prompt_tokens, after.output_tokens) == (
            before.id,
            before.arrival,
            before.prompt_tokens,
            before.output_tokens,
        )
    assert all(type(one.predicted_output_tokens) is int for one in noisy)


def test_tags_depend_on_the_seed_alone() -> None:
    requests = [request(i, 10, 100) for i in range(50)]
    assert tag(requests, Noisy(), 3) == tag(requests, Noisy(), 3)
    assert tag(requests, Noisy(), 3) != tag(requests, Noisy(), 4)
