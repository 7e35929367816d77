"""scripts/reproduce.py as a user calls it: what it lists, refuses, resumes and does not do twice."""

from __future__ import annotations

import json
import os
import re
import subprocess
from argparse import Namespace
from datetime import date
from importlib import import_module
from pathlib import Path

import pandas as pd
import pytest
from commands import ROOT, command, load_script

from block.run import campaign
from paper_figures.catalogue import FIGURES, STUDIES

TINY = ("--requests", "60", "--seeds", "1")


def reproduce(folder: Path, *arguments: str, timeout: float = 200) -> subprocess.CompletedProcess[str]:
    return command("scripts/reproduce.py", *arguments, folder=folder, timeout=timeout)


def said(stderr: str) -> list[str]:
    """What was said, but that it compiles, which the first call does."""
    return [line for line in stderr.splitlines() if not line.startswith("compiling, once")]


def test_the_time_that_is_listed_is_that_of_all_requests(tmp_path: Path) -> None:
    for requests in (40_000, 80_000):
        listed = reproduce(tmp_path, "fig7", "--list", "--requests", str(requests)).stdout
        seconds = 42 * requests * campaign.REQUEST_S / (os.cpu_count() or 1)
        assert f" 0 of  42 stored, about {max(seconds / 60, 1):.0f} min " in listed


def test_a_second_call_does_nothing_and_a_lost_run_is_made_again(tmp_path: Path) -> None:
    first = reproduce(tmp_path, "fig7", *TINY)
    assert first.returncode == 0, first.stderr
    folder = tmp_path / "artifacts" / "figures" / "simulated-60x1"
    assert first.stdout.splitlines()[0] == str((folder / "fig7.png").relative_to(tmp_path))
    assert {path.name for path in folder.glob("fig7.*")} == {"fig7.csv", "fig7.pdf", "fig7.png"}
    stored = sorted((tmp_path / "artifacts" / "runs").glob("*/run.json"))
    assert len(stored) == 14
    again = reproduce(tmp_path, "fig7", *TINY)
    told = f"14 of 14 results: stored {date.today()}; --fresh makes them anew\n"
    assert (again.returncode, again.stdout) == (0, told)
    assert sorted((tmp_path / "artifacts" / "runs").glob("*/run.json")) == stored

    stored[0].unlink()  # one that was killed before its end
    outdated = json.loads(stored[1].read_text())
    outdated["hashes"]["code"] = "another"
    stored[1].write_text(json.dumps(outdated))
    mended = reproduce(tmp_path, "fig7", *TINY)
    assert mended.returncode == 0, mended.stderr
    assert len(list((tmp_path / "artifacts" / "runs").glob("*/run.json"))) == 15
    fresh = reproduce(tmp_path, "fig7", *TINY, "--fresh")
    assert fresh.returncode == 0, fresh.stderr
    assert "stored" not in fresh.stdout
    assert len(list((tmp_path / "artifacts" / "runs").glob("*/run.json"))) == 29


def test_every_figure_is_listed_and_comes_from_the_smallest_runs(tmp_path: Path) -> None:
    """`make reproduce` at its smallest: all figures, from real runs; and what is listed before and after."""
    smallest = ("--requests", "20", "--seeds", "1")

    def listed() -> list[str]:
        done = reproduce(tmp_path, "--list", *smallest)
        assert done.returncode == 0, done.stderr
        assert [line.split()[0] for line in done.stdout.splitlines()] == [one for one in FIGURES if one not in STUDIES]
        return done.stdout.splitlines()

    costly = [line for line in listed() if re.search(r" 0 of +[1-9]\d* stored, about \d+ min ", line)]
    assert "fig6" in [line.split()[0] for line in costly]
    assert not (tmp_path / "artifacts").exists()
    drawn = reproduce(tmp_path, *smallest, "--out", "out", timeout=900)
    assert not [line for line in listed() if not re.search(r" (\d+) of +\1 stored  ", line)]
    assert (drawn.returncode, said(drawn.stderr)) == (0, [])
    folder = tmp_path / "out"
    drawn_ones = set(FIGURES) - set(STUDIES)
    for name in drawn_ones:
        module = import_module(f"paper_figures.{name}")
        kinds = ("csv", "png", "pdf") if hasattr(module, "draw") else ("csv", "md")
        assert all((folder / f"{name}.{kind}").stat().st_size > 100 for kind in kinds), name
    summary = pd.read_csv(folder / "summary.csv")
    claimed = {name for name in drawn_ones if hasattr(import_module(f"paper_figures.{name}"), "claims")}
    assert set(summary["figure"]) == claimed
    gaps = summary[summary["verdict"] == "gap"]
    assert {"headline", "fig6", "table2", "fig9"} <= set(gaps["figure"])
    assert gaps["reason"].notna().all()
    assert gaps["ours"].isna().all()
    assert summary["half_width"].isna().all()  # one seed has no interval
    assert "**A quick look**: Simulated: 20 requests a run, seeds: 1." in (folder / "summary.md").read_text()
    assert "Gaps: " in (folder / "table2.md").read_text()
    assert "</html>" in (folder / "index.html").read_text()


@pytest.mark.parametrize("backend", ["simulated", "emulated", "vllm"])
def test_the_paper_s_engines_cache_no_prefixes(backend: str) -> None:
    """V1's, of real engines, do by default."""
    options = Namespace(backend=backend, requests=20, seeds=1)
    jobs = load_script("reproduce")._jobs({"fig7": import_module("paper_figures.fig7")}, options).values()
    assert {job.settings["engine"]["enable_prefix_caching"] for job in jobs} == {False}
    assert {job.settings["engine"]["version"] for job in jobs} == {"v0" if backend == "simulated" else "v1"}


def test_the_fault_of_one_figure_costs_no_other(tmp_path: Path) -> None:
    """A module that draws nothing stands in for fig7."""
    (tmp_path / "broken.py").write_text(
        "import runpy, sys\n"
        "from paper_figures import fig7\n"
        "fig7.draw = lambda table: 1 / 0\n"
        "sys.argv = sys.argv[1:]\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    run = command(str(tmp_path / "broken.py"), str(ROOT / "scripts" / "reproduce.py"), "fig7", *TINY, folder=tmp_path)
    assert run.returncode == 1
    assert said(run.stderr) == ["error: fig7: ZeroDivisionError: division by zero (broken.py:3)"]
    assert (tmp_path / "artifacts" / "figures" / "simulated-60x1" / "summary.md").exists()


def test_a_run_that_fails_costs_its_figures_only(tmp_path: Path) -> None:
    (tmp_path / "artifacts").mkdir()
    (tmp_path / "artifacts" / "runs").write_text("in the way")
    failed = reproduce(tmp_path, "fig7", *TINY)
    assert failed.returncode == 1
    assert "Traceback" not in failed.stderr
    lines = failed.stderr.splitlines()
    assert "error: scheduler=" in lines[0]
    assert "runs_dir" in lines[0]
    assert lines[-1].startswith("error: fig7: 14 of 14 runs are missing: scheduler=random workload.qps=28")
