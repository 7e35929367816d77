"""LatencyModel: how long one engine step takes.

    step = linear[tokens] + decode(sequences, ΣKV) + Σ prefill[chunk, context]

- ``linear[t]``: everything that depends only on the number of tokens `t` in the step, for all layers, plus the fixed
  overhead of a step (launch, sampling, scheduling, all-reduce).
- ``decode``: attention of the decoding sequences, affine in their number and in the total of their KV tokens, times a
  factor of their number (a GPU whose last wave of thread blocks is nearly empty is slower). For a constant number it is
  affine in ΣKV, so the time of a run of decode steps has a closed form.
- ``prefill``: attention of one prompt chunk over `context` earlier tokens, bilinear between the knots of a grid.

A model is one flat float array (`latency_params`), so that compiled code takes it as one argument. On disk it is a
small JSON file that holds `linear` by its knots (it is piecewise linear).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from block.core.arrays import Floats, Int, Ints
from block.core.jit import Index, compiled

# Layout of `latency_params`: a header, the decode factors, the two knot vectors, the grid by rows (chunk), the times of
# chunks that begin a prompt, the linear table. The header says where what follows the factors begins.
_DECODE_BASE = 0
_DECODE_PER_SEQUENCE = 1
_DECODE_PER_KV = 2
_CHUNKS = 3
_CONTEXTS = 4
_GRID = 5
_FRESH = 6
_LINEAR = 7
_HEADER = 8

FORMAT = "block-latency/1"


@dataclass(frozen=True, eq=False)
class LatencyModel:
    """Step times of one GPU (or tensor-parallel group) running one model; every time in seconds.

    linear: float[max_tokens + 1], indexed by the tokens of a step (entry 0 is unused: an empty step takes no time).
    decode_base, decode_per_sequence, decode_per_kv: attention of a step that decodes, before its factor.
    decode_waves: the factor by the number of sequences, float[w] (entry 0 unused); beyond the last entry, the last.
    prefill_chunks, prefill_contexts: increasing knots, float[m] and float[n]; prefill: float[m, n].
    source: where the numbers come from, for people.
    ValueError in one line if the shapes do not fit together or a time is negative or not finite.
    """

    linear: Floats
    decode_base: float
    decode_per_sequence: float
    decode_per_kv: float
    prefill_chunks: Floats
    prefill_contexts: Floats
    prefill: Floats
    source: dict[str, Any] = field(default_factory=dict)
    decode_waves: Floats = field(default_factory=lambda: np.ones(1))

    def __post_init__(self) -> None:
        m, n = len(self.prefill_chunks), len(self.prefill_contexts)
        if np.shape(self.prefill) != (m, n) or m < 2 or n < 2:
            raise ValueError(f"prefill has shape {np.shape(self.prefill)}, its knots want ({m}, {n}), at least (2, 2)")
        for name in ("prefill_chunks", "prefill_contexts"):
            if not np.all(np.diff(getattr(self, name)) > 0):
                raise ValueError(f"{name} must increase")
        if np.ndim(self.linear) != 1 or len(self.linear) < 3:
            raise ValueError(f"linear has shape {np.shape(self.linear)}, want (max_tokens + 1,) with max_tokens >= 2")
        if np.ndim(self.decode_waves) != 1 or len(self.decode_waves) < 1:
            raise ValueError(f"decode_waves has shape {np.shape(self.decode_waves)}, want at least one factor")
        for name in ("linear", "decode_base", "decode_per_sequence", "decode_per_kv", "decode_waves", "prefill"):
            values = np.asarray(getattr(self, name))
            if not np.all(np.isfinite(values) & (values >= 0)):
                raise ValueError(f"{name} holds a time that is negative or not finite")

    @property
    def max_tokens(self) -> int:
        """Largest number of tokens in a step that the model knows."""
        return len(self.linear) - 1

    def pack(self) -> Floats:
        """The model as the flat array that the compiled functions of this module read."""
        decode = [self.decode_base, self.decode_per_sequence, self.decode_per_kv]
        fresh = np.zeros(int(self.prefill_chunks[-1]) + 1)
        grid = [self.prefill_chunks, self.prefill_contexts, np.ravel(self.prefill)]
        tables = [self.decode_waves, *grid, fresh, self.linear]
        begins = _HEADER + np.cumsum([len(one) for one in tables[:-1]])
        packed = np.concatenate([np.asarray(part, dtype=np.float64) for part in (decode, begins, *tables)])
        _tabulate_fresh(packed)
        return packed

    def scaled(self, factor: float, overhead_s: float = 0.0) -> LatencyModel:
        """The same model with every time multiplied by `factor` and `overhead_s` added to each step."""
        return replace(
            self,
            linear=np.asarray(self.linear) * factor + overhead_s,
            decode_base=self.decode_base * factor,
            decode_per_sequence=self.decode_per_sequence * factor,
            decode_per_kv=self.decode_per_kv * factor,
            prefill=np.asarray(self.prefill) * factor,
        )

    def save(self, path: Path) -> None:
        """Write the model as JSON, times to six significant digits and `linear` by its knots."""
        tokens = _knots(np.asarray(self.linear))
        document = {
            "format": FORMAT,
            "source": self.source,
            "decode": {
                "base": _rounded(self.decode_base),
                "per_sequence": _rounded(self.decode_per_sequence),
                "per_kv": _rounded(self.decode_per_kv),
                "waves": _rounded(self.decode_waves),
            },
            "linear": {"tokens": tokens.tolist(), "seconds": _rounded(np.asarray(self.linear)[tokens])},
            "prefill": {
                "chunks": _rounded(self.prefill_chunks),
                "contexts": _rounded(self.prefill_contexts),
                "seconds": _rounded(self.prefill),
            },
        }
        lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in document.items()]
        path.write_text("{\n" + ",\n".join(lines) + "\n}\n")

    @staticmethod
    def load(path: Path) -> LatencyModel:
        """Read what `save` wrote; ValueError in one line if the file is missing or is not a latency model."""
        try:
            document = json.loads(path.read_text())
            if not isinstance(document, dict):
                raise ValueError("holds no JSON object")
            if document["format"] != FORMAT:
                raise ValueError(f"format is {document['format']!r}, want {FORMAT!r}")
            decode, linear, prefill = document["decode"], document["linear"], document["prefill"]
            return LatencyModel(
                linear=table(linear["tokens"], linear["seconds"]),
                decode_base=float(decode["base"]),
                decode_per_sequence=float(decode["per_sequence"]),
                decode_per_kv=float(decode["per_kv"]),
                prefill_chunks=np.asarray(prefill["chunks"], dtype=np.float64),
                prefill_contexts=np.asarray(prefill["contexts"], dtype=np.float64),
                prefill=np.asarray(prefill["seconds"], dtype=np.float64),
                decode_waves=np.asarray(decode["waves"], dtype=np.float64),
                source=dict(document["source"]),
            )
        except OSError as error:
            raise ValueError(f"latency model {path}: {error.strerror}") from error
        except KeyError as error:
            raise ValueError(f"latency model {path}: no {error} in it") from error
        except (TypeError, ValueError) as error:
            raise ValueError(f"latency model {path}: {' '.join(str(error).split())}") from error


def table(tokens: Sequence[float] | Floats, seconds: Sequence[float] | Floats) -> Floats:
    """The `linear` table through the knots (tokens[i], seconds[i]), up to the last one.

    Below the first knot its value holds. ValueError if the knots do not increase.
    """
    knots = np.asarray(tokens, dtype=np.float64)
    values = np.asarray(seconds, dtype=np.float64)
    if knots.ndim != 1 or knots.shape != values.shape or len(knots) < 2 or knots[0] < 1 or np.any(np.diff(knots) <= 0):
        raise ValueError("the knots of linear must be at least two increasing token counts from 1 on, with a time each")
    return np.interp(np.arange(int(knots[-1]) + 1), knots, values)


def _knots(linear: Floats) -> Ints:
    """The token counts at which the slope of the table changes, and its ends."""
    bends = np.abs(np.diff(linear[1:], n=2)) > 1e-10 * np.max(linear)
    return np.concatenate([[1], np.flatnonzero(bends) + 2, [len(linear) - 1]])


def _rounded(values: float | Floats) -> Any:
    """`values` to six significant digits, as JSON's numbers and nested lists."""
    if np.ndim(values) == 0:
        number = float(f"{float(values):.6g}")
        return int(number) if number.is_integer() else number
    return [_rounded(value) for value in np.asarray(values)]


@compiled
def linear_time(params: Floats, tokens: Int) -> float:
    """Token-wise operators and fixed overhead of a step of `tokens` tokens; beyond the table its last slope goes on."""
    entry = int(params[_LINEAR]) + tokens
    last = params.shape[0] - 1
    if entry <= last:
        return float(params[Index(entry)])
    slope = params[last] - params[last - 1]
    return float(params[last] + slope * (entry - last))


@compiled
def decode_wave(params: Floats, sequences: Int) -> float:
    """The factor on the decode attention of `sequences` sequences."""
    return float(params[Index(min(_HEADER + sequences, int(params[_CHUNKS]) - 1))])


@compiled
def decode_time(params: Floats, sequences: Int, kv_tokens: Int) -> float:
    """Attention of `sequences` decoding sequences that together read `kv_tokens` tokens of KV; 0 for none."""
    if sequences == 0:
        return 0.0
    affine = params[_DECODE_BASE] + params[_DECODE_PER_SEQUENCE] * sequences + params[_DECODE_PER_KV] * kv_tokens
    return float(affine * decode_wave(params, sequences))


@compiled
def step_duration(params: Floats, tokens: Int, decodes: Int, decode_kv: Int, prefill: float) -> float:
    """Seconds of a step of `tokens` tokens; 0 if there are none.

    decodes, decode_kv: its decoding sequences, and the tokens of KV that they read together. prefill: the attention of
    its prompt chunks, `prefill_time` summed.
    """
    if tokens == 0:
        return 0.0
    return linear_time(params, tokens) + decode_time(params, decodes, decode_kv) + prefill


@compiled
def decode_run_time(params: Floats, sequences: Int, kv_tokens: Int, steps: Int) -> float:
    """Total time of `steps` consecutive steps in which the same `sequences` > 0 sequences decode and nothing else runs.

    `kv_tokens` is the total context of the first step; each step adds a token to every sequence.
    """
    first = linear_time(params, sequences) + decode_time(params, sequences, kv_tokens)
    growth = params[_DECODE_PER_KV] * decode_wave(params, sequences) * sequences
    return float(steps * first + growth * (0.5 * steps * (steps - 1)))


@compiled
def prefill_time(params: Floats, chunk: Int, context: Int) -> float:
    """Attention of a prompt chunk of `chunk` tokens over `context` earlier ones, clamped to the grid's last cells."""
    entry = int(params[_FRESH]) + chunk
    if context == 0 and entry < int(params[_LINEAR]):
        return float(params[Index(entry)])
    return _interpolated(params, chunk, context)


@compiled
def _tabulate_fresh(params: Floats) -> None:
    """Fill in the times of chunks that begin a prompt, which `prefill_time` is mostly asked for."""
    begin = int(params[_FRESH])
    for chunk in range(int(params[_LINEAR]) - begin):
        params[begin + chunk] = _interpolated(params, chunk, 0)


@compiled
def _interpolated(params: Floats, chunk: Int, context: Int) -> float:
    chunks = int(params[_CHUNKS])
    contexts = int(params[_CONTEXTS])
    grid = int(params[_GRID])
    m = contexts - chunks
    n = grid - contexts
    i = 0
    while i < m - 2 and params[Index(chunks + i + 1)] < chunk:
        i += 1
    j = 0
    while j < n - 2 and params[Index(contexts + j + 1)] < context:
        j += 1
    row = Index(chunks + i)
    column = Index(contexts + j)
    u = (chunk - params[row]) / (params[row + Index(1)] - params[row])
    v = (context - params[column]) / (params[column + Index(1)] - params[column])
    u = max(u, 0.0)  # below the first knot: its value; above the last: extrapolated along the last cell
    v = max(v, 0.0)
    at = Index(grid + i * n + j)
    above = Index(grid + (i + 1) * n + j)
    low = params[at] * (1.0 - v) + params[at + Index(1)] * v
    high = params[above] * (1.0 - v) + params[above + Index(1)] * v
    return float(low * (1.0 - u) + high * u)
