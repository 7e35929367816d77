"""Table 2 of the camera-ready: latencies of each scheduler at 30 requests/s, beside the published ones."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import yaml

from block.metrics import interval
from paper_figures import cells, style

TITLE = "Latencies of each scheduler at 30 requests/s, beside the published ones"
QPS = 30
CELLS = cells.grid(scheduler=tuple(style.SCHEDULERS), workload__qps=(QPS,), seed=(0, 1, 2))
METRICS = {
    "e2e_mean_s": "mean E2E (s)",
    "e2e_p99_s": "P99 E2E (s)",
    "ttft_p50_s": "TTFT P50 (s)",
    "ttft_p99_s": "TTFT P99 (s)",
    "tpot_p50_s": "token latency P50 (s)",
}
PUBLISHED = yaml.safe_load((Path(__file__).parent / "published.yaml").read_text())["at_30_qps"]


def table(stored: cells.Stored) -> pd.DataFrame:
    """A row per scheduler and metric: mean over seeds, half of its 95 % interval, published, difference as a share."""
    return of(cells.table(CELLS, stored))


def of(runs: pd.DataFrame) -> pd.DataFrame:
    """The table of these runs, a row each with its scheduler and metrics."""
    rows = []
    for scheduler in style.SCHEDULERS:
        for metric in METRICS:
            mean, half = interval(runs.loc[runs["scheduler"] == scheduler, metric].tolist())
            published = PUBLISHED.get(scheduler, {}).get(metric)
            difference = None if published is None else mean / published - 1
            rows.append((scheduler, metric, mean, half, published, difference))
    return pd.DataFrame(rows, columns=["scheduler", "metric", "mean", "half_width", "published", "difference"])


def markdown(table: pd.DataFrame) -> str:
    """The table for people."""
    lines = ["| scheduler | " + " | ".join(METRICS.values()) + " |", "|---" * (len(METRICS) + 1) + "|"]
    for scheduler, name in style.NAMES.items():
        part = table[table["scheduler"] == scheduler].set_index("metric")
        shown = name.replace("*", "\\*")
        lines.append(f"| {shown} | " + " | ".join(_cell(part.loc[metric]) for metric in METRICS) + " |")
    return "\n".join(lines) + "\n"


def _cell(row: pd.Series) -> str:
    text = f"{row['mean']:.3g} ± {row['half_width']:.2g}"
    if pd.notna(row["published"]):
        text += f" (published {row['published']:g}, {row['difference']:+.1%})"
    return text
