"""One look for all figures: the same colour for the same scheduler everywhere, readable at the width of a column."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns

# Names as the paper writes them, in its order; colours of Okabe and Ito, which the colour-blind can tell apart.
SCHEDULERS = {
    "random": ("random", "#999999"),
    "round_robin": ("round robin", "#56B4E9"),
    "min_qpm": ("min-QPM", "#F0E442"),
    "infaas": ("INFaaS++", "#E69F00"),
    "llumnix_minus": ("Llumnix-", "#009E73"),
    "block": ("Block", "#D55E00"),
    "block_star": ("Block*", "#0072B2"),
}
NAMES = {key: name for key, (name, _) in SCHEDULERS.items()}
COLOURS = dict(SCHEDULERS.values())
MARKERS = dict(zip(COLOURS, ("X", "v", "P", "D", "s", "o", "^"), strict=True))
COLUMN = 3.5  # inches


def use() -> None:
    """Set the style."""
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


def legend(figure: Any, axis: Any) -> None:
    """The schedulers that `axis` shows, below all panels."""
    handles, names = axis.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=len(SCHEDULERS), frameon=False)


def save(figure: Any, table: pd.DataFrame, folder: Path, name: str) -> None:
    """The picture as PDF and PNG (None: there is none), beside the table that it draws."""
    folder.mkdir(parents=True, exist_ok=True)
    table.to_csv(folder / f"{name}.csv", index=False, float_format="%.6g")
    if figure is None:
        return
    undated = {"CreationDate": None}  # the same picture is the same bytes
    for kind in ("pdf", "png"):
        figure.savefig(
            folder / f"{name}.{kind}", dpi=200, bbox_inches="tight", metadata=undated if kind == "pdf" else None
        )
    plt.close(figure)
