"""Arrival processes: gaps between requests at one request per second.

Every process returns gaps whose mean is exactly 1, and the workload divides them by its rate. So a rate only stretches
one and the same pattern (common random numbers for a capacity search), and the offered rate is exact: without this, the
realised rate of 10,000 Poisson arrivals strays by 1 %. A Poisson process scaled in this way is the Poisson process
conditioned on the time of its last arrival; vLLM's serving benchmark normalises its gaps too.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from block.core.arrays import Floats


@dataclass(frozen=True)
class RateProfile:
    """How the arrival rate of a trace moved: the seconds in which each of equally many of its `requests` arrived.

    So the resolution follows the rate: fine within a burst, coarse in the lull after it.
    """

    requests: int
    seconds: tuple[float, ...]

    @classmethod
    def fit(cls, times: Floats, pieces: int) -> RateProfile:
        """Cut a recording with arrival `times` (s, increasing, at least 2) into `pieces` of equally many requests.

        A mean gap after its last request the recording begins again.
        """
        count = len(times)
        lap = np.append(times, times[-1] + (times[-1] - times[0]) / (count - 1))
        edges = np.interp(np.linspace(0, count, pieces + 1), np.arange(count + 1), lap)
        return cls(count, tuple(float(f"{seconds:.3g}") for seconds in np.diff(edges)))

    def gaps(self, count: int, rng: np.random.Generator) -> Floats:
        """`count` unit-mean gaps: every piece has its requests, at times that are uniform within it; over and over."""
        pieces = len(self.seconds)
        places = np.sort(np.arange(count) * pieces // self.requests + rng.random(count))
        laps, inside = np.divmod(places, pieces)
        edges = np.concatenate([[0.0], np.cumsum(self.seconds)])
        times = laps * edges[-1] + np.interp(inside, np.arange(pieces + 1), edges)
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
