"""The headline table of the README, written between two marks from the CSV that the figure shows."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from block.metrics import interval
from paper_figures import settings, style
from paper_figures.verdicts import PUBLISHED

BEGIN, END = "<!-- headline: written by scripts/reproduce.py -->", "<!-- end of headline -->"
SCHEDULERS = ("block", "block_star", "llumnix_minus", "infaas", "min_qpm", "round_robin", "random")


def update(path: Path, folder: Path) -> None:
    """Write the table into the README at `path`, of the figures in `folder`; does nothing if there are no marks."""
    text = path.read_text(encoding="utf-8")
    if BEGIN not in text or END not in text or not (folder / "fig6.csv").exists():
        return
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    new = f"{before}{BEGIN}\n{table(pd.read_csv(folder / 'fig6.csv'))}{END}{after}"
    if new != text:
        path.write_text(new, encoding="utf-8")


def table(fig6: pd.DataFrame) -> str:
    """Capacities of all schedulers at both objectives, ours and published, and what Block gains, paired by seed."""
    found = fig6[fig6["capacity_qps"].notna()].set_index(["slo_s", "scheduler"])["capacity_qps"].sort_index()
    names = [style.NAMES[scheduler].replace("*", "\\*") for scheduler in SCHEDULERS]
    lines = ["| P99 TTFT at most | | " + " | ".join(names) + " |", "|---" * (len(names) + 2) + "|"]
    gains = []
    for slo in reversed(settings.SLO_S):
        ours = [interval(found[slo, scheduler].tolist()) for scheduler in SCHEDULERS]
        published = PUBLISHED["capacity_qps"]["base"][slo]
        cells = [f"{mean:.1f} ± {half or 0:.1f}" for mean, half in ours]
        lines.append(f"| {slo:g} s | ours | " + " | ".join(cells) + " |")
        lines.append(f"| {slo:g} s | paper | " + " | ".join(f"{published.get(s, '–')}" for s in SCHEDULERS) + " |")
        each = []
        for scheduler, name in zip(SCHEDULERS[:2], names, strict=False):
            apart = (found[slo, scheduler].to_numpy() - found[slo, "llumnix_minus"].to_numpy()).tolist()
            mean, half = interval(apart)
            each.append(f"{name} {mean:+.2f} ± {half or 0:.2f}")
        gains.append(f"{' and '.join(each)} at {slo:g} s")
    lines += [
        "",
        "± is half of the 95 % interval over 3 seeds. What a seed does to one scheduler it does to all,",
        f"so compare within seeds: over Llumnix-, {gains[0]};",
        f"{gains[1]}.",
    ]
    return "\n".join(lines) + "\n"
