"""The paper's headline claims, "+16.7 % capacity" and "-49.5 % P99": in which setting, and against whom, they hold
here.

Gains are paired: each seed's workload is served by both policies, and the interval is that of the seeds' own gains.
"""

from __future__ import annotations

from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns

from block.store.summary import interval
from paper_figures import fig6, points, settings, style, table2
from paper_figures.verdicts import PUBLISHED, Claim, order, value

TITLE = "Gain in capacity in every setting, and in P99 latency at every rate, over each baseline"
PAPER = "abstract"
SIMULATED_ONLY = True
OURS = ("block", "block_star")
BASELINES = ("round_robin", "infaas", "llumnix_minus")
QPS = tuple(qps for qps in fig6.QPS if qps >= 28)
MOST = 85  # % of gain that the figure has room for
RUNS = [point for point in fig6.RUNS if point["scheduler"] in OURS + BASELINES and point["workload.qps"] in QPS]
SEARCHES = table2.SEARCHES


def table(stored: points.Stored) -> pd.DataFrame:
    """A row per policy, baseline and setting (with slo_s) or rate (workload.qps): gain_percent, its half_width,
    by_seed.
    """
    searched = stored.capacities(SEARCHES, settings.SLO_S).set_index(["setting", "slo_s", "scheduler", "seed"])
    capacity = searched["capacity_qps"].sort_index()
    latency = stored.summaries(RUNS).set_index(["workload.qps", "scheduler", "seed"])["e2e_p99_s"].sort_index()
    rows = []
    for scheduler in OURS:
        for baseline in BASELINES:
            for setting in settings.SETTINGS:
                for slo in settings.SLO_S:
                    gains = capacity[setting, slo, scheduler] / capacity[setting, slo, baseline]
                    rows.append({"setting": setting, "slo_s": slo, **_gain(scheduler, baseline, gains)})
            for qps in QPS:
                gains = latency[qps, scheduler] / latency[qps, baseline]
                rows.append({"workload.qps": qps, **_gain(scheduler, baseline, gains)})
    return pd.DataFrame(rows).astype({"half_width": float})


def _gain(scheduler: str, baseline: str, ratios: pd.Series) -> dict[str, Any]:
    percent = (100 * (ratios - 1)).tolist()
    mean, half = interval(percent)
    by_seed = " ".join(f"{one:.3f}" for one in percent)
    return {"scheduler": scheduler, "baseline": baseline, "gain_percent": mean, "half_width": half, "by_seed": by_seed}


def draw(table: pd.DataFrame) -> Any:
    """A row for each of Block and Block*: capacities at both objectives by setting, P99 latency by rate."""
    figure, axes = plt.subplots(
        2, 3, figsize=(2 * style.COLUMN, 4.4), layout="constrained", sharex="col", width_ratios=(1, 1, 1.1)
    )
    places = {setting: -i for i, setting in enumerate(settings.SETTINGS)}
    for row, scheduler in zip(axes, OURS, strict=True):
        for axis, slo in zip(row, settings.SLO_S, strict=False):
            part = table[(table["scheduler"] == scheduler) & (table["slo_s"] == slo)]
            beyond = dict.fromkeys(places, 0)
            for shift, baseline in zip((0.22, 0.0, -0.22), BASELINES, strict=True):
                one = part[part["baseline"] == baseline]
                for _, far in one[one["gain_percent"] > MOST].iterrows():
                    beyond[far["setting"]] += 1  # beside those of other baselines
                    axis.annotate(
                        f"{far['gain_percent']:+.0f} →",
                        (MOST - 20 * (beyond[far["setting"]] - 1), places[far["setting"]] + shift - 0.1),
                        color=style.COLOURS[style.NAMES[baseline]],
                        ha="right",
                    )
                one = one[one["gain_percent"] <= MOST]
                name = style.NAMES[baseline]
                axis.errorbar(
                    one["gain_percent"],
                    [places[setting] + shift for setting in one["setting"]],
                    xerr=one["half_width"].fillna(0),
                    fmt=style.MARKERS[name],
                    color=style.COLOURS[name],
                    elinewidth=0.8,
                    markersize=3,
                    label=f"over {name}",
                )
            axis.axvline(0, color="black", linewidth=0.7)
            axis.axvline(PUBLISHED["headline"]["capacity_percent"], color="black", linewidth=0.7, linestyle=":")
            axis.set(title=f"{style.NAMES[scheduler]}: capacity (%), ≤ {slo:g} s", xlim=(-5, MOST))
            names = [one.name for one in settings.SETTINGS.values()] if axis is row[0] else [""] * len(places)
            axis.set_yticks(list(places.values()), names)
            if part["gain_percent"].isna().any():  # a row without points has its place all the same
                axis.set_ylim(min(places.values()) - 0.6, 0.6)
            if part["gain_percent"].isna().all():
                style.gap(axis)
        last = row[-1]
        part = table[(table["scheduler"] == scheduler) & table["workload.qps"].notna()]
        for baseline in BASELINES:
            one = part[part["baseline"] == baseline]
            name = style.NAMES[baseline]
            last.plot(one["workload.qps"], one["gain_percent"], color=style.COLOURS[name], marker=style.MARKERS[name])
            half = one["half_width"].fillna(0)
            low, high = one["gain_percent"] - half, one["gain_percent"] + half
            last.fill_between(one["workload.qps"], low, high, color=style.COLOURS[name], alpha=0.2, linewidth=0)
        last.axhline(0, color="black", linewidth=0.7)
        last.axhline(PUBLISHED["headline"]["p99_percent"], color="black", linewidth=0.7, linestyle=":")
        last.set(title=f"{style.NAMES[scheduler]}: P99 latency (%)", ylim=(-80, 20))
    axes[-1][-1].set_xlabel("requests/s")
    style.legend(figure, axes[0][0])
    sns.despine(figure)
    return figure


def claims(table: pd.DataFrame) -> list[Claim]:
    """Where the two numbers come closest, and whether Block is ahead everywhere."""
    searched: Any = (
        table[table["setting"].notna()].set_index(["scheduler", "baseline", "setting", "slo_s"]).sort_index()
    )
    latency: Any = table[table["setting"].isna()].set_index(["scheduler", "baseline", "workload.qps"]).sort_index()
    headline = PUBLISHED["headline"]
    found = []
    for scheduler in OURS:
        name = style.NAMES[scheduler]
        for setting, slo in (("batch24", 3.0), ("batch24", 10.0), ("base", 3.0)):
            gains = _seeds(searched.loc[(scheduler, "llumnix_minus", setting, slo), "by_seed"])
            what = f"capacity gain of {name} over Llumnix-, {settings.SETTINGS[setting].name}, P99 TTFT ≤ {slo:g} s"
            found.append(value(what, headline["capacity_percent"], gains, "%", tolerance=1))
        gains = _seeds(latency.loc[(scheduler, "infaas", 32), "by_seed"])
        what = f"P99 latency of {name} against INFaaS++ at 32 requests/s"
        found.append(value(what, headline["p99_percent"], gains, "%", tolerance=2))
        for baseline in BASELINES:
            seeds = np.array([_seeds(text) for text in searched.loc[(scheduler, baseline), "by_seed"]])
            everywhere = f"in all {len(settings.SETTINGS)} settings, at both objectives"
            what = f"{name} carries more than {style.NAMES[baseline]} {everywhere}"
            found.append(order(what, [None if np.isnan(one).any() else (one > 0).all() for one in seeds.T]))
    return found


def _seeds(text: str) -> list[float]:
    return [float(one) for one in str(text).split()]
