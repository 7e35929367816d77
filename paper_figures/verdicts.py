"""Claims of the paper beside what we measure, each with a verdict."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import yaml  # type: ignore[import-untyped]

from block.store.summary import interval
from paper_figures.catalogue import FIGURES

PUBLISHED: Mapping[str, Any] = yaml.safe_load((Path(__file__).parent / "published.yaml").read_text())
REASONS: Mapping[str, Mapping[str, str]] = yaml.safe_load((Path(__file__).parent / "reasons.yaml").read_text()) or {}

# The authors' own tolerance for a single run: a capacity within 0.3 requests/s, any other number within 4 %.
CAPACITY_QPS = 0.3
CELL = 0.04
PARTLY = 3  # times the tolerance


@dataclass(frozen=True)
class Claim:
    """One published value or order beside ours.

    published: None if the paper has no number; ours: mean over seeds; half_width: half of its 95 % interval, None for
    one seed; tolerance: absolute, in `unit`; holds: for a claim of an order, whether it holds for each seed (None where
    a seed cannot tell).
    """

    what: str
    published: float | None
    ours: float
    half_width: float | None = None
    unit: str = ""
    tolerance: float = 0.0
    holds: tuple[bool | None, ...] | None = None

    @property
    def verdict(self) -> str:
        """reproduced: within the tolerance, or for all seeds; partly: within three times it, or for most seeds; else
        not. "ours" if nothing is published, "gap" if what is asked for is not there for every seed.
        """
        if None in self.holds if self.holds is not None else math.isnan(self.ours):
            return "gap"
        if self.holds is not None:
            share = sum(map(bool, self.holds)) / len(self.holds)
            return "reproduced" if share == 1 else "partly" if share > 0.5 else "not"
        if self.published is None:
            return "ours"
        apart = abs(self.ours - self.published) - 1e-9
        return "reproduced" if apart <= self.tolerance else "partly" if apart <= PARTLY * self.tolerance else "not"


def value(
    what: str, published: float | None, ours: Sequence[float], unit: str = "", *, tolerance: float | None = None
) -> Claim:
    """A published number, beside ours of several seeds. tolerance: absolute; by default 4 % of the published."""
    mean, half = interval(ours)
    allowed = CELL * abs(published or 0.0) if tolerance is None else tolerance
    return Claim(what, published, mean, half, unit, allowed)


def order(what: str, holds: Sequence[bool | None]) -> Claim:
    """A claim that something is more than another, and whether it is, seed by seed."""
    return Claim(what, None, math.nan, holds=tuple(None if one is None else bool(one) for one in holds))


def above(more: Iterable[float], less: Iterable[float]) -> list[bool | None]:
    """Whether the one is more than the other, seed by seed; None where either is not there (NaN)."""
    pairs = zip(more, less, strict=True)
    return [None if math.isnan(one) or math.isnan(other) else one > other for one, other in pairs]


def rows(figure: str, paper: str, claims: Sequence[Claim], gap: str = "") -> pd.DataFrame:
    """The claims of one figure as rows of the summary; `gap`: why something that they ask for is not there."""
    found = []
    for claim in claims:
        reason = REASONS.get(figure, {}).get(claim.what, "") if claim.verdict in ("partly", "not") else ""
        ours: float | str = claim.ours
        published: float | str | None = claim.published
        if claim.holds is not None:
            published, ours = "claimed", f"{sum(map(bool, claim.holds))} of {len(claim.holds)} seeds"
        if claim.verdict == "gap":
            ours, reason = math.nan, gap or "it did not happen in these runs"
        found.append((figure, paper, claim.what, claim.unit, published, ours, claim.half_width, claim.verdict, reason))
    columns = ["figure", "paper", "what", "unit", "published", "ours", "half_width", "verdict", "reason"]
    return pd.DataFrame(found, columns=columns)


def markdown(summary: pd.DataFrame, label: str = "") -> str:
    """The summary for people; `label` says of what, if it is not of the runs of the full size."""
    counts = summary["verdict"].value_counts()
    told = ", ".join(
        f"{counts[verdict]} {verdict}" for verdict in ("reproduced", "partly", "not", "gap") if verdict in counts
    )
    lines = [
        "# What is reproduced",
        "",
        f"{told}. Reproduced: within the authors' own tolerance for a single run (capacity ± 0.3 requests/s, other",
        "numbers ± 4 %), or, for an order, for every seed. Partly: within three times that, or for most seeds. Ours:",
        "mean over seeds ± half of its 95 % interval (Student's t). Written by `python scripts/reproduce.py`.",
        "",
        *(
            [f"**A quick look**: {label}. Gap: what these runs cannot tell, and why. One seed has no interval.", ""]
            if label
            else []
        ),
        "| figure | what | published | ours | difference | verdict | reason |",
        "|---|---|---|---|---|---|---|",
    ]
    for _, row in summary.iterrows():
        lines.append("| " + " | ".join(cell.replace("*", "\\*") for cell in _cells(row)) + " |")
    return "\n".join(lines) + "\n"


def _cells(row: pd.Series) -> list[str]:
    unit = "" if pd.isna(row["unit"]) else str(row["unit"])
    reason = "" if pd.isna(row["reason"]) else str(row["reason"])
    return [
        f"{row['figure']} ({row['paper']})",
        str(row["what"]),
        shown(row["published"], unit=unit),
        shown(row["ours"], row["half_width"], unit),
        difference(row["published"], row["ours"], unit),
        str(row["verdict"]),
        reason,
    ]


def shown(number: Any, half_width: Any = None, unit: str = "") -> str:
    """A number with its interval and unit; a dash if there is none; text as it is."""
    if isinstance(number, str):
        try:
            number = float(number)
        except ValueError:
            return str(number)
    if number is None or pd.isna(number):
        return "–"
    spread = "" if half_width is None or pd.isna(half_width) else f" ± {float(half_width):.2g}"
    return f"{number:.4g}{spread}{f' {unit}' if unit else ''}"


def difference(published: Any, ours: Any, unit: str = "") -> str:
    """Ours minus the published one: a share of it, or, for shares, in points."""
    try:
        one, other = float(published), float(ours)
    except (TypeError, ValueError):
        return "–"
    if math.isnan(one) or math.isnan(other):
        return "–"
    return f"{other - one:+.1f} points" if unit == "%" or one == 0 else f"{other / one - 1:+.1%}"


def update(path: Path, figure: str, paper: str, claims: Sequence[Claim], gap: str = "") -> None:
    """Put a figure's claims into the summary at `path`, in the place of those that it had. gap: as of `rows`."""
    new = rows(figure, paper, claims, gap)
    if path.exists():
        old = pd.read_csv(path, dtype=str)
        new = pd.concat([old[old["figure"] != figure], new])
    order_of = {name: i for i, name in enumerate(FIGURES)}
    new = new.sort_values("figure", key=lambda names: names.map(order_of), kind="stable")
    new.to_csv(path, index=False, float_format="%.6g")


def read(folder: Path) -> pd.DataFrame:
    """The summary of a folder of figures."""
    path = folder / "summary.csv"
    return pd.read_csv(path, dtype=str) if path.exists() else rows("", "", [])


def write(folder: Path, label: str = "") -> None:
    """Write summary.md beside summary.csv. label: as of `markdown`."""
    (folder / "summary.md").write_text(markdown(read(folder), label))
