"""Capacity: the request rate at which a latency percentile crosses its objective.

A seed's workload is the same at every rate, only stretched, so latency grows almost monotonically with the rate and the
crossing can be bracketed; several seeds give an interval (`block.metrics.interval`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

METRICS = tuple(f"{name}_{which}_s" for name in ("ttft", "tpot", "e2e") for which in ("mean", "p50", "p99"))


@dataclass(frozen=True)
class CapacityConfig:
    """What to search for (the node `capacity` of the config).

    metric: a latency of a run's summary; slo_s: its objectives; seeds: how many, from `seed` on.
    low, high: requests/s where the search begins; the bracket is widened if the crossing is not in it.
    tolerance: width of the bracket, in requests/s, within which the crossing is interpolated (log-linearly). From 0.5
        to 0.1, single results moved by 0.05 at most, less than by another seed, for a third more runs.
    """

    metric: str = "ttft_p99_s"
    slo_s: tuple[float, ...] = (3.0, 10.0)
    seeds: int = 3
    low: float = 24.0
    high: float = 36.0
    tolerance: float = 0.5

    def __post_init__(self) -> None:
        if self.metric not in METRICS:
            raise ValueError(f"capacity.metric={self.metric}: choose from {', '.join(METRICS)}")
        object.__setattr__(self, "slo_s", tuple(self.slo_s))  # Hydra passes a list
        if not self.slo_s or not all(0 < slo < math.inf for slo in self.slo_s):
            raise ValueError(f"capacity.slo_s={list(self.slo_s)}: must be seconds greater than 0, such as [3,10]")
        for key in ("tolerance", "low"):
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


def crossings(latency: Callable[[float], float], config: CapacityConfig) -> tuple[list[float], list[Point]]:
    """The rate at which `latency(qps)` crosses each objective, and the points tried, in order of rate.

    What was tried for one objective serves the others. ValueError if an objective is missed at 1/100 of `low` or still
    met at 100 times `high`.
    """
    tried: dict[float, float] = {}

    def at(qps: float) -> float:
        if qps not in tried:
            tried[qps] = latency(qps)
        return tried[qps]

    rates = [_crossing(at, tried, slo, config) for slo in config.slo_s]
    return rates, [Point(*point) for point in sorted(tried.items())]


def _crossing(at: Callable[[float], float], tried: dict[float, float], slo: float, config: CapacityConfig) -> float:
    def excess(qps: float) -> float:
        return math.log(max(at(qps), 1e-9) / slo)

    low = max((qps for qps, latency in tried.items() if latency <= slo), default=config.low)
    high = min((qps for qps, latency in tried.items() if latency > slo and qps > low), default=max(config.high, low))
    while at(low) > slo:
        high = low
        low /= 1.5
        if low < config.low / 100:
            raise ValueError(f"capacity: {config.metric} misses {slo:g} s even at {high:.3g} requests/s")
    while at(high) <= slo:
        low = high
        high *= 1.5
        if high > config.high * 100:
            raise ValueError(f"capacity: {config.metric} meets {slo:g} s even at {low:.3g} requests/s")
    # Regula falsi on the logarithm, which grows about linearly with the rate; the Illinois rule halves the weight of an
    # end that stays, so that the bracket closes from both sides.
    below, above, side = excess(low), excess(high), 0
    while high - low > config.tolerance:
        margin = min(config.tolerance / 2, (high - low) / 4)
        middle = min(max(low - below * (high - low) / (above - below), low + margin), high - margin)
        value = excess(middle)
        if value > 0:
            high, above, below, side = middle, value, below / 2 if side > 0 else below, 1
        else:
            low, below, above, side = middle, value, above / 2 if side < 0 else above, -1
    below, above = excess(low), excess(high)
    return float(low - below * (high - low) / (above - below))
