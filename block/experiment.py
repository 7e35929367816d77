"""One run: build, serve the workload, store, and say what came out."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random as Stream
from typing import Any

import numpy as np
from joblib import Parallel, delayed
from numpy.typing import NDArray
from omegaconf import DictConfig
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from block import clock, provenance, workload
from block.capacity import Point, crossing, interval
from block.cluster import visible_gpus
from block.config import ConfigError, RunConfig, build, explain, node, plain
from block.dispatcher import Dispatcher
from block.latency import LatencyModel
from block.lengths import tag
from block.metrics import summarise
from block.monitor import Monitor
from block.results import Run, RunWriter, read_run, write_json
from block.rng import stream
from block.tables import request_columns
from block.tracking import log_run
from block.types import Request

PROGRESS_EVERY = 100  # requests between two updates of the progress bar
PROGRESS_COLUMNS = (
    TextColumn("{task.description}"),
    BarColumn(),
    MofNCompleteColumn(),
    TimeElapsedColumn(),
    TimeRemainingColumn(),
)


@dataclass
class Outcome:
    """What a run has done so far, in memory; also of one that was interrupted."""

    dispatcher: Dispatcher | None = None
    monitor: Monitor | None = None
    wall_time_s: float = 0.0


def requests_of(run: RunConfig) -> list[Request]:
    """The run's requests, tagged with their predicted lengths."""
    return tag(workload.generate(run.workload, run.seed), run.lengths, run.seed)


def serve(
    run: RunConfig, requests: Sequence[Request], outcome: Outcome, finished: Callable[[int], None] = lambda count: None
) -> None:
    """Replay `requests` on the run's testbed, filling `outcome`; `finished` is told of each batch of finished ones."""
    began = time.perf_counter()
    try:
        clock.run(_serve(run, requests, outcome, finished), virtual=run.backend.virtual)
    finally:
        outcome.wall_time_s = time.perf_counter() - began


async def _serve(
    run: RunConfig, requests: Sequence[Request], outcome: Outcome, finished: Callable[[int], None]
) -> None:
    async with run.backend.start(run.testbed) as fleet:
        policy_stream = Stream(int(stream(run.seed, "policy").integers(2**63)))
        dispatcher = Dispatcher(
            fleet.instances,
            run.scheduler,
            fleet.predictor,
            run.dispatch,
            policy_stream,
            delay_s=run.backend.dispatch_delay_s,
        )
        monitor = Monitor(fleet.instances, run.sample_every_s)
        outcome.dispatcher, outcome.monitor = dispatcher, monitor
        done = 0

        def count(_: asyncio.Task[Any]) -> None:
            nonlocal done
            done += 1
            if done % PROGRESS_EVERY == 0:
                finished(PROGRESS_EVERY)

        async with asyncio.TaskGroup() as group:
            for request in requests:  # open loop: nothing that happens to a request delays the next
                await clock.sleep_until(request.arrival)
                monitor.tick(clock.now(), request.id)
                group.create_task(dispatcher.submit(request)).add_done_callback(count)
        finished(done % PROGRESS_EVERY)


def execute(config: DictConfig, choices: Mapping[str, str], *, quiet: bool = False) -> Run:
    """Build, serve, store, mirror to W&B and report the run that `config` describes. ConfigError if it is wrong.

    quiet: no progress bar and one line at the end, as the jobs of a sweep want it.
    """
    run = build(config)
    console = Console(stderr=True, quiet=quiet)
    testbed = run.testbed
    latency = run.backend.latency(testbed)
    _announce(run, latency, console)
    try:
        requests = requests_of(run)
    except (ValueError, OSError) as error:
        raise ConfigError(explain(error)) from error
    hashes = {"latency_model": _hash(latency.pack()), "data_set": _hash(_lengths(requests))}
    with RunWriter(plain(config), choices, hashes=hashes, root=config.runs_dir) as writer:
        outcome = Outcome()
        try:
            with _progress(console, len(requests)) as advance:
                serve(run, requests, outcome, advance)
        finally:  # a run that fails or is interrupted keeps what it has finished
            _store(writer, outcome)
    wandb = log_run(writer.path, run.tracking)
    stored = read_run(writer.path)
    assert stored is not None
    _report(stored, wandb, Console(), quiet=quiet)
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
    )


def _announce(run: RunConfig, latency: LatencyModel, console: Console) -> None:
    testbed = run.testbed
    if getattr(run.backend, "auto", False):
        gpus = visible_gpus()
        why = f"{gpus or 'no'} GPU{'s' * (gpus != 1)} visible, {testbed.cluster.num_gpus} asked for"
        if gpus >= testbed.cluster.num_gpus:
            why = f"{gpus} GPUs visible, but this version has no backend for real engines yet"
        console.print(f"[dim]{why}: running the simulated testbed[/dim]")
    console.print(
        f"{testbed.instances} × {testbed.model.name} on {testbed.cluster.gpu}, {testbed.total_blocks} KV blocks each, "
        f"step times from {latency.source.get('method', 'a profile')}",
        highlight=False,
        soft_wrap=True,
    )


def _lengths(requests: Sequence[Request]) -> NDArray[np.int64]:
    return np.array([(request.prompt_tokens, request.output_tokens) for request in requests], dtype=np.int64)


def _hash(array: NDArray[Any]) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()[:16]


@contextmanager
def _progress(console: Console, total: int) -> Iterator[Callable[[int], None]]:
    """A progress bar over `total` requests; yields what is to be told of each batch of finished ones."""
    with Progress(*PROGRESS_COLUMNS, console=console, transient=True, auto_refresh=False) as bar:
        task = bar.add_task("requests", total=total)
        last = time.perf_counter()

        def advance(count: int) -> None:
            nonlocal last
            bar.advance(task, count)
            if time.perf_counter() - last > 0.1:
                last = time.perf_counter()
                bar.refresh()

        yield advance


HEADLINE = (
    ("TTFT", "ttft", 1000.0, "ms", ("mean", "p50", "p99")),
    ("token latency", "tpot", 1000.0, "ms", ("mean", "p50", "p99")),
    ("end to end", "e2e", 1.0, "s", ("mean", "p50", "p99")),
)


def _report(stored: Run, wandb: Path | None, console: Console, *, quiet: bool) -> None:
    summary, counts = stored.summary, stored.counts or {}
    if quiet:
        overrides = f"scheduler={stored.get('scheduler')} qps={stored.get('workload.qps'):g} seed={stored.get('seed')}"
        figures = f"TTFT P99 {_cell(summary['ttft_p99_s'], 1)} s, E2E mean {_cell(summary['e2e_mean_s'], 1)} s"
        console.print(f"{overrides}: {figures}, {counts.get('ok')} ok → {stored.path}", highlight=False, soft_wrap=True)
        return
    title = f"{stored.get('scheduler')} · {stored.get('model')} · {stored.get('workload.qps'):g} requests/s"
    table = Table("", "mean", "P50", "P99", title=title, title_justify="left")
    for label, name, factor, unit, which in HEADLINE:
        table.add_row(f"{label} ({unit})", *(_cell(summary.get(f"{name}_{w}_s"), factor) for w in which))
    console.print(table)
    facts = {
        "requests": ", ".join(f"{value} {key}" for key, value in counts.items()),
        "throughput": f"{_cell(summary['request_throughput_rps'], 1)} requests/s, "
        f"{_cell(summary['token_throughput_tps'], 1)} tokens/s",
        "preemptions": str(summary["preemptions"]),
        "dispatch": f"{_cell(summary['dispatch_overhead_mean_s'], 1000)} ms mean (modelled)",
        "forecast": f"{_cell(summary['forecast_p50_us'], 1)} µs P50, {_cell(summary['forecast_p99_us'], 1)} µs P99 (measured), "
        f"E2E error {_cell(summary['e2e_error_p50'], 100)} % P50",
        "wall time": f"{_cell(summary['wall_time_s'], 1)} s",
        "run": str(stored.path),
        "W&B": str(wandb) if wandb is not None else "not logged",
    }
    if summary["forecast_p50_us"] is None:
        facts["forecast"] = "none: the scheduler does not use them"
    grid = Table.grid(padding=(0, 2))
    for key, value in facts.items():
        grid.add_row(key, value)
    console.print(grid, highlight=False, soft_wrap=True)


def _cell(value: float | None, factor: float) -> str:
    return "–" if value is None else f"{value * factor:.4g}" if abs(value * factor) < 1000 else f"{value * factor:,.0f}"


def search(config: DictConfig, choices: Mapping[str, str]) -> dict[str, Any]:
    """Find the capacity of what `config` describes (its node `capacity`), print it and write it; returns what it wrote.

    Seeds are searched in parallel, one process each. ConfigError if the configuration is wrong.
    """
    wanted = node(config.capacity)
    build(config)  # tell what is wrong before any process starts
    seeds = range(config.seed, config.seed + wanted.seeds)
    console = Console()
    found = []
    with Progress(*PROGRESS_COLUMNS, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("seeds", total=len(seeds))
        for one in Parallel(n_jobs=-1, return_as="generator")(delayed(_capacity)(config, seed) for seed in seeds):
            found.append(one)
            bar.advance(task)
    mean, half = interval([qps for qps, _ in found])
    spread = "" if half is None else f" ± {half:.2f}"
    each = ", ".join(f"{qps:.2f}" for qps, _ in found)
    console.print(
        f"scheduler={choices['scheduler']} model={choices['model']}: {mean:.2f}{spread} requests/s at {wanted.metric} ≤ "
        f"{wanted.slo_s:g} s (95 % interval over {len(seeds)} seeds: {each})",
        highlight=False,
        soft_wrap=True,
    )
    settings = plain(config)
    document = {
        "choices": {key: value for key, value in choices.items() if not key.startswith("hydra/")},
        "config": settings,
        "config_hash": provenance.config_hash(settings),
        "git": provenance.git(),
        "capacity_qps": mean,
        "half_width_qps": half,
        "seeds": {str(s): {"capacity_qps": q, "points": points} for s, (q, points) in zip(seeds, found, strict=True)},
    }
    path = Path("artifacts/capacity") / f"{document['config_hash']}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, document)
    console.print(f"[dim]{path}[/dim]", highlight=False, soft_wrap=True)
    return document


def _capacity(config: DictConfig, seed: int) -> tuple[float, list[Point]]:
    """The capacity for one seed. A process of its own: it compiles, or loads what is compiled, and runs."""
    run = replace(build(config), seed=seed)

    def latency(qps: float) -> float:
        at_rate = replace(run, workload=replace(run.workload, qps=qps))
        outcome = Outcome()
        serve(at_rate, requests_of(at_rate), outcome)
        assert outcome.dispatcher is not None
        value = summarise(request_columns(outcome.dispatcher.records)).get(wanted.metric)
        if value is None:
            raise ConfigError(f"capacity.metric={wanted.metric}: a run's summary has no such number")
        return float(value)

    wanted = node(config.capacity)
    try:
        return crossing(latency, wanted)
    except ValueError as error:
        raise ConfigError(str(error)) from error
