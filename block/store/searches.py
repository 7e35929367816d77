"""Stored capacity searches: ``artifacts/capacity/<hash>.json``, one for each experiment, seed and thing searched for.

The file is written whole or not at all, and written again when what the search depends on has changed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from block.core.files import NotStored, write_json_or_divert
from block.store import provenance
from block.store.results import experiment_hash, local_time

DEFAULT_ROOT = Path("artifacts/capacity")  # relative to the current directory


@dataclass(frozen=True, slots=True)
class Search:
    """One stored search: created, choices, config, hashes, git, capacities_qps by objective, and the points tried.

    again: it was found, not made by the one who asked. trouble: why it is not stored where it belongs.
    """

    path: Path
    document: Mapping[str, Any]
    again: bool = False
    trouble: NotStored | None = None

    @property
    def created(self) -> str:
        """When it was made: "2026-01-31 14:05", local time."""
        return local_time(str(self.document.get("created", "")))

    def capacity(self, slo_s: float) -> float:
        """Requests/s at which the latency crosses `slo_s`; NaN if it does nowhere, and `gap` says why. KeyError if that
        was not searched for.
        """
        rate = self.document["capacities_qps"][f"{slo_s:g}"]
        return math.nan if rate is None else float(rate)

    def gap(self, slo_s: float) -> str | None:
        """Why there is no capacity at `slo_s`; None if there is one."""
        why = self.document.get("gaps", {}).get(f"{slo_s:g}")
        return None if why is None else str(why)


def path_of(config: Mapping[str, Any], root: Path = DEFAULT_ROOT) -> Path:
    """Where the search that a resolved config describes, for its own seed, is stored. Its rate is not part of it."""
    wanted = {key: value for key, value in config["capacity"].items() if key not in ("seeds", "fresh")}
    at_any_rate = {**config, "workload": {**config["workload"], "qps": None}}
    return root / f"{provenance.config_hash([experiment_hash(at_any_rate), wanted])}.json"


def find(config: Mapping[str, Any], hashes: Mapping[str, str], root: Path = DEFAULT_ROOT) -> Search | None:
    """The stored search that `config` describes; None if there is none, or `hashes` tell that it is outdated."""
    path = path_of(config, root)
    try:
        document = json.loads(path.read_bytes())
        current = document["hashes"] == hashes and bool(document["capacities_qps"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return Search(path, document, again=True) if current else None


def store(document: Mapping[str, Any], root: Path = DEFAULT_ROOT) -> Search:
    """Write a search, over an outdated one if there is one; into the temporary folder if it cannot be written there."""
    path, trouble = write_json_or_divert(str(root), path_of(document["config"], root), document)
    return Search(path, document, trouble=trouble)
