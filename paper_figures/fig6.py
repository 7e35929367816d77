"""Figure 6: latencies, scheduling overhead, throughput and capacity against the request rate, by scheduler.

The overhead that is drawn is measured: the wall-clock time of a request's forecasts, one for each instance, on the
machine that ran the simulation. What the paper measured there, network and processes included, is modelled in our
testbed (`backend.dispatch_delay_s`) and part of all latencies.
"""

from __future__ import annotations

from typing import Any

import matplotlib.pyplot as plt
import pandas as pd

from paper_figures import points, settings, style
from paper_figures.verdicts import CAPACITY_QPS, PUBLISHED, Claim, above, order, value

TITLE = "Latency, TTFT, scheduling overhead, throughput and capacity, by scheduler"
PAPER = "v2 Fig 6, camera-ready Fig 6"
QPS = (20, 24, 28, 30, 31, 32, 33, 34, 36)  # most happens about the capacities
RUNS = points.grid(scheduler=style.COMPARED, workload__qps=QPS, seed=settings.SEEDS)
SEARCHES = settings.searches("base", style.COMPARED)
INSTANCES = 12

PANELS = {
    "e2e_mean_s": "mean request latency (s)",
    "e2e_p99_s": "P99 request latency (s)",
    "ttft_mean_s": "mean TTFT (s)",
    "ttft_p99_s": "P99 TTFT (s)",
    "overhead_ms": "overhead (ms)",
    "overhead_percent": "overhead (% of latency)",
    "request_throughput_rps": "throughput (requests/s)",
}
CAPACITY = "capacity (requests/s)"


def table(stored: points.Stored) -> pd.DataFrame:
    """A row per run, and one per seed and objective with the capacity_qps at slo_s."""
    runs = stored.summaries(RUNS)
    runs["overhead_ms"] = runs["forecast_mean_us"].astype(float).fillna(0.0) * INSTANCES / 1000
    runs["overhead_percent"] = runs["overhead_ms"] / runs["e2e_mean_s"] / 10
    capacities = stored.capacities(SEARCHES, settings.SLO_S)
    keys = ["scheduler", "workload.qps", "seed"]
    return pd.concat([runs[[*keys, *PANELS]], capacities[["scheduler", "seed", "slo_s", "capacity_qps"]]])


def draw(table: pd.DataFrame) -> Any:
    """The panels in the paper's order."""
    figure, axes = plt.subplots(2, 4, figsize=(2 * style.COLUMN, 3.5), layout="constrained")
    runs = table[table["slo_s"].isna()]
    for axis, (metric, label) in zip(axes.flat, PANELS.items(), strict=False):
        shown = runs[runs["scheduler"].isin(("block", "block_star"))] if "overhead" in metric else runs
        style.lines(shown, axis, "workload.qps", metric)
        axis.set(xlabel="requests/s", title=label)
        if metric == "ttft_p99_s":
            axis.set_yscale("log")
            style.slo(axis, settings.SLO_S, QPS[0], QPS[-1])
        if "overhead" in metric:
            axis.set_ylim(bottom=0)
    last = axes.flat[-1]
    bars = table[table["slo_s"].notna()].assign(slo=lambda rows: rows["slo_s"].map("≤ {:g} s".format))
    style.bars(bars, last, "slo", "capacity_qps", style.COMPARED)
    style.zoom(last, bars["capacity_qps"])
    last.set(title=CAPACITY, xlabel="P99 TTFT")
    style.legend(figure, axes.flat[0])
    return figure


def claims(table: pd.DataFrame) -> list[Claim]:
    """Published capacities, and who has the higher one."""
    found = []
    by = table[table["slo_s"].notna()].set_index(["scheduler", "slo_s", "seed"])["capacity_qps"].sort_index()
    for slo, published in PUBLISHED["capacity_qps"]["base"].items():
        for scheduler, number in published.items():
            what = f"capacity of {style.NAMES[scheduler]}, P99 TTFT ≤ {slo} s"
            ours = by[scheduler, slo].tolist()
            found.append(value(what, number, ours, "requests/s", tolerance=CAPACITY_QPS))
    ours = {scheduler: by[scheduler, 10] for scheduler in style.COMPARED}
    for one, other in (("block", "llumnix_minus"), ("block_star", "llumnix_minus"), ("llumnix_minus", "round_robin")):
        found.append(order(f"{style.NAMES[one]} carries more than {style.NAMES[other]}", above(ours[one], ours[other])))
    return found
