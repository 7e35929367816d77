"""Table 1: how far length estimators are off on prompts held out, by data set.

    python scripts/evaluate_lengths.py experiment=length_estimation
    python scripts/evaluate_lengths.py estimation.data_sets=[mine.jsonl] estimation.estimators=[median,compact]

The numbers, and how well estimates are calibrated, are written to `estimation.scores`. Takes every key of run.py, and
those of the node `estimation`.
"""

import sys
from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig

from block import config
from block.lengths.estimation import Scores, evaluate
from block.results import write_json

config.register()
HEADS = ("error", "rate", "Acc-10", "Acc-50", "Acc-100", "bias", "covered")


@hydra.main(version_base="1.3", config_path="../conf", config_name="config")
def main(settings: DictConfig) -> None:
    """One table."""
    config.told(lambda: run(settings))


def run(settings: DictConfig) -> None:
    """Measure, print and write what `settings` describe."""
    wanted = config.node(settings.estimation)
    rows = evaluate(wanted)
    print(f"{'data set':<44}{'estimator':<15}{'pairs':>6}" + "".join(f"{head:>10}" for head in HEADS))
    for row in (row for row in rows if "missing" not in row):
        cells = [f"{row[name]:.2f}" if name == "average_error" else f"{row[name]:.1%}" for name in Scores._fields]
        print(f"{row['data']:<44}{row['estimator']:<15}{row['pairs']:>6}" + "".join(f"{cell:>10}" for cell in cells))
    for why, names in missing(rows).items():
        print(f"not there: {', '.join(names)}: {why}")
    path = Path(wanted.scores)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(
        path,
        {
            "config": config.plain(settings.estimation),
            "rows": [row for row in rows if "missing" not in row],
            "missing": [[row["data"], row["estimator"]] for row in rows if "missing" in row],
        },
    )
    print(path)


def missing(rows: list[dict[str, Any]]) -> dict[str, list[str]]:
    """Why estimators are missing, and which: data set and name."""
    found: dict[str, list[str]] = {}
    for row in rows:
        if "missing" in row:
            found.setdefault(row["missing"], []).append(f"{row['data']} {row['estimator']}")
    return found


if __name__ == "__main__":
    sys.exit(config.guard(main))
