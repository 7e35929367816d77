"""Prefix caches: the rate that each policy takes before P99 TTFT passes 10 s. One seed: it tells `prefix` its rates."""

from __future__ import annotations

import pandas as pd

from paper_figures import points
from paper_figures.prefix import A30, CLUSTERS, H100, POLICIES, SHARED
from paper_figures.verdicts import Claim, shown, value

TITLE = "Prefix caches: capacity of each policy at P99 TTFT ≤ 10 s"
PAPER = "beyond the paper"
SIMULATED_ONLY = True
RUNS: list[points.GridPoint] = []
SLO_S = 10.0
SEARCHED = [name for name in POLICIES if name not in ("sticky", "block")]
ABOUT_QPS = {
    (H100, "mooncake"): 8.6,
    (H100, "chat"): 123.0,
    (H100, "agent"): 71.0,
    (A30, "mooncake"): 4.5,
    (A30, "chat"): 37.5,
    (A30, "agent"): 20.0,
}
"""Where searches begin."""
STEPS = 40
"""Rates that are tried are multiples of a 40th of about what can be served."""


def _search(cluster: str, workload: str, policy: str) -> points.GridPoint:
    about = ABOUT_QPS[cluster, workload]
    wanted = {"low": 0.8 * about, "high": 1.05 * about, "tolerance": round(about / STEPS, 2), "slo_s": [SLO_S]}
    where = {"setting": cluster, **CLUSTERS[cluster], "workload": workload}
    return {**where, **{f"capacity.{name}": one for name, one in wanted.items()}, "scheduler": policy, "seed": 0}


SEARCHES = [_search(cluster, workload, policy) for cluster, workload in ABOUT_QPS for policy in SEARCHED]


def table(stored: points.Stored) -> pd.DataFrame:
    """A row per search."""
    found = stored.capacities(SEARCHES, [SLO_S])
    return found.rename(columns={"setting": "cluster"})[["cluster", "workload", "scheduler", "seed", "capacity_qps"]]


def markdown(table: pd.DataFrame) -> str:
    """A row per policy: requests/s."""
    by = table.set_index(["scheduler", "cluster", "workload"])["capacity_qps"]
    heads = [(cluster, workload) for cluster in CLUSTERS for workload in SHARED]
    lines = [
        "| requests/s | " + " | ".join(f"{workload}, {cluster}" for cluster, workload in heads) + " |",
        "|---" * (len(heads) + 1) + "|",
    ]
    for policy in SEARCHED:
        cells = [shown(by[policy, cluster, workload]) for cluster, workload in heads]
        lines.append(f"| {POLICIES[policy][0]} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def claims(table: pd.DataFrame) -> list[Claim]:
    """The capacity of each policy."""
    by = table.set_index(["scheduler", "cluster", "workload"])["capacity_qps"]
    return [
        value(f"capacity of {policy}, {workload}, {cluster}", None, [by[policy, cluster, workload]], "requests/s")
        for cluster in CLUSTERS
        for workload in SHARED
        for policy in SEARCHED
    ]
