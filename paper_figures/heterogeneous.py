"""Instances that differ: A30, pairs of A30 and A100 in one cluster, by scheduler."""

from __future__ import annotations

from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from matplotlib.ticker import LogLocator

from paper_figures import points, style, verdicts

TITLE = "Instances of different speed and memory in one cluster"
PAPER = "beyond the paper"
POLICIES = ("round_robin", "infaas", "llumnix_minus", "block", "block_star")
QPS = (28, 32, 36)
RUNS = points.grid(cluster=("mixed",), scheduler=POLICIES, workload__qps=QPS, seed=(0, 1, 2))
PANELS = {"ttft_p99_s": "P99 TTFT (s)", "e2e_p99_s": "P99 latency (s)", "e2e_mean_s": "mean latency (s)"}


def table(stored: points.Stored) -> pd.DataFrame:
    """A row per run."""
    return stored.summaries(RUNS)[["scheduler", "workload.qps", "seed", *PANELS, "preemptions"]]


def draw(table: pd.DataFrame) -> Any:
    """A panel per metric; lines are means over seeds, bands reach from the least to the greatest of them."""
    figure, axes = plt.subplots(1, len(PANELS), figsize=(2 * style.COLUMN, 2.2), layout="constrained")
    for axis, (metric, label) in zip(axes, PANELS.items(), strict=True):
        style.lines(table, axis, "workload.qps", metric)
        axis.set(xlabel="requests/s", title=label, yscale="log", xticks=QPS)
        style.plain_ticks(axis.yaxis, LogLocator(subs=(1.0, 2.0, 5.0)))
    sns.despine(figure)
    style.legend(figure, axes[0])
    return figure


def claims(table: pd.DataFrame) -> list[verdicts.Claim]:
    """Whether Block has the lowest P99 TTFT at each rate, seed by seed; and every P99."""
    found = []
    for metric in ("ttft_p99_s", "e2e_p99_s"):
        for qps in QPS:
            runs = table[table["workload.qps"] == qps].pivot(index="seed", columns="scheduler", values=metric)
            if metric == "ttft_p99_s":
                what = f"Block has a lower P99 TTFT than Llumnix- at {qps} requests/s"
                found.append(verdicts.order(what, (runs["block"] < runs["llumnix_minus"]).tolist()))
            for scheduler in POLICIES:
                what = f"{PANELS[metric].removesuffix(' (s)')} at {qps} requests/s, {style.NAMES[scheduler]}"
                found.append(verdicts.value(what, None, runs[scheduler].tolist(), "s"))
    return found
