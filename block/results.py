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
real servers leaves what it had finished (started.json, finished.jsonl), of which `recover` makes a run.
"""

from __future__ import annotations

import enum
import json
import logging
import math
import os
import secrets
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self, TextIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import ArrayLike

from block import metrics, provenance, tables
from block.types import Decision, Forecast, Request, RequestRecord

if TYPE_CHECKING:  # pandas costs a third of a second, and only readers need it
    import pandas as pd

SCHEMA_VERSION = 1
STARTED, FINISHED = "started.json", "finished.jsonl"  # of a run on real servers, until it ends
DEFAULT_ROOT = Path("artifacts/runs")  # relative to the current directory

# Keys of a config that do not change what a run does: config_hash leaves them out.
_NOT_THE_EXPERIMENT = ("command", "runs_dir", "tracking", "capacity", "server", "estimation")
# What a node is when it does nothing: config_hash leaves it out, as if the key were not there.
_OFF = {"provisioner": {"_target_": "block.provisioner.Static"}}

log = logging.getLogger(__name__)
_package_log = logging.getLogger("block")


# ---------------------------------------------------------------------------------------------------------- writing


class RunWriter:
    """Creates the folder of a run and, on leaving the context, completes it with run.json.

        with RunWriter(config, choices, hashes={"latency_model": …, "data_set": …}) as writer:
            outcome = …
            writer.store(outcome.records, outcome.decisions, outcome.instances, wall_time_s=…)

    The run's status is "ok" after `store`, "interrupted" after KeyboardInterrupt, SystemExit or a cancelled task, and
    "failed" after any other exception, which propagates. Leaving without `store` and without an exception raises
    RuntimeError. Within the context, warnings of all packages and what this one logs at level INFO go to run.log too.

    `config` is the resolved config in plain containers; `choices` names what was chosen of each config group.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        choices: Mapping[str, Any] | None = None,
        *,
        hashes: Mapping[str, str | None] | None = None,
        root: str | Path = DEFAULT_ROOT,
    ) -> None:
        created = datetime.now(UTC)
        self.id = f"{created:%Y%m%d-%H%M%S}-{secrets.token_hex(4)}"
        self.path = Path(root) / self.id
        config = _plain(config)
        self._document: dict[str, Any] = {
            "schema_version": SCHEMA_VERSION,
            "id": self.id,
            "created": created.isoformat(),
            "status": "interrupted",
            "error": None,
            "choices": {k: v for k, v in _plain(choices or {}).items() if not k.startswith("hydra/")},
            "config": config,
            "config_hash": experiment_hash(config),
            "hashes": dict(hashes or {}),
            "git": provenance.git(),
            "hardware": provenance.hardware(),
            "packages": provenance.packages(),
            "counts": None,
            "summary": {},
        }
        self._notes: TextIO | None = None

    def __enter__(self) -> Self:
        self.path.mkdir(parents=True)
        self._handler = logging.FileHandler(self.path / "run.log", encoding="utf-8")
        self._handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        logging.getLogger().addHandler(self._handler)
        self._level = _package_log.level
        _package_log.setLevel(self._level or logging.INFO)
        log.info("run %s begins, config %s", self.id, self._document["config_hash"])
        return self

    def note(self, record: RequestRecord) -> None:
        """Keep the record of a finished request for the case that this process is killed."""
        if self._notes is None:
            write_json(self.path / STARTED, self._document)
            self._notes = (self.path / FINISHED).open("a", encoding="utf-8")
        self._notes.write(json.dumps(asdict(record), default=int) + "\n")
        self._notes.flush()

    @property
    def summary(self) -> metrics.Summary:
        """The summary metrics; empty before `store`."""
        return dict(self._document["summary"])

    @property
    def counts(self) -> dict[str, int] | None:
        """Requests sent, ok, failed, fallback, preempted and failed over (at least once); None before `store`."""
        return self._document["counts"]  # type: ignore[no-any-return]

    def store(
        self,
        records: Sequence[RequestRecord],
        decisions: Collection[tuple[float, Decision, int]],
        instances: Mapping[str, ArrayLike],
        *,
        dispatch_overhead_s: ArrayLike | None = None,
        forecast_us: ArrayLike | None = None,
        wall_time_s: float | None = None,
        peak_memory_mib: float | None = None,
        engines: Mapping[str, Any] | None = None,
        ejections: Iterable[tuple[float, int, str]] = (),
        counterfactuals: Mapping[str, ArrayLike] | None = None,
        changes: Sequence[tuple[float, int, str, str]] = (),
        instance_seconds: float | None = None,
    ) -> metrics.Summary:
        """Write the tables, and return the summary that goes into run.json (see `metrics.summarise`).

        `decisions` are (time, decision, request id); `instances` maps a column's name to an array, all of one length.
        counterfactuals: columns of a table, like `instances`.
        engines: what real engines said of themselves. ejections: (time, instance id, reason) of those lost.
        changes: (time, instance id, change, reason) of those that joined or left; instance_seconds: what all have cost.
        Raises OSError if the disk is full, ValueError if the records contradict themselves.
        """
        columns = tables.request_columns(records)
        _write_table(self.path / "requests.parquet", tables.requests_table(columns))
        tokens = tables.tokens_table(records)
        if tokens is not None:
            _write_table(self.path / "tokens.parquet", tokens)
        _write_table(self.path / "decisions.parquet", tables.decisions_table(decisions))
        _write_table(self.path / "instances.parquet", tables.series_table(instances))
        if counterfactuals is not None:
            _write_table(self.path / "counterfactuals.parquet", tables.series_table(counterfactuals))
        ok = int(np.count_nonzero(columns["status"] == "ok"))
        self._document["counts"] = {
            "sent": len(records),
            "ok": ok,
            "failed": len(records) - ok,
            "fallback": sum(decision.fallback is not None for _, decision, _ in decisions),
            "preempted": int(np.count_nonzero(columns["preemptions"])),
            "failed_over": int(np.count_nonzero(columns["retries"])),
        }
        self._document["summary"] = metrics.summarise(
            columns,
            dispatch_overhead_s=dispatch_overhead_s,
            forecast_us=forecast_us,
            wall_time_s=wall_time_s,
            peak_memory_mib=peak_memory_mib,
        )
        if instance_seconds is not None:
            self._document["summary"]["instance_seconds"] = instance_seconds
        self._document["changes"] = _plain(list(changes))
        self._document["engines"] = _plain(engines or {})
        self._document["ejections"] = _plain(list(ejections))
        self._document["status"] = "ok"
        log.info("stored %s", ", ".join(f"{count} {name}" for name, count in self._document["counts"].items()))
        return self.summary

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> Literal[False]:
        try:
            if error is None and self._document["status"] != "ok":
                raise RuntimeError(f"run {self.id} ended without store(): it has no results")
            if error is not None:
                self._document["status"] = "failed" if isinstance(error, Exception) else "interrupted"
                self._document["error"] = f"{type(error).__name__}: {error}"
                # To run.log only: the exception itself goes on to the caller.
                record = log.makeRecord(
                    log.name, logging.ERROR, __file__, 0, "run failed", (), (type(error), error, trace)
                )
                self._handler.handle(record)
        finally:
            _package_log.setLevel(self._level)
            logging.getLogger().removeHandler(self._handler)
            self._handler.close()
        try:
            write_json(self.path / "run.json", self._document)
        except OSError as full:
            if error is None:
                raise
            log.warning("run %s failed, and its run.json could not be written: %s", self.id, full)
            return False
        if self._notes is not None:
            self._notes.close()
            for name in (STARTED, FINISHED):
                (self.path / name).unlink(missing_ok=True)
        return False


def recover(path: Path) -> Run | None:
    """Complete the folder of a run on real servers that was killed, with what it had finished; None if it is none.

    The run's status is "interrupted"; decisions and time series are lost.
    """
    if (path / "run.json").exists() or not (path / STARTED).exists():
        return None
    writer = RunWriter({}, root=path.parent)
    writer.path, writer.id = path, path.name
    writer._document = json.loads((path / STARTED).read_text())
    writer.store(list(_noted(path / FINISHED)), [], {})
    writer._document |= {"status": "interrupted", "error": "killed"}
    write_json(path / "run.json", writer._document)
    return read_run(path)


def _noted(path: Path) -> Iterator[RequestRecord]:
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            fields = json.loads(line)
        except ValueError:  # the last line, cut off
            return
        forecast = fields["forecast"]
        request = Request(**fields.pop("request"))
        yield RequestRecord(request, **{**fields, "forecast": forecast and Forecast(*forecast)})


def experiment_hash(config: Mapping[str, Any]) -> str:
    """What tells the experiment that a resolved config describes from all others; a run keeps it as its config_hash."""
    told = {key: value for key, value in _plain(config).items() if _OFF.get(key, _ABSENT) != value}
    return provenance.config_hash({key: value for key, value in told.items() if key not in _NOT_THE_EXPERIMENT})


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


def _write_table(path: Path, table: pa.Table) -> None:
    pq.write_table(table, path)
    _sync(path)  # run.json must not reach the disk before what it vouches for


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _plain(value: Any) -> Any:
    """`value` in JSON's types; an infinite or missing number is spelt as in YAML (".inf")."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, enum.Enum):
        return value.name
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, np.generic | np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return ".nan" if math.isnan(value) else ".inf" if value > 0 else "-.inf"
    return value


# ---------------------------------------------------------------------------------------------------------- reading

_ABSENT = object()


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
