"""LengthSketch: a compact stand-in for a trace's joint distribution of prompt and response lengths.

The requests are sorted by prompt length and cut into bins of equal mass. The sketch keeps the quantile function of the
prompt over all of them, and one quantile function of the response for each bin; all are piecewise linear on uniform
knots. Within a bin the two lengths are independent. Sampling is stratified, so that a run of n requests carries the
trace's mean tokens almost exactly: with independent draws, the mean of 10,000 ShareGPT requests strays by 1 %, which
is worth 0.3 QPS of capacity.

Of a trace with arrival times it keeps how its rate and lengths drifted, too. The requests are cut, in their order, into
stretches of equally many, and it is counted how many of a stretch are in which bin.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np

from block.core.arrays import Floats, Ints
from block.workload.arrivals import RateProfile

PROMPT_SEGMENTS = 512
SHAPE = (64, 32)  # bins, and segments of the response in each
TIMED_SHAPE = (16, 64)  # where there are times, which take their share of the file
STRETCHES = 128  # of the drift
PIECES = 512  # of the arrivals


@dataclass(frozen=True)
class LengthSketch:
    """Quantile functions, in tokens, at uniform knots.

    prompt: float[segments + 1]; output: float[bins, segments + 1], a row for each bin of the prompt's quantile.
    profile: how the trace's arrival rate moved, if it has arrival times. drift: how its lengths did:
        requests of each stretch by their bin, int[stretches, bins].
    source: where the numbers come from, for people.
    """

    prompt: Floats
    output: Floats
    profile: RateProfile | None = None
    drift: Ints | None = None
    source: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def fit(cls, prompt: Ints, output: Ints, times: Floats | None = None) -> LengthSketch:
        """Sketch the requests with lengths `prompt[i]`, `output[i]` (int[n]) and arrival `times` (s, increasing).

        A short trace gets a coarser sketch. Ties keep their order in the trace. ValueError if there are fewer than 4
        requests.
        """
        count = len(prompt)
        if count < 4:
            raise ValueError(f"{count} requests: a sketch needs at least 4")
        bins, segments = SHAPE if times is None else TIMED_SHAPE
        bins = max(1, min(bins, count // 16))
        segments = min(segments, count // bins // 2)
        order = np.argsort(prompt, kind="stable")
        parts = np.array_split(order, bins)
        sketch = cls(
            quantile_knots(prompt[order], min(PROMPT_SEGMENTS, count // 2)),
            np.array([quantile_knots(np.sort(output[part]), segments) for part in parts]),
        )
        if times is None:
            return sketch
        row = np.empty(count, dtype=np.int64)
        row[order] = np.repeat(np.arange(bins), [len(part) for part in parts])
        stretches = max(1, min(STRETCHES, count // 64))
        drift = np.zeros((stretches, bins), dtype=np.int64)
        np.add.at(drift, (np.arange(count) * stretches // count, row), 1)
        return replace(sketch, profile=RateProfile.fit(times, min(PIECES, count)), drift=drift)

    @classmethod
    def lognormal(
        cls, prompt_mean: float, prompt_cv: float, output_mean: float, output_cv: float, longest: int
    ) -> LengthSketch:
        """Independent lognormal lengths with these means (tokens) and coefficients of variation.

        Neither length exceeds `longest`; the means hold after that cut.
        """
        prompt = _lognormal_sample(prompt_mean, prompt_cv, longest)
        return cls(
            quantile_knots(prompt, 256),
            quantile_knots(_lognormal_sample(output_mean, output_cv, longest), 256)[None, :],
        )

    def sample(self, count: int, rng: np.random.Generator) -> tuple[Ints, Ints]:
        """`count` requests: prompt int[count] and output int[count], in tokens, at least 1.

        In random order; with a drift, as the trace began, and again from its start when it runs out. Stratified: the
        i-th smallest prompt (with a drift: of its bin) is drawn from the i-th of as many equal slices of the quantile,
        and the responses of a bin's requests from slices of that bin's quantile, shuffled within the bin.
        """
        bins = len(self.output)
        if self.drift is None:
            u = (np.arange(count) + rng.random(count)) / count
            row = np.minimum((u * bins).astype(np.int64), bins - 1)
            v = _stratified(row, rng)
            anywhere = rng.permutation(count)
            u, v, row = u[anywhere], v[anywhere], row[anywhere]
        else:
            row = _drifting(self.drift, count, rng)
            upto = np.append(0, np.cumsum(self.drift.sum(axis=0)))
            u = np.interp(row + _stratified(row, rng), np.arange(bins + 1), upto / upto[-1])
            v = _stratified(row, rng)
        place = v * (self.output.shape[1] - 1)
        knot = np.minimum(place.astype(np.int64), self.output.shape[1] - 2)
        low, high = self.output[row, knot], self.output[row, knot + 1]
        prompt = np.interp(u, np.linspace(0.0, 1.0, len(self.prompt)), self.prompt)
        return _tokens(prompt), _tokens(low + (high - low) * (place - knot))

    def save(self, path: Path) -> None:
        """Write as JSON, a row of numbers a line."""
        rows = ",\n    ".join(_compact(row) for row in self.output)
        profile = "null"
        if self.profile is not None:
            profile = json.dumps(asdict(self.profile), separators=(",", ":"))
        drift = json.dumps(None if self.drift is None else self.drift.tolist(), separators=(",", ":"))
        text = (
            f'{{\n  "source": {json.dumps(self.source)},\n  "profile": {profile},\n  "drift": {drift},\n'
            f'  "prompt": {_compact(self.prompt)},\n  "output": [\n    {rows}\n  ]\n}}\n'
        )
        path.write_text(text, encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> LengthSketch:
        """Read what `save` wrote."""
        data = json.loads(path.read_text(encoding="utf-8"))
        profile = data["profile"] and RateProfile(data["profile"]["requests"], tuple(data["profile"]["seconds"]))
        drift = np.array(data["drift"]) if data.get("drift") else None
        return cls(np.array(data["prompt"]), np.array(data["output"]), profile, drift, data["source"])


def _drifting(drift: Ints, count: int, rng: np.random.Generator) -> Ints:
    """The bins of `count` requests: in each stretch of the trace, each bin as often as there."""
    stretch = np.arange(count) % drift.sum() * len(drift) // drift.sum()
    upto = np.cumsum(drift, axis=1)
    place = _stratified(stretch, rng) * upto[stretch, -1]
    return np.asarray((upto[stretch] <= place[:, None]).sum(axis=1))


def _stratified(group: Ints, rng: np.random.Generator) -> Floats:
    """float[n] in [0, 1): those of one group, in random order, from as many equal slices as there are."""
    count, members = len(group), np.bincount(group)
    inside = rng.random(count)
    order = np.lexsort((rng.random(count), group))
    own = group[order]
    values = np.empty(count)
    values[order] = (np.arange(count) - (np.cumsum(members) - members)[own] + inside) / members[own]
    return values


def quantile_knots(ordered: Ints | Floats, segments: int) -> Floats:
    """Least-squares piecewise-linear quantile function of an increasing sample, at `segments` + 1 uniform knots.

    Hat functions add up to 1, so the residuals of the fit sum to 0: it keeps the sample's mean, which interpolating the
    empirical quantiles does not (it loses what the heavy tail curves away inside the last segment).
    """
    n = len(ordered)
    place = (np.arange(n) + 0.5) / n * segments
    knot = np.minimum(place.astype(np.int64), segments - 1)
    hats = np.zeros((segments + 1, segments + 1))
    right = place - knot
    np.add.at(hats, (knot, knot), (1 - right) ** 2)
    np.add.at(hats, (knot, knot + 1), (1 - right) * right)
    np.add.at(hats, (knot + 1, knot), (1 - right) * right)
    np.add.at(hats, (knot + 1, knot + 1), right**2)
    target = np.bincount(knot, (1 - right) * ordered, segments + 1)
    target += np.bincount(knot + 1, right * ordered, segments + 1)
    knots = np.clip(_increasing(np.linalg.solve(hats, target).tolist()), ordered[0], ordered[-1])
    # Cutting what shoots past the extremes moves the mean a little: stretch what lies above the shortest length.
    above = ((knots[:-1] + knots[1:]) / 2).mean() - knots[0]
    if above > 0:
        knots = knots[0] + (knots - knots[0]) * (np.mean(ordered) - knots[0]) / above
    return np.asarray(knots, dtype=np.float64)


def _increasing(knots: list[float]) -> Floats:
    """The nearest increasing knots, of the same trapezoid mean: a fit rings around a jump (pool adjacent violators)."""
    pools: list[tuple[float, float, int]] = []  # value, weight, knots
    for place, knot in enumerate(knots):
        value, weight, size = knot, 0.5 if place in (0, len(knots) - 1) else 1.0, 1
        while pools and pools[-1][0] >= value:
            before, mass, members = pools.pop()
            value = (before * mass + value * weight) / (mass + weight)
            weight, size = mass + weight, members + size
        pools.append((value, weight, size))
    return np.repeat([pool[0] for pool in pools], [pool[2] for pool in pools])


def _lognormal_sample(mean: float, cv: float, longest: int, size: int = 20_000) -> Floats:
    """The increasing sample at `size` mid-quantiles, cut at `longest`, with its location set so that the mean holds."""
    sigma = math.sqrt(math.log1p(cv**2))
    shape = np.exp(sigma * np.array([NormalDist().inv_cdf((i + 0.5) / size) for i in range(size)]))
    low, high = 0.0, float(longest) / shape[0]
    for _ in range(100):  # bisection: the mean of the cut sample grows with the scale
        scale = (low + high) / 2
        low, high = (scale, high) if np.minimum(scale * shape, longest).mean() < mean else (low, scale)
    return np.asarray(np.minimum(high * shape, longest))


def _tokens(lengths: Floats) -> Ints:
    return np.asarray(np.maximum(np.rint(lengths), 1), dtype=np.int64)


def _compact(row: Floats) -> str:
    return "[" + ", ".join(f"{value:.1f}".removesuffix(".0") for value in row) + "]"
