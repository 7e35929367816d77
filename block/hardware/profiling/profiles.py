"""Reading operator profiles: CSV files in Vidur's format, times in milliseconds, one row a shape.

Every reader returns the medians in seconds, per layer and GPU, and raises ValueError in one line if a file or a column
is missing, or if no row has the wanted degree of tensor parallelism.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from block.core.arrays import Floats

# Token-wise operators of one layer, as Vidur sums them: it counts `add` once.
LAYER = (
    "input_layernorm",
    "attn_pre_proj",
    "attn_rope",
    "attn_post_proj",
    "post_attention_layernorm",
    "mlp_up_proj",
    "mlp_act",
    "mlp_down_proj",
    "add",
)
EMBEDDING = "emb"  # once a step


class Attention(NamedTuple):
    """Rows of prefill by (chunk, context), with the KV save of the chunk, and of decode by (batch, KV per sequence)."""

    chunk: Floats
    context: Floats
    prefill: Floats
    save: Floats
    batch: Floats
    kv: Floats
    decode: Floats


def read_operators(path: Path, tensor_parallel: int) -> tuple[Floats, dict[str, Floats]]:
    """Increasing token counts, float[n], and each operator's times at them (`LAYER` and `EMBEDDING`; NaN: none)."""
    rows = _rows(path, [_median(name) for name in (*LAYER, EMBEDDING)] + ["num_tokens"], tensor_parallel)
    rows = rows.groupby("num_tokens").median(numeric_only=True)
    return _floats(rows.index), {name: _floats(rows[_median(name)]) * 1e-3 for name in (*LAYER, EMBEDDING)}


def read_attention(path: Path, tensor_parallel: int) -> Attention:
    """The rows of an attention profile, as they are."""
    times = [_median(name) for name in ("attn_prefill", "attn_decode", "attn_kv_cache_save")]
    keys = ["is_prefill", "batch_size", "prefill_chunk_size", "kv_cache_size"]
    rows = _rows(path, times + keys, tensor_parallel)
    prefill = rows[rows["is_prefill"]]
    decode = rows[~rows["is_prefill"]]
    return Attention(
        chunk=_floats(prefill["prefill_chunk_size"]),
        context=_floats(prefill["kv_cache_size"]),
        prefill=_floats(prefill[times[0]]) * 1e-3,
        save=_floats(prefill[times[2]]) * 1e-3,
        batch=_floats(decode["batch_size"]),
        kv=_floats(decode["kv_cache_size"]),
        decode=_floats(decode[times[1]]) * 1e-3,
    )


def read_all_reduce(path: Path, workers: int) -> tuple[Floats, Floats]:
    """Bytes (increasing) and the time of an all-reduce of them over `workers` GPUs."""
    rows = _rows(path, ["size", _median("all_reduce")], workers, "num_workers")
    rows = rows.groupby("size").median(numeric_only=True)
    return _floats(rows.index), _floats(rows[_median("all_reduce")]) * 1e-3


def _rows(path: Path, columns: list[str], parallel: int, key: str = "num_tensor_parallel_workers") -> pd.DataFrame:
    try:
        rows = pd.read_csv(path)
    except OSError as error:
        raise ValueError(f"profile {path}: {error.strerror}") from error
    except (ValueError, pd.errors.ParserError) as error:
        raise ValueError(f"profile {path}: not a CSV file ({' '.join(str(error).split())})") from error
    missing = [column for column in (*columns, key) if column not in rows]
    if missing:
        raise ValueError(f"profile {path}: no column {', '.join(missing)}")
    chosen = rows[rows[key] == parallel]
    if chosen.empty:
        raise ValueError(f"profile {path}: no row with {key}={parallel}, choose from {sorted(set(rows[key]))}")
    return chosen


def _median(operator: str) -> str:
    return f"time_stats.{operator}.median"


def _floats(column: pd.Series[float] | pd.Index[float]) -> Floats:
    return np.asarray(column, dtype=np.float64)
