"""Rows of a profile that cannot be true, and what to put in their place.

A row is impossible if it has no time, if its time is below the physical floor (a matrix product must read its weights
at no more than the data sheet's bandwidth and compute at no more than its peak), or if it is off its neighbours by a
factor that no kernel switch explains. It is replaced by the line between its nearest possible neighbours; past the last
one, by that one's time in proportion to the tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from block.core.arrays import Floats
from block.hardware.catalogue import GPU, Model

OUTLIER = 3.0  # the largest true switch of a kernel in the profiles changes the time by 2.6
NEIGHBOURS = 4  # on each side


class Repair(NamedTuple):
    """One replaced row: seconds per layer as measured (NaN: no time) and as put in its place, and why."""

    operator: str
    tokens: int
    measured: float
    repaired: float
    reason: str


def operator_floor(gpu: GPU, model: Model, operator: str, tokens: Floats) -> Floats:
    """The least seconds that the operator can take at each number of tokens: 0 where physics gives no useful bound.

    Element-wise kernels have none: their data may never leave the cache.
    """
    weights = model.projections.get(operator, 0.0)
    read = weights * model.dtype_bytes / (gpu.bandwidth * 1e9)
    return np.maximum(read, 2 * weights * tokens / (gpu.tflops * 1e12))


def impossible(seconds: Floats, floor: Floats) -> dict[int, str]:
    """The rows (by index) that cannot be true, with the reason; rows are in the order of their token counts."""
    reasons: dict[int, str] = {}
    for i, (value, least) in enumerate(zip(seconds, floor, strict=True)):
        if not value > 0:
            reasons[i] = "no time"
        elif value < least:
            reasons[i] = f"below the floor of {least * 1e6:.1f} µs"
    possible = [i for i in range(len(seconds)) if i not in reasons]
    for place, i in enumerate(possible):
        around = possible[max(0, place - NEIGHBOURS) : place] + possible[place + 1 : place + 1 + NEIGHBOURS]
        typical = float(np.median(seconds[around])) if around else float(seconds[i])
        if not typical / OUTLIER < seconds[i] < typical * OUTLIER:
            reasons[i] = f"neighbours take {typical * 1e6:.1f} µs"
    return reasons


def repair(operator: str, tokens: Floats, seconds: Floats, floor: Floats) -> tuple[Floats, list[Repair]]:
    """The operator's times with the impossible rows replaced, and the list of those rows.

    ValueError if fewer than two rows are possible.
    """
    reasons = impossible(seconds, floor)
    good: NDArray[np.bool_] = np.array([i not in reasons for i in range(len(seconds))])
    if good.sum() < 2:
        raise ValueError(f"operator {operator}: {good.sum()} of {len(seconds)} rows are possible, want at least 2")
    repaired = np.interp(tokens, tokens[good], seconds[good])
    past = tokens > tokens[good][-1]
    repaired[past] *= tokens[past] / tokens[good][-1]
    repairs = [
        Repair(operator, int(tokens[i]), float(seconds[i]), float(repaired[i]), reason)
        for i, reason in sorted(reasons.items())
    ]
    return repaired, repairs
