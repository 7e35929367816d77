"""What a run says on the terminal: what it is about to do, how far it is, what came out."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from block.backends.simulated import Simulated
from block.cluster.fleet import Backend
from block.cluster.spec import Mixed, Testbed
from block.hardware.devices import visible_gpus
from block.lengths.estimation import Scores
from block.store.results import Run
from block.workload.spec import Facts

HEADLINE = (
    ("TTFT", "ttft", 1000.0, "ms"),
    ("token latency", "tpot", 1000.0, "ms"),
    ("end to end", "e2e", 1.0, "s"),
)


def announce(testbed: Testbed, backend: Backend, console: Console) -> None:
    """Say what is about to run, and why it is simulated if GPUs were asked for."""
    if isinstance(backend, Simulated) and backend.auto:
        gpus = visible_gpus()
        why = f"{gpus or 'no'} GPU{'s' * (gpus != 1)} visible, {testbed.cluster.num_gpus} asked for"
        if isinstance(testbed.cluster, Mixed):
            why = "GPUs of several kinds asked for"
        console.print(f"[dim]{why}: running the simulated testbed[/dim]", soft_wrap=True)
    elif not backend.virtual:
        urls = getattr(backend, "urls", ())
        servers = f"{len(urls)} server{'s' * (len(urls) != 1)}"
        what = f"attaching to {servers}" if urls else "starting vLLM servers; their logs are in the run's folder"
        console.print(f"[dim]{what}[/dim]", soft_wrap=True)
        if urls:
            return
    for kind in testbed.kinds:
        each = kind.gpu if kind.model.tensor_parallel == 1 else f"{kind.model.tensor_parallel} × {kind.gpu}"
        what = f"{kind.instances} × {kind.model.name} on {each}, {kind.total_blocks} KV blocks each"
        method = backend.latency(kind).source["method"]
        console.print(f"{what}; step times: {method}", highlight=False, soft_wrap=True)
        gpus, shared = kind.cluster.num_gpus, kind.model.tensor_parallel
        if gpus % shared:
            idle = f"{gpus % shared} of {gpus} GPUs are idle, which model.tensor_parallel={shared} does not divide"
            console.print(idle, highlight=False, soft_wrap=True)


def tell(facts: Facts, console: Console, searched: bool = False) -> None:
    """Say what was done to a trace before it is replayed. searched: as of `Facts.lines`."""
    for line in facts.lines(searched):
        console.print(line, highlight=False, markup=False, soft_wrap=True)


@contextmanager
def progress(console: Console, what: str, total: int) -> Iterator[Callable[[int], None]]:
    """A progress bar with an estimate; yields what is to be told how many more are done."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    times = (TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(
        *columns, *times, console=console, transient=True, auto_refresh=False, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task(what, total=total)
        bar.refresh()
        last = time.perf_counter()

        def advance(count: int) -> None:
            nonlocal last
            bar.advance(task, count)
            if time.perf_counter() - last > 0.1:  # drawing costs more than a request does
                last = time.perf_counter()
                bar.refresh()

        yield advance


def report(run: Run, wandb: Path | None, console: Console) -> None:
    """The table at the end of a run."""
    summary, counts = run.summary, run.counts or {}
    qps = run.get("workload.qps")
    rate = "as recorded" if qps is None else f"{qps:g} requests/s"
    title = f"{run.get('scheduler')} · {run.get('model')} · {rate}"
    table = Table("", "mean", "P50", "P99", title=title, title_justify="left")
    for label, name, factor, unit in HEADLINE:
        cells = (_cell(summary[f"{name}_{which}_s"], factor) for which in ("mean", "p50", "p99"))
        table.add_row(f"{label} ({unit})", *cells)
    console.print(table)
    forecasts = "none: this policy does not use them"
    if summary["forecast_p50_us"] is not None:
        forecasts = (
            f"{_cell(summary['forecast_p50_us'])} µs P50, {_cell(summary['forecast_p99_us'])} µs P99 (measured); "
            f"E2E off by {_cell(summary['e2e_error_p50'], 100)} % P50"
        )
    compile_s = summary.get("compile_s") or 0.0
    compiling = f" (+ {_cell(compile_s)} s compiling, once)" if compile_s >= 0.01 else ""
    facts = {
        "requests": ", ".join(f"{value} {key}" for key, value in counts.items() if value is not None),
        "throughput": f"{_cell(summary['request_throughput_rps'])} requests/s, "
        f"{_cell(summary['token_throughput_tps'])} tokens/s",
        "preemptions": "not known" if summary["preemptions"] is None else str(summary["preemptions"]),
        **(
            {"prefix cache": f"{summary['prefix_hit_rate']:.1%} of prompt tokens hit"}
            if summary.get("prefix_hit_rate")
            else {}
        ),
        "dispatch": f"{_cell(summary['dispatch_overhead_mean_s'], 1000)} ms mean",
        "forecasts": forecasts,
        "wall time": f"{_cell(summary['wall_time_s'])} s{compiling}",
        "run": str(run.path),
        "W&B": str(wandb) if wandb is not None else "not logged",
    }
    if "instance_seconds" in summary:
        changes = run.document["changes"]
        counted = ", ".join(f"{sum(one[2] == kind for one in changes)} {kind}ed" for kind in ("join", "drain"))
        facts["provisioner"] = f"{counted}; {_cell(summary['instance_seconds'])} instance-seconds"
    lost = [(at, f"{'lost':<13}instance {i} at {at:.1f} s: {why}") for at, i, why in run.document.get("ejections", ())]
    lost += [(at, f"{'back':<13}instance {i} at {at:.1f} s") for at, i in run.document.get("readmissions", ())]
    for _, line in sorted(lost):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    for key, value in facts.items():  # not a table, which would cut the paths to the terminal's width
        console.print(f"{key:<13}{value}", highlight=False, markup=False, soft_wrap=True)


def report_line(run: Run, job: str, console: Console) -> None:
    """The same in one line, for a `job` of a sweep, called so (`sweep.standing`)."""
    summary, counts = run.summary, run.counts or {}
    figures = f"TTFT P99 {_cell(summary['ttft_p99_s'])} s, E2E mean {_cell(summary['e2e_mean_s'])} s"
    line = f"{job}: {figures}, {counts.get('ok')} ok → {run.path}"
    console.print(line, highlight=False, markup=False, soft_wrap=True)


def report_scores(rows: Sequence[Mapping[str, Any]], path: Path, console: Console) -> None:
    """Table 1, of the rows of `lengths.estimation.evaluate`; what could not be measured, and why; where it is."""
    heads = ("error", "rate", "Acc-10", "Acc-50", "Acc-100", "bias", "covered")
    missing: dict[str, list[str]] = {}
    lines = [f"{'data set':<44}{'estimator':<15}{'pairs':>6}" + "".join(f"{head:>10}" for head in heads)]
    for row in rows:
        if "missing" in row:
            missing.setdefault(row["missing"], []).append(f"{row['data']} {row['estimator']}")
            continue
        cells = [f"{row[name]:.2f}" if name == "average_error" else f"{row[name]:.1%}" for name in Scores._fields]
        start = f"{row['data']:<44}{row['estimator']:<15}{row['pairs']:>6}"
        lines.append(start + "".join(f"{cell:>10}" for cell in cells))
    lines += [f"not measured: {', '.join(names)}: {why}" for why, names in missing.items()]
    console.print("\n".join([*lines, str(path)]), highlight=False, markup=False, soft_wrap=True)


def _cell(value: float | None, factor: float = 1.0) -> str:
    if value is None:
        return "–"
    value *= factor
    return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"
