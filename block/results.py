"""Stored runs: ``artifacts/runs/<time>-<id>/`` is a run once it holds run.json, which is written last and atomically.

    run.json           schema_version, status, config, choices, provenance, counts, summary
    requests.parquet   a row per request, in the order of the workload
    decisions.parquet  a row per decision: candidates and scores (lists), chosen, fallback, time
    instances.parquet  time series of the instances
    counterfactuals.parquet  when sampled requests would have finished on each instance; of runs with `replay_share`
    tokens.parquet     when each token of a request came; of real engines only
    run.log            what was logged meanwhile
    instances/         what real servers said

A run that was killed, or that found the disk full, leaves a folder without run.json, which no reader returns. One on
real servers leaves what it had finished (started.json, finished.jsonl), of which `block.writer.recover` makes a run.
"""

from __future__ import annotations

import enum
import json
import logging
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from block import metrics, provenance

if TYPE_CHECKING:  # pandas costs a third of a second, and only readers need it
    import pandas as pd

SCHEMA_VERSION = 1
DEFAULT_ROOT = Path("artifacts/runs")  # relative to the current directory

# Keys of a config that do not change what a run does: config_hash leaves them out.
_NOT_THE_EXPERIMENT = ("command", "runs_dir", "tracking", "capacity", "server", "estimation")
_ABSENT = object()

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Run:
    """One stored run. The tables are read when asked for, and raise OSError if the run failed before writing them."""

    path: Path
    document: Mapping[str, Any]  # run.json

    @property
    def id(self) -> str:
        """The folder's name; nothing is to be read from it."""
        return self.path.name

    @property
    def status(self) -> str:
        """ "ok", "failed" or "interrupted"."""
        return str(self.document["status"])

    @property
    def config(self) -> dict[str, Any]:
        """The resolved config."""
        return self.document["config"]  # type: ignore[no-any-return]

    @property
    def choices(self) -> dict[str, str]:
        """What was chosen of each config group, e.g. {"scheduler": "block", "model": "llama2-7b"}."""
        return self.document["choices"]  # type: ignore[no-any-return]

    @property
    def summary(self) -> metrics.Summary:
        """The summary metrics (`metrics.summarise`); empty for a run that failed before its end."""
        return self.document["summary"]  # type: ignore[no-any-return]

    @property
    def counts(self) -> dict[str, int] | None:
        """Requests sent, ok, failed, fallback, preempted, failed over."""
        return self.document["counts"]  # type: ignore[no-any-return]

    def get(self, key: str, default: Any = None) -> Any:
        """A choice ("scheduler"), a config value by its dotted key ("workload.qps"), or a field of run.json."""
        if key in self.choices:
            return self.choices[key]
        value: Any = self.config
        for part in key.split("."):
            value = value.get(part, _ABSENT) if isinstance(value, Mapping) else _ABSENT
        return self.document.get(key, default) if value is _ABSENT else value

    def requests(self) -> pd.DataFrame:
        """The request table."""
        return _read_table(self.path / "requests.parquet")

    def decisions(self) -> pd.DataFrame:
        """The decision table."""
        return _read_table(self.path / "decisions.parquet")

    def instances(self) -> pd.DataFrame:
        """The time series of the instances."""
        return _read_table(self.path / "instances.parquet")

    def counterfactuals(self) -> pd.DataFrame:
        """When sampled requests would have finished on each instance; OSError if the run had `replay_share=0`."""
        return _read_table(self.path / "counterfactuals.parquet")


def runs(*, root: str | Path = DEFAULT_ROOT, status: str | Iterable[str] | None = "ok", **where: Any) -> list[Run]:
    """The stored runs that match, oldest first; `status=None` returns the failed and interrupted ones too.

    A keyword is a key of `Run.get`: ``runs(scheduler="block", **{"workload.qps": 30})``. A list, tuple or set matches
    any of its members. A folder whose run.json cannot be read is skipped with a warning; without one it is no run.
    """
    found = [run for path in sorted(Path(root).glob("*/run.json")) if (run := read_run(path.parent)) is not None]
    found = [run for run in found if status is None or _matches(run.status, status)]
    matching = [run for run in found if all(_matches(run.get(key, _ABSENT), want) for key, want in where.items())]
    return sorted(matching, key=lambda run: (str(run.document["created"]), run.id))


def read_run(path: str | Path) -> Run | None:
    """The run stored in folder `path`; None, with a warning, if its run.json is missing or cannot be read."""
    file = Path(path) / "run.json"
    try:
        document = json.loads(file.read_bytes())
        lacking = [key for key in _REQUIRED if not isinstance(document[key], _REQUIRED[key])]
        if lacking:
            raise ValueError(f"{lacking[0]} is {document[lacking[0]]!r}")
        if document["schema_version"] > SCHEMA_VERSION:
            raise ValueError(f"schema_version {document['schema_version']}: this code knows {SCHEMA_VERSION}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        log.warning("skipped %s: %s: %s", file, type(error).__name__, error)
        return None
    return Run(Path(path), document)


_REQUIRED = {"schema_version": int, "created": str, "status": str, "config": dict, "choices": dict, "summary": dict}


def frame(found: Iterable[Run], *keys: str) -> pd.DataFrame:
    """A row per run: its id, the given keys of `Run.get` (None: it has no such key), and its summary metrics."""
    import pandas as pd

    return pd.DataFrame([{"id": run.id, **{key: run.get(key) for key in keys}, **run.summary} for run in found])


def _matches(value: Any, want: Any) -> bool:
    return any(value == one for one in (want if isinstance(want, list | tuple | set | frozenset) else (want,)))


def _read_table(path: Path) -> pd.DataFrame:
    return pq.read_table(path).to_pandas()  # type: ignore[no-any-return]


def experiment_hash(config: Mapping[str, Any]) -> str:
    """What tells the experiment that a resolved config describes from all others; a run keeps it as its config_hash."""
    told = {key: value for key, value in config.items() if key not in _NOT_THE_EXPERIMENT}
    return provenance.config_hash(json_value(told))


def local_time(created: str) -> str:
    """A stored moment as it is shown: "2026-01-31 14:05", local time; as it is if it is none."""
    try:
        return f"{datetime.fromisoformat(created).astimezone():%Y-%m-%d %H:%M}"
    except ValueError:
        return created


def write_json(path: Path, document: Mapping[str, Any]) -> None:
    """Write `path` whole or not at all, even if the machine stops. Raises OSError, or ValueError for a NaN."""
    text = json.dumps(document, indent=1, allow_nan=False) + "\n"
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    _sync(path.parent)


def write_table(path: Path, table: pa.Table) -> None:
    """Write `path` to the disk, for certain."""
    pq.write_table(table, path)
    _sync(path)  # run.json must not reach the disk before what it vouches for


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def json_value(value: Any) -> Any:
    """`value` in JSON's types; an infinite or missing number is spelt as in YAML (".inf")."""
    if isinstance(value, Mapping):
        return {str(key): json_value(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [json_value(item) for item in value]
    if isinstance(value, enum.Enum):
        return value.name
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, np.generic | np.ndarray):
        return json_value(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return ".nan" if math.isnan(value) else ".inf" if value > 0 else "-.inf"
    return value
