"""What the commands of run.py do: one run (`execute`), Table 1 (`evaluate_lengths`).

`do` does what the key `command` of a config names, so that run.py makes every experiment of conf/experiment.
"""

from __future__ import annotations

import resource
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from block.backends.simulated import Simulated
from block.core import jit
from block.core.choices import did_you_mean
from block.core.files import NotStored, check_writable, reason, write_json_or_divert
from block.core.user_code import user_errors
from block.dispatch.policies import Needs
from block.engine.batch import EngineSpec, warm_up
from block.engine.predictor import Predictor
from block.lengths.estimation import evaluate
from block.run import effects
from block.run.config import RunConfig, build, node, plain
from block.run.config_errors import ConfigError
from block.run.console import announce, progress, report, report_line, report_scores, tell
from block.run.fingerprints import fingerprints, own_files
from block.run.hydra_schema import filed_choices, own_choices
from block.run.replay import Outcome, replay, requests_of
from block.run.sweep import job_label, searching, varies
from block.store import provenance
from block.store.results import Run
from block.store.summary import summarise
from block.store.tables import request_columns
from block.store.wandb import log_run
from block.store.writer import RunWriter


def run_command(
    config: DictConfig, choices: Mapping[str, str], *, sweep: DictConfig | None = None
) -> float | list[float] | None:
    """What `config.command`, a name of COMMANDS, stands for. ConfigError if it is none. sweep: as of `execute`.

    Returns what `config.objective` names of a run's summary, a number or a list; None where there is no run.
    """
    if config.command not in COMMANDS:
        raise ConfigError(f"command={config.command}: {did_you_mean(str(config.command), list(COMMANDS))}")
    wanted = config.objective
    names = list(wanted or []) if isinstance(wanted, Sequence | None) and not isinstance(wanted, str) else [wanted]
    known = [*summarise(request_columns([])), "instance_seconds"]
    for name in names:
        if name not in known:
            raise ConfigError(f"objective={name}: {did_you_mean(str(name), known)}")
    made = COMMANDS[config.command](config, choices, sweep=sweep)
    if not isinstance(made, Run) or not names:
        return None
    values = [made.summary.get(name) for name in names]
    if None in values and sweep is not None and searching(sweep):
        raise ConfigError(f"objective={names[values.index(None)]}: this run has no such number: {made.path}")
    return values[0] if isinstance(wanted, str) else values  # type: ignore[return-value]


def execute(
    config: DictConfig, choices: Mapping[str, str], *, sweep: DictConfig | None = None, quiet: bool = False
) -> Run:
    """Build, serve, store, mirror to W&B and report the run that `config` describes. ConfigError if it is wrong.

    NotStored, after reporting, if it could not be stored where it belongs. sweep: the Hydra config of the sweep that
    the run is a job of; such a run says one line only. quiet: say nothing.
    """
    run = build(config)
    effects.refuse(config, "serve", run)
    requests, facts = requests_of(run)
    try:
        check_writable(Path(config.runs_dir))
    except OSError as error:
        raise ConfigError(f"runs_dir={config.runs_dir}: {reason(error)}") from error
    console = Console(stderr=True, quiet=quiet or sweep is not None)
    testbed = run.testbed
    announce(testbed, run.backend, console)
    first = sweep is None or OmegaConf.select(sweep, "job.num", default=0) == 0
    if first or (sweep is not None and varies(sweep, "workload")):  # the first of a sweep speaks for all that are alike
        tell(facts, Console(stderr=True, quiet=quiet))
    compiling = jit.seconds()
    compile_ahead(run)
    warm_up_s = jit.seconds() - compiling
    hashes = fingerprints(run, requests)
    _forget_peak()
    origin = provenance.origin([*own_files(run), *own_choices()])
    told = {"workload": asdict(facts)}
    writer = RunWriter(
        plain(config), filed_choices(config, choices), hashes=hashes, git=origin, facts=told, root=config.runs_dir
    )
    trouble = None
    try:
        with writer:
            outcome = Outcome(compile_s=warm_up_s)
            try:
                with user_errors(), progress(console, "requests", len(requests)) as advance:
                    note = None if run.backend.virtual else writer.note
                    replay(run, requests, outcome, advance, note, writer.path / "instances")
            finally:  # a run that fails or is interrupted keeps what it has finished
                _store(writer, outcome)
    except NotStored as error:  # which is told after the result
        trouble = error
    wandb = log_run(writer.path, run.tracking) if trouble is None else None
    stored = writer.run
    if sweep is not None and not quiet:
        report_line(stored, job_label(sweep), Console())
    elif not quiet:
        report(stored, wandb, Console())
    if trouble is not None:
        raise trouble
    return stored


def compile_ahead(run: RunConfig) -> None:
    """Load the compiled code of a run, or compile it. Of processes that do so at once, one compiles it all."""
    alike = run.testbed.kinds[0]
    latency = run.backend.latency(alike)
    with jit.one_at_a_time():
        if run.policy.needs is Needs.FORECAST:
            Predictor(alike.settings, latency).warm_up()
        if isinstance(run.backend, Simulated):
            warm_up(EngineSpec(alike.settings, latency))


def _forget_peak() -> None:
    """Let the peak of memory be that of what comes, not that of larger runs before it in this process. Linux only."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _peak_mib() -> float:
    """The most memory that this process has held, on Linux since `_forget_peak`."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024
    except (OSError, StopIteration):  # the other counter is at least what the parent held when it started this process
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _store(writer: RunWriter, outcome: Outcome) -> None:
    history, monitor = outcome.history, outcome.monitor
    if history is None or monitor is None:
        return
    records = sorted(history.records, key=lambda record: record.request.id)
    overheads = [record.dispatched - record.request.arrival for record in records if record.status == "ok"]
    writer.store(
        records,
        history.decisions,
        monitor.columns(),
        dispatch_overhead_s=np.array(overheads),
        forecast_us=np.array(history.forecast_s) * 1e6,
        wall_time_s=outcome.wall_time_s,
        compile_s=outcome.compile_s,
        peak_memory_mib=_peak_mib(),
        engines=outcome.engines,
        snapshots=outcome.snapshots,
        ejections=history.ejections,
        readmissions=history.readmissions,
        counterfactuals=outcome.counterfactuals.columns() if outcome.counterfactuals else None,
        changes=() if outcome.scaler is None else outcome.scaler.changes,
        instance_seconds=None if outcome.scaler is None else outcome.scaler.instance_seconds(outcome.ended_at),
    )


def evaluate_lengths(
    config: DictConfig, choices: Mapping[str, str], *, sweep: DictConfig | None = None
) -> list[dict[str, Any]]:
    """Measure, print and write to `estimation.scores` what the node `estimation` of `config` asks for; returns the rows
    of `evaluate`. ConfigError if it is wrong, or nothing of it can be measured; NotStored, after printing, if it could
    not be written there.
    """
    wanted = node(config.estimation)
    effects.refuse(config, "evaluate_lengths")
    path = Path(wanted.scores)
    try:
        check_writable(path.parent)
    except OSError as error:
        raise ConfigError(f"estimation.scores={path}: {reason(error)}") from error
    rows = evaluate(wanted)
    measured = [row for row in rows if "missing" not in row]
    if not measured:
        raise ConfigError("; ".join(dict.fromkeys(row["missing"] for row in rows)))
    missing = [[row["data"], row["estimator"]] for row in rows if "missing" in row]
    document = {"config": plain(config.estimation), "rows": measured, "missing": missing}
    where, trouble = write_json_or_divert(f"estimation.scores={path}", path, document)
    report_scores(rows, where, Console())
    if trouble is not None:
        raise trouble
    return rows


COMMANDS: Mapping[str, Callable[..., Any]] = {"serve": execute, "evaluate_lengths": evaluate_lengths}
"""What `do` does by the name that a config's key `command` gives."""
