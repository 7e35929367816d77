"""Arrival processes: gaps between requests at one request per second.

Every process returns gaps whose mean is exactly 1, and the workload divides them by its rate. So a rate only stretches
one and the same pattern (common random numbers for a capacity search), and the offered rate is exact: without this, the
realised rate of 10,000 Poisson arrivals strays by 1 %. A Poisson process scaled in this way is the Poisson process
conditioned on the time of its last arrival; vLLM's serving benchmark normalises its gaps too.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from block.types import Floats


@dataclass(frozen=True)
class RateProfile:
    """How the arrival rate of a trace moved: requests counted in consecutive bins of `bin_s` seconds."""

    bin_s: float
    counts: tuple[int, ...]

    @classmethod
    def fit(cls, times: Floats, bin_s: float) -> RateProfile:
        """Count the arrival `times` (s, increasing) in bins that start at the first one."""
        bins = ((times - times[0]) // bin_s).astype(np.int64)
        return cls(bin_s, tuple(np.bincount(bins).tolist()))

    def gaps(self, count: int, rng: np.random.Generator) -> Floats:
        """`count` unit-mean gaps of the Poisson process whose rate follows this profile, over and over.

        A unit-rate Poisson process is carried through the inverse of the cumulative rate (time rescaling).
        """
        expected = np.concatenate([[0.0], np.cumsum(self.counts)])
        edges = np.arange(len(expected)) * self.bin_s
        laps, inside = np.divmod(np.cumsum(rng.exponential(size=count)), expected[-1])
        times = laps * edges[-1] + np.interp(inside, expected, edges)
        return _unit_mean(np.diff(times, prepend=0.0))


def gamma_gaps(count: int, shape: float, rng: np.random.Generator) -> Floats:
    """`count` unit-mean Gamma gaps, squared coefficient of variation 1 / `shape`: below 1 bursty, at 1 Poisson."""
    return _unit_mean(rng.gamma(shape, 1.0 / shape, size=count))


def constant_gaps(count: int) -> Floats:
    """`count` gaps of exactly 1."""
    return np.ones(count)


def recorded_gaps(count: int, times: Floats) -> Floats:
    """`count` unit-mean gaps of a recording with arrival `times` (s, increasing, at least 2), over and over.

    The first request comes one mean gap after the start, and as much lies between two laps.
    """
    gaps = np.diff(times)
    return _unit_mean(np.resize(np.concatenate([[gaps.mean()], gaps]), count))


def _unit_mean(gaps: Floats) -> Floats:
    scaled: Floats = gaps * (len(gaps) / gaps.sum())
    return scaled
