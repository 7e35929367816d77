"""Table 2 (camera-ready: Table 3): capacity when one thing of the setting changes, and on two production traces."""

from __future__ import annotations

import pandas as pd

from block.store.summary import interval
from paper_figures import points, settings, style
from paper_figures.verdicts import CAPACITY_QPS, PUBLISHED, Claim, above, order, shown, value

TITLE = "Capacity (requests/s) when the model, the workload, the batch or the chunk changes"
PAPER = "v2 Table 2, camera-ready Table 3"
SIMULATED_ONLY = True
POLICIES = ("round_robin", "infaas", "llumnix_minus", "block", "block_star")
RUNS: list[points.GridPoint] = []
SEARCHES = [
    {"setting": setting, **point} for setting in settings.SETTINGS for point in settings.searches(setting, POLICIES)
]


def table(stored: points.Stored) -> pd.DataFrame:
    """A row per setting, scheduler, seed and objective."""
    return stored.capacities(SEARCHES, settings.SLO_S)[["setting", "scheduler", "seed", "slo_s", "capacity_qps"]]


def markdown(table: pd.DataFrame) -> str:
    """A row per setting and objective: mean over seeds ± half of its 95 % interval, and the published value."""
    names = [style.NAMES[scheduler].replace("*", "\\*") for scheduler in POLICIES]
    lines = ["| setting | P99 TTFT | " + " | ".join(names) + " |", "|---" * (len(names) + 2) + "|"]
    by = table.set_index(["setting", "slo_s", "scheduler", "seed"])["capacity_qps"].sort_index()
    for setting, one in settings.SETTINGS.items():
        for slo in settings.SLO_S:
            texts = []
            for scheduler in POLICIES:
                text = shown(*interval(by[setting, slo, scheduler].tolist()))
                published = _published(setting, slo).get(scheduler)
                texts.append(text if published is None else f"{text} (published {published:g})")
            lines.append(f"| {one.name} | ≤ {slo:g} s | " + " | ".join(texts) + " |")
    return "\n".join(lines) + "\n"


def claims(table: pd.DataFrame) -> list[Claim]:
    """What is published beside the base setting's, and who carries more in each setting."""
    by = table.set_index(["setting", "slo_s", "scheduler", "seed"])["capacity_qps"].sort_index()
    found = []
    for setting, one in settings.SETTINGS.items():
        for slo in settings.SLO_S:
            for scheduler, number in _published(setting, slo).items() if setting != "base" else ():
                what = f"capacity of {style.NAMES[scheduler]}, {one.name}, P99 TTFT ≤ {slo:g} s"
                ours = by[setting, slo, scheduler].tolist()
                found.append(value(what, number, ours, "requests/s", tolerance=CAPACITY_QPS))
        for scheduler in ("block", "block_star"):
            more = above(by[setting, 10, scheduler], by[setting, 10, "llumnix_minus"])
            found.append(order(f"{style.NAMES[scheduler]} carries more than Llumnix-, {one.name}", more))
    return found


def _published(setting: str, slo: float) -> dict[str, float]:
    found: dict[str, float] = PUBLISHED["capacity_qps"].get(setting, {}).get(slo, {})
    return found
