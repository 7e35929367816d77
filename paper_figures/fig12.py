"""Figure 12 of the camera-ready: what injected errors of lengths and of forecasts cost Block."""

from __future__ import annotations

from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns

from paper_figures import points, settings, style
from paper_figures.verdicts import PUBLISHED, Claim, value

TITLE = "Injected error: lengths and forecasts times Gaussian factors, at 32 requests/s"
PAPER = "camera-ready Fig 12"
QPS = 32
SLO_S = 10.0
SIGMAS = (0.0, 0.25, 0.5, 1.0)
LENGTH, FORECAST = "lengths.sigma", "dispatch.forecast_noise"


def _errors(length: float, forecast: float) -> points.GridPoint:
    """Without errors it is the run that other figures have too."""
    return {"lengths": "injected", LENGTH: length, FORECAST: forecast} if length or forecast else {}


RUNS = [
    {**point, **_errors(length, forecast)}
    for length in SIGMAS
    for forecast in SIGMAS
    for point in points.grid(scheduler=("block",), workload__qps=(QPS,), seed=settings.SEEDS)
]
SEARCHES = [
    *settings.searches("base", ("block",)),
    *(
        {**point, **_errors(1.0, 1.0), "capacity.slo_s": [SLO_S]}
        for point in settings.searches("base", ("block",), "both errors 100 %")
    ),
]
PANELS = {
    "e2e_mean_s": "mean request latency (s)",
    "e2e_p99_s": "P99 request latency (s)",
    "ttft_p99_s": "P99 TTFT (s)",
}


def table(stored: points.Stored) -> pd.DataFrame:
    """A row per run, and one per search with its capacity_qps at 10 s, without errors and with 100 % of both."""
    runs = stored.summaries(RUNS)[[LENGTH, FORECAST, "seed", *PANELS]]
    searched = stored.capacities(SEARCHES, (SLO_S,))[[LENGTH, FORECAST, "seed", "capacity_qps"]]
    return pd.concat([runs, searched]).fillna({LENGTH: 0.0, FORECAST: 0.0})


def draw(table: pd.DataFrame) -> Any:
    """A heat map for each metric: means over seeds."""
    figure, axes = plt.subplots(1, 3, figsize=(2 * style.COLUMN, 2.3), layout="constrained")
    runs = table[table["e2e_mean_s"].notna()]
    names = [f"{sigma:.0%}" for sigma in SIGMAS]
    for axis, (metric, label) in zip(axes, PANELS.items(), strict=True):
        grid = runs.pivot_table(index=LENGTH, columns=FORECAST, values=metric)
        sns.heatmap(
            grid, annot=True, fmt=".3g", cmap="viridis_r", cbar=False, ax=axis, annot_kws={"fontsize": 7}, square=True
        )
        axis.set(title=label, xlabel="error of forecasts", ylabel="error of lengths" if axis is axes[0] else "")
        axis.set_xticklabels(names)
        axis.set_yticklabels(names, rotation=0)
    return figure


def claims(table: pd.DataFrame) -> list[Claim]:
    """The capacity lost with errors of 100 % on both."""
    by = table[table["e2e_mean_s"].isna()].pivot(index="seed", columns=LENGTH, values="capacity_qps")
    lost = 100 * (1 - by[1.0] / by[0.0])
    low, high = PUBLISHED["injected_error_capacity_percent"]
    middle = (low + high) / 2
    return [
        value("capacity lost with errors of 100 % on both", middle, lost.tolist(), "%", tolerance=middle - low + 0.5)
    ]
