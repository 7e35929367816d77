"""What a run achieved, and several: pure functions on the columns of a request table, and on numbers of runs.

TTFT = first token − arrival; E2E = last token − arrival; TPOT = (last token − first token) / (response tokens − 1), for
responses of two tokens or more. Only requests with status "ok" count. A number that does not exist (no such request,
nothing measured) is None, never NaN and never filled in.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

# Two-sided 95 % quantiles of Student's t, by degrees of freedom from 1.
_T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)

Columns = Mapping[str, NDArray[Any]]
Summary = dict[str, float | int | None]


def ttft(columns: Columns) -> NDArray[np.float64]:
    """Seconds from arrival to the first token, a value per row."""
    return np.asarray(columns["first_token"] - columns["arrival"], dtype=np.float64)


def e2e(columns: Columns) -> NDArray[np.float64]:
    """Seconds from arrival to the last token, a value per row."""
    return np.asarray(columns["finished"] - columns["arrival"], dtype=np.float64)


def tpot(columns: Columns) -> NDArray[np.float64]:
    """Seconds per token after the first, a value per row with two response tokens or more (the others are left out)."""
    more = columns["output_tokens"] > 1
    seconds = columns["finished"][more] - columns["first_token"][more]
    return np.asarray(seconds / (columns["output_tokens"][more] - 1), dtype=np.float64)


def e2e_error(columns: Columns) -> NDArray[np.float64]:
    """|forecast − actual| / actual of E2E, a value per row that carries a forecast (NaN: it carries none)."""
    actual = e2e(columns)
    forecast = columns["forecast_e2e"]
    known = ~np.isnan(forecast) & (actual > 0)
    return np.abs(forecast[known] - actual[known]) / actual[known]


def goodput(columns: Columns, ttft_s: float, tpot_s: float) -> float | None:
    """The share of all requests that are ok with both TTFT and TPOT within these objectives; None if there are none."""
    ok = only_ok(columns)
    good = ttft(ok) <= ttft_s
    good[ok["output_tokens"] > 1] &= tpot(ok) <= tpot_s
    return int(good.sum()) / len(columns["arrival"]) if len(columns["arrival"]) else None


def imbalance(columns: Columns, instances: int) -> float | None:
    """How far requests crowd: those of the instance that has most, over those of an instance in the mean, both in the
    mean of all moments at which a request is dispatched. 1: all have the same. None if no request is ok.

    instances: how many there are, those without requests among them.
    """
    ok = only_ok(columns)
    if not len(ok["dispatched"]):
        return None
    moments = np.sort(ok["dispatched"])
    there = np.zeros((instances, len(moments)), dtype=np.int64)
    for instance_id, count in enumerate(there):
        mine = ok["instance_id"] == instance_id
        began, ended = np.sort(ok["dispatched"][mine]), np.sort(ok["finished"][mine])
        count += np.searchsorted(began, moments, "right") - np.searchsorted(ended, moments, "right")
    return float(there.max(axis=0).mean() / there.mean())


def only_ok(columns: Columns) -> dict[str, NDArray[Any]]:
    """The rows with status "ok"."""
    ok = np.asarray(columns["status"]) == "ok"
    return {name: np.asarray(column)[ok] for name, column in columns.items()}


def summarise(
    columns: Columns,
    *,
    dispatch_overhead_s: ArrayLike | None = None,
    forecast_us: ArrayLike | None = None,
    wall_time_s: float | None = None,
    compile_s: float | None = None,
    peak_memory_mib: float | None = None,
) -> Summary:
    """The summary of a run, ready for JSON.

    `columns` are those of the request table, arrays of one length: arrival, first_token, finished (seconds),
    prompt_tokens, output_tokens, preemptions (NaN: not known), forecast_e2e (seconds, NaN: none), status, and
    cached_tokens, which runs of before 0.3.0 lack.

    Throughput counts ok requests from the first arrival to the last token; tokens are those of prompts and responses
    together. The keyword arguments are measured by the caller: seconds that each dispatch took beside waiting for its
    answer, microseconds that each forecast took, wall-clock seconds of the run without those of compiling, these, and
    the most memory that its process held.

    Raises ValueError if an ok request lacks one of its times.
    """
    ok = only_ok(columns)
    for name in ("arrival", "first_token", "finished"):
        lacking = int(np.count_nonzero(~np.isfinite(ok[name])))
        if lacking:
            raise ValueError(f"{lacking} requests have status 'ok' but no {name}")
    count = len(ok["arrival"])
    duration = float(ok["finished"].max() - ok["arrival"].min()) if count else 0.0
    response_tokens = int(ok["output_tokens"].sum())
    tokens = response_tokens + int(ok["prompt_tokens"].sum())
    return {
        **_stats("ttft", ttft(ok), "s", "mean", 50, 99),
        **_stats("tpot", tpot(ok), "s", "mean", 50, 99),
        **_stats("e2e", e2e(ok), "s", "mean", 50, 99),
        "request_throughput_rps": count / duration if duration > 0 else None,
        "token_throughput_tps": tokens / duration if duration > 0 else None,
        "output_throughput_tps": response_tokens / duration if duration > 0 else None,
        "preemptions": None if np.isnan(ok["preemptions"]).any() else int(ok["preemptions"].sum()),
        "prefix_hit_rate": _hit_rate(ok),
        **_stats("e2e_error", e2e_error(ok), "", "mean", 50),
        **_stats("dispatch_overhead", dispatch_overhead_s, "s", "mean", 99),
        **_stats("forecast", forecast_us, "us", "mean", 50, 99),
        "wall_time_s": None if wall_time_s is None else float(wall_time_s),
        "compile_s": None if compile_s is None else float(compile_s),
        "peak_memory_mib": None if peak_memory_mib is None else float(peak_memory_mib),
    }


def _hit_rate(ok: Columns) -> float | None:
    """The share of prompt tokens that prefix caches had; None where that is not told of every request."""
    prompts, cached = int(ok["prompt_tokens"].sum()), ok.get("cached_tokens")
    return int(cached.sum()) / prompts if prompts and cached is not None and (cached >= 0).all() else None


def _stats(name: str, values: ArrayLike | None, unit: str, *which: str | int) -> Summary:
    """The mean ("mean") and percentiles (a number) of `values`, keyed name_which_unit; None where there are none."""
    array = np.empty(0) if values is None else np.asarray(values, dtype=np.float64)
    if not np.isfinite(array).all():
        raise ValueError(f"{name}: every value must be finite")
    out: Summary = {}
    for what in which:
        label = what if isinstance(what, str) else f"p{what}"
        key = f"{name}_{label}_{unit}" if unit else f"{name}_{label}"
        if not array.size:
            out[key] = None
        else:
            out[key] = float(array.mean() if isinstance(what, str) else np.percentile(array, what))
    return out


def interval(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean, and half the width of its 95 % confidence interval (Student's t); None for a single value."""
    array = np.asarray(values, dtype=np.float64)
    if len(array) < 2:
        return float(array.mean()), None
    freedom = len(array) - 1
    # Beyond the table, the expansion of t around the normal quantile 1.96.
    t = _T95[freedom - 1] if freedom <= len(_T95) else 1.95996 + 2.3722 / freedom + 2.8225 / freedom**2
    return float(array.mean()), float(t * array.std(ddof=1) / math.sqrt(len(array)))
