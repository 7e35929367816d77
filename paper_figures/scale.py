"""Scale: quality and cost of a request by the number of instances, at constant load for each."""

from __future__ import annotations

from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from matplotlib.ticker import FixedLocator

from paper_figures import points, style
from paper_figures.verdicts import Claim, value

TITLE = "Scale: latency and cost of a request by the number of instances, at 2.5 requests/s for each"
PAPER = "beyond the paper"
SIMULATED_ONLY = True
QPS = 2.5  # for each instance, as 30 for 12
REQUESTS = 300  # for each instance, in 120 s
VARIANTS: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    # Fresh snapshots, true lengths, all instances: what no scheduler of so many can do, as its cost shows.
    "omniscient": ({"scheduler": "block"}, (12, 50, 100)),
    # As good where both are, and so in its place beyond.
    "Po16": ({"scheduler": "po_k", "scheduler.k": 16}, (50, 100, 200)),
    "Po2": ({"scheduler": "po2"}, (12, 50, 100, 200, 1000)),
    "Po2, estimated lengths, 16 dispatchers": (
        {"scheduler": "po2", "lengths": "compact", "dispatch.dispatchers": 16, "dispatch.snapshot_interval_s": 1},
        (12, 50, 100, 200),
    ),
    "Llumnix-": ({"scheduler": "llumnix_minus"}, (12, 50, 100)),
}


RUNS = [
    {
        "setting": variant,
        **values,
        "cluster.num_gpus": instances,
        "workload.num_requests": REQUESTS * instances,
        "workload.qps": QPS * instances,
        "seed": 0,
    }
    for variant, (values, sizes) in VARIANTS.items()
    for instances in sizes
]
PANELS = {
    "e2e_p99_s": "P99 request latency (s)",
    "ttft_p99_s": "P99 TTFT (s)",
    "cost_us": "cost of a request (µs)",
}


def table(stored: points.Stored) -> pd.DataFrame:
    """A row per run; cost_us: wall-clock time of the run, simulated engines and all, over its requests."""
    rows = []
    for point, run in stored.run(RUNS):
        cost = 1e6 * float(run.summary["wall_time_s"] or 0.0) / run.document["counts"]["sent"]
        latencies = {metric: run.summary[metric] for metric in ("e2e_mean_s", "e2e_p99_s", "ttft_p99_s")}
        rows.append({"variant": point["setting"], "instances": point["cluster.num_gpus"], **latencies, "cost_us": cost})
    return pd.DataFrame(rows)


def draw(table: pd.DataFrame) -> Any:
    """A panel for each metric."""
    figure, axes = plt.subplots(1, len(PANELS), figsize=(2 * style.COLUMN, 2.4), layout="constrained")
    names = ("Block", "Block*", "Po2", "INFaaS++", "Llumnix-")
    for axis, (metric, label) in zip(axes, PANELS.items(), strict=True):
        for variant, name in zip(VARIANTS, names, strict=True):
            one = table[table["variant"] == variant]
            axis.plot(
                one["instances"], one[metric], marker=style.MARKERS[name], color=style.COLOURS[name], label=variant
            )
        axis.set(xscale="log", xlabel="instances", title=label)
        if metric != "e2e_p99_s":
            axis.set_yscale("log")
        style.plain_ticks(axis.xaxis, FixedLocator([12, 50, 100, 200, 1000]))
    for axis, ticks in ((axes[1], [0.5, 1, 2, 3, 5]), (axes[2], [50, 100, 150, 200, 300, 400, 600, 800, 1200])):
        style.plain_ticks(axis.yaxis, FixedLocator(ticks))
    sns.despine(figure)
    style.legend(figure, axes[0], 3)
    return figure


def claims(table: pd.DataFrame) -> list[Claim]:
    """What two choices lose against asking all, or sixteen, at the largest size there is of both; what a request
    costs.
    """
    by: Any = table.set_index(["variant", "instances"])
    found: list[Claim] = []
    for instances, best in ((100, "omniscient"), (100, "Po16"), (200, "Po16")):
        for metric, name in (("e2e_p99_s", "P99 E2E"), ("ttft_p99_s", "P99 TTFT")):
            for variant in (best, "Po2"):
                what = f"{name}, {instances:,} instances, {variant}"
                if what not in {claim.what for claim in found}:
                    found.append(value(what, None, [by.loc[(variant, instances), metric]], "s"))
    for metric, name in (("e2e_p99_s", "P99 E2E"), ("ttft_p99_s", "P99 TTFT")):
        found.append(value(f"{name}, 1,000 instances, Po2", None, [by.loc[("Po2", 1000), metric]], "s"))
    for instances in (12, 1000):
        what = f"cost of a request, {instances:,} instances, Po2, simulated engines and all"
        found.append(value(what, None, [by.loc[("Po2", instances), "cost_us"]], "µs"))
    return found
