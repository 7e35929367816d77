"""Robustness: a latency model that is wrong, and its correction by the steps that snapshots show."""

from __future__ import annotations

from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns

from paper_figures import points, settings, style
from paper_figures.verdicts import Claim, value

TITLE = "A latency model that is wrong, and its online correction, at 30 requests/s"
PAPER = "beyond the paper"
SIMULATED_ONLY = True
QPS = 30
STEPS = 200  # that the correction remembers
SCENARIOS: dict[str, dict[str, Any]] = {
    "as modelled": {},
    "steps vary by 25 %": {"backend.step_noise": 0.25},
    "one instance 1.5 × slower": {"backend.slowdown": [1.5]},
    "four instances 1.5 × slower": {"backend.slowdown": [1.5] * 4},
    "model of a T4": {"backend.predictor_gpu": "t4"},
    "model of an H100": {"backend.predictor_gpu": "h100"},
}
VARIANTS: dict[str, dict[str, Any]] = {
    "Llumnix-": {"scheduler": "llumnix_minus"},
    "Block": {"scheduler": "block"},
    "Block, corrected": {"scheduler": "block", "dispatch.correction_steps": STEPS},
}
RUNS = [
    {"setting": scenario, "workload.qps": QPS, **variant, **values, "seed": seed}
    for scenario, values in SCENARIOS.items()
    for variant in VARIANTS.values()
    for seed in settings.SEEDS
]
PANELS = {
    "e2e_error_mean": "error of forecasts (%)",
    "e2e_p99_s": "P99 request latency (s)",
    "ttft_p99_s": "P99 TTFT (s)",
}


def table(stored: points.Stored) -> pd.DataFrame:
    """A row per run."""
    rows = []
    for point, run in stored.run(RUNS):
        variant = next(name for name, values in reversed(VARIANTS.items()) if values.items() <= point.items())
        numbers = {metric: run.summary[metric] for metric in (*PANELS, "e2e_mean_s")}
        rows.append({"scenario": point["setting"], "variant": variant, "seed": point["seed"], **numbers})
    return pd.DataFrame(rows).astype({"e2e_error_mean": float})


def draw(table: pd.DataFrame) -> Any:
    """A panel for each metric, a group of bars for each scenario."""
    figure, axes = plt.subplots(1, len(PANELS), figsize=(2 * style.COLUMN, 2.9), layout="constrained", sharey=True)
    colours = {
        "Llumnix-": style.COLOURS["Llumnix-"],
        "Block": style.COLOURS["Block"],
        "Block, corrected": style.COLOURS["Block*"],
    }
    shown = table.assign(e2e_error_mean=100 * table["e2e_error_mean"])
    for axis, (metric, label) in zip(axes, PANELS.items(), strict=True):
        sns.barplot(
            shown,
            saturation=1,
            x=metric,
            y="scenario",
            hue="variant",
            palette=colours,
            errorbar=("pi", 100),
            err_kws={"linewidth": 0.8},
            ax=axis,
        )
        axis.set(xlabel=label, ylabel="")
        axis.get_legend().remove()
    style.legend(figure, axes[0], 3)
    sns.despine(figure)
    return figure


def claims(table: pd.DataFrame) -> list[Claim]:
    """Errors and latencies, with and without the correction."""
    by: Any = table.set_index(["scenario", "variant", "seed"]).sort_index()
    found = []
    for scenario in SCENARIOS:
        for variant in ("Block", "Block, corrected"):
            one = by.loc[scenario, variant]
            error = (100 * one["e2e_error_mean"]).tolist()
            found.append(value(f"error of forecasts, {scenario}, {variant}", None, error, "%"))
            found.append(value(f"P99 E2E, {scenario}, {variant}", None, one["e2e_p99_s"].tolist(), "s"))
    return found
