"""What the commands do: one run (`execute`), one capacity search (`search`), Table 1 (`evaluate_lengths`).

`do` does what the key `command` of a config names, so that run.py makes every experiment of conf/experiment.
"""

from __future__ import annotations

import hashlib
import inspect
import os
import resource
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, fields, is_dataclass, replace
from datetime import UTC, datetime
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
from joblib import Parallel, delayed
from numpy.typing import NDArray
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from block.backends.simulated import Simulated
from block.core import jit as compiled
from block.core.choices import choose
from block.core.types import Request
from block.dispatch.policies import Needs
from block.dispatch.policy_checks import own_code
from block.engine.batch import EngineSpec, warm_up
from block.engine.predictor import Predictor
from block.lengths.estimation import evaluate
from block.run import effects
from block.run.capacity import crossings
from block.run.config import RunConfig, build, node, plain
from block.run.config_errors import ConfigError, explain
from block.run.console import announce, progress, report, report_line, report_scores, tell
from block.run.hydra_schema import filed, own_choices
from block.run.replay import Outcome, made_of, serve
from block.run.sweep import end_with, searching, standing, varies
from block.store import provenance, searches
from block.store.results import NotStored, Run, json_value, keep_json, probe, reason
from block.store.searches import Search
from block.store.summary import interval, summarise
from block.store.tables import request_columns
from block.store.wandb import log_run
from block.store.writer import RunWriter
from block.workload import spec as workload


def do(
    config: DictConfig, choices: Mapping[str, str], *, sweep: DictConfig | None = None
) -> float | list[float] | None:
    """What `config.command`, a name of COMMANDS, stands for. ConfigError if it is none. sweep: as of `execute`.

    Returns what `config.objective` names of a run's summary, a number or a list; None where there is no run.
    """
    if config.command not in COMMANDS:
        raise ConfigError(f"command={config.command}: {choose(str(config.command), list(COMMANDS))}")
    wanted = config.objective
    names = list(wanted or []) if isinstance(wanted, Sequence | None) and not isinstance(wanted, str) else [wanted]
    known = [*summarise(request_columns([])), "instance_seconds"]
    for name in names:
        if name not in known:
            raise ConfigError(f"objective={name}: {choose(str(name), known)}")
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
    requests, facts = _made(run)
    try:
        probe(Path(config.runs_dir))
    except OSError as error:
        raise ConfigError(f"runs_dir={config.runs_dir}: {reason(error)}") from error
    console = Console(stderr=True, quiet=quiet or sweep is not None)
    testbed = run.testbed
    announce(testbed, run.backend, console)
    first = sweep is None or OmegaConf.select(sweep, "job.num", default=0) == 0
    if first or (sweep is not None and varies(sweep, "workload")):  # the first of a sweep speaks for all that are alike
        tell(facts, Console(stderr=True, quiet=quiet))
    compiling = compiled.seconds()
    compile_ahead(run)
    warm_up_s = compiled.seconds() - compiling
    hashes = fingerprints(run, requests)
    _forget_peak()
    origin = provenance.origin([*_own_files(run), *own_choices()])
    told = {"workload": asdict(facts)}
    writer = RunWriter(
        plain(config), filed(config, choices), hashes=hashes, git=origin, facts=told, root=config.runs_dir
    )
    trouble = None
    try:
        with writer:
            outcome = Outcome(compile_s=warm_up_s)
            try:
                with own_code(), progress(console, "requests", len(requests)) as advance:
                    note = None if run.backend.virtual else writer.note
                    serve(run, requests, outcome, advance, note, writer.path / "instances")
            finally:  # a run that fails or is interrupted keeps what it has finished
                _store(writer, outcome)
    except NotStored as error:  # which is told after the result
        trouble = error
    wandb = log_run(writer.path, run.tracking) if trouble is None else None
    stored = writer.run
    if sweep is not None and not quiet:
        report_line(stored, standing(sweep), Console())
    elif not quiet:
        report(stored, wandb, Console())
    if trouble is not None:
        raise trouble
    return stored


def compile_ahead(run: RunConfig) -> None:
    """Load the compiled code of a run, or compile it. Of processes that do so at once, one compiles it all."""
    alike = run.testbed.kinds[0]
    latency = run.backend.latency(alike)
    with compiled.one_at_a_time():
        if run.policy.needs is Needs.FORECAST:
            Predictor(alike.settings, latency).warm_up()
        if isinstance(run.backend, Simulated):
            warm_up(EngineSpec(alike.settings, latency))


def _made(run: RunConfig) -> tuple[list[Request], workload.Facts]:
    """The run's requests, and what was done to them. ConfigError if there is no such trace or estimator, or it is not
    sound.
    """
    try:
        with own_code():
            return made_of(run)
    except (ValueError, OSError) as error:
        raise ConfigError(explain(error)) from error


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
        ejections=history.ejections,
        counterfactuals=outcome.counterfactuals.columns() if outcome.counterfactuals else None,
        changes=() if outcome.scaler is None else outcome.scaler.changes,
        instance_seconds=None if outcome.scaler is None else outcome.scaler.instance_seconds(outcome.ended_at),
    )


def fingerprints(run: RunConfig, requests: Sequence[Request] | None = None) -> dict[str, str]:
    """Hashes of what a run's results depend on beside its config, by name: the code and what computes with it, the
    engines and their step times, its requests' lengths, their arrivals, and what is believed of their lengths. Each
    module of the user's, and each file that an object of the user's names, has one of its own.

    They are the same at every request rate, and for every scheduler of this package.
    """
    requests = _made(run)[0] if requests is None else requests
    at_any_rate = run.workload if run.workload.qps is None else replace(run.workload, qps=1.0)
    arrivals = requests if at_any_rate == run.workload else workload.generate(at_any_rate, run.seed)
    backend, kinds = run.backend, run.testbed.kinds
    latency = [backend.latency(kind).pack() for kind in kinds]
    if isinstance(backend, Simulated) and backend.predictor_gpu is not None:  # what the engines are, beside that
        latency += [replace(backend, predictor_gpu=None).latency(kind).pack() for kind in kinds]
    engines = [type(backend).__name__, asdict(run.testbed.engine)]
    blocks = [[kind.instances, kind.total_blocks] for kind in kinds]
    lengths = np.array([_column(requests, field, np.int64) for field in ("prompt_tokens", "output_tokens")])
    texts = [request.prompt for request in requests if request.prompt is not None]
    hashes = {
        "code": provenance.code_hash(),
        "libraries": provenance.config_hash(provenance.libraries(*(() if backend.virtual else ("torch", "vllm")))),
        "engines": provenance.config_hash(json_value([engines, blocks])),
        "latency_model": _hash(np.concatenate(latency)),
        "data_set": _hash(lengths, *texts),
        "arrivals": _hash(_column(arrivals, "arrival", np.float64)),
        "estimates": _hash(_column(requests, "predicted_output_tokens", np.int64)),
    }
    sources = {name: provenance.source_hash(path) for name, path in own_modules(run).items()} | _loose_classes(run)
    return hashes | sources | {str(path): provenance.file_hash(path)[:16] for path in _named_files(run)}


def _column(requests: Sequence[Request], field: str, kind: type[np.generic]) -> NDArray[Any]:
    return np.fromiter(map(attrgetter(field), requests), kind, len(requests))


def _hash(array: NDArray[Any], *texts: str) -> str:
    digest = hashlib.sha256(np.ascontiguousarray(array).tobytes())
    for text in texts:
        digest.update(f"{len(text)} {text}".encode("utf-8", "replace"))
    return digest.hexdigest()[:16]


def own_modules(run: RunConfig) -> dict[str, Path]:
    """The modules of the user's that the run's objects are of, and those that these import, by name."""
    found: dict[str, Path] = {}
    for name in {type(part).__module__ for part in _parts(run)}:
        found |= {} if _is_ours(name) else provenance.own_modules(name)
    return dict(sorted(found.items()))


def _loose_classes(run: RunConfig) -> dict[str, str]:
    """Hashes of the user's classes that no file holds, as in a notebook; what nothing tells is never the same again."""
    found = {}
    for cls in {type(part) for part in _parts(run) if not _is_ours(type(part).__module__)}:
        if cls.__module__ not in provenance.own_modules(cls.__module__):
            try:
                text = inspect.getsource(cls)
            except (OSError, TypeError):
                text = secrets.token_hex()
            found[f"{cls.__module__}.{cls.__qualname__}"] = hashlib.sha256(text.encode()).hexdigest()[:16]
    return dict(sorted(found.items()))


def _named_files(run: RunConfig) -> list[Path]:
    """The files, and those in the folders, that the fields of objects of the user's classes name."""
    named = [Path(value) for part in _parts(run) if not _is_ours(type(part).__module__) for value in _texts(part)]
    found = {file for path in named for file in ([path] if path.is_file() else path.rglob("*")) if file.is_file()}
    return sorted(found)


def _own_files(run: RunConfig) -> list[Path]:
    """What the user has written of the run's objects and might have committed: modules and data sheets."""
    sheets = [Path(value) for part in _parts(run) for value in _texts(part) if value.endswith(".yaml")]
    modules = filter(provenance.is_own, own_modules(run).values())
    return [*modules, *(path for path in sheets if path.is_file())]


def _is_ours(module: str) -> bool:
    return module.partition(".")[0] == "block"


def _parts(value: Any) -> Iterator[Any]:
    """The dataclasses that a value is made of, itself among them."""
    if is_dataclass(value):
        yield value
        for field in fields(value):
            yield from _parts(getattr(value, field.name, None))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _parts(item)


def _texts(part: Any) -> Iterator[str]:
    """The strings among a dataclass's fields, except names of nothing."""
    values = (getattr(part, field.name, None) for field in fields(part))
    return (value for value in values if isinstance(value, str) and value)


def search(config: DictConfig, choices: Mapping[str, str]) -> dict[str, Any]:
    """Find the capacity of what `config` describes (its node `capacity`) and print it; returns, for each objective, the
    mean capacity_qps, its half_width_qps and those by_seed (NaN where the latency crosses it nowhere, and then the mean
    is None).

    Several seeds run in parallel, one process each. ConfigError if the configuration is wrong; NotStored, after
    printing, if a search could not be stored where it belongs.
    """
    wanted = node(config.capacity)
    run = build(config)  # tell what is wrong before any process starts
    effects.refuse(config, "capacity", run)
    if run.workload.source == "trace":
        tell(_made(run)[1], Console(stderr=True), searched=True)
    choices = filed(config, choices)
    seeds = range(config.seed, config.seed + wanted.seeds)
    console = Console()
    found = []
    files = own_choices()  # which only this process knows
    jobs = (delayed(_search)(config, choices, files, seed, os.getpid()) for seed in seeds)
    with progress(Console(stderr=True), "seeds", len(seeds)) as advance:
        alone = len(seeds) == 1  # and needs no process of its own, which takes two seconds to start
        for one in Parallel(n_jobs=1 if alone else -1, return_as="generator")(jobs):
            found.append(one)
            advance(1)
    objectives = {}
    for slo in wanted.slo_s:
        rates = [one.capacity(slo) for one in found]
        gaps = [why for one in found if (why := one.gap(slo)) is not None]
        mean, half = (None, None) if gaps else interval(rates)
        objectives[f"{slo:g}"] = {"capacity_qps": mean, "half_width_qps": half, "by_seed": rates}
        what = f"{choices['scheduler']} on {choices['model']}"
        how = f"{wanted.metric} ≤ {slo:g} s"
        if mean is None:
            said = f"no capacity at {how}: {gaps[0]} ({len(gaps)} of {len(found)} seeds)"
        else:
            spread = "" if half is None else f" ± {half:.2f}"
            each = ", ".join(f"{rate:.2f}" for rate in rates)
            said = f"{mean:.2f}{spread} requests/s at {how} (95 % interval; by seed: {each})"
        console.print(f"{what}: {said}", highlight=False, soft_wrap=True)
    for one in found:
        stored = f" stored {one.created}, --fresh searches anew" if one.again else ""
        console.print(f"[dim]{one.path}{stored}[/dim]", highlight=False, soft_wrap=True)
    if troubles := [str(one.trouble) for one in found if one.trouble is not None]:
        raise NotStored("; ".join(dict.fromkeys(troubles)))
    return objectives


def _search(config: DictConfig, choices: Mapping[str, str], files: Sequence[Path], seed: int, main: int) -> Search:
    end_with(main)
    seeded = config.copy()
    seeded.seed = seed
    return search_one(seeded, choices, files)


def search_one(config: DictConfig, choices: Mapping[str, str], files: Sequence[Path] = ()) -> Search:
    """The search that `config` describes for its own seed: the stored one, or a new one, which is stored.

    files: those of the user's that `config` was composed of.

    All is built anew for each rate that is tried, as for a run. ConfigError if the configuration is wrong.
    """
    run = build(config)
    wanted = node(config.capacity)
    settings, hashes = plain(config), fingerprints(run)
    if not wanted.fresh and (stored := searches.find(settings, hashes)) is not None:
        return stored
    try:
        probe(searches.DEFAULT_ROOT)
    except OSError as error:
        raise ConfigError(f"{searches.DEFAULT_ROOT}: {reason(error)}") from error

    def latency(qps: float) -> float:
        settings = config.copy()
        settings.workload.qps = qps
        at_rate = build(settings)
        outcome = Outcome()
        with own_code():
            serve(at_rate, _made(at_rate)[0], outcome)
        assert outcome.history is not None
        value = summarise(request_columns(outcome.history.records)).get(wanted.metric)
        if value is None:
            raise ConfigError(f"capacity.metric={wanted.metric}: a run's summary has no such number")
        return float(value)

    found = crossings(latency, wanted)
    document = {
        "created": datetime.now(UTC).isoformat(),
        "choices": {key: value for key, value in filed(config, choices).items() if not key.startswith("hydra/")},
        "config": settings,
        "hashes": hashes,
        "git": provenance.origin([*_own_files(run), *files]),
        "capacities_qps": {
            f"{slo:g}": None if slo in found.reasons else rate
            for slo, rate in zip(wanted.slo_s, found.rates, strict=True)
        },
        "gaps": {f"{slo:g}": why for slo, why in found.reasons.items()},
        "points": found.points,
    }
    return searches.store(document)


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
        probe(path.parent)
    except OSError as error:
        raise ConfigError(f"estimation.scores={path}: {reason(error)}") from error
    rows = evaluate(wanted)
    measured = [row for row in rows if "missing" not in row]
    if not measured:
        raise ConfigError("; ".join(dict.fromkeys(row["missing"] for row in rows)))
    missing = [[row["data"], row["estimator"]] for row in rows if "missing" in row]
    document = {"config": plain(config.estimation), "rows": measured, "missing": missing}
    where, trouble = keep_json(f"estimation.scores={path}", path, document)
    report_scores(rows, where, Console())
    if trouble is not None:
        raise trouble
    return rows


COMMANDS: Mapping[str, Callable[..., Any]] = {"serve": execute, "evaluate_lengths": evaluate_lengths}
"""What `do` does by the name that a config's key `command` gives."""
