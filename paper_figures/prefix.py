"""Prefix caches: Block with a price on work, and the routers of today, near the capacity of the best of these."""

from __future__ import annotations

from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from matplotlib.ticker import LogLocator

from block.store.summary import goodput, imbalance
from paper_figures import points, settings, style
from paper_figures.verdicts import Claim, above, order, value

TITLE = "Prefix caches: policies at 70, 85 and 100 % of the capacity of the best router"
PAPER = "beyond the paper"
SIMULATED_ONLY = True
H100, A30 = "8 × H100, Llama-3-8B", "12 × A30, Qwen2-7B"
CLUSTERS: dict[str, dict[str, Any]] = {
    H100: {
        "engine": "vllm_v1",
        "model": "llama3-8b",
        "cluster.gpu": "h100",
        "cluster.num_gpus": 8,
        "engine.max_num_seqs": 256,
        "engine.max_num_batched_tokens": 2048,
        "engine.max_model_len": 131072,
        points.REQUESTS: 8000,
    },
    A30: {
        "engine": "vllm_v1",
        "model": "qwen2-7b",
        "engine.max_num_batched_tokens": 2048,
        "engine.max_model_len": 32768,
        points.REQUESTS: 4000,
    },
}
SHARED = ("mooncake", "chat", "agent")
WORKLOADS = (*SHARED, "sharegpt")
ROUTERS = {
    "llmd": ("llm-d", "#0072B2", "^"),
    "cache_aware": ("cache-aware", "#56B4E9", "v"),
    "preble": ("Preble", "#CC79A7", "h"),
    "lmetric": ("LMetric", "#009E73", "s"),
    "dynamo": ("Dynamo", "#E69F00", "D"),
    "aibrix": ("AIBrix", "#F0E442", "P"),
    "sticky": ("sticky", "#999999", "X"),
}
OTHERS = {"block": ("Block", "#7F3B00", "*")}
POLICIES = {**ROUTERS, **OTHERS, "block_cache": ("Block, priced", "#D55E00", "o")}
LOADS = (0.7, 0.85, 1.0)
CAPACITY_QPS = {
    (H100, "mooncake"): 9.1,
    (H100, "chat"): 126.5,
    (H100, "agent"): 73.0,
    (H100, "sharegpt"): 300.0,
    (A30, "mooncake"): 4.87,
    (A30, "chat"): 37.3,
    (A30, "agent"): 21.2,
    (A30, "sharegpt"): 74.0,
}
"""Of the router that has most, by the searches of `prefix_capacity`: P99 TTFT ≤ 10 s. Of ShareGPT, with short prompts
and so few requests, about where queues begin to grow.
"""
GOOD = {"ttft_s": 2.0, "tpot_s": 0.1}
"""Objectives of goodput."""
METRICS = {"ttft_p99_s": "P99 TTFT (s)", "e2e_mean_s": "mean E2E (s)"}


def _run(cluster: str, workload: str, load: float, policy: str, seed: int, **more: Any) -> points.GridPoint:
    qps = round(load * CAPACITY_QPS[cluster, workload], 3)
    where = {"setting": f"{cluster}/{load:g}", **CLUSTERS[cluster]}
    return {**where, "workload": workload, "workload.qps": qps, "scheduler": policy, "seed": seed, **more}


TOLD = [
    _run(cluster, workload, load, policy, seed)
    for cluster, workload in CAPACITY_QPS
    for load in LOADS
    for policy in POLICIES
    for seed in settings.SEEDS
]
LESS: dict[str, dict[str, Any]] = {
    "sent": {"dispatch.prefixes": "sent"},
    "1 s old": {"dispatch.snapshot_interval_s": 1},
}
"""What is known less well: what was sent there instead of what is told, and what was told 1 s ago."""
RUNS = TOLD + [
    _run(cluster, workload, load, policy, seed, **less)
    for less in LESS.values()
    for cluster, workload in CAPACITY_QPS
    if workload in SHARED
    for load in LOADS
    for policy in ("llmd", "block_cache")
    for seed in settings.SEEDS
]


def table(stored: points.Stored) -> pd.DataFrame:
    """A row per run."""
    rows = []
    for point, run in stored.run(RUNS):
        cluster, load = point["setting"].split("/")
        names = {"cluster": cluster, "workload": point["workload"], "load": float(load), "qps": point["workload.qps"]}
        known = next((name for name, less in LESS.items() if less.items() <= point.items()), "told")
        which = {"policy": point["scheduler"], "knowledge": known, "seed": point["seed"]}
        numbers = {name: run.summary[name] for name in (*METRICS, "ttft_mean_s", "e2e_p99_s", "prefix_hit_rate")}
        columns = {str(name): column.to_numpy() for name, column in run.requests().items()}
        numbers["tpot_mean_s"] = run.summary["tpot_mean_s"]
        numbers["goodput"] = goodput(columns, **GOOD)
        numbers["imbalance"] = imbalance(columns, run.config["cluster"]["num_gpus"])
        rows.append({**names, **which, **numbers})
    return pd.DataFrame(rows)


def draw(table: pd.DataFrame) -> Any:
    """Two rows of panels a cluster; dashed: by what was sent there instead of what servers tell."""
    rows = [(cluster, metric) for cluster in CLUSTERS for metric in METRICS]
    figure, axes = plt.subplots(
        len(rows), len(WORKLOADS), figsize=(2.4 * style.COLUMN, 7.6), layout="constrained", sharex=True
    )
    for row, (cluster, metric) in zip(axes, rows, strict=True):
        for axis, workload in zip(row, WORKLOADS, strict=True):
            part = table[(table["cluster"] == cluster) & (table["workload"] == workload)]
            for policy, (name, colour, marker) in POLICIES.items():
                for how, line in (("told", "-"), ("sent", "--")):
                    one = part[(part["policy"] == policy) & (part["knowledge"] == how)]
                    if one.empty:
                        continue
                    by = one.groupby("load")[metric].mean()
                    label = name if how == "told" else f"{name}, not told"
                    axis.plot(100 * by.index, by, line, marker=marker, color=colour, label=label)
            axis.set(yscale="log", xticks=[70, 85, 100])
            style.plain_ticks(axis.yaxis, LogLocator(subs=(1, 2, 5)))
            axis.set_title(f"{workload}\n{cluster}" if metric == "ttft_p99_s" else "")
        row[0].set_ylabel(METRICS[metric])
    for axis in axes[-1]:
        axis.set_xlabel("load (% of capacity)")
    sns.despine(figure)
    style.legend(figure, axes[0][0], 6)
    return figure


def claims(table: pd.DataFrame) -> list[Claim]:
    """Against the router that is best there: who leads, seed by seed, and by how much at capacity."""
    found = []
    by: Any = table.set_index(["cluster", "workload", "load", "knowledge", "policy", "seed"]).sort_index()
    for cluster, workload in CAPACITY_QPS:
        for load in LOADS:
            told = by.loc[cluster, workload, load, "told"]
            where = f"{workload}, {cluster}, {100 * load:g} %"
            for metric, label in METRICS.items():
                best = told[metric].groupby("policy").mean()[list(ROUTERS)].idxmin()
                ours, theirs = told.loc["block_cache", metric], told.loc[best, metric]
                if workload in SHARED:
                    found.append(order(f"block_cache has less {label} than any router, {where}", above(theirs, ours)))
                if load == 1.0:
                    more = (100 * (ours / theirs - 1)).tolist()
                    found.append(value(f"{label} of block_cache against the best router's, {where}", None, more, "%"))
            if load == 1.0:
                good = told["goodput"]
                best = good.groupby("policy").mean()[list(ROUTERS)].idxmax()
                more = (100 * (good["block_cache"] - good[best])).tolist()
                found.append(value(f"goodput of block_cache less the best router's, {where}", None, more, "points"))
    return found
