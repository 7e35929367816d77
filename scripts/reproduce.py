"""Draw the paper's figures and tables, running first what is missing.

    python scripts/reproduce.py                draw all
    python scripts/reproduce.py fig6           draw some
    python scripts/reproduce.py --list         what there is, and how many of its runs are stored

A figure is written to artifacts/figures/ as PDF and PNG, a table as Markdown, each beside the CSV of what it shows.
Runs are stored in artifacts/runs/ and found there again, so that a call that was interrupted goes on where it was;
another one runs nothing.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from hydra import compose, initialize_config_dir  # noqa: E402
from joblib import Parallel, delayed  # noqa: E402
from omegaconf import OmegaConf  # noqa: E402
from rich.console import Console  # noqa: E402

from block import config, experiment  # noqa: E402
from block.console import progress  # noqa: E402
from block.results import DEFAULT_ROOT, Run, experiment_hash, runs  # noqa: E402
from block.sweep import end_with  # noqa: E402
from paper_figures import cells, style  # noqa: E402

FIGURES = ("fig6", "cdf", "fig7", "snapshot")
ALWAYS = ("backend=simulated", "tracking=none")


def main() -> int:
    """Parse, run, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("figures", nargs="*", metavar="FIGURE", help=f"some of {', '.join(FIGURES)} (default: all)")
    parser.add_argument("--list", action="store_true", help="say what there is and what is stored of it")
    parser.add_argument("--out", type=Path, default=Path("artifacts/figures"), help="folder for the figures")
    parser.add_argument("--requests", type=int, default=10_000, help="requests a run; fewer are for a quick look")
    arguments = parser.parse_args()
    for name in arguments.figures:
        if name not in FIGURES:
            parser.error(f"{name}: choose from {', '.join(FIGURES)}")
    if arguments.requests < 1:
        parser.error(f"--requests={arguments.requests}: must be at least 1")
    names = arguments.figures or FIGURES
    modules = {name: importlib.import_module(f"paper_figures.{name}") for name in names}
    jobs = {cells.key(cell): cell for module in modules.values() for cell in module.CELLS}
    composed = _composed(list(jobs.values()), arguments.requests)
    stored = _stored(composed)
    if arguments.list:
        for name, module in modules.items():
            have = sum(cells.key(cell) in stored for cell in module.CELLS)
            print(f"{name:8}{have:4} of {len(module.CELLS):3} runs stored   {module.TITLE}")
        return 0
    missing = [key for key in jobs if key not in stored]
    if missing:
        work = (delayed(_execute)(*composed[key], os.getpid()) for key in missing)
        with progress(Console(stderr=True), "runs", len(missing)) as advance:
            for _ in Parallel(n_jobs=-1, return_as="generator_unordered")(work):
                advance(1)
        stored = _stored(composed)
    style.use()
    for name, module in modules.items():
        _draw(name, module, stored, arguments.out)
    return 0


Composed = dict[tuple[Any, ...], tuple[dict[str, Any], dict[str, str]]]


def _composed(wanted: Sequence[cells.Cell], requests: int) -> Composed:
    """The resolved config of each cell's run, and its choices."""
    config.register()
    bases: dict[tuple[str, ...], tuple[Any, dict[str, str]]] = {}
    found = {}
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        for cell in wanted:
            groups = {key: value for key, value in cell.items() if key in config.GROUPS or key in config.CHOICES}
            chosen = tuple(cells.overrides(groups))
            if chosen not in bases:  # composing takes long; a value is set in no time
                overrides = [*chosen, *ALWAYS, f"workload.num_requests={requests}"]
                made = compose("config", overrides=overrides, return_hydra_config=True)
                named = made.hydra.runtime.choices.items()
                choices = {str(k): str(v) for k, v in named if not str(k).startswith("hydra/")}
                bases[chosen] = (made, choices)
            base, choices = bases[chosen]
            settings = OmegaConf.masked_copy(base, [str(key) for key in base if key != "hydra"])
            for key in cell.keys() - groups.keys():
                OmegaConf.update(settings, key, cell[key])
            found[cells.key(cell)] = (config.plain(settings), choices)
    return found


def _stored(composed: Composed) -> dict[tuple[Any, ...], Run]:
    """The latest stored run of each cell that has one."""
    by_hash = {run.document["config_hash"]: run for run in runs(root=DEFAULT_ROOT)}
    found = {key: by_hash.get(experiment_hash(settings)) for key, (settings, _) in composed.items()}
    return {key: run for key, run in found.items() if run is not None}


def _execute(settings: dict[str, Any], choices: dict[str, str], main: int) -> None:
    """One run; in a process of its own."""
    end_with(main)
    experiment.execute(OmegaConf.create(settings), choices, quiet=True)


def _draw(name: str, module: ModuleType, stored: Mapping[tuple[Any, ...], Run], folder: Path) -> None:
    """Write a figure or, if it is a table, its Markdown, beside the CSV of what it shows."""
    table = module.table(stored)
    if hasattr(module, "draw"):
        style.save(module.draw(table), table, folder, name)
        print(folder / f"{name}.png")
    else:
        style.save(None, table, folder, name)
        (folder / f"{name}.md").write_text(f"{module.TITLE}:\n\n{module.markdown(table)}")
        print(folder / f"{name}.md")


if __name__ == "__main__":
    sys.exit(main())
