"""From operator profiles to a LatencyModel: read, repair, sum over the layers, and tell the error on held-out rows."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from block.core.arrays import Floats
from block.engine.latency import LatencyModel, table
from block.hardware.catalogue import GPU, Model
from block.hardware.profiling.attention import LayerAttention, fit_attention, possible_rows
from block.hardware.profiling.errors import RelativeError, held_out, relative_error
from block.hardware.profiling.profiles import EMBEDDING, LAYER, read_all_reduce, read_attention, read_operators
from block.hardware.profiling.repair import Repair, impossible, operator_floor, repair
from block.hardware.profiling.transfer import Points, transfer
from block.hardware.roofline import BANDWIDTH_EFFICIENCY, KERNEL, roofline

BEYOND = 2  # the table goes this many times as far as the profile
MOST_IMPOSSIBLE = 0.1  # of an attention profile's rows: with more of them, the others are not believed either
SMOOTHING = 9  # rows of the running median over the all-reduce times, which jump between two modes
SIGNIFICANT = 4  # digits of the errors and times told to people


@dataclass(frozen=True, eq=False)
class Profile:
    """Where the profiles of one pair of GPU and model lie.

    attention may be None if `points` of it and the profile of another model on the same GPU (`kin`, `kin_attention`)
    are given. all_reduce is needed if the model is tensor parallel.
    """

    gpu: GPU
    model: Model
    operators: Path
    attention: Path | None = None
    all_reduce: Path | None = None
    kin: Model | None = None
    kin_attention: Path | None = None
    points: Points | None = None


@dataclass(frozen=True, eq=False)
class ProfileFit:
    """A latency model with what was repaired, the errors by operator, and what else a reader must know."""

    model: LatencyModel
    repairs: list[Repair]
    errors: dict[str, RelativeError]
    notes: list[str]


def fit_profile(profile: Profile) -> ProfileFit:
    """Fit a latency model to the profile; ValueError in one line if a file is missing or cannot be used."""
    gpu, model = profile.gpu, profile.model
    tokens, operators = read_operators(profile.operators, model.tensor_parallel)
    repairs: list[Repair] = []
    errors: dict[str, RelativeError] = {}
    notes: list[str] = []
    layer = np.zeros_like(tokens)
    for name in LAYER:
        floor = operator_floor(gpu, model, name, tokens)
        seconds, replaced = repair(name, tokens, operators[name], floor)
        errors[name] = _interpolation_error(tokens, operators[name], floor)
        repairs += replaced
        layer += seconds
    embedding, replaced = repair(EMBEDDING, tokens, operators[EMBEDDING], np.zeros_like(tokens))
    errors[EMBEDDING] = _interpolation_error(tokens, operators[EMBEDDING], np.zeros_like(tokens))
    repairs += replaced

    if model.tensor_parallel > 1:
        if profile.all_reduce is None:
            raise ValueError(f"model={model.name} with tensor_parallel={model.tensor_parallel} needs all_reduce.csv")
        size, seconds = read_all_reduce(profile.all_reduce, model.tensor_parallel)
        train, test = held_out(len(size))
        predicted = np.interp(size[test], size[train], _running_median(seconds[train]))
        errors["all_reduce"] = relative_error(predicted, seconds[test])
        sent = tokens * model.hidden_size * model.dtype_bytes
        layer += 2 * np.interp(sent, size, _running_median(seconds))

    attention, said = _attention(profile)
    notes += said
    if attention is None:
        skeleton = roofline(gpu, model)
        save = KERNEL + 2 * model.kv_bytes * tokens / (gpu.bandwidth * 1e9 * BANDWIDTH_EFFICIENCY)
    else:
        errors |= attention.errors
        skeleton = attention.model(np.zeros(3), model.layers)
        save = attention.save[0] + attention.save[1] * tokens
    total = model.layers * (layer + save) + embedding
    head = model.head_weights * model.dtype_bytes / (gpu.bandwidth * 1e9 * BANDWIDTH_EFFICIENCY)
    notes.append(
        f"not profiled and not added: output projection ({head * 1e3:.1f} ms by roofline), sampling, scheduling"
    )
    source = {
        "gpu": gpu.name,
        "model": model.name,
        "tensor_parallel": model.tensor_parallel,
        "model_numbers": model.numbers,
        "method": "operator profiles, per-layer medians summed over the layers",
        "profiled_tokens": int(tokens[-1]),
        "notes": notes,
        "errors": {name: [error.rows, _short(error.median), _short(error.p95)] for name, error in errors.items()},
        "repairs": _by_operator(repairs),
    }
    return ProfileFit(replace(skeleton, linear=_extended(tokens, total), source=source), repairs, errors, notes)


def _attention(profile: Profile) -> tuple[LayerAttention | None, list[str]]:
    """The attention of a layer, or None where only the roofline is left; and what to say about it."""
    gpu, model = profile.gpu, profile.model
    if profile.attention is not None:
        rows, share = possible_rows(read_attention(profile.attention, model.tensor_parallel), gpu, model)
        if share <= MOST_IMPOSSIBLE:
            return fit_attention(rows), [f"attention: {share:.1%} of the profile's rows are impossible and left out"]
        return None, [
            f"attention: {share:.1%} of the profile's rows are faster than the hardware allows, so that none is "
            "believed: decode, prefill and KV save are the roofline's"
        ]
    if profile.kin is None or profile.kin_attention is None or profile.points is None:
        raise ValueError(f"gpu={gpu.name} model={model.name}: no attention profile, and no kin and points in its place")
    rows, _ = possible_rows(read_attention(profile.kin_attention, profile.kin.tensor_parallel), gpu, profile.kin)
    kin = fit_attention(rows)
    said = f"attention: no profile; from {profile.kin.name} on the same GPU by heads and KV bytes, and from points"
    return transfer(kin, profile.kin, model, profile.points), [said, f"points: {profile.points.source}"]


def _interpolation_error(tokens: Floats, seconds: Floats, floor: Floats) -> RelativeError:
    """Error at possible rows that are held out, of the line between the others."""
    good = np.array(sorted(set(range(len(tokens))) - set(impossible(seconds, floor))))
    train, test = held_out(len(good))
    predicted = np.interp(tokens[good[test]], tokens[good[train]], seconds[good[train]])
    return relative_error(predicted, seconds[good[test]])


def _running_median(values: Floats) -> Floats:
    padded = np.pad(values, SMOOTHING // 2, mode="edge")
    return np.asarray(np.median(np.lib.stride_tricks.sliding_window_view(padded, SMOOTHING), axis=1))


def _extended(tokens: Floats, seconds: Floats) -> Floats:
    """The table through the profile's rows, and beyond them by the slope of their second half."""
    half = int(np.searchsorted(tokens, tokens[-1] / 2))
    slope = (seconds[-1] - seconds[half]) / (tokens[-1] - tokens[half])
    end = tokens[-1] * BEYOND
    return table(np.append(tokens, end), np.append(seconds, seconds[-1] + slope * (end - tokens[-1])))


def _by_operator(repairs: list[Repair]) -> dict[str, dict[str, list[float | None]]]:
    """Compact for the tracked file: operator → tokens → [measured, repaired] in microseconds (null: no time)."""
    listed: dict[str, dict[str, list[float | None]]] = {}
    for row in repairs:
        measured = None if np.isnan(row.measured) else _short(row.measured * 1e6)
        listed.setdefault(row.operator, {})[str(row.tokens)] = [measured, _short(row.repaired * 1e6)]
    return listed


def _short(value: float) -> float:
    return float(f"{value:.{SIGNIFICANT}g}")
