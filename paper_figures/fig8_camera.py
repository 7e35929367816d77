"""Figure 8 of the camera-ready: Block against Llumnix with live migration on 8 × A100-40GB; and the same on 12 × A30.

The paper names Llama-2-70B, of which there are two instances, full at 3 requests/s. Its rates of 16–36 fit what the
artifact's scripts for this figure deploy: Llama-2-7B on eight instances of batch 96, and Llumnix without chunked
prefill. Both are here.
"""

from __future__ import annotations

from typing import Any

import matplotlib.pyplot as plt
import pandas as pd

from paper_figures import points, settings, style
from paper_figures.verdicts import PUBLISHED, Claim, above, order, value

TITLE = "Llumnix with live migration against Block, on A100 and A30"
PAPER = "camera-ready Fig 8"
SIMULATED_ONLY = True
POLICIES = ("llumnix_minus", "llumnix", "block", "block_star")
UNCHUNKED = "vllm_v0_unchunked"
QPS = (16, 24, 32, 36)
TESTBEDS: dict[str, tuple[dict[str, tuple[Any, ...]], tuple[float, ...]]] = {
    "8 × A100, Llama-2-7B": ({"cluster": ("a100x8",), "engine__max_num_seqs": (96,)}, QPS),
    "12 × A30, Llama-2-7B": ({"cluster": ("a30x12",)}, (30, 32)),
    # In which 3,000 requests take as long as 10,000 elsewhere and more.
    "2 × 4 A100, Llama-2-70B": (
        {"cluster": ("a100x8",), "model": ("llama2-70b",), "workload__num_requests": (3000,)},
        (1, 2, 3),
    ),
}
RUNS = [
    point
    for testbed, rates in TESTBEDS.values()
    for policies, engine in ((POLICIES, "vllm_v0"), (("llumnix",), UNCHUNKED))
    for point in points.grid(scheduler=policies, engine=(engine,), **testbed, workload__qps=rates, seed=settings.SEEDS)
]
PANELS = {"e2e_mean_s": "mean request latency (s)", "token_throughput_tps": "throughput (tokens/s)"}
OTHERS = ("e2e_p99_s", "ttft_p99_s", "preemptions")


def table(stored: points.Stored) -> pd.DataFrame:
    """A row per run."""
    found = stored.summaries(RUNS)
    found["testbed"] = [_testbed(row) for _, row in found.iterrows()]
    return found[["testbed", "scheduler", "engine", "workload.qps", "seed", *PANELS, *OTHERS]]


def _testbed(row: pd.Series) -> str:
    a100, large = row["cluster"] == "a100x8", row.get("model") == "llama2-70b"
    return list(TESTBEDS)[2 if large else 0 if a100 else 1]


def draw(table: pd.DataFrame) -> Any:
    """Latency above, throughput below; a column for each testbed. Dashed: Llumnix without chunked prefill."""
    figure, axes = plt.subplots(2, 3, figsize=(2 * style.COLUMN, 3.6), layout="constrained")
    published = PUBLISHED["a100_at_36_qps"]
    for testbed, column in zip(TESTBEDS, axes.T, strict=True):
        runs = table[table["testbed"] == testbed]
        whole = runs[runs["engine"] == UNCHUNKED].groupby("workload.qps")
        for axis, (metric, label) in zip(column, PANELS.items(), strict=True):
            style.lines(runs[runs["engine"] != UNCHUNKED], axis, "workload.qps", metric)
            mean = whole[metric].mean()
            axis.plot(mean.index, mean, "--", color=style.POLICIES["llumnix"][1], label="Llumnix, whole prompts")
            axis.set(title=f"{testbed}\n{label}" if metric == "e2e_mean_s" else label, xlabel="requests/s")
            if testbed == next(iter(TESTBEDS)):
                for scheduler, numbers in published.items():
                    name, colour, marker = style.POLICIES[scheduler]
                    look = {"color": colour, "fillstyle": "none", "markersize": 7, "label": f"{name}, paper"}
                    axis.plot(36, numbers[metric], marker, **look)
            axis.set_ylim(bottom=0)
    axes[0, 0].set_yscale("log")
    axes[0, 0].set_ylim(4, 120)
    style.legend(figure, axes[0, 0], 4)
    return figure


def claims(table: pd.DataFrame) -> list[Claim]:
    """Published numbers at 36 requests/s, and who is ahead of Llumnix with migration."""
    first, a30, _ = TESTBEDS
    by: Any = table.set_index(["testbed", "scheduler", "engine", "workload.qps", "seed"]).sort_index()
    found = []
    for scheduler, engine in (("block_star", "vllm_v0"), ("llumnix", UNCHUNKED)):
        ours = by.loc[(first, scheduler, engine, 36)]
        for metric, (what, unit) in {
            "token_throughput_tps": ("throughput", "tokens/s"),
            "e2e_mean_s": ("mean latency", "s"),
        }.items():
            number = PUBLISHED["a100_at_36_qps"][scheduler][metric]
            named = f"{what} of {style.NAMES[scheduler]} at 36 requests/s on A100"
            found.append(value(named, number, ours[metric].tolist(), unit))
    mean = by["e2e_mean_s"]
    less = above(mean[first, "llumnix", UNCHUNKED, 36], mean[first, "block_star", "vllm_v0", 36])
    found.append(order("Block*'s mean latency is below that of Llumnix without chunked prefill, 36 on A100", less))
    for one, other in (("block", "llumnix"), ("llumnix", "llumnix_minus")):
        less = above(mean[a30, other, "vllm_v0", 32], mean[a30, one, "vllm_v0", 32])
        found.append(order(f"{style.NAMES[one]}'s mean latency is below {style.NAMES[other]}'s, 32 on A30", less))
    return found
