"""One look for all figures: the same colour for the same scheduler everywhere, readable at the width of a column."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from matplotlib.ticker import Locator, NullFormatter

# Names as the paper writes them, in its order; colours of Okabe and Ito, which the colour-blind can tell apart.
POLICIES = {
    "random": ("random", "#999999", "X"),
    "round_robin": ("round robin", "#56B4E9", "v"),
    "min_qpm": ("min-QPM", "#F0E442", "P"),
    "infaas": ("INFaaS++", "#E69F00", "D"),
    "llumnix_minus": ("Llumnix-", "#009E73", "s"),
    "block": ("Block", "#D55E00", "o"),
    "block_star": ("Block*", "#0072B2", "^"),
    "po2": ("Po2", "#CC79A7", "h"),
    "llumnix": ("Llumnix", "#000000", "d"),
}
NAMES = {key: name for key, (name, _, _) in POLICIES.items()}
COLOURS = {name: colour for name, colour, _ in POLICIES.values()}
MARKERS = {name: marker for name, _, marker in POLICIES.values()}
COMPARED = ("random", "round_robin", "min_qpm", "infaas", "llumnix_minus", "block", "block_star")  # in Figs 6, 7, CDFs
COLUMN = 3.5  # inches


def use() -> None:
    """Have seaborn draw as all figures do: fonts, grid, sizes for a column of a paper."""
    sns.set_theme(
        context="paper",
        style="whitegrid",
        rc={
            "font.size": 8,
            "axes.titlesize": 8,
            "axes.labelsize": 8,
            "legend.fontsize": 7,
            "xtick.labelsize": 7,
            "ytick.labelsize": 7,
            "lines.linewidth": 1.2,
            "lines.markersize": 3.5,
            "grid.linewidth": 0.4,
            "pdf.fonttype": 42,
        },
    )


def named(table: pd.DataFrame) -> pd.DataFrame:
    """The table with its policies by the paper's names."""
    return table.assign(scheduler=table["scheduler"].map(NAMES))


def lines(table: pd.DataFrame, axis: Any, x: str, y: str) -> None:
    """A line for each scheduler: the mean over seeds, in a band from the least to the greatest of them."""
    sns.lineplot(
        named(table),
        x=x,
        y=y,
        hue="scheduler",
        style="scheduler",
        palette=COLOURS,
        markers=MARKERS,
        dashes=False,
        errorbar=("pi", 100),
        markeredgewidth=0,
        ax=axis,
    )
    axis.set(xlabel="", ylabel="")
    axis.get_legend().remove()


def bars(table: pd.DataFrame, axis: Any, x: str, y: str, order: Sequence[str]) -> None:
    """Bars from the keys `order` of POLICIES, grouped by x: the mean over seeds, whiskers from least to greatest."""
    names = [NAMES[key] for key in order]
    sns.barplot(
        named(table),
        x=x,
        y=y,
        hue="scheduler",
        hue_order=names,
        palette=COLOURS,
        saturation=1,
        errorbar=("pi", 100),
        err_kws={"linewidth": 0.8},
        ax=axis,
    )
    axis.set(xlabel="", ylabel="")
    axis.get_legend().remove()


def gap(axis: Any) -> None:
    """Say in a panel that there is nothing to show."""
    axis.annotate("none found", (0.5, 0.5), xycoords="axes fraction", ha="center", va="center", color="0.4")
    axis.tick_params(labelleft=False)


def zoom(axis: Any, values: pd.Series, share: float = 0.15) -> None:
    """Let the values fill the axis: a capacity is no length, and its differences are what is to be seen."""
    values = values.dropna()
    if values.empty:
        gap(axis)
        return
    spread = float(values.max() - values.min()) or 1.0
    axis.set_ylim(max(0.0, values.min() - share * spread - 0.5), values.max() + share * spread)


def plain_ticks(axis: Any, at: Locator) -> None:
    """Ticks at these places of a logarithmic x or y axis, as plain numbers, and none between them."""
    axis.set_major_locator(at)
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


def slo(axis: Any, seconds: Sequence[float], first: float, last: float) -> None:
    """Dotted lines at the objectives, named where latencies that grow with the rate are not: low ones on the right."""
    for one in seconds:
        axis.axhline(one, color="black", linewidth=0.7, linestyle=":")
        least = one == min(seconds)
        x, ha, va = (last, "right", "top") if least else (first, "left", "bottom")
        axis.annotate(f"SLO {one:g} s", (x, one), fontsize=6, ha=ha, va=va)


def legend(figure: Any, axis: Any, columns: int = 7) -> None:
    """What `axis` shows, below all panels."""
    handles, names = axis.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=columns, frameon=False)


def save(figure: Any, table: pd.DataFrame, folder: Path, name: str, label: str = "") -> None:
    """The picture as PDF and PNG (None: there is none), beside the table that it draws; `label` stands above it."""
    folder.mkdir(parents=True, exist_ok=True)
    table.to_csv(folder / f"{name}.csv", index=False, float_format="%.6g")
    if figure is None:
        return
    if label:
        figure.suptitle(label, fontsize=8)
    undated = {"CreationDate": None}  # the same picture is the same bytes
    for kind in ("pdf", "png"):
        figure.savefig(
            folder / f"{name}.{kind}", dpi=200, bbox_inches="tight", metadata=undated if kind == "pdf" else None
        )
    plt.close(figure)
