"""Attention of one layer, fitted to a profile: a prefill grid, a decode law with its wave factors, the KV save."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from block.core.arrays import Floats, Ints
from block.engine.latency import LatencyModel, decode_time, prefill_time
from block.hardware.catalogue import GPU, Model
from block.hardware.profiling.errors import RelativeError, held_out, relative_error
from block.hardware.profiling.profiles import Attention

CHUNKS = np.concatenate(
    [np.arange(32, 321, 32), [384, 448, 512, 640, 768, 896, 1024, 1280, 1536, 1792, 2048, 2560, 3072, 3584, 4096]]
).astype(np.float64)
CONTEXTS = np.array([0, 64, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 2560, 3072, 4032], dtype=np.float64)
ROUNDS = 100  # of alternating between the affine law and the wave factors: the times then change by less than 1e-7


@dataclass(frozen=True, eq=False)
class LayerAttention:
    """Seconds of one layer on one GPU.

    prefill: float[CHUNKS, CONTEXTS]; decode: (base, per sequence, per KV token) before the factor `waves[sequences]`;
    save: (base, per token) of writing the KV cache; errors on held-out rows by operator.
    """

    prefill: Floats
    decode: tuple[float, float, float]
    waves: Floats
    save: tuple[float, float]
    errors: dict[str, RelativeError] = field(default_factory=dict)

    def model(self, linear: Floats, layers: int = 1) -> LatencyModel:
        """A latency model of `layers` such layers around the given `linear` table."""
        base, per_sequence, per_kv = self.decode
        return LatencyModel(
            linear=linear,
            decode_base=layers * base,
            decode_per_sequence=layers * per_sequence,
            decode_per_kv=layers * per_kv,
            prefill_chunks=CHUNKS,
            prefill_contexts=CONTEXTS,
            prefill=layers * self.prefill,
            decode_waves=self.waves,
        )


def possible_rows(profile: Attention, gpu: GPU, model: Model) -> tuple[Attention, float]:
    """The profile without the rows that cannot be true, and their share.

    Those have no time, or are faster than the data sheet allows for reading the KV or for the causal half's FLOPs.
    """
    bandwidth, flops = gpu.bandwidth * 1e9, gpu.tflops * 1e12
    width = model.heads * model.head_dim / model.tensor_parallel
    compute = 4 * profile.chunk * (profile.context + profile.chunk / 2) * width / flops
    floor = np.maximum(compute, (profile.context + profile.chunk) * model.kv_bytes / bandwidth)
    prefill = profile.prefill >= floor
    decode = profile.decode >= profile.batch * profile.kv * model.kv_bytes / bandwidth
    kept = Attention(*(column[prefill] for column in profile[:4]), *(column[decode] for column in profile[4:]))
    return kept, float(1 - np.mean(np.concatenate([prefill, decode])))


def fit_attention(profile: Attention) -> LayerAttention:
    """Fit every row; the errors are those of a fit without the held-out rows, on these."""
    train, test = held_out(len(profile.prefill))
    train_decode, test_decode = held_out(len(profile.decode))
    trial = _fit(profile, train, train_decode)
    packed = trial.model(np.zeros(3)).pack()
    prefill = [prefill_time(packed, int(profile.chunk[i]), int(profile.context[i])) for i in test]
    totals = profile.batch * profile.kv
    decode = [decode_time(packed, int(profile.batch[i]), int(totals[i])) for i in test_decode]
    save = trial.save[0] + trial.save[1] * profile.chunk[test]
    errors = {
        "attn_kv_cache_save": relative_error(save, profile.save[test]),
        "attn_prefill": relative_error(np.array(prefill), profile.prefill[test]),
        "attn_decode": relative_error(np.array(decode), profile.decode[test_decode]),
    }
    whole = _fit(profile, np.arange(len(profile.prefill)), np.arange(len(profile.decode)))
    return LayerAttention(whole.prefill, whole.decode, whole.waves, whole.save, errors)


def _fit(profile: Attention, prefill: Ints, decode: Ints) -> LayerAttention:
    law, waves = _decode_law(profile.batch[decode], profile.kv[decode], profile.decode[decode])
    chunk, save = profile.chunk[prefill], profile.save[prefill]
    base, per_token = _relative_least_squares(np.column_stack([np.ones_like(chunk), chunk]), save)
    grid = _grid(chunk, profile.context[prefill], profile.prefill[prefill])
    return LayerAttention(grid, law, waves, (float(base), float(per_token)))


def _decode_law(batch: Floats, kv: Floats, seconds: Floats) -> tuple[tuple[float, float, float], Floats]:
    """Least squares of the relative error: an affine law in (batch, ΣKV), and each batch's factor, with median 1."""
    terms = np.column_stack([np.ones_like(batch), batch, batch * kv])
    sequences = batch.astype(np.int64)
    known = np.unique(sequences)
    waves = np.ones(int(known[-1]) + 1)
    law = _relative_least_squares(terms, seconds)
    for _ in range(ROUNDS):
        ratio = seconds / (terms @ law)
        factors = np.array([np.median(ratio[sequences == n]) for n in known])
        waves = np.interp(np.arange(len(waves)), known, factors / np.median(factors))
        law = _relative_least_squares(terms * waves[sequences][:, None], seconds)
    return (float(law[0]), float(law[1]), float(law[2])), waves


def _relative_least_squares(terms: Floats, seconds: Floats) -> Floats:
    """The coefficients that minimize the sum of (terms @ coefficients / seconds − 1)²."""
    return np.asarray(np.linalg.lstsq(terms / seconds[:, None], np.ones_like(seconds), rcond=None)[0])


def _grid(chunk: Floats, context: Floats, seconds: Floats) -> Floats:
    """The rows on CHUNKS × CONTEXTS: linear in the context for each profiled chunk, then linear between chunks.

    A chunk profiled without context borrows its growth with the context from the nearest chunk that was, in proportion
    to the chunk where it is the larger one.
    """
    lines: dict[float, Floats] = {}
    starts: dict[float, float] = {}
    for size in np.unique(chunk):
        rows = chunk == size
        contexts = np.unique(context[rows])
        times = np.array([np.median(seconds[rows & (context == at)]) for at in contexts])
        starts[float(size)] = float(times[0])
        if len(contexts) > 1:
            slope = (times[-1] - times[0]) / (contexts[-1] - contexts[0])
            beyond = np.maximum(CONTEXTS - contexts[-1], 0.0)
            lines[float(size)] = np.interp(CONTEXTS, contexts, times) + slope * beyond
    if not lines:
        raise ValueError("attention profile: no prefill chunk was profiled with more than one context")
    full = np.array(sorted(lines))
    for size, start in starts.items():
        if size not in lines:
            lender = float(full[np.argmin(np.abs(full - size))])
            lines[size] = start + (lines[lender] - lines[lender][0]) * max(1.0, size / lender)
    sizes = np.array(sorted(lines))
    values = np.array([lines[float(size)] for size in sizes])
    return np.column_stack([np.interp(CHUNKS, sizes, column) for column in values.T])
