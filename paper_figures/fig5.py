"""Figure 5: how wrong forecasts are, and how good the instance is that they choose.

One request in a hundred is tried on copies of all instances at the moment of its dispatch
(`block.dispatch.counterfactual`), so that the chosen one has a true rank among them.
"""

from __future__ import annotations

from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns

from block.store.summary import e2e_error, only_ok
from paper_figures import points, settings, style
from paper_figures.verdicts import PUBLISHED, Claim, order, value

TITLE = "Prediction error, latency of the chosen instance among all, and its true rank"
PAPER = "v2 Fig 5, camera-ready Fig 5"
SIMULATED_ONLY = True
QPS = (20, 24, 28, 32, 36)
POLICIES = ("block", "block_star")
RUNS = points.grid(scheduler=POLICIES, workload__qps=QPS, replay_share=(0.01,), seed=settings.SEEDS)
LATENCIES = {"best": "best", "chosen": "chosen", "average": "average", "worst": "worst"}
INSTANCES = 12


def table(stored: points.Stored) -> pd.DataFrame:
    """A row per run: mean error_percent of E2E; of the replayed requests, mean E2E of the chosen instance, and of the
    best, average and worst one; ranked_1 to ranked_12, the share of requests whose instance had that rank.
    """
    rows = []
    for point, run in stored.run(RUNS):
        requests = only_ok({str(k): v.to_numpy() for k, v in run.requests().items()})
        replayed = run.counterfactuals()
        by_request = replayed.groupby("request_id")["replayed_e2e"]
        chosen = replayed["chosen"]
        ranks = by_request.rank(method="min")[chosen].value_counts(normalize=True)
        rows.append(
            {
                **point,
                "error_percent": 100 * e2e_error(requests).mean(),
                "chosen": replayed.loc[chosen, "replayed_e2e"].mean(),
                "best": by_request.min().mean(),
                "average": by_request.mean().mean(),
                "worst": by_request.max().mean(),
                **{f"ranked_{rank}": ranks.get(float(rank), 0.0) for rank in range(1, INSTANCES + 1)},
            }
        )
    return pd.DataFrame(rows)


def draw(table: pd.DataFrame) -> Any:
    """Error against rate; latencies of Block against rate; ranks at all rates together."""
    figure, axes = plt.subplots(1, 3, figsize=(2 * style.COLUMN, 2.1), layout="constrained")
    style.lines(table, axes[0], "workload.qps", "error_percent")
    axes[0].set(title="prediction error (%)", xlabel="requests/s", ylim=(0, None))
    axes[0].axhline(PUBLISHED["prediction_error_percent"], color="black", linewidth=0.7, linestyle=":")
    axes[0].annotate("published", (QPS[0], PUBLISHED["prediction_error_percent"]), fontsize=6, va="bottom")
    axes[0].legend(*axes[0].get_legend_handles_labels(), frameon=False, loc="lower right")
    block = table[table["scheduler"] == "block"].groupby("workload.qps")[list(LATENCIES)].mean()
    greys = dict(zip(LATENCIES, ("#009E73", style.COLOURS["Block"], "#999999", "#000000"), strict=True))
    for (name, label), marker in zip(LATENCIES.items(), ("s", "o", "v", "X"), strict=True):
        axes[1].plot(block.index, block[name], color=greys[name], marker=marker, markeredgewidth=0, label=label)
    axes[1].set(title="latency if sent to (s), Block", xlabel="requests/s", ylim=(0, None))
    axes[1].legend(frameon=False, loc="best")
    columns = [f"ranked_{rank}" for rank in range(1, INSTANCES + 1)]
    shares = table.melt(["scheduler"], columns, "rank", "share")
    shares["rank"] = shares["rank"].str.removeprefix("ranked_").astype(int)
    shares["share"] *= 100
    style.bars(shares, axes[2], "rank", "share", POLICIES)
    axes[2].set(title="true rank of the chosen (% of requests)", xlabel=f"rank among {INSTANCES}")
    sns.despine(figure)
    return figure


def claims(table: pd.DataFrame) -> list[Claim]:
    """The error, and that the chosen instance is close to the best."""
    block = table[table["scheduler"] == "block"]
    error = block.groupby("seed")["error_percent"].mean()
    first = block.groupby("seed")[["ranked_1", "ranked_2", "ranked_3"]].mean().sum(axis=1)
    near = block.groupby("seed")[["chosen", "best", "average"]].mean()
    closer = near["chosen"] - near["best"] < near["average"] - near["chosen"]
    return [
        value(
            "mean prediction error of Block", PUBLISHED["prediction_error_percent"], error.tolist(), "%", tolerance=1
        ),
        value("requests sent to one of the three truly best instances", None, (100 * first).tolist(), "%"),
        order("the chosen instance is closer to the best than to the average", closer.tolist()),
    ]
