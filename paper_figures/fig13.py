"""Figure 13 of the camera-ready: what the predictor costs. The paper has 16 processes on each of 12 nodes; ours is a
function call in the dispatcher, measured in the runs themselves on the machine that ran them.
"""

from __future__ import annotations

from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns

from paper_figures import points, settings, style
from paper_figures.verdicts import PUBLISHED, Claim, order

TITLE = "CPU and memory of a predictor, measured here"
PAPER = "camera-ready Fig 13"
QPS = (20, 24, 28, 32, 36)
INSTANCES = 12
ASKED = {"block_star": INSTANCES, "po2": 2}
RUNS = [
    *points.grid(scheduler=("block_star",), workload__qps=QPS, seed=settings.SEEDS),
    *points.grid(lengths=("compact",), scheduler=("po2",), workload__qps=QPS, seed=settings.SEEDS),
]


def table(stored: points.Stored) -> pd.DataFrame:
    """A row per run: core_percent, the share of a core that the forecasts of one instance take; forecast_us, the mean
    time of one; memory_gib, the most that the whole process held: 12 engine twins, dispatcher, predictor and all
    records.
    """
    found = stored.summaries(RUNS)
    asked = found["scheduler"].map(ASKED) / INSTANCES
    found["core_percent"] = 100 * found["workload.qps"] * asked * found["forecast_mean_us"] * 1e-6
    found["memory_gib"] = found["peak_memory_mib"] / 1024
    found["forecast_us"] = found["forecast_mean_us"]
    return found[["scheduler", "workload.qps", "seed", "core_percent", "forecast_us", "memory_gib"]]


def draw(table: pd.DataFrame) -> Any:
    """CPU on a logarithmic axis, with the published range; time of a forecast; memory."""
    figure, axes = plt.subplots(1, 3, figsize=(2 * style.COLUMN, 2.2), layout="constrained")
    published = PUBLISHED["predictor"]
    for axis, column in zip(axes, ("core_percent", "forecast_us", "memory_gib"), strict=True):
        style.lines(table, axis, "workload.qps", column)
        axis.set_xlabel("requests/s")
    axes[0].set(title="a predictor's CPU (% of a core)", yscale="log")
    axes[0].axhspan(*published["core_percent"], color="black", alpha=0.25, linewidth=0)
    axes[0].annotate("published, all asked", (QPS[0], published["core_percent"][0]), fontsize=6, va="top")
    axes[1].set(title="one forecast (µs)", ylim=(0, None))
    axes[2].set(title="memory (GiB), all of the run", ylim=(0, 2))
    axes[2].axhline(published["memory_gib"], color="black", linewidth=0.7, linestyle=":")
    axes[2].annotate("published, one predictor", (QPS[0], published["memory_gib"]), fontsize=6, va="top")
    style.legend(figure, axes[0])
    sns.despine(figure)
    return figure


def claims(table: pd.DataFrame) -> list[Claim]:
    """Below what was published: a core, a forecast, memory."""
    published = PUBLISHED["predictor"]
    most = table.groupby("seed")[["core_percent", "forecast_us", "memory_gib"]].max()
    core, slow = published["core_percent"][0], published["forecast_ms"][0]
    return [
        order(f"a predictor takes less than the published {core} % of a core", most["core_percent"] < core),
        order(f"a forecast takes less than the published {slow} ms", most["forecast_us"] < 1000 * slow),
        order(
            f"the whole simulated run holds less than the published {published['memory_gib']} GiB of one predictor",
            most["memory_gib"] < published["memory_gib"],
        ),
    ]
