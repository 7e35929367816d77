"""Writing runs: the folder of a run, complete once it holds run.json (`block.results` says what lies there)."""

from __future__ import annotations

import json
import logging
import secrets
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, TextIO

import numpy as np
from numpy.typing import ArrayLike

from block import metrics, provenance, tables
from block.results import (
    DEFAULT_ROOT,
    SCHEMA_VERSION,
    Run,
    experiment_hash,
    json_value,
    read_run,
    write_json,
    write_table,
)
from block.types import Decision, Forecast, Request, RequestRecord

STARTED, FINISHED = "started.json", "finished.jsonl"  # of a run on real servers, until it ends

log = logging.getLogger(__name__)
_package_log = logging.getLogger("block")


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
        git: Mapping[str, Any] | None = None,
        root: str | Path = DEFAULT_ROOT,
    ) -> None:
        created = datetime.now(UTC)
        self.id = f"{created:%Y%m%d-%H%M%S}-{secrets.token_hex(4)}"
        self.path = Path(root) / self.id
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
        write_table(self.path / "requests.parquet", tables.requests_table(columns))
        tokens = tables.tokens_table(records)
        if tokens is not None:
            write_table(self.path / "tokens.parquet", tokens)
        write_table(self.path / "decisions.parquet", tables.decisions_table(decisions))
        write_table(self.path / "instances.parquet", tables.series_table(instances))
        if counterfactuals is not None:
            write_table(self.path / "counterfactuals.parquet", tables.series_table(counterfactuals))
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
        self._document["changes"] = json_value(list(changes))
        self._document["engines"] = json_value(engines or {})
        self._document["ejections"] = json_value(list(ejections))
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
