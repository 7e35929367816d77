"""What the commands do: one run (`execute`), one capacity search (`search`)."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from joblib import Parallel, delayed
from numpy.typing import NDArray
from omegaconf import DictConfig
from rich.console import Console

from block import provenance
from block.capacity import Point, crossings, interval
from block.config import ConfigError, build, explain, node, plain
from block.console import announce, progress, report, report_line
from block.metrics import summarise
from block.policies import Needs
from block.predictor import Predictor
from block.results import Run, RunWriter, read_run, write_json
from block.serving import Outcome, requests_of, serve
from block.sweep import end_with, standing
from block.tables import request_columns
from block.tracking import log_run
from block.types import Request


def execute(
    config: DictConfig, choices: Mapping[str, str], *, sweep: DictConfig | None = None, quiet: bool = False
) -> Run:
    """Build, serve, store, mirror to W&B and report the run that `config` describes. ConfigError if it is wrong.

    sweep: the Hydra config of the sweep that the run is a job of; such a run says one line only. quiet: say nothing.
    """
    run = build(config)
    try:
        requests = requests_of(run)
    except (ValueError, OSError) as error:
        raise ConfigError(explain(error)) from error
    try:
        Path(config.runs_dir).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"runs_dir={config.runs_dir}: {error.strerror}") from error
    console = Console(stderr=True, quiet=quiet or sweep is not None)
    testbed = run.testbed
    latency = run.backend.latency(testbed)
    announce(testbed, run.backend, latency, console)
    if run.scheduler.needs is Needs.FORECAST:
        Predictor(testbed.engine, latency, testbed.total_blocks).warm_up()
    hashes = {"latency_model": _hash(latency.pack()), "data_set": _hash(_lengths(requests))}
    with RunWriter(plain(config), choices, hashes=hashes, root=config.runs_dir) as writer:
        outcome = Outcome()
        try:
            with progress(console, "requests", len(requests)) as advance:
                note = None if run.backend.virtual else writer.note
                serve(run, requests, outcome, advance, note, writer.path / "instances")
        finally:  # a run that fails or is interrupted keeps what it has finished
            _store(writer, outcome)
    wandb = log_run(writer.path, run.tracking)
    stored = read_run(writer.path)
    assert stored is not None
    if quiet:
        return stored
    if sweep is not None:
        report_line(stored, standing(sweep), Console())
    else:
        report(stored, wandb, Console())
    return stored


def _store(writer: RunWriter, outcome: Outcome) -> None:
    dispatcher, monitor = outcome.dispatcher, outcome.monitor
    if dispatcher is None or monitor is None:
        return
    records = sorted(dispatcher.records, key=lambda record: record.request.id)
    overheads = [record.dispatched - record.request.arrival for record in records if record.status == "ok"]
    writer.store(
        records,
        dispatcher.decisions,
        monitor.columns(),
        dispatch_overhead_s=np.array(overheads),
        forecast_us=np.array(dispatcher.forecast_s) * 1e6,
        wall_time_s=outcome.wall_time_s,
        engines=outcome.engines,
        ejections=dispatcher.ejections,
    )


def _lengths(requests: Sequence[Request]) -> NDArray[np.int64]:
    return np.array([(request.prompt_tokens, request.output_tokens) for request in requests], dtype=np.int64)


def _hash(array: NDArray[Any]) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()[:16]


def search(config: DictConfig, choices: Mapping[str, str]) -> dict[str, Any]:
    """Find the capacity of what `config` describes (its node `capacity`), print it and write it; returns what it wrote.

    Seeds run in parallel, one process each. ConfigError if the configuration is wrong.
    """
    wanted = node(config.capacity)
    build(config)  # tell what is wrong before any process starts
    seeds = range(config.seed, config.seed + wanted.seeds)
    console = Console()
    found = []
    jobs = (delayed(_capacity)(config, seed, os.getpid()) for seed in seeds)
    with progress(Console(stderr=True), "seeds", len(seeds)) as advance:
        for one in Parallel(n_jobs=-1, return_as="generator")(jobs):
            found.append(one)
            advance(1)
    objectives = {}
    for i, slo in enumerate(wanted.slo_s):
        rates = [capacities[i] for capacities, _ in found]
        mean, half = interval(rates)
        objectives[f"{slo:g}"] = {"capacity_qps": mean, "half_width_qps": half, "by_seed": rates}
        spread = "" if half is None else f" ± {half:.2f}"
        each = ", ".join(f"{rate:.2f}" for rate in rates)
        what = f"{choices['scheduler']} on {choices['model']}"
        how = f"{wanted.metric} ≤ {slo:g} s (95 % interval; by seed: {each})"
        console.print(f"{what}: {mean:.2f}{spread} requests/s at {how}", highlight=False, soft_wrap=True)
    settings = plain(config)
    document = {
        "choices": {key: value for key, value in choices.items() if not key.startswith("hydra/")},
        "config": settings,
        "config_hash": provenance.config_hash(settings),
        "git": provenance.git(),
        "objectives_s": objectives,
        "points": {str(seed): points for seed, (_, points) in zip(seeds, found, strict=True)},
    }
    path = Path("artifacts/capacity") / f"{document['config_hash']}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, document)
    console.print(f"[dim]{path}[/dim]", highlight=False, soft_wrap=True)
    return document


def _capacity(config: DictConfig, seed: int, main: int) -> tuple[list[float], list[Point]]:
    """The capacities for one seed. A process of its own: it compiles, or loads what is compiled, and runs."""
    end_with(main)
    run = replace(build(config), seed=seed)
    wanted = node(config.capacity)

    def latency(qps: float) -> float:
        at_rate = replace(run, workload=replace(run.workload, qps=qps))
        outcome = Outcome()
        serve(at_rate, requests_of(at_rate), outcome)
        assert outcome.dispatcher is not None
        value = summarise(request_columns(outcome.dispatcher.records)).get(wanted.metric)
        if value is None:
            raise ConfigError(f"capacity.metric={wanted.metric}: a run's summary has no such number")
        return float(value)

    try:
        return crossings(latency, wanted)
    except ValueError as error:
        raise ConfigError(str(error)) from error
