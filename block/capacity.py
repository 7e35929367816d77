"""Capacity: the request rate at which a latency percentile crosses its objective.

A seed's workload is the same at every rate, only stretched, so latency grows almost monotonically with the rate and the
crossing can be bracketed; several seeds give an interval.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

# Two-sided 95 % quantiles of Student's t, by degrees of freedom from 1.
_T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)


@dataclass(frozen=True)
class CapacityConfig:
    """What to search for (the node `capacity` of conf/capacity.yaml).

    metric: a key of a run's summary, in seconds; slo_s: its objective; seeds: how many, from `seed` on.
    low, high: requests/s where the search begins; the bracket is widened if the crossing is not in it.
    tolerance: width of the bracket, in requests/s, within which the crossing is interpolated.
    """

    metric: str = "ttft_p99_s"
    slo_s: float = 10.0
    seeds: int = 3
    low: float = 24.0
    high: float = 36.0
    tolerance: float = 0.1

    def __post_init__(self) -> None:
        if not self.metric.endswith("_s"):
            raise ValueError(f"capacity.metric={self.metric}: choose a latency such as ttft_p99_s or e2e_p99_s")
        for key in ("slo_s", "tolerance", "low"):
            if not 0 < getattr(self, key) < math.inf:
                raise ValueError(f"capacity.{key}={getattr(self, key)}: must be greater than 0")
        if self.high <= self.low:
            raise ValueError(f"capacity.high={self.high}: must be greater than capacity.low={self.low}")
        if self.seeds < 1:
            raise ValueError(f"capacity.seeds={self.seeds}: must be at least 1")


class Point(NamedTuple):
    """A rate that was tried, and the latency there."""

    qps: float
    latency_s: float


def crossing(latency: Callable[[float], float], config: CapacityConfig) -> tuple[float, list[Point]]:
    """The rate at which `latency(qps)` crosses the objective, and the points tried, in order of rate.

    ValueError if it is missed at a rate of 1/100 of `low` or still met at 100 times `high`.
    """
    tried: dict[float, float] = {}

    def misses(qps: float) -> bool:
        tried[qps] = latency(qps)
        return tried[qps] > config.slo_s

    low, high = config.low, config.high
    while misses(low):
        high = low
        low /= 1.5
        if low < config.low / 100:
            raise ValueError(f"capacity: {config.metric} misses {config.slo_s} s even at {high:.3g} requests/s")
    while high not in tried and not misses(high):
        low = high
        high *= 1.5
        if high > config.high * 100:
            raise ValueError(f"capacity: {config.metric} meets {config.slo_s} s even at {low:.3g} requests/s")
    while high - low > config.tolerance:
        middle = (low + high) / 2
        if misses(middle):
            high = middle
        else:
            low = middle
    # Latency grows about exponentially with the rate near the crossing.
    ends = np.log([max(tried[low], 1e-9), config.slo_s, tried[high]])
    qps = low + (high - low) * (ends[1] - ends[0]) / (ends[2] - ends[0])
    return float(qps), [Point(*point) for point in sorted(tried.items())]


def interval(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean, and half the width of its 95 % confidence interval (Student's t); None for a single value."""
    array = np.asarray(values, dtype=np.float64)
    if len(array) < 2:
        return float(array.mean()), None
    t = _T95[len(array) - 2] if len(array) - 2 < len(_T95) else 1.96
    return float(array.mean()), float(t * array.std(ddof=1) / math.sqrt(len(array)))
