"""Capacity: the request rate at which a latency percentile crosses its objective.

A seed's workload is the same at every rate, only stretched, so latency grows almost monotonically with the rate and the
crossing can be bracketed; several seeds give an interval (`block.store.summary.interval`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from block.core.choices import did_you_mean

FAR = 16  # steps of the grid: when so long a reach is not enough, the far end is tried at once

METRICS = tuple(f"{name}_{which}_s" for name in ("ttft", "tpot", "e2e") for which in ("mean", "p50", "p99"))


@dataclass(frozen=True)
class CapacityConfig:
    """What to search for (the node `capacity` of the config).

    metric: a latency of a run's summary; slo_s: its objectives; seeds: how many, from `seed` on.
    low, high: about where the latency crosses the least and the greatest objective, in requests/s: the search begins
        there, and goes as far as it must.
    tolerance: the rates tried are multiples of it, in requests/s; between two that are next to each other the crossing
        is interpolated (log-linearly). Against searches that closed in on the crossing, 0.5 moves single results of
        Block and Llumnix- by up to 0.14, and those of heuristics by up to 1: their latency does not grow evenly, and
        a search that begins elsewhere may find another crossing (min-QPM at 3 s: 19.4 or 20.9 for one seed).
    fresh: search even if the search is stored.
    """

    metric: str = "ttft_p99_s"
    slo_s: tuple[float, ...] = (3.0, 10.0)
    seeds: int = 3
    low: float = 24.0
    high: float = 36.0
    tolerance: float = 0.5
    fresh: bool = False

    def __post_init__(self) -> None:
        if self.metric not in METRICS:
            raise ValueError(f"capacity.metric={self.metric}: {did_you_mean(self.metric, METRICS)}")
        object.__setattr__(self, "slo_s", tuple(self.slo_s))  # Hydra passes a list
        if not self.slo_s or not all(0 < slo < math.inf for slo in self.slo_s):
            raise ValueError(f"capacity.slo_s={list(self.slo_s)}: must be seconds greater than 0, such as [3,10]")
        for key in ("tolerance", "low"):
            if not 0 < getattr(self, key) < math.inf:
                raise ValueError(f"capacity.{key}={getattr(self, key)}: must be greater than 0")
        if not self.low < self.high < math.inf:
            raise ValueError(f"capacity.high={self.high}: must be greater than capacity.low={self.low}")
        if self.seeds < 1:
            raise ValueError(f"capacity.seeds={self.seeds}: must be at least 1")
        if self.seeds > 1000:
            raise ValueError(f"capacity.seeds={self.seeds}: must be at most 1000")


class Point(NamedTuple):
    """A rate that was tried, and the latency there."""

    qps: float
    latency_s: float


class Crossings(NamedTuple):
    """What a search has found: the rate at which each objective is crossed (requests/s; NaN if it is nowhere), the
    points tried, in order of rate, and why an objective is crossed nowhere, by the objective (s).
    """

    rates: list[float]
    points: list[Point]
    reasons: dict[float, str]


class NoSuchRate(Exception):
    """Requests cannot come at a rate; the message says why."""


class _Nowhere(Exception):
    """An objective is crossed nowhere; the message says why."""


def crossings(latency: Callable[[float], float], config: CapacityConfig) -> Crossings:
    """Where `latency(qps)` crosses each objective. What was tried for one objective serves the others.

    An objective that is missed at 1/100 of `low` (or at the least rate there is, `tolerance`), or still met at 100
    times `high`, is crossed nowhere: so it is with few requests, which all fit into the instances at once. So it is too
    if `latency` raises NoSuchRate on the way, unless at the first rate of all.
    """
    tried: dict[int, float] = {}  # latency by rate, in units of `tolerance`

    def at(rate: int) -> float:
        if rate not in tried:
            tried[rate] = latency(_qps(rate, config))
        return tried[rate]

    rates, reasons = [], {}
    for slo in config.slo_s:
        try:
            rates.append(_crossing(at, tried, slo, config))
        except _Nowhere as why:
            rates.append(math.nan)
            reasons[slo] = str(why)
        except NoSuchRate as why:
            if not tried:
                raise
            rates.append(math.nan)
            reasons[slo] = f"{config.metric} meets {slo:g} s even at {_qps(max(tried), config):,.4g} requests/s; {why}"
    return Crossings(rates, [Point(_qps(rate, config), tried[rate]) for rate in sorted(tried)], reasons)


def _qps(rate: int, config: CapacityConfig) -> float:
    return round(rate * config.tolerance, 9)


def _crossing(at: Callable[[int], float], tried: dict[int, float], slo: float, config: CapacityConfig) -> float:
    def excess(rate: int) -> float:
        return math.log(max(at(rate), 1e-9) / slo)

    least, most = config.low / config.tolerance, config.high / config.tolerance
    span = most - least
    easy, hard = min(config.slo_s), max(config.slo_s)
    slope = math.log(hard / easy if hard > easy else 10.0) / span  # of the logarithm, as `low` and `high` have it
    low = max((rate for rate, latency in tried.items() if latency <= slo), default=0)  # met there; 0: nowhere yet
    high = min((rate for rate, latency in tried.items() if latency > slo and rate > low), default=0)  # missed there
    reach = 0.5  # how far to go at least to get to the other side; more and more if the guess is not enough
    width = 0  # of the bracket, before a step by the line
    while low == 0 or high == 0 or high - low > 1:
        if low and high:
            # The line misleads where the curve bends: if it did not halve the bracket, the middle does.
            by_line = 2 * (high - low) <= width or width == 0
            width = high - low if by_line else 0
            rate = round(_on_line(low, excess(low), high, excess(high))) if by_line else (low + high) // 2
            rate = min(max(rate, low + 1), high - 1)
        elif tried:
            nearest = min(tried, key=lambda rate: (abs(excess(rate)), rate))
            guess = nearest - excess(nearest) / slope
            if low:
                rate = math.ceil(min(max(guess, low + reach), low + max(span, reach)))
                if reach >= FAR:  # the crossing is far beyond the guess, if it is anywhere
                    rate = max(rate, math.ceil(most * 100) + 1)
            else:
                rate = max(math.floor(max(min(guess, high - reach), high - max(span, reach))), 1)
            reach *= 2
        else:
            rate = max(round(least + math.log(slo / easy) / slope if hard > easy else least + span / 2), 1)
        if excess(rate) > 0:
            high = rate
            if not low and rate <= max(least / 100, 1):
                raise _Nowhere(f"{config.metric} misses {slo:g} s even at {_qps(rate, config):,.4g} requests/s")
        else:
            low = rate
            if not high and rate > most * 100:
                raise _Nowhere(f"{config.metric} meets {slo:g} s even at {_qps(rate, config):,.4g} requests/s")
    return config.tolerance * _on_line(low, excess(low), high, excess(high))


def _on_line(low: int, below: float, high: int, above: float) -> float:
    """Where the line through the excess `below` ≤ 0 at `low` and `above` > 0 at `high` crosses zero."""
    return low - below * (high - low) / (above - below)
