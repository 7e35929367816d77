"""Table 2 of the camera-ready: latencies of each scheduler at 30 requests/s, beside the published ones."""

from __future__ import annotations

import pandas as pd

from block.store.summary import interval
from paper_figures import points, settings, style, verdicts

TITLE = "Latencies of each scheduler at 30 requests/s, beside the published ones"
PAPER = "camera-ready Table 2"
QPS = 30
POLICIES = (*style.COMPARED, "po2")
RUNS = [
    {**point, **({"lengths": "compact"} if point["scheduler"] == "po2" else {})}
    for point in points.grid(scheduler=POLICIES, workload__qps=(QPS,), seed=settings.SEEDS)
]
METRICS = {
    "e2e_mean_s": "mean E2E (s)",
    "e2e_p99_s": "P99 E2E (s)",
    "ttft_p50_s": "TTFT P50 (s)",
    "ttft_p99_s": "TTFT P99 (s)",
    "tpot_p50_s": "token latency P50 (s)",
}
PUBLISHED = verdicts.PUBLISHED["at_30_qps"]


def table(stored: points.Stored) -> pd.DataFrame:
    """A row per run."""
    return stored.summaries(RUNS)[["scheduler", "seed", *METRICS]]


def markdown(table: pd.DataFrame) -> str:
    """A row per scheduler: mean over seeds, half of its 95 % interval, and the published value if there is one."""
    lines = ["| scheduler | " + " | ".join(METRICS.values()) + " |", "|---" * (len(METRICS) + 1) + "|"]
    for scheduler in POLICIES:
        part = table[table["scheduler"] == scheduler]
        shown = style.NAMES[scheduler].replace("*", "\\*")
        texts = []
        for metric in METRICS:
            mean, half = interval(part[metric].tolist())
            text = verdicts.shown(mean, half)
            published = PUBLISHED.get(scheduler, {}).get(metric)
            if published is not None:
                text += f" (published {published:g}, {mean / published - 1:+.1%})"
            texts.append(text)
        lines.append(f"| {shown} | " + " | ".join(texts) + " |")
    return "\n".join(lines) + "\n"


def claims(table: pd.DataFrame) -> list[verdicts.Claim]:
    """Every published point."""
    found = []
    for scheduler, metrics in PUBLISHED.items():
        part = table[table["scheduler"] == scheduler]
        for metric, published in metrics.items():
            what = f"{METRICS[metric].removesuffix(' (s)')} of {style.NAMES[scheduler]} at {QPS} requests/s"
            found.append(verdicts.value(what, published, part[metric].tolist(), "s"))
    return found
