"""Herding: several dispatchers in front of one cluster, none knowing what the others place."""

from __future__ import annotations

from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from matplotlib.ticker import FixedLocator

from paper_figures import points, settings, style
from paper_figures.verdicts import Claim, above, order, value

TITLE = (
    "Herding: dispatchers that know nothing of each other, by instances asked and age of snapshots, at 32 requests/s"
)
PAPER = "beyond the paper"
SIMULATED_ONLY = True
QPS = 32
DISPATCHERS, STALENESS, K, LEDGER = (
    "dispatch.dispatchers",
    "dispatch.snapshot_interval_s",
    "scheduler.k",
    "dispatch.ledger",
)
AGES = (0, 1, 5)
ASKED = {2: "2", 4: "4", 12: "all 12"}


def _cell(dispatchers: int, age: int, k: int, ledger: bool, seed: int) -> points.GridPoint:
    what = {"scheduler": "block", "workload.qps": QPS, DISPATCHERS: dispatchers, STALENESS: age, K: k, LEDGER: ledger}
    return {**what, "seed": seed}


RUNS = [
    _cell(dispatchers, age, k, ledger, seed)
    for ledger, k, counts in (
        (True, 2, (1, 4, 16)),
        (True, 4, (1, 4, 16)),
        (True, 12, (1, 4, 16)),
        (False, 2, (1, 16)),
        (False, 12, (1, 16)),
    )
    for dispatchers in counts
    for age in AGES
    for seed in settings.SEEDS
]
METRICS = {"ttft_p99_s": "P99 TTFT (s)", "e2e_p99_s": "P99 request latency (s)"}
TICKS = ([2, 5, 10, 20, 40], [30, 35, 40, 50, 60, 70])


def table(stored: points.Stored) -> pd.DataFrame:
    """A row per run."""
    return stored.summaries(RUNS)[[LEDGER, DISPATCHERS, STALENESS, K, "seed", *METRICS, "e2e_mean_s"]]


def draw(table: pd.DataFrame) -> Any:
    """A row of panels for each metric, a panel for each age; whole lines are with the ledger, dashed ones without."""
    figure, axes = plt.subplots(
        len(METRICS), len(AGES), figsize=(2 * style.COLUMN, 3.8), layout="constrained", sharex=True, sharey="row"
    )
    colours = dict(zip(ASKED, (style.COLOURS["Po2"], style.COLOURS["Block*"], style.COLOURS["Block"]), strict=True))
    for row, (metric, label), ticks in zip(axes, METRICS.items(), TICKS, strict=True):
        for axis, age in zip(row, AGES, strict=True):
            part = table[table[STALENESS] == age]
            groups: Any = part.groupby([LEDGER, K])
            for (ledger, k), one in groups:
                by = one.groupby(DISPATCHERS)[metric].agg(["mean", "min", "max"])
                name = f"asks {ASKED[k]}{'' if ledger else ', no ledger'}"
                line = "-" if ledger else "--"
                axis.plot(by.index, by["mean"], line, marker="o" if ledger else "s", color=colours[k], label=name)
                axis.fill_between(by.index, by["min"], by["max"], color=colours[k], alpha=0.12, linewidth=0)
            axis.set(xscale="log", yscale="log")
            style.plain_ticks(axis.xaxis, FixedLocator([1, 4, 16]))
            style.plain_ticks(axis.yaxis, FixedLocator(ticks))
        row[0].set_ylabel(label)
    for axis, age in zip(axes[0], AGES, strict=True):
        axis.set_title("fresh snapshots" if age == 0 else f"snapshots up to {age} s old")
    for axis in axes[-1]:
        axis.set_xlabel("dispatchers")
    sns.despine(figure)
    style.legend(figure, axes[0][0], 5)
    return figure


def claims(table: pd.DataFrame) -> list[Claim]:
    """When asking all herds, and what two choices and the ledger save."""
    by = table.set_index([LEDGER, DISPATCHERS, STALENESS, K, "seed"])["ttft_p99_s"].sort_index()
    found = [
        value(
            f"P99 TTFT, {n} dispatchers, snapshots up to {age} s old, {name} asked",
            None,
            by[True, n, age, k].tolist(),
            "s",
        )
        for n, age in ((1, 0), (16, 0), (16, 5))
        for k, name in ((2, "2"), (12, "all"))
    ]
    found += [
        value(
            f"P99 TTFT, one dispatcher without ledger, snapshots up to 5 s old, {name} asked",
            None,
            by[False, 1, 5, k].tolist(),
            "s",
        )
        for k, name in ((2, "2"), (12, "all"))
    ]
    fresh = above(by[True, 1, 0, 2], by[True, 1, 0, 12])
    herds = above(by[True, 16, 5, 12], by[True, 16, 5, 2])
    found.append(order("one dispatcher with fresh snapshots does better when it asks all than when it asks 2", fresh))
    found.append(order("16 dispatchers with snapshots up to 5 s old do better when they ask 2 than all", herds))
    return found
