"""Figure 11 of the camera-ready: bursty arrivals. Gaps are Gamma distributed; a shape below 1 is burstier than
Poisson.
"""

from __future__ import annotations

from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from matplotlib.ticker import FixedLocator

from paper_figures import points, settings, style
from paper_figures.verdicts import PUBLISHED, Claim, above, order, value

TITLE = "Bursty arrivals: latency at 32 requests/s, and capacity, by the shape of Gamma gaps"
PAPER = "camera-ready Fig 11"
SIMULATED_ONLY = True
QPS = 32
SLO_S = 10.0
SHAPES = (0.25, 0.5, 1.0, 2.0)
POLICIES = ("round_robin", "infaas", "llumnix_minus", "block", "block_star")
SHAPE = "workload.burst_shape"


def _gaps(shape: float) -> points.GridPoint:
    """Gamma gaps of shape 1 are those of Poisson arrivals, which other figures have too."""
    return {} if shape == 1 else {"workload.arrivals": "gamma", SHAPE: shape}


RUNS = [
    {**point, **_gaps(shape)}
    for shape in SHAPES
    for point in points.grid(scheduler=POLICIES, workload__qps=(QPS,), seed=settings.SEEDS)
]
SEARCHES = [
    point if shape == 1 else {**point, **_gaps(shape), "capacity.slo_s": [SLO_S]}
    for shape in SHAPES
    for point in settings.searches("base", ("block_star",), None if shape == 1 else "bursty")
]
PANELS = {"e2e_mean_s": "mean request latency (s)", "ttft_p99_s": "P99 TTFT (s)"}


def table(stored: points.Stored) -> pd.DataFrame:
    """A row per run, and one per search of Block* with its capacity_qps at 10 s."""
    runs = stored.summaries(RUNS)[["scheduler", SHAPE, "seed", *PANELS]]
    searched = stored.capacities(SEARCHES, (SLO_S,))[["scheduler", SHAPE, "seed", "capacity_qps"]]
    return pd.concat([runs, searched]).fillna({SHAPE: 1.0})


def draw(table: pd.DataFrame) -> Any:
    """Latency of each scheduler; capacity of Block*."""
    figure, axes = plt.subplots(1, 3, figsize=(2 * style.COLUMN, 2.3), layout="constrained")
    runs, searched = _parts(table)
    for axis, (metric, label) in zip(axes, PANELS.items(), strict=False):
        style.lines(runs, axis, SHAPE, metric)
        axis.set(title=f"{label}, {QPS} requests/s")
    style.lines(searched, axes[2], SHAPE, "capacity_qps")
    axes[2].set(title="capacity (requests/s), P99 TTFT ≤ 10 s")
    style.zoom(axes[2], searched["capacity_qps"], 1.0)
    axes[1].set_yscale("log")
    style.plain_ticks(axes[1].yaxis, FixedLocator([2, 5, 10, 20, 50]))
    for axis in axes:
        axis.set_xscale("log", base=2)
        axis.set_xticks(SHAPES, [f"{shape:g}" for shape in SHAPES])
        axis.set_xlabel("shape (bursty ← 1 = Poisson → regular)")
    style.legend(figure, axes[0])
    sns.despine(figure)
    return figure


def _parts(table: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The rows of runs, and those of searches, which have no latency."""
    searched = table["e2e_mean_s"].isna()
    return table[~searched], table[searched]


def claims(table: pd.DataFrame) -> list[Claim]:
    """How much the shape moves the capacity, and who is ahead at each shape."""
    runs, searched = _parts(table)
    by = searched.pivot(index="seed", columns=SHAPE, values="capacity_qps")
    width = 100 * (by.max(axis=1, skipna=False) / by.min(axis=1, skipna=False) - 1)
    published = PUBLISHED["burstiness_capacity_percent"]
    found = [value("capacity of Block* moves over the shapes by", published, width.tolist(), "%", tolerance=1)]
    mean = runs.set_index([SHAPE, "scheduler", "seed"])["e2e_mean_s"].sort_index()
    for shape in SHAPES:
        less = above(mean[shape, "llumnix_minus"], mean[shape, "block"])
        found.append(order(f"Block's mean latency is below Llumnix-'s at shape {shape:g}", less))
    return found
