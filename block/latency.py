"""LatencyModel: how long one engine step takes.

    step = linear[tokens] + decode(batch, ΣKV) + Σ prefill[chunk, context]

- ``linear[t]``: everything that depends only on the number of tokens `t` in the step, for all layers, plus the fixed
  overhead of a step (launch, sampling, scheduling, all-reduce).
- ``decode``: attention of the decoding sequences, affine in their number and in the total of their KV tokens, so the time
  of a run of decode steps has a closed form.
- ``prefill``: attention of one prompt chunk over `context` earlier tokens, bilinear between the knots of a grid.

A model is one flat float array (`packed`), so that compiled code takes it as one argument.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from block.compiled import compiled
from block.types import Floats

# Layout of `packed`: a header, the two knot vectors, the grid by rows (chunk), the linear table.
_DECODE_BASE = 0
_DECODE_PER_SEQUENCE = 1
_DECODE_PER_KV = 2
_CHUNKS = 3
_CONTEXTS = 4
_HEADER = 5


@dataclass(frozen=True)
class LatencyModel:
    """Step times of one GPU (or tensor-parallel group) running one model; every time in seconds.

    linear: float[max_tokens + 1], indexed by the tokens of a step (entry 0 is unused: an empty step takes no time).
    decode_base, decode_per_sequence, decode_per_kv: attention of a step that decodes.
    prefill_chunks, prefill_contexts: increasing knots, float[m] and float[n]; prefill: float[m, n].
    source: where the numbers come from, for people.
    """

    linear: Floats
    decode_base: float
    decode_per_sequence: float
    decode_per_kv: float
    prefill_chunks: Floats
    prefill_contexts: Floats
    prefill: Floats
    source: dict[str, Any] = field(default_factory=dict)

    @property
    def max_tokens(self) -> int:
        """Largest number of tokens in a step that the model knows."""
        return len(self.linear) - 1

    def pack(self) -> Floats:
        """The model as the flat array that the compiled functions of this module read."""
        header = [
            self.decode_base,
            self.decode_per_sequence,
            self.decode_per_kv,
            float(len(self.prefill_chunks)),
            float(len(self.prefill_contexts)),
        ]
        parts = [header, self.prefill_chunks, self.prefill_contexts, np.ravel(self.prefill), self.linear]
        return np.concatenate([np.asarray(part, dtype=np.float64) for part in parts])

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
        """Write the model as JSON."""
        raise NotImplementedError

    @staticmethod
    def load(path: Path) -> LatencyModel:
        """Read what `save` wrote; ValueError in one line if the file is not a latency model."""
        return LatencyModel(**json.loads(path.read_text()))


@compiled
def linear_time(packed: Floats, tokens: int) -> float:
    """Token-wise operators and fixed overhead of a step with `tokens` tokens; beyond the table, linear extrapolation."""
    m = int(packed[_CHUNKS])
    n = int(packed[_CONTEXTS])
    table = _HEADER + m + n + m * n
    last = packed.shape[0] - 1
    if table + tokens <= last:
        return packed[table + tokens]
    slope = packed[last] - packed[last - 1]
    return packed[last] + slope * (table + tokens - last)


@compiled
def decode_time(packed: Floats, sequences: int, kv_tokens: int) -> float:
    """Attention of `sequences` decoding sequences that together read `kv_tokens` tokens of KV; 0 for none."""
    if sequences == 0:
        return 0.0
    return packed[_DECODE_BASE] + packed[_DECODE_PER_SEQUENCE] * sequences + packed[_DECODE_PER_KV] * kv_tokens


@compiled
def decode_run_time(packed: Floats, sequences: int, kv_tokens: int, steps: int) -> float:
    """Total time of `steps` consecutive steps in which the same `sequences` > 0 sequences decode and nothing else runs.

    `kv_tokens` is the total context of the first step; each step adds a token to every sequence.
    """
    first = linear_time(packed, sequences) + decode_time(packed, sequences, kv_tokens)
    growth = packed[_DECODE_PER_KV] * sequences
    return steps * first + growth * (0.5 * steps * (steps - 1))


@compiled
def prefill_time(packed: Floats, chunk: int, context: int) -> float:
    """Attention of a prompt chunk of `chunk` tokens over `context` earlier ones, clamped to the grid's last cells."""
    m = int(packed[_CHUNKS])
    n = int(packed[_CONTEXTS])
    chunks = _HEADER
    contexts = chunks + m
    grid = contexts + n
    i = 0
    while i < m - 2 and packed[chunks + i + 1] < chunk:
        i += 1
    j = 0
    while j < n - 2 and packed[contexts + j + 1] < context:
        j += 1
    u = (chunk - packed[chunks + i]) / (packed[chunks + i + 1] - packed[chunks + i])
    v = (context - packed[contexts + j]) / (packed[contexts + j + 1] - packed[contexts + j])
    u = max(u, 0.0)  # below the first knot: its value; above the last: extrapolated along the last cell
    v = max(v, 0.0)
    at = grid + i * n + j
    low = packed[at] * (1.0 - v) + packed[at + 1] * v
    high = packed[at + n] * (1.0 - v) + packed[at + n + 1] * v
    return low * (1.0 - u) + high * u
