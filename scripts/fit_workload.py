"""Derive the tracked workload sketches from the public traces, and report how well they match.

    python scripts/fit_workload.py                      every data set whose trace is in $BLOCK_DATA or ~/.cache/block
    python scripts/fit_workload.py azure_conv           one of them
    python scripts/fit_workload.py --csv my.csv my_chat   a sketch of one's own: then `workload.name=my_chat`

BurstGPT's trace is too large to keep: without it, its sketch is made from published means and an assumed spread.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from block.core.arrays import Floats, Ints
from block.core.choices import did_you_mean
from block.core.rng import generator
from block.run.config_errors import Parser, piped
from block.workload.length_sketch import LengthSketch
from block.workload.sharing_sketch import SharingSketch, hit_rate
from block.workload.spec import SKETCHES
from block.workload.trace_formats import Columns, read
from block.workload.traces import TRACES, Trace, find_data

ORIGINS = {
    "sharegpt": "ShareGPT, Llama-2 tokens: artifact of arXiv 2508.03611 (github.com/AKafakA/Block), MIT",
    "arxiv": "arXiv summarization, Llama-2 tokens: github.com/microsoft/vidur, MIT",
    "azure_conv": "Azure LLM inference trace 2023, conversation: github.com/Azure/AzurePublicDataset, CC-BY 4.0",
    "azure_code": "Azure LLM inference trace 2023, code: github.com/Azure/AzurePublicDataset, CC-BY 4.0",
    "burstgpt": "BurstGPT: github.com/HPMLL/BurstGPT, CC-BY 4.0",
    "mooncake": "Mooncake's conversation trace: github.com/kvcache-ai/Mooncake, Apache 2.0",
}
# Mean request and response tokens as published; the spread and the independence of the two are assumptions.
BURSTGPT_MEANS = (621.0, 126.0)
BURSTGPT_CV = 1.0
BURSTGPT_LONGEST = 4095
CACHES = (0.01, 0.03, 0.1, 0.3, 1.0)
"""Sizes of caches that a sketch of sharing is measured by: the share of all blocks of the trace."""


@dataclass(frozen=True)
class Quality:
    """How a sample of a sketch differs from its trace. Spreads: of the mean total tokens of a run, relative to it."""

    ks_prompt: float
    ks_output: float
    ks_total: float
    rank_correlation: tuple[float, float]  # trace, sample
    spread: float
    spread_independent: float


def ks_distance(a: Ints, b: Ints) -> float:
    """Greatest distance of the two samples' empirical distribution functions (Kolmogorov-Smirnov)."""
    at = np.union1d(a, b)
    gap = [np.searchsorted(np.sort(x), at, side="right") / len(x) for x in (a, b)]
    return float(np.abs(gap[0] - gap[1]).max())


def rank_correlation(a: Ints, b: Ints) -> float:
    """Spearman's correlation; ties take their average rank."""
    return float(np.corrcoef(_ranks(a), _ranks(b))[0, 1])


def _ranks(values: Ints) -> Floats:
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    return np.asarray((np.cumsum(counts) - (counts - 1) / 2)[place])


def measure(sketch: LengthSketch, trace: Trace, run: int = 10_000, seeds: int = 20) -> Quality:
    """Compare a sample as long as the trace with it; the spreads are over `seeds` runs of `run` requests."""
    prompt, output = sketch.sample(len(trace.prompt), generator(0, "fit.quality"))
    totals = trace.prompt + trace.output
    means = [np.add(*sketch.sample(run, generator(seed, "fit.spread"))).mean() for seed in range(seeds)]
    return Quality(
        ks_distance(trace.prompt, prompt),
        ks_distance(trace.output, output),
        ks_distance(totals, prompt + output),
        (rank_correlation(trace.prompt, trace.output), rank_correlation(prompt, output)),
        float(np.std(means) / np.mean(means)),
        float(totals.std() / np.sqrt(run) / totals.mean()),
    )


def fit(trace: Trace, origin: str, path: Path) -> tuple[LengthSketch, Quality]:
    """The sketch of a trace, with its source and its quality written into it."""
    sketch = LengthSketch.fit(trace.prompt, trace.output, trace.times)
    quality = measure(sketch, trace)
    distances = (quality.ks_prompt, quality.ks_output, quality.ks_total)
    return replace(sketch, source=_source(trace, origin, path, distances)), quality


def _source(trace: Trace, origin: str, path: Path, distances: Sequence[float]) -> dict[str, Any]:
    """What a sketch says of its trace, and how far a sample of it is from that."""
    return {
        "origin": origin,
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "requests": len(trace.prompt),
        "mean_prompt_tokens": round(float(trace.prompt.mean()), 2),
        "mean_output_tokens": round(float(trace.output.mean()), 2),
        "ks": [round(value, 4) for value in distances],
    }


def hit_rates(contents: Sequence[Ints]) -> dict[str, float]:
    """What one cache finds, by the share of all blocks that it holds."""
    blocks = len(np.unique(np.concatenate([content[:, 0] for content in contents])))
    return {f"{share:g}": hit_rate(contents, math.ceil(share * blocks)) for share in CACHES}


def fit_sharing(trace: Trace, origin: str, path: Path) -> SharingSketch:
    """The sketch of a trace whose prompts share prefixes, with its source and what caches find written into it."""
    assert trace.contents is not None
    sketch = SharingSketch.fit(trace)
    drawn = sketch.sample(len(trace.prompt), generator(0, "fit.quality"))
    assert drawn.contents is not None
    found, finds = hit_rates(trace.contents), hit_rates(drawn.contents)
    distances = (ks_distance(trace.prompt, drawn.prompt), ks_distance(trace.output, drawn.output))
    rates = {share: [round(rate, 4), round(finds[share], 4)] for share, rate in found.items()}
    source = {**_source(trace, origin, path, distances), "hit_rates": rates}
    return replace(sketch, source=source)


def report_sharing(name: str, sketch: SharingSketch) -> Table:
    """What caches of several sizes find in the trace, and in a sample."""
    source = sketch.source
    table = Table(title=f"{name}: {source['requests']:,} requests", title_justify="left")
    for column in ("cache, share of all blocks", "trace finds", "sketch finds"):
        table.add_column(column, justify="right")
    for share, (trace, drawn) in source["hit_rates"].items():
        table.add_row(f"{float(share):.0%}", f"{trace:.1%}", f"{drawn:.1%}")
    table.caption = f"KS distance of prompts {source['ks'][0]:.4f}, of responses {source['ks'][1]:.4f}"
    return table


def published_burstgpt() -> LengthSketch:
    """BurstGPT without its trace: lognormal lengths with the published means."""
    means = dict(zip(("mean_prompt_tokens", "mean_output_tokens"), BURSTGPT_MEANS, strict=True))
    note = f"published means only; assumed: independent lognormal lengths, coefficient of variation {BURSTGPT_CV}"
    sketch = LengthSketch.lognormal(BURSTGPT_MEANS[0], BURSTGPT_CV, BURSTGPT_MEANS[1], BURSTGPT_CV, BURSTGPT_LONGEST)
    return replace(sketch, source={"origin": ORIGINS["burstgpt"], "note": note, **means})


def report(name: str, sketch: LengthSketch, trace: Trace, quality: Quality) -> Table:
    """Original against sampled: means, quantiles, distances, rank correlation, seed-to-seed spread."""
    prompt, output = sketch.sample(len(trace.prompt), generator(0, "fit.quality"))
    table = Table(title=f"{name}: {len(trace.prompt):,} requests", title_justify="left")
    for column in ("tokens", "", "mean", "P1", "P10", "P50", "P90", "P99", "KS distance"):
        table.add_column(column, justify="left" if column in ("tokens", "") else "right")
    rows = (
        ("prompt", trace.prompt, prompt, quality.ks_prompt),
        ("response", trace.output, output, quality.ks_output),
        ("total", trace.prompt + trace.output, prompt + output, quality.ks_total),
    )
    for label, original, sampled, distance in rows:
        for kind, values, ks in (("trace", original, ""), ("sketch", sampled, f"{distance:.4f}")):
            quantiles = [f"{value:,.0f}" for value in np.quantile(values, (0.01, 0.1, 0.5, 0.9, 0.99))]
            table.add_row(label if kind == "trace" else "", kind, f"{values.mean():,.1f}", *quantiles, ks)
    table.caption = (
        f"rank correlation {quality.rank_correlation[0]:+.3f} (trace), {quality.rank_correlation[1]:+.3f} (sketch); "
        f"mean total of 10,000 requests, seed to seed: ±{quality.spread:.3%} (independent draws: "
        f"±{quality.spread_independent:.2%})"
    )
    return table


def main(arguments: list[str] | None = None) -> int:
    """Command line; exit code 2 and one line on standard error if a trace is missing or malformed."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help=f"data sets: {', '.join(ORIGINS)}; with --csv one name of your own")
    parser.add_argument("--csv", type=Path, help="a trace of your own, in any format of docs/workloads.md")
    parser.add_argument("--prompt-column", help="with --csv (default: by the file's own format)")
    parser.add_argument("--output-column", help="with --csv (default: by the file's own format)")
    parser.add_argument("--time-column", help="with --csv: seconds or timestamps; keeps how rate and lengths drifted")
    parser.add_argument("--out", type=Path, default=SKETCHES, help="directory (default: artifacts/workloads)")
    parser.add_argument("--force", action="store_true", help="write over sketches that are there")
    options = parser.parse_args(arguments)
    console = Console()
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        for name, file, origin in _chosen(options):
            target = _target(options, name)
            if file is None:
                sketch = published_burstgpt()
                sketch.save(target)
                console.print(f"{name}: {sketch.source['note']} -> {target}", soft_wrap=True)
                continue
            path, timed = file
            trace = read(path, _columns(options), timed=timed)
            if trace.contents is not None:
                sharing = fit_sharing(trace, origin, path)
                sharing.save(target)
                console.print(report_sharing(name, sharing), f"-> {target}", soft_wrap=True)
                continue
            sketch, quality = fit(trace, origin, path)
            sketch.save(target)
            console.print(report(name, sketch, trace, quality), f"-> {target}", soft_wrap=True)
    except (OSError, ValueError) as error:
        print(f"fit_workload: {error}", file=sys.stderr)
        return 2
    return 0


def _target(options: argparse.Namespace, name: str) -> Path:
    """Where the sketch of that name goes. ValueError if it is no name, or is taken."""
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise ValueError(f"name={name!r}: must be of letters, digits, '_', '-' and '.', such as my_chat")
    target: Path = options.out / f"{name}.json"
    if target.exists() and not options.force:
        raise ValueError(f"{target}: is there already; give another name or --out, or --force to write over it")
    return target


def _columns(options: argparse.Namespace) -> Columns:
    return Columns(None, options.prompt_column, options.output_column, options.time_column)


def _chosen(options: argparse.Namespace) -> Iterator[tuple[str, tuple[Path, bool] | None, str]]:
    """Of each sketch that is asked for: name, trace and whether it has times (None: BurstGPT without one), origin."""
    if options.csv:
        if len(options.names) != 1:
            raise ValueError(f"--csv {options.csv}: give exactly one name for its sketch, not {len(options.names)}")
        yield options.names[0], (options.csv, options.time_column is not None), options.csv.name
        return
    for key in ("prompt_column", "output_column", "time_column"):
        if getattr(options, key) is not None:
            raise ValueError(f"--{key.replace('_', '-')} {getattr(options, key)}: has no effect without --csv")
    for name in options.names or ORIGINS:
        if name not in ORIGINS:
            raise ValueError(f"name={name!r}: {did_you_mean(name, list(ORIGINS))}, or give --csv FILE.csv")
        try:
            path = find_data(TRACES[name].path, f"`python scripts/fetch_data.py {name}` gets it")
        except FileNotFoundError as missing:
            if name == "burstgpt":
                yield name, None, ORIGINS[name]
            elif options.names:
                raise
            else:
                print(f"fit_workload: skipped {name}: {missing}", file=sys.stderr)
        else:
            yield name, (path, TRACES[name].timed), ORIGINS[name]


if __name__ == "__main__":
    sys.exit(piped(main))
