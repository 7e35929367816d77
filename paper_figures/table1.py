"""Table 1: how far length estimators are off on prompts that were held out, by data set.

Shows what `python run.py experiment=length_estimation` measured and wrote.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd

from paper_figures import points
from paper_figures.verdicts import PUBLISHED, Claim, order, value

TITLE = "Length estimators on held-out prompts: average error (tokens), error rate, share within 10, 50 and 100 tokens"
PAPER = "v2 Table 1, camera-ready Table 1"
RUNS: list[points.GridPoint] = []
SCORES = Path(__file__).resolve().parents[1] / "artifacts" / "lengths" / "scores.json"
FILES = (SCORES,)
COLUMNS = ("average_error", "error_rate", "acc_10", "acc_50", "acc_100", "bias", "covered")
BASELINES = ("mean", "median", "prompt_length")
MARGIN = 0.25


def measured() -> list[dict[str, Any]]:
    """What was measured, a row per data set and estimator. MissingResults if nothing was."""
    if not SCORES.is_file():
        raise points.MissingResults("python run.py experiment=length_estimation was not run")
    rows: list[dict[str, Any]] = json.loads(SCORES.read_text())["rows"]
    return rows


def table(stored: points.Stored) -> pd.DataFrame:
    """A row per data set and estimator. MissingResults if nothing was measured."""
    return pd.DataFrame([{key: row[key] for key in ("data", "estimator", "pairs", *COLUMNS)} for row in measured()])


def markdown(table: pd.DataFrame) -> str:
    """The table for people, the published row beneath."""
    heads = ("data set", "estimator", "average error", "error rate", "Acc-10", "Acc-50", "Acc-100", "bias", "covered")
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for _, row in table.iterrows():
        shares = [f"{100 * row[column]:.1f} %" for column in COLUMNS[1:]]
        lines.append(" | ".join(["| " + row["data"], row["estimator"], f"{row['average_error']:.1f}", *shares]) + " |")
    low, high = PUBLISHED["length_error_percent"]
    lines.append(f"| ShareGPT, published | RoBERTa | – | {low}–{high} % |" + " – |" * len(COLUMNS[2:]))
    return "\n".join(lines) + "\n"


def claims(table: pd.DataFrame) -> list[Claim]:
    """The published error rate beside that of each learned estimator, and that it beats what needs no learning."""
    found = []
    low, high = PUBLISHED["length_error_percent"]
    middle = (low + high) / 2
    whole = table.drop_duplicates("estimator").set_index("estimator")["error_rate"]
    for name in whole.index.difference(list(BASELINES)):
        what = f"error rate of {name} (published: RoBERTa on ShareGPT; ours on {table['data'][0]})"
        found.append(value(what, middle, [100 * whole[name]], "%", tolerance=middle - low))
        least = min(whole[baseline] for baseline in BASELINES if baseline in whole)
        found.append(
            order(
                f"{name} errs at least {MARGIN:.0%} less than the best constant", [whole[name] < (1 - MARGIN) * least]
            )
        )
    return found
