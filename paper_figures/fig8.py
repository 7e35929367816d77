"""Figure 8: ten instances from the start, or six and more once a predicted or a measured latency exceeds 70 s."""

from __future__ import annotations

from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns

from paper_figures import points, style, verdicts

TITLE = "Auto-provisioning: by predicted latency, by measured latency, or none"
PAPER = "v2 Fig 8"
THRESHOLD_S = 70.0
NAMES = {"static": "static, 10", "relief": "relief, from 6", "preempt": "preempt, from 6"}
COLOURS = {"static": "#999999", "relief": "#0072B2", "preempt": "#D55E00"}
RUNS = points.grid(
    provisioner=tuple(NAMES), scheduler=("block",), cluster__num_gpus=(10,), workload__qps=(24,), seed=(0, 1, 2)
)
WIDTH = 100  # requests that a point stands for


def table(stored: points.Stored) -> pd.DataFrame:
    """By request number: mean latency and active instances; with the run's P99, requests over the threshold, when the
    first instance joined (s) and what all cost (instance-seconds).
    """
    rows = []
    for point, run in stored.run(RUNS):
        requests = run.requests().set_index("request_id")
        latency = (requests["finished"] - requests["arrival"])[requests["status"] == "ok"]
        active = run.instances().groupby("request_id").size().reindex(requests.index, method="ffill")
        bins = requests.index // WIDTH * WIDTH
        one = pd.DataFrame({"latency_s": latency.groupby(bins).mean(), "instances": active.groupby(bins).mean()})
        joins = [change[0] for change in run.document["changes"] if change[2] == "join"]
        always = point["cluster.num_gpus"] * requests["finished"].max()
        one = (
            one.rename_axis("request")
            .reset_index()
            .assign(
                **{key: point[key] for key in ("provisioner", "seed")},
                e2e_p99_s=run.summary["e2e_p99_s"],
                e2e_mean_s=run.summary["e2e_mean_s"],
                over_threshold=int((latency > THRESHOLD_S).sum()),
                first_join_s=min(joins, default=np.nan),
                instance_seconds=run.summary.get("instance_seconds", always),
            )
        )
        rows.append(one)
    return pd.concat(rows, ignore_index=True)


def draw(table: pd.DataFrame) -> Any:
    """Above what happens, by request, with the first seed; below what comes of it, with the range over seeds."""
    figure, axes = plt.subplots(2, 2, figsize=(2 * style.COLUMN, 3.8), layout="constrained", height_ratios=(3, 2))
    for provisioner, name in NAMES.items():
        one = table[(table["provisioner"] == provisioner) & (table["seed"] == table["seed"].min())]
        axes[0, 0].plot(one["request"], one["latency_s"], color=COLOURS[provisioner], label=name)
        axes[0, 1].plot(one["request"], one["instances"], color=COLOURS[provisioner], label=name, drawstyle="steps-mid")
    axes[0, 0].axhline(THRESHOLD_S, color="black", linewidth=0.7, linestyle=":")
    axes[0, 0].annotate("threshold", (0, THRESHOLD_S), fontsize=6, va="bottom")
    axes[0, 0].set(title=f"latency, mean of {WIDTH} requests (s)", xlabel="request", ylim=(0, None))
    axes[0, 1].set(title="active instances", xlabel="request", ylim=(0, 11))
    runs = _runs(table)
    for axis, metric, label in (
        (axes[1, 0], "e2e_p99_s", "P99 latency (s)"),
        (axes[1, 1], "over_threshold", f"requests over {THRESHOLD_S:g} s"),
    ):
        found = runs.groupby("provisioner", sort=False)[metric].agg(["mean", "min", "max"]).loc[list(NAMES)]
        axis.barh(
            list(NAMES.values()),
            found["mean"],
            xerr=[found["mean"] - found["min"], found["max"] - found["mean"]],
            color=list(COLOURS.values()),
            error_kw={"linewidth": 0.8},
        )
        axis.invert_yaxis()
        axis.set_title(label)
    axes[1, 1].set_yticklabels([])
    sns.despine(figure)
    handles, names = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=len(NAMES), frameon=False)
    return figure


def claims(table: pd.DataFrame) -> list[verdicts.Claim]:
    """What the paper says of preempt against relief, seed by seed; and the numbers behind it."""
    runs: Any = _runs(table).pivot(index="seed", columns="provisioner")
    found = [
        verdicts.order(what, [None if worse is None else not worse for worse in _worse(runs[metric])])
        for what, metric in (
            ("preempt provisions no later than relief", "first_join_s"),
            ("preempt has a lower P99 than relief", "e2e_p99_s"),
            ("preempt leaves fewer requests over the threshold than relief", "over_threshold"),
        )
    ]
    for metric, label, unit in (
        ("first_join_s", "first instance joins", "s"),
        ("e2e_p99_s", "P99 latency", "s"),
        ("over_threshold", "requests over the threshold", ""),
    ):
        for provisioner in ("relief", "preempt"):
            found.append(verdicts.value(f"{label}, {provisioner}", None, runs[metric][provisioner].tolist(), unit))
    return found


def _worse(metric: pd.DataFrame) -> list[bool | None]:
    """Whether preempt has more of it than relief, seed by seed."""
    return verdicts.above(metric["preempt"], metric["relief"])


def _runs(table: pd.DataFrame) -> pd.DataFrame:
    """A row per run."""
    return table.drop(columns=["request", "latency_s", "instances"]).drop_duplicates()
