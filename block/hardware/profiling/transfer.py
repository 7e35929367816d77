"""Attention of a model that was not profiled, from another model's on the same GPU and a few measured points."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from block.core.arrays import Floats
from block.hardware.catalogue import Model
from block.hardware.profiling.attention import CHUNKS, CONTEXTS, LayerAttention
from block.hardware.profiling.errors import relative_error


@dataclass(frozen=True, eq=False)
class Points:
    """Measured points of one layer's attention, seconds.

    prefill: `prefill_seconds` of one `prefill_chunk` by `prefill_contexts`. decode: `decode_seconds` by
    `decode_batches`, every sequence with `decode_kv` tokens of `decode_kv_bytes` each on the measured GPU.
    """

    prefill_chunk: int
    prefill_contexts: Floats
    prefill_seconds: Floats
    decode_batches: Floats
    decode_kv: int
    decode_kv_bytes: int
    decode_seconds: Floats
    source: str


# The paper's artifact holds a 13.8 MB attention profile of Llama-2-7B on the A30 (FlashInfer); these are points of it.
# The decode points are of the model cut over 8 GPUs: 4 KV heads × 128 × 2 (K and V) × 2 bytes a token.
LLAMA2_7B_A30 = Points(
    prefill_chunk=64,
    prefill_contexts=np.array([0, 64, 128, 256, 512, 1024, 1536, 2048, 2304, 2560, 2816], dtype=np.float64),
    prefill_seconds=np.array([153, 157, 500, 517, 605, 739, 932, 1037, 1102, 1151, 1214]) * 1e-7,
    decode_batches=np.array([79, 84, 96, 112, 120, 128], dtype=np.float64),
    decode_kv=4032,
    decode_kv_bytes=2048,
    decode_seconds=np.array([7812, 8275, 9591, 10867, 11962, 12469]) * 1e-7,
    source="Block artifact, A30 attention profile of Llama-2-7B: 11 prefill points (TP 1) and 6 decode points (TP 8)",
)


def transfer(fitted: LayerAttention, profiled: Model, model: Model, points: Points) -> LayerAttention:
    """Attention of `model` on the GPU on which `fitted` was measured with the model `profiled`.

    Decode keeps the kernel's base and per-sequence times and takes the bytes' time from the points: it is bound by
    bandwidth, and with this many KV heads it fills the GPU, so the wave factors go. Prefill scales with the query
    heads; what the points take more or less than that is the KV's reading, the same for every chunk. The KV save scales
    with the KV's bytes.
    """
    base, per_sequence, _ = fitted.decode
    bytes_read = points.decode_batches * points.decode_kv * points.decode_kv_bytes
    overhead = base + per_sequence * points.decode_batches
    per_byte = _slope(bytes_read, points.decode_seconds - overhead)

    scaled = fitted.prefill * (model.heads / model.tensor_parallel) / (profiled.heads / profiled.tensor_parallel)
    at_points = _at(scaled, points.prefill_chunk, points.prefill_contexts)
    extra = points.prefill_seconds - at_points

    kept, left = slice(0, None, 2), slice(1, None, 2)  # every other point is held out
    decode = overhead[left] + bytes_read[left] * _slope(bytes_read[kept], points.decode_seconds[kept] - overhead[kept])
    contexts = points.prefill_contexts
    prefill = at_points[left] + np.interp(contexts[left], contexts[kept], extra[kept])
    errors = {
        "attn_kv_cache_save": fitted.errors["attn_kv_cache_save"],
        "attn_prefill": relative_error(prefill, points.prefill_seconds[left]),
        "attn_decode": relative_error(decode, points.decode_seconds[left]),
    }
    return LayerAttention(
        prefill=np.maximum(scaled + _line_through(contexts, extra, CONTEXTS), 0.0),
        decode=(base, per_sequence, per_byte * model.kv_bytes),
        waves=np.ones(1),
        save=(fitted.save[0], fitted.save[1] * model.kv_bytes / profiled.kv_bytes),
        errors=errors,
    )


def _slope(x: Floats, y: Floats) -> float:
    """The line through the origin nearest to the points."""
    return float(x @ y / (x @ x))


def _at(grid: Floats, chunk: int, contexts: Floats) -> Floats:
    """The grid's row of one chunk, at any contexts."""
    row = [np.interp(chunk, CHUNKS, column) for column in grid.T]
    return np.asarray(np.interp(contexts, CONTEXTS, row))


def _line_through(x: Floats, y: Floats, at: Floats) -> Floats:
    """The points joined by lines; past the last, the slope of the second half goes on."""
    half = len(x) // 2
    slope = (y[-1] - y[half]) / (x[-1] - x[half])
    return np.asarray(np.interp(at, x, y) + slope * np.maximum(at - x[-1], 0.0))
