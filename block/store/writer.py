"""Writing runs: the folder of a run, complete once it holds run.json (`block.store.results` says what lies there)."""

from __future__ import annotations

import json
import logging
import secrets
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, TextIO

import numpy as np
import pyarrow as pa
from numpy.typing import ArrayLike

from block.core.files import NotStored, diverted, json_value, reason, write_json
from block.core.types import Decision, Forecast, Request, RequestRecord
from block.store import provenance, tables
from block.store.results import DEFAULT_ROOT, SCHEMA_VERSION, Run, experiment_hash, read_run, write_table
from block.store.summary import Summary, summarise

STARTED, FINISHED = "started.json", "finished.jsonl"  # of a run on real servers, until it ends

log = logging.getLogger(__name__)
_package_log = logging.getLogger("block")


class RunWriter:
    """Creates the folder of a run and, on leaving the context, completes it with run.json.

        with RunWriter(config, choices, hashes={"latency_model": …, "data_set": …}) as writer:
            outcome = …
            writer.store(outcome.records, outcome.decisions, outcome.instances, wall_time_s=…)

    What cannot be written there, as the disk is full, say, is written into the temporary folder; `path` is where it is,
    and NotStored, raised on leaving the context, says so. `run` has it all in any case.

    The run's status is "ok" after `store`, "interrupted" after KeyboardInterrupt, SystemExit or a cancelled task, and
    "failed" after any other exception, which propagates. Leaving without `store` and without an exception raises
    RuntimeError. Within the context, warnings of all packages and what this one logs at level INFO go to run.log too.

    `config` is the resolved config in plain containers; `choices` names what was chosen of each config group; `facts`
    are further nodes of run.json.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        choices: Mapping[str, Any] | None = None,
        *,
        hashes: Mapping[str, str | None] | None = None,
        git: Mapping[str, Any] | None = None,
        facts: Mapping[str, Any] | None = None,
        root: str | Path = DEFAULT_ROOT,
    ) -> None:
        created = datetime.now(UTC)
        self.id = f"{created:%Y%m%d-%H%M%S}-{secrets.token_hex(4)}"
        self._root = Path(root)
        self.path = self._root / self.id
        config = json_value(config)
        self._document: dict[str, Any] = {
            "schema_version": SCHEMA_VERSION,
            "id": self.id,
            "created": created.isoformat(),
            "status": "interrupted",
            "error": None,
            "choices": {k: v for k, v in json_value(choices or {}).items() if not k.startswith("hydra/")},
            "config": config,
            "config_hash": experiment_hash(config),
            "hashes": dict(hashes or {}),
            "git": git or provenance.git(),
            "hardware": provenance.hardware(),
            "packages": provenance.packages(),
            "counts": None,
            "summary": {},
            **json_value(facts or {}),
        }
        self._notes: TextIO | None = None
        self._takes_notes = True
        self._tables: dict[str, pa.Table] = {}
        self._trouble: OSError | None = None  # of the first table that could not be written

    def __enter__(self) -> Self:
        self.path.mkdir(parents=True)
        self._handler = _RunLog(self.path / "run.log", encoding="utf-8")
        self._handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        logging.getLogger().addHandler(self._handler)
        self._level = _package_log.level
        _package_log.setLevel(self._level or logging.INFO)
        log.info("run %s begins, config %s", self.id, self._document["config_hash"])
        return self

    def note(self, record: RequestRecord) -> None:
        """Keep the record of a finished request for the case that this process is killed."""
        if not self._takes_notes:
            return
        try:
            if self._notes is None:
                write_json(self.path / STARTED, self._document)
                self._notes = (self.path / FINISHED).open("a", encoding="utf-8")
            request = replace(record.request, content=None, block_hashes=None)  # which no table has
            self._notes.write(json.dumps(asdict(replace(record, request=request)), default=int) + "\n")
            self._notes.flush()
        except OSError as error:  # no reason to stop
            self._takes_notes = False
            log.warning("%s: %s; if this run is killed, what it has finished is lost", self.path, reason(error))

    @property
    def run(self) -> Run:
        """The run, of which the tables can be read if they are stored."""
        return Run(self.path, self._document)

    @property
    def summary(self) -> Summary:
        """The summary metrics; empty before `store`."""
        return dict(self._document["summary"])

    @property
    def counts(self) -> dict[str, int | None] | None:
        """Requests sent, ok, failed, fallback, preempted and failed over (at least once); None before `store`. Where it
        is not known of a request that is ok whether it was preempted, `preempted` is None.
        """
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
        compile_s: float | None = None,
        peak_memory_mib: float | None = None,
        engines: Mapping[str, Any] | None = None,
        ejections: Iterable[tuple[float, int, str]] = (),
        readmissions: Iterable[tuple[float, int]] = (),
        counterfactuals: Mapping[str, ArrayLike] | None = None,
        changes: Sequence[tuple[float, int, str, str]] = (),
        instance_seconds: float | None = None,
        snapshots: Sequence[Mapping[str, Any]] = (),
    ) -> Summary:
        """Write the tables, and return the summary that goes into run.json (see `block.store.summary.summarise`).

        `decisions` are (time, decision, request id); `instances` maps a column's name to an array, all of one length.
        counterfactuals: columns of a table, like `instances`.
        engines: what real engines said of themselves. ejections: (time, instance id, reason) of those lost;
        readmissions: (time, instance id) of those that were back.
        changes: (time, instance id, change, reason) of those that joined or left; instance_seconds: what all have cost.
        snapshots: how those of each real engine came, and how old they were.
        Raises ValueError if the records contradict themselves.
        """
        columns = tables.request_columns(records)
        self._write("requests", tables.requests_table(columns))
        tokens = tables.tokens_table(records)
        if tokens is not None:
            self._write("tokens", tokens)
        self._write("decisions", tables.decisions_table(decisions))
        self._write("instances", tables.series_table(instances))
        if counterfactuals is not None:
            self._write("counterfactuals", tables.series_table(counterfactuals))
        ok = int(np.count_nonzero(columns["status"] == "ok"))
        self._document["summary"] = summarise(
            columns,
            dispatch_overhead_s=dispatch_overhead_s,
            forecast_us=forecast_us,
            wall_time_s=wall_time_s,
            compile_s=compile_s,
            peak_memory_mib=peak_memory_mib,
        )
        self._document["counts"] = {
            "sent": len(records),
            "ok": ok,
            "failed": len(records) - ok,
            "fallback": sum(decision.fallback is not None for _, decision, _ in decisions),
            "preempted": None if self.summary["preemptions"] is None else int((columns["preemptions"] > 0).sum()),
            "failed_over": int(np.count_nonzero(columns["retries"])),
        }
        if instance_seconds is not None:
            self._document["summary"]["instance_seconds"] = instance_seconds
        self._document["changes"] = json_value(list(changes))
        self._document["engines"] = json_value(engines or {})
        self._document["snapshots"] = json_value(list(snapshots))
        self._document["ejections"] = json_value(list(ejections))
        self._document["readmissions"] = json_value(list(readmissions))
        self._document["status"] = "ok"
        known = (f"{count} {name}" for name, count in self._document["counts"].items() if count is not None)
        log.info("stored %s", ", ".join(known))
        return self.summary

    def _write(self, name: str, table: pa.Table) -> None:
        """Write a table, or keep it until the run ends if that cannot be."""
        self._tables[f"{name}.parquet"] = table
        try:
            if self._trouble is None:
                write_table(self.path / f"{name}.parquet", table)
        except OSError as error:
            self._trouble = error

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
            if self._trouble is not None:
                raise self._trouble
            write_json(self.path / "run.json", self._document)
        except OSError as trouble:
            told = self._elsewhere(trouble)
            if error is None:
                raise told from trouble
            log.warning("%s", told)
            return False
        self._forget_notes()
        return False

    def _elsewhere(self, trouble: OSError) -> NotStored:
        """Store the run in the temporary folder; returns what is to be told."""
        key, own = f"runs_dir={self._root}: {reason(trouble)}", self.path
        try:
            self.path = diverted(self.id)
            self.path.mkdir()
            with suppress(OSError):
                shutil.copy(own / "run.log", self.path)
            for name, table in self._tables.items():
                write_table(self.path / name, table)
            write_json(self.path / "run.json", self._document)
        except OSError as again:
            shutil.rmtree(self.path, ignore_errors=True)
            self.path = own
            told = NotStored(f"{key}; nor is the run stored elsewhere: {reason(again)}")
            with suppress(OSError):  # that it was there
                failed = {"status": "failed", "error": f"NotStored: {told}"}
                write_json(own / "run.json", {**self._document, **failed})
            return told
        self._forget_notes()
        if not (own / "instances").exists():  # what servers said is left where it is
            shutil.rmtree(own, ignore_errors=True)
        return NotStored(f"{key}; the run is in {self.path} instead")

    def _forget_notes(self) -> None:
        """They were for the case that there would be no run.json."""
        with suppress(OSError):
            if self._notes is not None:
                self._notes.close()
            for name in (STARTED, FINISHED):
                (self._root / self.id / name).unlink(missing_ok=True)


class _RunLog(logging.FileHandler):
    """A log that ends where the disk does: that is told by what is stored, and not in the midst of a run."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 — logging's name
        """Nothing: logging would print a traceback."""

    def close(self) -> None:
        """As a file is, but what cannot be written any more is lost."""
        with suppress(OSError):
            super().close()


def recover(path: Path) -> Run | None:
    """Complete the folder of a run on real servers that was killed, with what it had finished; None if it is none.

    The run's status is "interrupted"; decisions and time series are lost. OSError if it cannot be written.
    """
    if (path / "run.json").exists() or not (path / STARTED).exists():
        return None
    writer = RunWriter({}, root=path.parent)
    writer.path, writer.id = path, path.name
    writer._document = json.loads((path / STARTED).read_text())
    writer.store(list(_noted(path / FINISHED)), [], {})
    if writer._trouble is not None:
        raise writer._trouble
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
