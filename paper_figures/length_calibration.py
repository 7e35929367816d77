"""How length estimates lie against true lengths on held-out prompts, and whether the intervals stated with them hold
what they should.

Drawn from what `python run.py experiment=length_estimation` measured and wrote.
"""

from __future__ import annotations

from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns

from paper_figures import points, style, table1
from paper_figures.verdicts import Claim, value

TITLE = "Calibration of the learned length estimators on held-out prompts"
PAPER = "beyond the paper"
RUNS: list[points.GridPoint] = []
FILES = table1.FILES
NAMES = {
    "gpteacher": "GPTeacher",
    "codegen-instruct": "GPTeacher, code",
    "roleplay-simple-deduped-roleplay-instruct": "GPTeacher, role-play",
}
LEVEL = 0.8


def table(stored: points.Stored) -> pd.DataFrame:
    """Of each learned estimator and data set, a row per tenth of the estimates, in tokens, and one per level of
    coverage. MissingResults if nothing was measured.
    """
    learned = [row for row in table1.measured() if row["estimator"] not in table1.BASELINES]
    if not learned:
        raise points.MissingResults("python run.py experiment=length_estimation measured no learned estimator")
    rows = [
        {"estimator": one["estimator"], "data": NAMES.get(one["data"], one["data"]), "kind": kind, **row}
        for one in learned
        for kind, each in one["calibration"].items()
        for row in each
    ]
    return pd.DataFrame(rows).rename(columns={"estimate": "tokens"})


def draw(table: pd.DataFrame) -> Any:
    """A panel for each estimator and data set, and one for the coverage of all."""
    groups: Any = list(table.groupby(["estimator", "data"], sort=False))
    rows = (len(groups) + 2) // 2
    figure, axes = plt.subplots(rows, 2, figsize=(2 * style.COLUMN, 2.4 * rows), layout="constrained", squeeze=False)
    panels, last = axes.flat[: len(groups)], axes.flat[len(groups)]
    for spare in axes.flat[len(groups) + 1 :]:
        spare.set_visible(False)
    for axis, (names, group) in zip(panels, groups, strict=True):
        _against_truth(axis, group[group["kind"] == "by_estimate"])
        axis.set(title=" on ".join(names), xlabel="estimate (tokens), mean of a tenth", ylabel="true length (tokens)")
    _coverage(last, table[table["kind"] == "coverage"])
    panels[0].legend(loc="upper left", frameon=False)
    sns.despine(figure)
    return figure


def _against_truth(axis: Any, tenths: pd.DataFrame) -> None:
    x, colour = tenths["tokens"], style.COLOURS["Block*"]
    stated = tenths["stated_p10"], tenths["stated_p90"]
    axis.fill_between(x, *stated, color=colour, alpha=0.15, linewidth=0, label="stated P10 to P90")
    axis.vlines(x, tenths["true_p10"], tenths["true_p90"], color=colour, linewidth=0.9, label="true P10 to P90")
    axis.plot(x, tenths["true_p50"], "o", color=colour, label="true median")
    axis.plot(x, tenths["true_mean"], "_", color="black", markersize=5, label="true mean")
    axis.axline((0, 0), slope=1, color="0.5", linewidth=0.8, linestyle="--")
    axis.set(xlim=(0, None), ylim=(0, None))


def _coverage(axis: Any, levels: pd.DataFrame) -> None:
    shares = levels.assign(
        stated=100 * levels["stated"], held=100 * levels["held"], of=levels["estimator"] + " on " + levels["data"]
    )
    sns.lineplot(
        shares,
        x="stated",
        y="held",
        hue="of",
        style="of",
        palette="colorblind",
        markers=True,
        markeredgewidth=0,
        ax=axis,
    )
    axis.axline((0, 0), slope=1, color="0.5", linewidth=0.8, linestyle="--")
    axis.set(title="coverage of intervals", xlabel="stated to lie within (%)", ylabel="do lie within (%)")
    axis.set(xlim=(0, 100), ylim=(0, 100))
    axis.legend(loc="lower right", frameon=False)


def claims(table: pd.DataFrame) -> list[Claim]:
    """How many lengths lie within the intervals that are stated to hold 80 % of them."""
    found = []
    for _, row in table[table["stated"] == LEVEL].iterrows():
        what = f"lengths within the {LEVEL:.0%} intervals of {row['estimator']} on {row['data']}"
        found.append(value(what, None, [100 * row["held"]], "%"))
    return found
