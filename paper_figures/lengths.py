"""What the error of response lengths costs: capacity and latency from true lengths to each estimator, and for errors
that are injected; and how well the learned estimator is calibrated.
"""

from __future__ import annotations

from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns

from paper_figures import points, settings, style
from paper_figures.verdicts import Claim, above, order

TITLE = "Capacity and latency of Block by the error of its response lengths"
PAPER = "beyond the paper"
SIMULATED_ONLY = True
QPS = 32
MEAN_TOKENS = 326  # of the workload's responses
ESTIMATORS: dict[str, dict[str, Any]] = {
    "true": {"lengths": "oracle"},
    "noisy": {"lengths": "noisy"},
    "compact": {"lengths": "compact"},
    "constant": {"lengths": "constant", "lengths.tokens": MEAN_TOKENS},
    "injected 25 %": {"lengths": "injected", "lengths.sigma": 0.25},
    "injected 50 %": {"lengths": "injected", "lengths.sigma": 0.5},
    "injected 100 %": {"lengths": "injected", "lengths.sigma": 1.0},
}
RUNS = [
    {"scheduler": "block", **values, "workload.qps": QPS, "seed": seed}
    for values in ESTIMATORS.values()
    for seed in settings.SEEDS
]
SEARCHES = [
    {**values, **point}
    for name, values in ESTIMATORS.items()
    for point in settings.searches("base", ("block",), None if name == "true" else f"{name} lengths")
]
INJECTED = [name for name in ESTIMATORS if name.startswith(("true", "injected"))]
KEYS = ("lengths", "lengths.sigma", "lengths.tokens")


def table(stored: points.Stored) -> pd.DataFrame:
    """A row per run with its error_rate, the sum of errors over the sum of lengths, and latencies; one per search with
    its capacity_qps.
    """
    rows = []
    for point, run in stored.run(RUNS):
        requests = run.requests()
        off = np.abs(requests["predicted_output_tokens"] - requests["output_tokens"]).sum()
        latencies = {key: run.summary[key] for key in ("e2e_mean_s", "e2e_p99_s", "ttft_p99_s")}
        error = off / requests["output_tokens"].sum()
        rows.append({"estimator": _name(point), "seed": point["seed"], "error_rate": error, **latencies})
    runs = pd.DataFrame(rows)
    found = stored.search(SEARCHES)
    searches = [
        {"estimator": _name(point), "seed": point["seed"], "slo_s": slo, "capacity_qps": one.capacity(slo)}
        for point, one in found
        for slo in settings.SLO_S
    ]
    capacities = pd.DataFrame(searches)
    capacities["error_rate"] = capacities["estimator"].map(runs.groupby("estimator")["error_rate"].mean())
    return pd.concat([runs, capacities])


def _name(point: points.GridPoint) -> str:
    wanted = {key: point[key] for key in KEYS if key in point}
    return next(name for name, values in ESTIMATORS.items() if values == wanted)


def draw(table: pd.DataFrame) -> Any:
    """Against the error rate: capacity at both objectives, and P99 latencies at 32 requests/s."""
    figure, axes = plt.subplots(1, 3, figsize=(2 * style.COLUMN, 2.4), layout="constrained")
    panels = (
        (table[table["slo_s"] == 3], "capacity_qps", "capacity (requests/s), P99 TTFT ≤ 3 s"),
        (table[table["slo_s"] == 10], "capacity_qps", "capacity (requests/s), P99 TTFT ≤ 10 s"),
        (table[table["slo_s"].isna()], "e2e_p99_s", f"P99 request latency (s), {QPS} requests/s"),
    )
    colours = dict(zip(ESTIMATORS, sns.color_palette("colorblind", len(ESTIMATORS)), strict=True))
    for axis, (part, column, label) in zip(axes, panels, strict=True):
        by = part.groupby("estimator")
        means: Any = by[[column, "error_rate"]].mean()
        axis.plot(100 * means.loc[INJECTED, "error_rate"], means.loc[INJECTED, column], color="0.7", zorder=1)
        for name in ESTIMATORS:
            values, x = by.get_group(name)[column], 100 * means.loc[name, "error_rate"]
            axis.plot([x, x], [values.min(), values.max()], color=colours[name], linewidth=0.8)
            marker = "s" if name in INJECTED else "o"
            axis.plot(x, values.mean(), marker, color=colours[name], label=name, markersize=4)
        if part[column].isna().all():
            style.gap(axis)
        axis.set(title=label, xlabel="error rate of the lengths (%)", ylabel="")
    style.legend(figure, axes[0], len(ESTIMATORS))
    sns.despine(figure)
    return figure


def claims(table: pd.DataFrame) -> list[Claim]:
    """Whether better lengths carry more, seed by seed."""
    by = table[table["slo_s"] == 10].pivot(index="seed", columns="estimator", values="capacity_qps")
    pairs = (("true", "compact"), ("noisy", "compact"), ("compact", "constant"))
    return [
        order(f"{one} lengths carry more than {other} ones, P99 TTFT ≤ 10 s", above(by[one], by[other]))
        for one, other in pairs
    ]
