"""The distributions of TTFT and request latency, for each scheduler, at some request rates."""

from __future__ import annotations

from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.ticker import LogLocator

from paper_figures import points, style

TITLE = "Distributions of TTFT and request latency"
PAPER = "v2 CDFs"
QPS = (20, 24, 28, 32, 36)
RUNS = points.grid(scheduler=style.COMPARED, workload__qps=QPS, seed=(0,))
SHARES = np.concatenate([np.arange(0.01, 0.99, 0.01), np.arange(0.99, 1.0, 0.001)])
METRICS = {"ttft_s": "TTFT (s)", "e2e_s": "request latency (s)"}


def table(stored: points.Stored) -> pd.DataFrame:
    """Quantiles of each run's requests."""
    rows = []
    for point, run in stored.run(RUNS):
        requests = run.requests()
        requests = requests[requests["status"] == "ok"]
        ttft = np.quantile(requests["first_token"] - requests["arrival"], SHARES)
        e2e = np.quantile(requests["finished"] - requests["arrival"], SHARES)
        rows.append(pd.DataFrame({**point, "share": SHARES, "ttft_s": ttft, "e2e_s": e2e}))
    return pd.concat(rows, ignore_index=True)


def draw(table: pd.DataFrame) -> Any:
    """A row of panels for each metric."""
    figure, axes = plt.subplots(
        2, len(QPS), figsize=(2 * style.COLUMN, 3.4), layout="constrained", sharex="row", sharey=True
    )
    for row, (metric, label) in zip(axes, METRICS.items(), strict=True):
        for axis, qps in zip(row, QPS, strict=True):
            part = table[table["workload.qps"] == qps]
            for scheduler in style.COMPARED:
                name = style.NAMES[scheduler]
                one = part[part["scheduler"] == scheduler]
                axis.plot(one[metric], one["share"], color=style.COLOURS[name], label=name)
            axis.set(xscale="log", xlabel=label)
            style.plain_ticks(axis.xaxis, LogLocator(subs=(1.0, 3.0)))
        row[0].set_ylabel("share of requests")
    for axis, qps in zip(axes[0], QPS, strict=True):
        axis.set_title(f"{qps} requests/s")
    sns.despine(figure)
    style.legend(figure, axes.flat[0])
    return figure
