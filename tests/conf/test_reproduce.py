"""scripts/reproduce.py as a user calls it: what it lists, refuses, resumes and does not do twice."""

from __future__ import annotations

import json
import subprocess
import sys
from datetime import date
from pathlib import Path

import pytest

from paper_figures import fig6
from paper_figures.catalogue import FIGURES

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "reproduce.py"
TINY = ("--requests", "60", "--seeds", "1")


def reproduce(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=200, check=False)


def test_the_list_has_every_figure_with_its_state_and_cost(tmp_path: Path) -> None:
    listed = reproduce(tmp_path, "--list")
    assert listed.returncode == 0, listed.stderr
    lines = listed.stdout.splitlines()
    assert [line.split()[0] for line in lines] == list(FIGURES)
    cells = len(fig6.RUNS) + len(fig6.SEARCHES)
    assert any(f" 0 of {cells} stored, about" in line for line in lines)
    assert not (tmp_path / "artifacts").exists()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("fig99",), "fig99: choose from headline, fig5, fig6"),
        (("--requests", "0"), "--requests=0: must be at least 1"),
        (("--seeds", "4"), "--seeds=4: must be between 1 and 3"),
        (("--backend", "emulated", "table2"), "table2: needs --backend simulated"),
        (("--backend", "cloud"), "invalid choice: 'cloud'"),
    ],
)
def test_what_is_wrong_is_told_in_one_line(tmp_path: Path, arguments: tuple[str, ...], told: str) -> None:
    refused = reproduce(tmp_path, *arguments)
    assert refused.returncode == 2
    assert told in refused.stderr.splitlines()[-1]


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
