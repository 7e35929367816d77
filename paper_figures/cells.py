"""The cells of a figure: which runs it needs, found among the stored ones; a missing one is an error that names it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

import pandas as pd

from block.results import Run, frame

Cell = Mapping[str, Any]
"""Values of one run by their keys: the group choice "scheduler", or a config value such as "workload.qps"."""


Stored = Mapping[tuple[Any, ...], Run]
"""Stored runs by the `key` of their cells."""


class MissingCells(LookupError):
    """Runs that a figure needs are not stored; the message names them."""


def grid(**values: Sequence[Any]) -> list[dict[str, Any]]:
    """Every combination; a double underscore in a key stands for a dot."""
    keys = [key.replace("__", ".") for key in values]
    return [dict(zip(keys, combination, strict=True)) for combination in product(*values.values())]


def overrides(cell: Cell) -> list[str]:
    """The cell as Hydra's overrides."""
    return [f"{key}={value}" for key, value in cell.items()]


def found(cells: Sequence[Cell], stored: Stored) -> list[Run]:
    """The run of each cell. MissingCells if one lacks."""
    missing = [cell for cell in cells if key(cell) not in stored]
    if missing:
        shown = "; ".join(" ".join(overrides(cell)) for cell in missing[:5])
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        raise MissingCells(f"{len(missing)} of {len(cells)} runs are missing: {shown}{more}")
    return [stored[key(cell)] for cell in cells]


def table(cells: Sequence[Cell], stored: Stored) -> pd.DataFrame:
    """A row per cell with its values and its run's summary. MissingCells if one lacks."""
    return frame(found(cells, stored), *cells[0])


def key(cell: Cell) -> tuple[Any, ...]:
    """What tells a cell from all others."""
    return tuple(sorted((name, str(value)) for name, value in cell.items()))
