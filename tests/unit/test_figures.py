"""The figures: each is drawn from stored runs, saved beside what it draws, and refuses to be drawn with holes."""

from __future__ import annotations

import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pandas as pd
import pytest
from hydra import compose, initialize_config_dir

from block import config, experiment
from block.results import Run
from paper_figures import cells, style

ROOT = Path(__file__).resolve().parents[2]
FIGURES = ("fig6", "cdf", "fig7")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """One small run, which stands for all."""
    config.register()
    folder = tmp_path_factory.mktemp("runs")
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        settings = compose("config", ["workload.num_requests=80", "tracking=none", f"runs_dir={folder}"])
    return experiment.execute(settings, {"scheduler": "block"}, quiet=True)


@pytest.mark.parametrize("name", FIGURES)
def test_a_figure_is_drawn_and_saved_beside_its_table(name: str, run: Run, tmp_path: Path) -> None:
    module = import_module(f"paper_figures.{name}")
    style.use()
    stored = {cells.key(cell): run for cell in module.CELLS}
    table = module.table(stored)
    if "scheduler" in table and name == "fig6":
        table["scheduler"] = [cell["scheduler"] for cell in module.CELLS]
    style.save(module.draw(table), table, tmp_path, name)
    assert (tmp_path / f"{name}.png").stat().st_size > 10_000
    assert (tmp_path / f"{name}.pdf").stat().st_size > 10_000
    drawn = pd.read_csv(tmp_path / f"{name}.csv")
    assert len(drawn) == len(table) > 0


def test_the_snapshot_shows_what_was_published_beside_ours(run: Run) -> None:
    module = import_module("paper_figures.snapshot")
    stored = {cells.key(cell): run for cell in module.CELLS}
    rows = module.cells.table(module.CELLS, stored)
    rows["scheduler"] = [cell["scheduler"] for cell in module.CELLS]
    table = module.of(rows)
    mean = run.summary["e2e_mean_s"]
    assert mean is not None
    ours = table[table["metric"] == "e2e_mean_s"].set_index("scheduler")
    assert ours.loc["block_star", "mean"] == pytest.approx(mean)
    assert ours.loc["block_star", "half_width"] == pytest.approx(0.0)
    assert ours.loc["block_star", "published"] == 10.92
    assert ours.loc["block_star", "difference"] == pytest.approx(mean / 10.92 - 1)
    assert pd.isna(ours.loc["random", "published"])
    text = module.markdown(table)
    assert f"| Block\\* | {mean:.3g} ± " in text
    assert f" (published 10.92, {mean / 10.92 - 1:+.1%})" in text


@pytest.mark.parametrize("name", [*FIGURES, "snapshot"])
def test_a_missing_run_is_named(name: str, run: Run) -> None:
    module = import_module(f"paper_figures.{name}")
    stored = {cells.key(cell): run for cell in module.CELLS[:-1]}
    lacking = " ".join(cells.overrides(module.CELLS[-1]))
    with pytest.raises(cells.MissingCells, match=f"1 of {len(module.CELLS)} runs are missing: {lacking}"):
        module.table(stored)


def test_every_scheduler_has_a_colour_and_a_marker_of_its_own() -> None:
    assert len(set(style.COLOURS.values())) == len(style.SCHEDULERS) == len(set(style.MARKERS.values()))


def test_a_grid_is_every_combination() -> None:
    assert cells.grid(scheduler=("a", "b"), workload__qps=(1, 2)) == [
        {"scheduler": scheduler, "workload.qps": qps} for scheduler in ("a", "b") for qps in (1, 2)
    ]


def test_the_command_lists_what_there_is_and_refuses_what_there_is_not(tmp_path: Path) -> None:
    def command(*arguments: str) -> subprocess.CompletedProcess[str]:
        script = [sys.executable, str(ROOT / "scripts" / "reproduce.py"), *arguments]
        return subprocess.run(script, cwd=tmp_path, capture_output=True, text=True, timeout=100, check=False)

    listed = command("--list")
    assert listed.returncode == 0, listed.stderr
    assert [line.split()[0] for line in listed.stdout.splitlines()] == [*FIGURES, "snapshot"]
    assert "0 of 357 runs stored" in listed.stdout
    refused = command("fig99")
    assert refused.returncode == 2
    assert "fig99: choose from fig6, cdf, fig7, snapshot" in refused.stderr.splitlines()[-1]
