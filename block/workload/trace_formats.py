"""Trace files as people have them: which columns hold what, read from CSV, JSON, JSON lines and parquet.

A file is of a *format*: the names of its columns, and the unit of its times. The format is recognised by the columns
that the file has, or named; and any column can be named by itself. Nothing is guessed beyond that, and no row is lost
in silence: what is left out is counted.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from block.core.arrays import Floats, Ints
from block.core.choices import did_you_mean
from block.workload.prompts import pieces
from block.workload.records import Table, open_table
from block.workload.traces import Trace

MOST_TOKENS = 10_000_000
"""A count above this is an error in the file: no model takes so many."""

HASHES = "hash_ids"
"""The column with the numbers of a prompt's blocks, in all formats that have one."""

UNITS = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9}
"""Seconds in each unit of time."""


@dataclass(frozen=True)
class Format:
    """Columns of a kind of file, by name or dotted path.

    prompt, output: token counts; the prompts of `texts` are texts or conversations, to be counted. time: of arrival, in
    `unit` or as timestamps; None: none.
    by: columns that a file must have beside those two to be recognised. source: who writes such files.
    delay: column of the time since the turn before of the same `session`, for turns without a time of their own.
    hashed: tokens of the blocks of the prompt of which the column hash_ids has a number each, equal where the prompts
    are up to there; None: there is none.
    """

    prompt: str
    output: str
    time: str | None
    source: str
    unit: str = "s"
    by: tuple[str, ...] = ()
    session: str | None = None
    delay: str | None = None
    texts: bool = False
    hashed: int | None = None


# In the order in which they are tried: what is recognised by more columns stands before what it contains.
FORMATS: Mapping[str, Format] = {
    "block": Format("prompt_tokens", "output_tokens", "arrival", "this project; times may be left out"),
    "azure": Format("ContextTokens", "GeneratedTokens", "TIMESTAMP", "Azure LLM inference traces, 2023 and 2024"),
    "burstgpt": Format("Request tokens", "Response tokens", "Timestamp", "BurstGPT, with and without Session ID"),
    "bailian": Format(
        "input_length",
        "output_length",
        "timestamp",
        "Qwen-Bailian usage traces",
        by=("timestamp", "chat_id"),
        hashed=16,
    ),
    "sessions": Format(
        "input_length",
        "output_length",
        "timestamp",
        "AIPerf and Dynamo: Mooncake's columns with session_id and delay",
        unit="ms",
        by=("session_id",),
        session="session_id",
        delay="delay",
        hashed=512,
    ),
    "mooncake": Format(
        "input_length",
        "output_length",
        "timestamp",
        "Mooncake (FAST '25), AIPerf",
        unit="ms",
        by=("timestamp",),
        hashed=512,
    ),
    "vidur": Format("num_prefill_tokens", "num_decode_tokens", "arrived_at", "Vidur; times may be left out"),
    "splitwise": Format("prompt_size", "token_size", "arrival_timestamp", "SplitwiseSim"),
    "llmservingsim": Format("input_toks", "output_toks", "arrival_time_ns", "LLMServingSim", unit="ns"),
    "inference_perf": Format(
        "info.input_tokens", "info.output_tokens", "start_time", "inference-perf, report of each request"
    ),
    "guidellm": Format("prompt_tokens_count", "output_tokens_count", None, "GuideLLM data sets"),
    "vllm_custom": Format("prompt", "output_tokens", None, "vLLM's custom data set: a text and a count", texts=True),
}


@dataclass(frozen=True)
class Columns:
    """What the user says of a file: its format, and single columns of it; None for what the file itself tells.

    unit: of the times, one of UNITS. ValueError if the format or the unit is none.
    """

    format: str | None = None
    prompt: str | None = None
    output: str | None = None
    time: str | None = None
    unit: str | None = None

    def __post_init__(self) -> None:
        for key, value, choices in (("format", self.format, FORMATS), ("time_unit", self.unit, UNITS)):
            if value is not None and value not in choices:
                raise ValueError(f"workload.{key}={value}: {did_you_mean(value, list(choices))}")


class UnknownFormat(ValueError):
    """The columns of a file are of no known format, and not named."""


def read(path: Path, columns: Columns, *, timed: bool) -> Trace:
    """The requests of a file, in the order of their arrival if `timed`, else in that of the file.

    Rows with a prompt or a response of less than a token (failed requests) are left out and counted. OSError if the
    file cannot be read; ValueError, in one line with file, line, column and the key to set, if it is not of the form
    (UnknownFormat if its columns tell nothing).
    """
    table = open_table(path)
    name, form = _format(table, columns, path)
    prompt_column, output_column = columns.prompt or form.prompt, columns.output or form.output
    prompt, texts = _tokens(table, prompt_column, "prompt_column", texts=form.texts or columns.prompt is not None)
    output, _ = _tokens(table, output_column, "output_column", texts=columns.output is not None)
    times = _arrivals(table, columns, form) if timed else None
    if form.session is not None and table.has(form.session):
        prompt = _whole_prompts(table, form.session, prompt, output)
    failed = {f"{prompt_column} below 1": prompt < 1, f"{output_column} below 1": (output < 1) & (prompt >= 1)}
    kept = np.flatnonzero((prompt >= 1) & (output >= 1))
    if not len(kept):
        raise ValueError(f"{path}: no row has both {prompt_column!r} and {output_column!r} >= 1")
    if times is not None:
        kept = kept[np.argsort(times[kept], kind="stable")]
        if times[kept[0]] == times[kept[-1]]:
            raise ValueError(
                f"{path}: column {columns.time or form.time!r} needs at least two different arrival times; "
                "workload.arrivals=poisson goes without them"
            )
    since = None if times is None else times[kept] - times[kept[0]]
    return Trace(
        prompt[kept],
        output[kept],
        since,
        None if texts is None else [texts[i] for i in kept],
        format=name,
        rows=len(table),
        dropped={reason: int(rows.sum()) for reason, rows in failed.items() if rows.any()},
        rate=None if since is None else (len(kept) - 1) / float(since[-1]),
        contents=_contents(table, form.hashed, prompt, kept),
    )


def _format(table: Table, columns: Columns, path: Path) -> tuple[str, Format]:
    """The format that is named, or the one that the columns tell. Columns that are named are of any file."""
    if columns.format is not None:
        return columns.format, FORMATS[columns.format]
    for name, form in FORMATS.items():
        if all(map(table.has, (form.prompt, form.output, *form.by))):
            return name, form
    if columns.prompt and columns.output:
        return "own", Format(columns.prompt, columns.output, None, "")
    for name, form in FORMATS.items():  # of one column that is not named, the format tells
        if table.has(form.output if columns.prompt else form.prompt) and (columns.prompt or columns.output):
            return name, form
    said = f"{path}: has the columns {', '.join(table.names)}, which"
    for name, form in FORMATS.items():
        for there, lacking, key in ((form.prompt, form.output, "output"), (form.output, form.prompt, "prompt")):
            if table.has(there):
                raise UnknownFormat(
                    f"{said} lack {lacking!r} of the format {name}; name another by workload.{key}_column"
                )
    raise UnknownFormat(
        f"{said} are of no known format ({', '.join(FORMATS)}: docs/workloads.md); "
        "name them by workload.prompt_column and workload.output_column"
    )


def _column(table: Table, column: str, key: str) -> Any:
    if not table.has(column):
        raise ValueError(
            f"{table.path}: has no column {column!r} for workload.{key}: {did_you_mean(column, table.names)}"
        )
    return table.values(column)


def _tokens(table: Table, column: str, key: str, *, texts: bool) -> tuple[Ints, list[str] | None]:
    """Counts of tokens, and the texts that were counted, if there may be `texts` and the column holds such."""
    values = _column(table, column, key)
    if isinstance(values, list) or not (pa.types.is_integer(values.type) or pa.types.is_floating(values.type)):
        values = values if isinstance(values, list) else values.to_pylist()
        said = [_said(one) for one in values] if texts else []
        words = [one for one in said if one is not None]
        if texts and len(words) == len(values):
            return np.array([max(pieces(one), 1) for one in words], dtype=np.int64), words
        numbers = np.array([_number(one) for one in values], dtype=np.float64)
    else:
        numbers = np.asarray(values.to_numpy(), dtype=np.float64)
    wrong = np.flatnonzero(~np.isfinite(numbers) | (numbers > MOST_TOKENS) | (numbers != np.floor(numbers)))
    if len(wrong):
        wanted = f"a whole number of tokens, at most {MOST_TOKENS:,}"
        raise ValueError(_wrong(table, values, int(wrong[0]), column, key, wanted))
    return numbers.astype(np.int64), None


def _wrong(table: Table, values: Any, row: int, column: str, key: str, wanted: str) -> str:
    """What is said of a value that is not what is wanted."""
    value = values[row] if isinstance(values, list) else values[row].as_py()
    shown = "nothing" if value is None else repr(value)[:60]
    where = f"column {column!r} (workload.{key})"
    return f"{table.path}: {table.line(row)}: {where} holds {shown}; wants {wanted}"


def _said(value: Any) -> str | None:
    """The text of a string or of the messages of a conversation; None if it is neither."""
    if isinstance(value, str):
        return value if math.isnan(_number(value)) else None
    if isinstance(value, list) and value and all(isinstance(one, Mapping) for one in value):
        return "\n".join(str(one.get("content", one.get("value")) or "") for one in value)
    return None


def _number(value: Any) -> float:
    """NaN for what is no number."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return math.nan
    try:
        return float(value)
    except (ValueError, OverflowError):
        return math.nan


def _arrivals(table: Table, columns: Columns, form: Format) -> Floats:
    """When each request arrives, in seconds from any origin, float[rows]."""
    column = columns.time or form.time
    timed = column is not None and (columns.time is not None or table.has(column))
    if form.session is not None and table.has(form.session):
        return _turns(table, form, _times(table, str(column), columns, form, gaps=True) if timed else None)
    if column is None or not timed:
        expected = f"no column {column!r}" if column else "no times"
        raise ValueError(
            f"{table.path}: has {expected} of arrival; name the column by workload.time_column, "
            "or take workload.arrivals=poisson, gamma or constant"
        )
    return _times(table, column, columns, form)


def _times(table: Table, column: str, columns: Columns, form: Format, *, gaps: bool = False) -> Floats:
    """Numbers of a unit, or timestamps, in seconds. gaps: rows may have none (NaN)."""
    values = _column(table, column, "time_column")
    unit = UNITS[columns.unit or (form.unit if columns.time in (None, form.time) else "s")]
    if not isinstance(values, list):
        if pa.types.is_timestamp(values.type):
            values = values.cast(pa.timestamp("ns", values.type.tz)).cast(pa.int64())
            unit = UNITS["ns"]
        elif not (pa.types.is_integer(values.type) or pa.types.is_floating(values.type)):
            values = values.to_pylist()
    if isinstance(values, list):
        times = np.array([_number(one) for one in values]) * unit
        texts = [i for i, one in enumerate(values) if isinstance(one, str) and math.isnan(times[i])]
        if texts:
            times[texts] = _timestamps([values[i] for i in texts])
    else:
        times = np.asarray(values.to_numpy(), dtype=np.float64) * unit
    wrong = np.flatnonzero(np.isinf(times) if gaps else ~np.isfinite(times))
    if len(wrong):
        raise ValueError(_wrong(table, values, int(wrong[0]), column, "time_column", "a number or a timestamp"))
    return np.asarray(times, dtype=np.float64)


def _timestamps(texts: Sequence[Any]) -> Floats:
    """Seconds since 1970 of timestamps in ISO 8601; NaN for what is none."""
    import pandas as pd  # a third of a second, for these files only

    parsed = pd.to_datetime(pd.Series(texts, dtype=object), utc=True, errors="coerce", format="ISO8601")
    seconds = (parsed - pd.Timestamp(0, tz="UTC")).dt.total_seconds()
    return np.asarray(seconds.to_numpy(), dtype=np.float64)


def _sessions(table: Table, session: str) -> Iterator[list[int]]:
    """The rows of each session, in their order; a row without one is a session of its own."""
    turns: dict[Any, list[int]] = {}
    for row, name in enumerate(_column(table, session, "format")):
        key = name.as_py() if isinstance(name, pa.Scalar) else name
        turns.setdefault(("", row) if key is None else key, []).append(row)
    yield from turns.values()


def _turns(table: Table, form: Format, times: Floats | None) -> Floats:
    """Arrivals of turns: at their own time, else `delay` after the turn before, and at 0 for the first without any.

    What is replayed is open loop: a delay that its writer counted from the answer is counted from the arrival.
    """
    nothing = np.full(len(table), math.nan)
    listed = form.delay is not None and table.has(form.delay)
    delays = _times(table, str(form.delay), Columns(), form, gaps=True) if listed else nothing
    arrivals = nothing if times is None else times
    for rows in _sessions(table, str(form.session)):
        at = 0.0
        for row in rows:
            at = arrivals[row] if arrivals[row] == arrivals[row] else at + np.nan_to_num(delays[row])
            arrivals[row] = at
    return arrivals


def _contents(table: Table, hashed: int | None, prompt: Ints, rows: Ints) -> list[Ints] | None:
    """What the prompts of these rows consist of, by the numbers of their blocks; None if the file has none."""
    if hashed is None or not table.has(HASHES):
        return None
    values = table.values(HASHES)
    listed = values if isinstance(values, list) else values.to_pylist()
    found = []
    for row in rows.tolist():
        numbers = listed[row]
        if not isinstance(numbers, list) or not all(isinstance(one, int) and 0 <= one < 2**40 for one in numbers):
            wanted = "a list of numbers from 0 on, one for each block of the prompt"
            raise ValueError(
                f"{table.path}: {table.line(row)}: column {HASHES!r} holds {str(numbers)[:60]}; wants {wanted}"
            )
        content = np.full((-(-int(prompt[row]) // hashed), 2), hashed, dtype=np.int64)
        content[-1, 1] = (prompt[row] - 1) % hashed + 1
        content[:, 0] = -1 - row  # what has no number, nobody shares
        known = numbers[: len(content)]
        content[: len(known), 0] = known
        found.append(content)
    return found


def _whole_prompts(table: Table, session: str, prompt: Ints, output: Ints) -> Ints:
    """Prompts with all that was said before in their session, unless the file has hashes of whole prompts."""
    if table.has(HASHES):
        return prompt
    whole = prompt.copy()
    for rows in _sessions(table, session):
        said = 0
        for row in rows:
            whole[row] += said
            said = int(whole[row] + output[row])
    return whole
