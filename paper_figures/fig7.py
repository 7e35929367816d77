"""Figure 7: free KV blocks over the instances, their variance, and preemptions, as the requests come."""

from __future__ import annotations

from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns

from paper_figures import points, settings, style
from paper_figures.verdicts import Claim, above, order

TITLE = "Free KV blocks and preemptions, by request"
PAPER = "v2 Fig 7, camera-ready Fig 7"
QPS = (28, 32)
RUNS = points.grid(scheduler=style.COMPARED, workload__qps=QPS, seed=settings.SEEDS)
SHOWN = 0  # the seed that is drawn
WIDTH = 200  # requests that a point stands for
PANELS = {
    "free_mean": "free KV blocks, mean",
    "free_variance": "free KV blocks, variance",
    "preemptions": "preemptions so far",
}


def table(stored: points.Stored) -> pd.DataFrame:
    """By request number: mean and variance over instances of the free blocks, and all preemptions so far."""
    rows = []
    for point, run in stored.run(RUNS):
        samples = run.instances().groupby("request_id")
        one = pd.DataFrame(
            {
                "free_mean": samples["free_blocks"].mean(),
                "free_variance": samples["free_blocks"].var(ddof=0),
                "preemptions": samples["preemptions"].sum(),
            }
        )
        one = one.groupby(one.index // WIDTH * WIDTH).agg(
            {"free_mean": "mean", "free_variance": "mean", "preemptions": "max"}
        )
        rows.append(one.rename_axis("request").reset_index().assign(**point))
    return pd.concat(rows, ignore_index=True)


def draw(table: pd.DataFrame) -> Any:
    """A row of panels for each request rate."""
    figure, axes = plt.subplots(len(QPS), 3, figsize=(2 * style.COLUMN, 3.6), layout="constrained", sharex=True)
    for row, qps in zip(axes, QPS, strict=True):
        part = table[(table["workload.qps"] == qps) & (table["seed"] == SHOWN)]
        for axis, (column, label) in zip(row, PANELS.items(), strict=True):
            for scheduler in style.COMPARED:
                name = style.NAMES[scheduler]
                one = part[part["scheduler"] == scheduler]
                axis.plot(one["request"], one[column], color=style.COLOURS[name], label=name)
            if qps == QPS[0]:
                axis.set_title(label)
            if column == "preemptions":
                axis.set_yscale("symlog", linthresh=10)
        row[0].set_ylabel(f"{qps} requests/s")
    for axis in axes[-1]:
        axis.set_xlabel("request")
    sns.despine(figure)
    style.legend(figure, axes.flat[0])
    return figure


def claims(table: pd.DataFrame) -> list[Claim]:
    """That Block keeps the memory of the instances even, and preempts less, for each seed."""
    last = table.groupby(["workload.qps", "scheduler", "seed"]).agg({"free_variance": "mean", "preemptions": "max"})
    found = []
    for qps in QPS:
        one = last.loc[qps]
        for other in ("llumnix_minus", "round_robin"):
            both = one["preemptions"].astype(float).unstack("scheduler")[["block", other]]
            both = both.where(both.max(axis=1) > 0)  # where nobody preempts, nobody does so less
            less = above(both[other], both["block"])
            found.append(order(f"Block preempts less than {style.NAMES[other]} at {qps} requests/s", less))
        free = one["free_variance"].unstack("scheduler")
        even = free["block"] < free["round_robin"]
        what = f"Block keeps free KV blocks more even than round robin at {qps} requests/s"
        found.append(order(what, even.tolist()))
    return found
