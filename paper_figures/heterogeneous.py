"""Instances that differ: A30, pairs of A30 and A100 in one cluster, by scheduler."""

from __future__ import annotations

from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns

from paper_figures import cells, style, verdicts

TITLE = "Instances of different speed and memory in one cluster"
PAPER = "beyond the paper"
SCHEDULERS = ("round_robin", "infaas", "llumnix_minus", "block", "block_star")
QPS = (28, 32, 36)
RUNS = cells.grid(cluster=("mixed",), scheduler=SCHEDULERS, workload__qps=QPS, seed=(0, 1, 2))
PANELS = {"ttft_p99_s": "P99 TTFT (s)", "e2e_p99_s": "P99 latency (s)", "e2e_mean_s": "mean latency (s)"}


def table(stored: cells.Stored) -> pd.DataFrame:
    """A row per run."""
    return stored.summaries(RUNS)[["scheduler", "workload.qps", "seed", *PANELS, "preemptions"]]


def draw(table: pd.DataFrame) -> Any:
    """A panel per metric; lines are means over seeds, bands reach from the least to the greatest of them."""
    shown = table.assign(scheduler=table["scheduler"].map(style.NAMES))
    figure, axes = plt.subplots(1, len(PANELS), figsize=(2 * style.COLUMN, 2.2), layout="constrained")
    for axis, (metric, label) in zip(axes, PANELS.items(), strict=True):
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
        axis.set(xlabel="requests/s", ylabel="", title=label, yscale="log", xticks=QPS)
        axis.get_legend().remove()
    style.legend(figure, axes[0])
    return figure


def claims(table: pd.DataFrame) -> list[verdicts.Claim]:
    """Whether Block has the lowest P99s at each rate, seed by seed, and how far the others are from it."""
    found = []
    for metric, label in (("ttft_p99_s", "P99 TTFT"), ("e2e_p99_s", "P99 latency")):
        for qps in QPS:
            runs = table[table["workload.qps"] == qps].pivot(index="seed", columns="scheduler", values=metric)
            for other in ("llumnix_minus", "round_robin"):
                name = style.NAMES[other]
                what = f"at {qps} requests/s Block has a lower {label} than {name}"
                found.append(verdicts.order(what, (runs["block"] < runs[other]).tolist()))
            for scheduler in SCHEDULERS:
                what = f"{label} at {qps} requests/s, {style.NAMES[scheduler]}"
                found.append(verdicts.value(what, None, runs[scheduler].tolist(), "s"))
    return found
