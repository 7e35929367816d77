"""Figures 9 and 10 of the camera-ready: capacity by the number of instances that are asked, with estimated and true
lengths.
"""

from __future__ import annotations

from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns

from paper_figures import points, settings, style
from paper_figures.verdicts import CAPACITY_QPS, PUBLISHED, Claim, above, order, value

TITLE = "Capacity by the number of instances asked, with estimated and with true lengths"
PAPER = "camera-ready Figs 9, 10"
SIMULATED_ONLY = True
K = (2, 4, 8)
ALL = 12
LENGTHS = {"estimated": "compact", "oracle": "oracle"}
RUNS: list[points.GridPoint] = []
SEARCHES: list[points.GridPoint] = [
    *(
        {"lengths": lengths, "scheduler.k": k, **point}
        for name, lengths in LENGTHS.items()
        for k in K
        for point in settings.searches("base", ("po_k",), f"{k} with {name} lengths")
    ),
    *settings.searches("base", ("block", "block_star", "llumnix_minus")),
]


def table(stored: points.Stored) -> pd.DataFrame:
    """A row per lengths, k, seed and objective; Llumnix- has neither lengths nor k."""
    found = stored.capacities(SEARCHES, settings.SLO_S)
    names = {scheduler: name for name, scheduler in LENGTHS.items()} | {"block": "oracle", "block_star": "estimated"}
    known = found.get("lengths", pd.Series(index=found.index, dtype=object))
    found["lengths"] = known.fillna(found["scheduler"]).map(names)
    found["k"] = found["scheduler.k"].fillna(ALL).where(found["lengths"].notna())
    return found[["lengths", "k", "seed", "slo_s", "capacity_qps"]]


def draw(table: pd.DataFrame) -> Any:
    """A panel for each objective, with the published values as crosses and Llumnix- as a line."""
    figure, axes = plt.subplots(1, len(settings.SLO_S), figsize=(2 * style.COLUMN, 2.2), layout="constrained")
    colours = {"estimated": style.COLOURS["Block*"], "oracle": style.COLOURS["Block"]}
    for axis, slo in zip(axes, settings.SLO_S, strict=True):
        part = table[table["slo_s"] == slo]
        asked = part[part["lengths"].notna()].astype({"k": int})
        sns.barplot(
            asked,
            saturation=1,
            x="k",
            y="capacity_qps",
            hue="lengths",
            palette=colours,
            errorbar=("pi", 100),
            err_kws={"linewidth": 0.8},
            ax=axis,
        )
        for shift, lengths in ((-0.2, "estimated"), (0.2, "oracle")):
            for place, k in enumerate((*K, ALL)):
                if (published := PUBLISHED["power_of_k"][lengths][slo].get(k)) is not None:
                    axis.plot(place + shift, published, "x", color="black", markersize=5)
        axis.plot([], [], "x", color="black", label="published")
        llumnix = part[part["lengths"].isna()]["capacity_qps"]
        axis.axhline(llumnix.mean(), color=style.COLOURS["Llumnix-"], linestyle="--", label="Llumnix-")
        style.zoom(axis, part["capacity_qps"])
        axis.tick_params(labelleft=True)  # for the published ones, where we have none
        axis.set(title=f"capacity (requests/s), P99 TTFT ≤ {slo:g} s", xlabel="instances asked", ylabel="")
        axis.get_legend().remove()
    style.legend(figure, axes[0], 4)
    sns.despine(figure)
    return figure


def claims(table: pd.DataFrame) -> list[Claim]:
    """Published capacities, and that most of the gain of asking all is there with two."""
    asked = table.dropna(subset=["lengths"])
    by = asked.set_index(["lengths", "k", "slo_s", "seed"])["capacity_qps"].sort_index()
    found = []
    for lengths, objectives in PUBLISHED["power_of_k"].items():
        for slo, published in objectives.items():
            for k, number in published.items():
                if k != ALL:  # which Fig 6 tells
                    what = f"capacity when {k} are asked, {lengths} lengths, P99 TTFT ≤ {slo} s"
                    ours = by[lengths, k, slo].tolist()
                    found.append(value(what, number, ours, "requests/s", tolerance=CAPACITY_QPS))
    two, all_ = by["estimated", 2, 10], by["estimated", ALL, 10]
    found.append(order("asking two carries at least 97 % of asking all, P99 TTFT ≤ 10 s", above(two, 0.97 * all_)))
    more = above(by["oracle", ALL, 10], all_)
    found.append(order("true lengths carry more than estimated ones", more))
    return found
