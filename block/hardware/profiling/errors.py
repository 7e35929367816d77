"""Held-out rows and relative errors."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from block.core.arrays import Floats, Ints

EVERY = 5  # one row in five is held out


class RelativeError(NamedTuple):
    """Relative errors on held-out rows: how many, their median and 95th percentile as fractions."""

    rows: int
    median: float
    p95: float


def held_out(rows: int) -> tuple[Ints, Ints]:
    """Indices to fit on, and those held out: every fifth row, never the first or the last."""
    index = np.arange(rows)
    test = (index % EVERY == EVERY // 2) & (index < rows - 1)
    return index[~test], index[test]


def relative_error(predicted: Floats, measured: Floats) -> RelativeError:
    """Summary of |predicted / measured − 1|."""
    errors = np.abs(predicted / measured - 1)
    return RelativeError(len(errors), float(np.median(errors)), float(np.percentile(errors, 95)))
