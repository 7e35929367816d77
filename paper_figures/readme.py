"""The tables of README.md and docs/results.md, written between two marks from the CSV that their figures show."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd

from block.store.summary import interval
from paper_figures import settings, style
from paper_figures.verdicts import PUBLISHED

POLICIES = ("block", "block_star", "llumnix_minus", "infaas", "min_qpm", "round_robin", "random")
BASELINES = ("llumnix_minus", "infaas", "round_robin")


def marks(name: str) -> tuple[str, str]:
    """What stands before and after the table of this name."""
    return f"<!-- {name}: written by scripts/reproduce.py -->\n", f"<!-- end of {name} -->"


PAGES = (Path("README.md"), Path("docs/results.md"))


def update(path: Path, folder: Path) -> None:
    """Write the tables into the page at `path`, of the figures in `folder`, each where its two marks are."""
    text = path.read_text(encoding="utf-8")
    new = text
    for name, figure, write in (("headline", "fig6", table), ("claims", "headline", claims)):
        begin, end = marks(name)
        if begin in new and end in new and (folder / f"{figure}.csv").exists():
            before, _, rest = new.partition(begin)
            _, _, after = rest.partition(end)
            new = f"{before}{begin}{write(pd.read_csv(folder / f'{figure}.csv'))}{end}{after}"
    if new != text:
        path.write_text(new, encoding="utf-8")


def table(fig6: pd.DataFrame) -> str:
    """Capacities of all policies at both objectives, ours and published, and what Block gains, paired by seed."""
    found = fig6[fig6["capacity_qps"].notna()].set_index(["slo_s", "scheduler"])["capacity_qps"].sort_index()
    names = [style.NAMES[scheduler].replace("*", "\\*") for scheduler in POLICIES]
    lines = ["| P99 TTFT at most | | " + " | ".join(names) + " |", "|---" * (len(names) + 2) + "|"]
    gains = []
    for slo in reversed(settings.SLO_S):
        ours = [interval(found[slo, scheduler].tolist()) for scheduler in POLICIES]
        published = PUBLISHED["capacity_qps"]["base"][slo]
        cells = [f"{mean:.1f} ± {half or 0:.1f}" for mean, half in ours]
        lines.append(f"| {slo:g} s | ours | " + " | ".join(cells) + " |")
        lines.append(f"| {slo:g} s | paper | " + " | ".join(f"{published.get(s, '–')}" for s in POLICIES) + " |")
        each = []
        for scheduler, name in zip(POLICIES[:2], names, strict=False):
            apart = (found[slo, scheduler].to_numpy() - found[slo, "llumnix_minus"].to_numpy()).tolist()
            mean, half = interval(apart)
            each.append(f"{name} {mean:+.2f} ± {half or 0:.2f}")
        gains.append(f"{' and '.join(each)} at {slo:g} s")
    lines += [
        "",
        "± is half of the 95 % interval over 3 seeds. What a seed does to one policy it does to all,",
        f"so compare within seeds: over Llumnix-, {gains[0]};",
        f"{gains[1]}.",
    ]
    return "\n".join(lines) + "\n"


def claims(headline: pd.DataFrame) -> str:
    """In which setting, and over whom, Block (Block*) gains how much capacity, and at which rates how much P99 latency;
    bold where the interval over seeds reaches what the abstract claims.
    """
    published = PUBLISHED["headline"]
    searched: Any = (
        headline[headline["setting"].notna()].set_index(["setting", "slo_s", "baseline", "scheduler"]).sort_index()
    )
    lines = [
        f"| capacity, % | P99 TTFT | {' | '.join(f'over {style.NAMES[one]}' for one in BASELINES)} |",
        "|---|---|---|---|---|",
    ]
    for setting, one in settings.SETTINGS.items():
        for slo in settings.SLO_S:
            gains = [
                _both(searched.loc[(setting, slo, baseline)], published["capacity_percent"]) for baseline in BASELINES
            ]
            lines.append(f"| {one.name} | ≤ {slo:g} s | {' | '.join(gains)} |")
    latency: Any = (
        headline[headline["setting"].isna()].set_index(["workload.qps", "baseline", "scheduler"]).sort_index()
    )
    lines += [
        "",
        f"| P99 latency, % | {' | '.join(f'against {style.NAMES[one]}' for one in BASELINES)} |",
        "|---|---|---|---|",
    ]
    for qps in sorted(latency.index.unique("workload.qps")):
        changes = [_both(latency.loc[(qps, baseline)], published["p99_percent"]) for baseline in BASELINES]
        lines.append(f"| {qps:g} requests/s | {' | '.join(changes)} |")
    return "\n".join(lines) + "\n"


def _both(gains: Any, claimed: float) -> str:
    """Block's gain and, in brackets, Block*'s."""
    block, star = (_gain(gains.loc[scheduler], claimed) for scheduler in POLICIES[:2])
    return f"{block} ({star})"


def _gain(row: pd.Series, claimed: float) -> str:
    reach = abs(row["gain_percent"]) + row["half_width"]
    text = f"{row['gain_percent']:+.1f} ± {row['half_width']:.1f}"
    return f"**{text}**" if row["gain_percent"] * claimed > 0 and reach >= abs(claimed) else text
