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
real servers leaves what it had finished (started.json, finished.jsonl): `block.store.writer.recover` makes a run of it.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from block.core.files import json_value, sync
from block.store import provenance
from block.store.summary import Summary

if TYPE_CHECKING:  # pandas costs a third of a second, and only readers need it
    import pandas as pd

SCHEMA_VERSION = 1
DEFAULT_ROOT = Path("artifacts/runs")  # relative to the current directory

# Keys of a config that do not change what a run does: config_hash leaves them out.
_NOT_THE_EXPERIMENT = ("command", "objective", "runs_dir", "tracking", "capacity", "gateway", "server", "estimation")
_ABSENT: Any = object()
_NEVER = object()  # equal to nothing that is asked for

# What a key of `Run.get` may be or begin with: the top of a config, an experiment's choice, the fields of run.json.
KEYS = (
    *(
        "scheduler",
        "model",
        "cluster",
        "engine",
        "migration",
        "workload",
        "lengths",
        "backend",
        "tracking",
        "provisioner",
    ),
    *(
        "dispatch",
        "capacity",
        "command",
        "objective",
        "seed",
        "sample_every_s",
        "replay_share",
        "runs_dir",
        "gateway",
        "estimation",
    ),
    *("experiment", "schema_version", "id", "created", "status", "error", "choices", "config", "config_hash", "hashes"),
    *("git", "hardware", "packages", "counts", "summary", "changes", "engines", "snapshots", "ejections"),
    "readmissions",
)

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
    def summary(self) -> Summary:
        """The summary metrics (`block.store.summary.summarise`); empty for a run that failed before its end."""
        return self.document["summary"]  # type: ignore[no-any-return]

    @property
    def counts(self) -> dict[str, int | None] | None:
        """Requests sent, ok, failed, fallback, preempted (None: not known), failed over."""
        return self.document["counts"]  # type: ignore[no-any-return]

    def get(self, key: str, default: Any = _ABSENT) -> Any:
        """A choice ("scheduler"), a config value by its dotted key ("workload.qps"), or a field of run.json.

        ValueError, with the nearest keys, if it has no such key and no default is given.
        """
        if key in self.choices:
            return self.choices[key]
        value: Any = self.config
        for part in key.split("."):
            value = value.get(part, _ABSENT) if isinstance(value, Mapping) else _ABSENT
        found = self.document.get(key, default) if value is _ABSENT else value
        if found is _ABSENT:
            _refuse_unknown([key], [self])
        return None if found is _ABSENT else found

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
    ValueError, with the nearest keys, for a key that no run has.
    """
    found = [run for path in sorted(Path(root).glob("*/run.json")) if (run := read_run(path.parent)) is not None]
    _refuse_unknown(where, found)
    found = [run for run in found if status is None or _matches(run.status, status)]
    matching = [run for run in found if all(_matches(run.get(key, _NEVER), want) for key, want in where.items())]
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
    """A row per run: its id, the given keys of `Run.get` (None: others have it), and its summary metrics.

    ValueError, with the nearest keys, for a key that none of the runs has.
    """
    import pandas as pd

    found = list(found)
    _refuse_unknown(keys, found)
    return pd.DataFrame([{"id": run.id, **{key: run.get(key, None) for key in keys}, **run.summary} for run in found])


def _refuse_unknown(keys: Iterable[str], found: Sequence[Run]) -> None:
    """ValueError for a key that none of the runs has; if there are none, for one that no config begins with."""
    for key in keys:
        if key in KEYS or any(run.get(key, None) is not None for run in found):
            continue
        known = set(KEYS).union(*(_keys(run.config) for run in found), *(run.choices for run in found))
        if key not in known and (found or key.partition(".")[0] not in KEYS):
            raise ValueError(f"{key}: no such key; {_nearest(key, sorted(known))}")


def _keys(config: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """The dotted keys of a config and of the nodes in it."""
    for key, value in config.items():
        yield f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from _keys(value, f"{prefix}{key}.")


def _nearest(key: str, known: Sequence[str]) -> str:
    """Those that are spelt like it, as a whole or in their last part; else where all are told."""
    last = key.rpartition(".")[2]
    ends = get_close_matches(last, {one.rpartition(".")[2] for one in known}, n=3)
    alike = [one for end in ends for one in known if one.rpartition(".")[2] == end]
    near = alike or get_close_matches(key, known)
    some = f"did you mean {' or '.join(near[:3])}? " if near else ""
    return f"{some}choose a config group or a key that python run.py --cfg job shows, such as workload.qps"


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


def write_table(path: Path, table: pa.Table) -> None:
    """Write `path` to the disk, for certain. OSError if it cannot be, and then it is not there."""
    try:
        pq.write_table(table, path)
        sync(path)  # run.json must not reach the disk before what it vouches for
    except OSError:
        with suppress(OSError):
            path.unlink()
        raise
