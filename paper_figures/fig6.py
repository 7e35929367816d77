"""Figure 6: request latency, TTFT, the time of a forecast and throughput against the request rate, by scheduler.

The paper's scheduling overhead is that of its network and processes; ours is modelled (`backend.dispatch_delay_s`), and
so what is drawn of it is what was measured: the time of a forecast.
"""

from __future__ import annotations

from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns

from paper_figures import cells, style

TITLE = "Latency, TTFT, forecast time and throughput against the request rate"
QPS = tuple(range(20, 37))
SEEDS = (0, 1, 2)
CELLS = cells.grid(scheduler=tuple(style.SCHEDULERS), workload__qps=QPS, seed=SEEDS)

PANELS = (
    ("e2e_mean_s", "mean request latency (s)"),
    ("e2e_p99_s", "P99 request latency (s)"),
    ("ttft_mean_s", "mean TTFT (s)"),
    ("ttft_p99_s", "P99 TTFT (s)"),
    ("forecast_p50_us", "one forecast, measured (µs)"),
    ("request_throughput_rps", "throughput (requests/s)"),
)
SLO_S = (3, 10)


def table(stored: cells.Stored) -> pd.DataFrame:
    """A row per run."""
    return cells.table(CELLS, stored)[["scheduler", "workload.qps", "seed", *(metric for metric, _ in PANELS)]]


def draw(table: pd.DataFrame) -> Any:
    """The panels; lines are means over seeds, bands reach from the least to the greatest of them."""
    shown = table.assign(scheduler=table["scheduler"].map(style.NAMES))
    figure, axes = plt.subplots(2, 3, figsize=(2 * style.COLUMN, 3.6), layout="constrained")
    for axis, (metric, label) in zip(axes.flat, PANELS, strict=True):
        sns.lineplot(
            shown,
            x="workload.qps",
            y=metric,
            hue="scheduler",
            style="scheduler",
            palette=style.COLOURS,
            markers=style.MARKERS,
            dashes=False,
            errorbar=("pi", 100),
            markeredgewidth=0,
            ax=axis,
        )
        axis.set(xlabel="requests/s", ylabel="", title=label)
        axis.get_legend().remove()
        if metric == "ttft_p99_s":
            axis.set_yscale("log")
            for slo in SLO_S:
                axis.axhline(slo, color="black", linewidth=0.7, linestyle=":")
                axis.annotate(f"SLO {slo} s", (QPS[-1], slo), fontsize=6, ha="right", va="top")
    style.legend(figure, axes.flat[0])
    return figure
