"""An estimator's own errors, measured on prompts that it was not trained on, and drawn again for a simulated workload.

A workload without prompts has lengths of its own, often of another data set than the estimator's. What is carried over
is how the estimator errs *by rank*: responses are sorted by their true length and cut into bins of equal mass, and of
each bin the quantiles of log(estimate / truth) are kept. The shortest tenth of a workload is overestimated as the
shortest tenth of the held-out responses was, the longest is underestimated alike. That an estimator trained on the
workload's own prompts would err by the same factors is an assumption.
"""

from __future__ import annotations

import numpy as np

from block.core.arrays import Floats, Ints

OUTRUN_SHARE = 0.3
"""Tokens still to come of a response that has outrun its estimate, per token that it has: the mean of `compact`'s
resampled errors, once a response is past its estimate by a tenth to a half (docs/lengths.md)."""

BINS = 16
QUANTILES = 32


def measured(estimates: Ints, truths: Ints) -> Floats:
    """The table float[BINS, QUANTILES] of log(estimate / truth): a row per bin of the truth's rank, ascending.

    ValueError if there are fewer pairs than BINS.
    """
    if len(truths) < BINS:
        raise ValueError(f"{len(truths)} held-out pairs are too few to measure errors: at least {BINS}")
    order = np.argsort(truths, kind="stable")
    ratios = np.log(estimates[order] / truths[order])
    middles = (np.arange(QUANTILES) + 0.5) / QUANTILES
    return np.stack([np.quantile(part, middles) for part in np.array_split(ratios, BINS)])


def resampled(table: Floats, output_tokens: Ints, rng: np.random.Generator) -> Ints:
    """int[n] estimates for responses of these lengths: each the truth times a factor drawn from its rank's bin.

    Equal lengths share a rank, the middle one of theirs.
    """
    ordered = np.sort(output_tokens)
    count = len(ordered)
    ranks = (np.searchsorted(ordered, output_tokens) + np.searchsorted(ordered, output_tokens, side="right")) / 2
    bins = np.minimum((ranks * len(table) / max(count, 1)).astype(np.int64), len(table) - 1)
    draws = rng.integers(table.shape[1], size=count)
    estimates = np.rint(output_tokens * np.exp(table[bins, draws]))
    return np.asarray(np.maximum(estimates, 1), dtype=np.int64)


def check_share(outrun_share: float) -> None:
    """ValueError if it can be none."""
    if not 0 <= outrun_share < float("inf"):
        raise ValueError(f"lengths.outrun_share={outrun_share}: must be 0 or more")
