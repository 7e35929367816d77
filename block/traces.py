"""Public traces on disk: what the files are called, where they are looked for, and how a CSV becomes arrays.

No trace is part of the project. `scripts/fetch_data.py` puts them into $BLOCK_DATA, or ~/.cache/block.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
from pyarrow import csv

from block.types import Floats, Ints


@dataclass(frozen=True)
class TraceFile:
    """A CSV with a row for each request: its place below a data directory and its column names (`time`: optional)."""

    path: str
    prompt: str
    output: str
    time: str | None = None


TRACES = {
    "sharegpt": TraceFile("traces/sharegpt_10k_llama2.csv", "num_prefill_tokens", "num_decode_tokens"),
    "arxiv": TraceFile("traces/arxiv_summarization_llama2.csv", "num_prefill_tokens", "num_decode_tokens"),
    "azure_conv": TraceFile("traces/azure_conv_2023.csv", "ContextTokens", "GeneratedTokens", "TIMESTAMP"),
    "azure_code": TraceFile("traces/azure_code_2023.csv", "ContextTokens", "GeneratedTokens", "TIMESTAMP"),
    "burstgpt": TraceFile("traces/burstgpt_without_fails_1.csv", "Request tokens", "Response tokens", "Timestamp"),
}


@dataclass(frozen=True)
class Trace:
    """Requests in the order of their arrival: lengths int[n] in tokens, times float[n] in seconds and prompts (if
    recorded).

    format: what the file was taken for; rows: what it holds; dropped: how many of these were left out, by the reason.
    """

    prompt: Ints
    output: Ints
    times: Floats | None
    prompts: Sequence[str] | None = None
    format: str = ""
    rows: int = 0
    dropped: Mapping[str, int] = field(default_factory=dict)


def data_dirs() -> list[Path]:
    """Where data files are looked for, in this order: $BLOCK_DATA (if set), ~/.cache/block."""
    named = os.environ.get("BLOCK_DATA")
    return ([Path(named)] if named else []) + [Path.home() / ".cache" / "block"]


def find_data(path: str, advice: str) -> Path:
    """The file `path` below the first data directory that has it.

    FileNotFoundError names every place that was searched and ends with `advice`: how to get the file.
    """
    places = [directory / path for directory in data_dirs()]
    for place in places:
        if place.is_file():
            return place
    raise FileNotFoundError(f"no {Path(path).name}: looked for {' and '.join(map(str, places))}; {advice}")


def read_trace(path: Path, prompt: str, output: str, time: str | None) -> Trace:
    """Read the named columns of a CSV; rows with a length below 1 (failed requests) are left out.

    The time column holds seconds or timestamps (`2023-11-16 18:15:46.68`); rows are sorted by it if they are not.
    ValueError if a column is missing or is not of numbers, if no request is left, or if the times do not move.
    """
    table = csv.read_csv(path)
    for column in filter(None, (prompt, output, time)):
        if column not in table.column_names:
            raise ValueError(f"column={column!r} is not in {path}: choose from {', '.join(table.column_names)}")
    lengths = [_numbers(table, column, path) for column in (prompt, output)]
    valid = (lengths[0] >= 1) & (lengths[1] >= 1)
    if not valid.any():
        raise ValueError(f"{path}: no row has both {prompt!r} and {output!r} >= 1")
    prompts, outputs = (column[valid].astype(np.int64) for column in lengths)
    if time is None:
        return Trace(prompts, outputs, None)
    times = _numbers(table, time, path)[valid]
    if times.min() == times.max():
        raise ValueError(f"column={time!r} of {path}: needs at least two different arrival times")
    order = np.argsort(times, kind="stable")
    return Trace(prompts[order], outputs[order], times[order] - times[order[0]])


def _numbers(table: pa.Table, column: str, path: Path) -> Floats:
    values = table[column]
    if pa.types.is_timestamp(values.type):
        values = values.cast(pa.timestamp("ns")).cast(pa.int64())
        return np.asarray(values.to_numpy() * 1e-9, dtype=np.float64)
    if not (pa.types.is_integer(values.type) or pa.types.is_floating(values.type)) or values.null_count:
        raise ValueError(f"column={column!r} of {path}: must hold a number in every row, holds {values.type}")
    return np.asarray(values.to_numpy(), dtype=np.float64)
