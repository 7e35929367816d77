"""The cells of a figure: which runs and searches it needs, found among the stored; a missing one is an error that
names it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, Protocol, TypeVar

import pandas as pd

from block.store.results import Run
from block.store.searches import Search

Cell = Mapping[str, Any]
"""Values of one run or search by their keys: the group choice "scheduler", or a config value such as "workload.qps"."""

Key = tuple[tuple[str, str], ...]
"""What tells a cell from all others."""

LABELS = ("setting",)
"""Keys of cells that name something for people and configure nothing."""

REQUESTS = "workload.num_requests"
"""A cell that sets it has another number of requests than most, which all change together for a quick look."""

Kind = TypeVar("Kind", Run, Search)


class Figure(Protocol):
    """What the module of a figure has at least; the package's docstring tells the rest."""

    TITLE: str
    PAPER: str
    RUNS: Sequence[Cell]

    def table(self, stored: Stored) -> pd.DataFrame:
        """What it shows."""
        ...


class MissingCells(LookupError):
    """Runs or searches that a figure needs are not stored; the message names them."""


@dataclass(frozen=True)
class Stored:
    """What is stored, by the `key` of its cell. Cells of seeds from `seeds` on are not asked for."""

    runs: Mapping[Key, Run]
    searches: Mapping[Key, Search]
    seeds: int = 3

    def run(self, cells: Sequence[Cell]) -> list[tuple[Cell, Run]]:
        """Each cell with its run. MissingCells if one lacks."""
        return _found(self.wanted(cells), self.runs, "runs")

    def search(self, cells: Sequence[Cell]) -> list[tuple[Cell, Search]]:
        """Each cell with its search. MissingCells if one lacks."""
        return _found(self.wanted(cells), self.searches, "searches")

    def wanted(self, cells: Sequence[Cell]) -> list[Cell]:
        """The cells of the seeds that are asked for."""
        return [cell for cell in cells if cell.get("seed", 0) < self.seeds]

    def part(self, figure: Figure) -> Stored:
        """What one figure needs of it."""
        runs = {key(cell) for cell in figure.RUNS}
        searches = {key(cell) for cell in getattr(figure, "SEARCHES", ())}
        return Stored(
            {name: run for name, run in self.runs.items() if name in runs},
            {name: search for name, search in self.searches.items() if name in searches},
            self.seeds,
        )

    def summaries(self, cells: Sequence[Cell]) -> pd.DataFrame:
        """A row per run: the values of its cell, and its summary. MissingCells if one lacks."""
        rows = [{**cell, **run.summary} for cell, run in self.run(cells)]
        return pd.DataFrame(rows)

    def capacities(self, cells: Sequence[Cell], slo_s: Sequence[float]) -> pd.DataFrame:
        """A row per search and objective: the values of its cell, slo_s and capacity_qps. MissingCells if one lacks."""
        found = self.search(cells)
        return pd.DataFrame(
            [{**cell, "slo_s": slo, "capacity_qps": one.capacity(slo)} for cell, one in found for slo in slo_s]
        )

    def gaps(self, cells: Sequence[Cell]) -> str:
        """Why searches have found no capacity, and how many of them; empty if all have."""
        found = self.search(cells)
        reasons = [why for _, one in found for why in one.document.get("gaps", {}).values()]
        sought = sum(len(one.document["capacities_qps"]) for _, one in found)
        if not reasons:
            return ""
        return f"{len(reasons)} of {sought} capacities are beyond these runs, as {reasons[0]}"


def _found(cells: Sequence[Cell], stored: Mapping[Key, Kind], what: str) -> list[tuple[Cell, Kind]]:
    missing = [cell for cell in cells if key(cell) not in stored]
    if missing:
        shown = "; ".join(" ".join(overrides(cell)) for cell in missing[:5])
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        raise MissingCells(f"{len(missing)} of {len(cells)} {what} are missing: {shown}{more}")
    return [(cell, stored[key(cell)]) for cell in cells]


def grid(**values: Sequence[Any]) -> list[dict[str, Any]]:
    """Every combination; a double underscore in a key stands for a dot."""
    keys = [key.replace("__", ".") for key in values]
    return [dict(zip(keys, combination, strict=True)) for combination in product(*values.values())]


def overrides(cell: Cell) -> list[str]:
    """The cell as Hydra's overrides."""
    return [f"{key}={value}" for key, value in cell.items() if key not in LABELS]


def key(cell: Cell) -> Key:
    """What tells a cell from all others."""
    return tuple(sorted((name, str(value)) for name, value in cell.items() if name not in LABELS))
