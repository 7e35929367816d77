"""Workloads: who asks for how much, and when. Seeded and open-loop: nothing a server does moves an arrival.

`generate` draws lengths and arrivals from separate streams, so that the arrival process never moves a length, and a
rate only stretches the arrivals of its seed (see `arrivals`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from itertools import cycle, islice, repeat
from pathlib import Path

import numpy as np

from block.arrivals import constant_gaps, gamma_gaps, recorded_gaps
from block.lengths import pairs
from block.rng import stream
from block.sketch import LengthSketch
from block.traces import TRACES, Trace, TraceFile, find_data, read_trace
from block.types import Floats, Ints, Request

ARRIVALS = ("poisson", "gamma", "constant", "trace")
SOURCES = ("sketch", "trace", "synthetic")
SKETCHES = Path(__file__).resolve().parent.parent / "artifacts" / "workloads"
CUSTOM = TraceFile("", "prompt_tokens", "output_tokens", "arrival")


@dataclass(frozen=True)
class Workload:
    """One workload: the Hydra group `workload`. ValueError if a value is outside its range.

    name: the data set; it picks the sketch, and the trace file unless `trace_path` is given.
    qps: mean request rate of the whole cluster, 1/s; the last of the requests arrives at num_requests / qps.
    arrivals: "poisson"; "gamma" (gaps with shape `burst_shape`: below 1 bursty, above 1 regular); "constant"; "trace"
        (a trace's own times, or a Poisson process with the rate profile of a sketch, scaled to `qps`).
    source: lengths from a "sketch" (tracked with the project), from the "trace" file itself (its rows in their order,
        again from the start when they run out), or "synthetic" (independent lognormals).
    max_total_tokens: the model's length. A longer request is cut, its prompt first, as a client does that keeps the
        newest context; a response of this length or more becomes max_total_tokens - 1.
    prompt_mean, prompt_cv, output_mean, output_cv: of the synthetic lengths: mean in tokens, coefficient of variation.
    trace_path, *_column: any CSV; None stands for the data set's own file and columns, and for a file of one's own for
        the columns prompt_tokens, output_tokens and arrival (seconds or timestamps, read if arrivals is "trace").
        A data set of prompts (gpteacher, sharegpt_text) or a FILE.json, .jsonl or .parquet of prompts and responses
        gives its held-out side, and requests that have prompts; they have no times.
    """

    name: str = "sharegpt"
    num_requests: int = 10_000
    qps: float = 30.0
    arrivals: str = "poisson"
    burst_shape: float = 1.0
    source: str = "sketch"
    max_total_tokens: int = 4096
    prompt_mean: float = 512.0
    prompt_cv: float = 1.0
    output_mean: float = 256.0
    output_cv: float = 1.0
    trace_path: str | None = None
    prompt_column: str | None = None
    output_column: str | None = None
    time_column: str | None = None

    def __post_init__(self) -> None:
        _choice("arrivals", self.arrivals, ARRIVALS)
        _choice("source", self.source, SOURCES)
        _at_least("num_requests", self.num_requests, 1)
        _at_least("max_total_tokens", self.max_total_tokens, 2)
        for key in ("qps", "burst_shape", "prompt_mean", "prompt_cv", "output_mean", "output_cv"):
            _positive(key, getattr(self, key))
        if self.source == "synthetic":
            for key in ("prompt_mean", "output_mean"):
                mean = getattr(self, key)
                if not 1 <= mean < self.max_total_tokens:
                    raise ValueError(f"workload.{key}={mean}: must be in [1, max_total_tokens={self.max_total_tokens})")
        if self.burst_shape != 1 and self.arrivals != "gamma":
            raise ValueError(f"workload.burst_shape={self.burst_shape}: needs arrivals=gamma, not {self.arrivals}")
        if self.source == "sketch":
            _choice("name", self.name, tuple(sorted(path.stem for path in SKETCHES.glob("*.json"))))
        if self.source == "trace" and self.trace_path is None and self.name not in TRACES:
            raise ValueError(
                f"workload.trace_path=null: {self.name!r} has no file of its own; give FILE.csv, "
                f"or choose workload.name from {', '.join(TRACES)}"
            )
        if self.arrivals == "trace" and not self._records_times():
            raise ValueError(
                f"workload.arrivals=trace: {self.name} with source={self.source} has no arrival times; "
                f"choose from {', '.join(ARRIVALS[:-1])}, or another workload"
            )

    def _records_times(self) -> bool:
        if self.source == "sketch":
            return _sketch(self.name).profile is not None
        named = self.trace_path is not None and pairs.is_pairs(self.trace_path)
        return self.source == "trace" and not named and self._columns().time is not None

    def _columns(self) -> TraceFile:
        own = TRACES.get(self.name, CUSTOM)
        return TraceFile(
            self.trace_path or own.path,
            self.prompt_column or own.prompt,
            self.output_column or own.output,
            self.time_column or own.time,
        )


def generate(workload: Workload, seed: int) -> list[Request]:
    """The run's requests in order of arrival, ids 0 .. n-1; predicted_output_tokens is the truth until one estimates.

    The same for the same arguments on every machine. FileNotFoundError if a trace file is not there, ValueError if it
    is not of the expected form.
    """
    count = workload.num_requests
    trace = _trace(workload) if workload.source == "trace" else None
    prompt, output = _lengths(workload, trace, stream(seed, "workload.lengths"))
    output = np.minimum(output, workload.max_total_tokens - 1)
    prompt = np.minimum(prompt, workload.max_total_tokens - output)
    arrival = np.cumsum(_gaps(workload, trace, stream(seed, "workload.arrivals"))) / workload.qps
    outputs = output.tolist()
    texts = [None] * count if trace is None or trace.prompts is None else islice(cycle(trace.prompts), count)
    numbers = (range(count), arrival.tolist(), prompt.tolist(), outputs, outputs)
    return list(map(Request, *numbers, repeat(None), texts))


def _lengths(workload: Workload, trace: Trace | None, rng: np.random.Generator) -> tuple[Ints, Ints]:
    count = workload.num_requests
    if trace is not None:
        return np.resize(trace.prompt, count), np.resize(trace.output, count)
    if workload.source == "sketch":
        return _sketch(workload.name).sample(count, rng)
    sketch = LengthSketch.lognormal(
        workload.prompt_mean,
        workload.prompt_cv,
        workload.output_mean,
        workload.output_cv,
        workload.max_total_tokens - 1,
    )
    return sketch.sample(count, rng)


def _gaps(workload: Workload, trace: Trace | None, rng: np.random.Generator) -> Floats:
    count = workload.num_requests
    if workload.arrivals == "constant":
        return constant_gaps(count)
    if workload.arrivals in ("poisson", "gamma"):
        return gamma_gaps(count, workload.burst_shape, rng)
    if trace is not None and trace.times is not None:
        return recorded_gaps(count, trace.times)
    profile = _sketch(workload.name).profile
    assert profile is not None  # Workload refuses arrivals=trace without one
    return profile.gaps(count, rng)


def _trace(workload: Workload) -> Trace:
    if workload.trace_path is not None and pairs.is_pairs(workload.trace_path):
        held_out = pairs.load(workload.trace_path).test
        prompt = np.array([max(pairs.pieces(text), 1) for text in held_out.prompts], dtype=np.int64)
        return Trace(prompt, held_out.tokens, None, held_out.prompts)
    columns = workload._columns()
    if workload.trace_path is None:
        advice = f"`python scripts/fetch_data.py {workload.name}` gets it, workload.source=sketch goes without"
        path = find_data(columns.path, advice)
    else:
        path = Path(workload.trace_path).expanduser()
        if not path.is_file():
            raise FileNotFoundError(f"workload.trace_path={workload.trace_path}: no such file")
    return read_trace(path, columns.prompt, columns.output, columns.time if workload.arrivals == "trace" else None)


@lru_cache
def _sketch(name: str) -> LengthSketch:
    return LengthSketch.load(SKETCHES / f"{name}.json")


def _choice(key: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"workload.{key}={value!r}: choose from {', '.join(choices)}")


def _at_least(key: str, value: int, least: int) -> None:
    if not isinstance(value, int) or value < least:
        raise ValueError(f"workload.{key}={value}: must be an integer >= {least}")


def _positive(key: str, value: float) -> None:
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"workload.{key}={value}: must be a finite number > 0")
