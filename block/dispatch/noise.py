"""Injected error: forecasts times Gaussian factors, to see how exact they must be (the camera-ready's Fig 12)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from block.core.snapshot import Snapshot
from block.core.types import Forecasts, Request
from block.dispatch.core import Forecaster


class NoisyForecaster:
    """The forecasts of another forecaster, each multiplied by a factor of its own: N(1, sigma²), cut to 0.1 … 5."""

    def __init__(self, exact: Forecaster, sigma: float, rng: np.random.Generator) -> None:
        self._exact = exact
        self._sigma = sigma
        self._rng = rng

    def forecasts(
        self, snapshots: Sequence[Snapshot], in_transit: Sequence[Sequence[Request]], request: Request, now: float
    ) -> Forecasts:
        """One forecast for each snapshot."""
        exact = self._exact.forecasts(snapshots, in_transit, request, now)
        drawn = self._rng.normal(1.0, self._sigma, len(exact)).clip(0.1, 5.0).tolist()
        return Forecasts.of(exact).times(drawn)
