"""Injected error: what a forecaster says times a factor, and nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from test_replay import run, served

from block.core.snapshot import Snapshot
from block.core.types import Forecast, Request
from block.dispatch import policies
from block.dispatch.config import DispatchConfig
from block.dispatch.noise import NoisyForecaster


class Constant:
    """Forecasts 1 s and 10 s for whatever is asked."""

    def forecasts(
        self, snapshots: Sequence[Snapshot], in_transit: Sequence[Sequence[Request]], request: Request, now: float
    ) -> list[Forecast]:
        return [Forecast(1.0, 10.0) for _ in snapshots]


SNAPSHOTS = [Snapshot(i, 0.0, 0.0, 0, 0, 0, 0, np.zeros((0, 0), dtype=np.int64)) for i in range(5000)]


def noisy(sigma: float, seed: int = 0) -> list[Forecast]:
    forecaster = NoisyForecaster(Constant(), sigma, np.random.default_rng(seed))
    return forecaster.forecasts(SNAPSHOTS, [[]] * len(SNAPSHOTS), Request(0, 0.0, 1, 1, 1), 0.0)


def test_each_forecast_has_a_gaussian_factor_of_its_own() -> None:
    factors = np.array([forecast.ttft for forecast in noisy(0.2)])
    assert (factors.mean(), factors.std()) == (pytest.approx(1.0, abs=0.01), pytest.approx(0.2, rel=0.05))
    assert len(set(factors.tolist())) == len(factors)
    np.testing.assert_allclose([forecast.e2e for forecast in noisy(0.2)], 10 * factors)


def test_factors_are_cut() -> None:
    factors = [forecast.ttft for forecast in noisy(3.0)]
    assert (min(factors), max(factors)) == (0.1, 5.0)


def test_noise_of_a_run_moves_choices_but_not_what_arrives() -> None:
    exact = replace(run(), policy=policies.Block())
    erring = replace(exact, dispatch=DispatchConfig(forecast_noise=1.0))
    first, second, third = (served(settings).history for settings in (exact, erring, erring))
    assert first is not None
    assert second is not None
    assert third is not None
    assert [r.request for r in first.records] == [r.request for r in second.records]
    assert [r.instance_id for r in first.records] != [r.instance_id for r in second.records]
    assert list(second.records) == list(third.records)


def test_a_wrong_value_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"dispatch\.forecast_noise=-0.1"):
        DispatchConfig(forecast_noise=-0.1)
