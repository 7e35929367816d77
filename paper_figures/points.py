"""The grid points of a figure: which runs and searches it needs, found among the stored; a missing one is an error that
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

GridPoint = Mapping[str, Any]
"""Values of one run or search by their keys: the group choice "scheduler", or a config value such as "workload.qps"."""

Key = tuple[tuple[str, str], ...]
"""What tells a point from all others."""

LABELS = ("setting",)
"""Keys of points that name something for people and configure nothing."""

REQUESTS = "workload.num_requests"
"""A point that sets it has another number of requests than most, which all change together for a quick look."""

Kind = TypeVar("Kind", Run, Search)


class Figure(Protocol):
    """What the module of a figure has at least; the package's docstring tells the rest."""

    TITLE: str
    PAPER: str
    RUNS: Sequence[GridPoint]

    def table(self, stored: Stored) -> pd.DataFrame:
        """What it shows."""
        ...


class MissingResults(LookupError):
    """Runs or searches that a figure needs are not stored; the message names them."""


@dataclass(frozen=True)
class Stored:
    """What is stored, by the `key` of its point. Points of seeds from `seeds` on are not asked for."""

    runs: Mapping[Key, Run]
    searches: Mapping[Key, Search]
    seeds: int = 3

    def run(self, points: Sequence[GridPoint]) -> list[tuple[GridPoint, Run]]:
        """Each point with its run. MissingResults if one lacks."""
        return _found(self.wanted(points), self.runs, "runs")

    def search(self, points: Sequence[GridPoint]) -> list[tuple[GridPoint, Search]]:
        """Each point with its search. MissingResults if one lacks."""
        return _found(self.wanted(points), self.searches, "searches")

    def wanted(self, points: Sequence[GridPoint]) -> list[GridPoint]:
        """The points of the seeds that are asked for."""
        return [point for point in points if point.get("seed", 0) < self.seeds]

    def part(self, figure: Figure) -> Stored:
        """What one figure needs of it."""
        runs = {key(point) for point in figure.RUNS}
        searches = {key(point) for point in getattr(figure, "SEARCHES", ())}
        return Stored(
            {name: run for name, run in self.runs.items() if name in runs},
            {name: search for name, search in self.searches.items() if name in searches},
            self.seeds,
        )

    def summaries(self, points: Sequence[GridPoint]) -> pd.DataFrame:
        """A row per run: the values of its point, and its summary. MissingResults if one lacks."""
        rows = [{**point, **run.summary} for point, run in self.run(points)]
        return pd.DataFrame(rows)

    def capacities(self, points: Sequence[GridPoint], slo_s: Sequence[float]) -> pd.DataFrame:
        """A row per search and objective: the values of its point, slo_s, capacity_qps. MissingResults if one lacks."""
        found = self.search(points)
        return pd.DataFrame(
            [{**point, "slo_s": slo, "capacity_qps": one.capacity(slo)} for point, one in found for slo in slo_s]
        )

    def gaps(self, points: Sequence[GridPoint]) -> str:
        """Why searches have found no capacity, and how many of them; empty if all have."""
        found = self.search(points)
        reasons = [why for _, one in found for why in one.document.get("gaps", {}).values()]
        sought = sum(len(one.document["capacities_qps"]) for _, one in found)
        if not reasons:
            return ""
        return f"{len(reasons)} of {sought} capacities are beyond these runs, as {reasons[0]}"


def _found(points: Sequence[GridPoint], stored: Mapping[Key, Kind], what: str) -> list[tuple[GridPoint, Kind]]:
    missing = [point for point in points if key(point) not in stored]
    if missing:
        shown = "; ".join(" ".join(overrides(point)) for point in missing[:5])
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        raise MissingResults(f"{len(missing)} of {len(points)} {what} are missing: {shown}{more}")
    return [(point, stored[key(point)]) for point in points]


def grid(**values: Sequence[Any]) -> list[dict[str, Any]]:
    """Every combination; a double underscore in a key stands for a dot."""
    keys = [key.replace("__", ".") for key in values]
    return [dict(zip(keys, combination, strict=True)) for combination in product(*values.values())]


def overrides(point: GridPoint) -> list[str]:
    """The point as Hydra's overrides."""
    return [f"{key}={value}" for key, value in point.items() if key not in LABELS]


def key(point: GridPoint) -> Key:
    """What tells a point from all others."""
    return tuple(sorted((name, str(value)) for name, value in point.items() if name not in LABELS))
