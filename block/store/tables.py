"""The tables of a run as columns: from records and decisions to numpy arrays, and from those to Arrow."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence, Sized
from itertools import chain
from operator import attrgetter
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import ArrayLike, NDArray

from block.core.types import Decision, RequestRecord


def request_columns(records: Sequence[RequestRecord]) -> dict[str, NDArray[Any]]:
    """The request table as numpy columns, a row per record. Times are seconds, NaN where they never came.

    `output_tokens` counts the tokens generated; forecasts are seconds from the decision, NaN where there was none.
    `preemptions` are NaN where they are not known.
    """

    def column(kind: type[np.generic], name: str, of: Sequence[Any]) -> NDArray[Any]:
        return np.fromiter(map(attrgetter(name), of), kind, len(of))

    requests = [record.request for record in records]
    unknown = (math.nan, math.nan)
    times = chain.from_iterable(record.forecast or unknown for record in records)
    forecasts = np.fromiter(times, np.float64, 2 * len(records)).reshape(-1, 2)
    return {
        "request_id": column(np.int64, "id", requests),
        "instance_id": column(np.int64, "instance_id", records),
        "arrival": column(np.float64, "arrival", requests),
        "dispatched": column(np.float64, "dispatched", records),
        "first_token": column(np.float64, "first_token", records),
        "finished": column(np.float64, "finished", records),
        "prompt_tokens": column(np.int64, "prompt_tokens", requests),
        "output_tokens": column(np.int64, "output_tokens", records),
        "predicted_output_tokens": column(np.int64, "predicted_output_tokens", requests),
        "forecast_ttft": forecasts[:, 0],
        "forecast_e2e": forecasts[:, 1],
        "status": np.array([record.status for record in records], dtype=np.str_),
        "preemptions": np.array([record.preemptions for record in records], dtype=np.float64),
        "retries": column(np.int64, "retries", records),
        "error": np.array([record.error or "" for record in records], dtype=np.str_),
        "cached_tokens": column(np.int64, "cached_tokens", records),
    }


def requests_table(columns: Mapping[str, NDArray[Any]]) -> pa.Table:
    """The table of `request_columns`; a time that never came is null, and so are preemptions that are not known."""
    arrays = {name: _array(column) for name, column in columns.items()}
    return pa.table({**arrays, "preemptions": arrays["preemptions"].cast(pa.int64())})


def decisions_table(rows: Collection[tuple[float, Decision, int]]) -> pa.Table:
    """A row per (time, decision, request id); `scores[i]` belongs to `candidates[i]`, `fallback` may be null."""
    decisions = [decision for _, decision, _ in rows]
    return pa.table(
        {
            "request_id": _array(np.fromiter((request for _, _, request in rows), np.int64, len(rows))),
            "time": _array(np.fromiter((time for time, _, _ in rows), np.float64, len(rows))),
            "chosen": _array(np.fromiter((decision.instance_id for decision in decisions), np.int64, len(rows))),
            "candidates": _lists([decision.candidates for decision in decisions], np.int32),
            "scores": _lists([decision.scores for decision in decisions], np.float64),
            "fallback": _strings([decision.fallback for decision in decisions]),
        }
    )


def tokens_table(records: Sequence[RequestRecord]) -> pa.Table | None:
    """A row per request whose token times are known; None if there is none."""
    known = [record for record in records if record.token_times is not None]
    if not known:
        return None
    times = [record.token_times or [] for record in known]
    ids = np.fromiter((record.request.id for record in known), np.int64, len(known))
    return pa.table({"request_id": _array(ids), "token_times": _lists(times, np.float64)})


def series_table(columns: Mapping[str, ArrayLike]) -> pa.Table:
    """A table of equally long columns; raises ValueError naming the first whose length differs."""
    arrays = {name: _array(np.asarray(column)) for name, column in columns.items()}
    for name, array in arrays.items():
        if len(array) != len(first := next(iter(arrays.values()))):
            raise ValueError(f"instances: column {name!r} has {len(array)} rows, the others {len(first)}")
    return pa.table(arrays)


# Columns are handed over as buffers because pa.array() imports pandas, a third of a second that a run need not pay.


def _array(values: NDArray[Any]) -> pa.Array:
    """A column of numbers, truth values or strings; NaN becomes null."""
    if values.dtype.kind in "UO":
        return _strings(values.tolist())
    if values.ndim != 1:
        raise ValueError(f"a column has one dimension, not shape {values.shape}")
    if values.dtype.kind == "b":
        return pa.Array.from_buffers(pa.bool_(), len(values), [None, _bits(values)])
    values = np.ascontiguousarray(values)
    return pa.Array.from_buffers(
        pa.from_numpy_dtype(values.dtype), len(values), [_validity(~np.isnan(values)), pa.py_buffer(values)]
    )


def _strings(values: Sequence[str | None]) -> pa.StringArray:
    data = [b"" if value is None else value.encode() for value in values]
    valid = np.fromiter((value is not None for value in values), np.bool_, len(values))
    return pa.StringArray.from_buffers(
        len(values), pa.py_buffer(_offsets(data)), pa.py_buffer(b"".join(data)), _validity(valid)
    )


def _lists(rows: Sequence[Sequence[float]], dtype: type[np.generic]) -> pa.ListArray:
    offsets = _offsets(rows)
    values = np.fromiter(chain.from_iterable(rows), dtype, int(offsets[-1]))
    return pa.ListArray.from_arrays(_array(offsets), _array(values))


def _offsets(rows: Sequence[Sized]) -> NDArray[np.int32]:
    """Where each row begins once they lie end to end, and where the last one ends."""
    offsets = np.zeros(len(rows) + 1, np.int32)
    np.cumsum(np.fromiter(map(len, rows), np.int32, len(rows)), out=offsets[1:])
    return offsets


def _bits(flags: NDArray[np.bool_]) -> pa.Buffer:
    return pa.py_buffer(np.packbits(flags, bitorder="little"))


def _validity(valid: NDArray[np.bool_]) -> pa.Buffer | None:
    return None if valid.all() else _bits(valid)
