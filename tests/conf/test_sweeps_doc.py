"""The commands of docs/sweeps.md run."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
from commands import ROOT
from test_readme import lines, run_small

COMMANDS = lines("python run.py", (ROOT / "docs" / "sweeps.md").read_text())


@pytest.mark.parametrize("line", COMMANDS)
def test_a_command_runs(line: str, tmp_path: Path) -> None:
    if "optuna" in line and find_spec("optuna") is None:
        pytest.skip("Optuna's sweeper is no dependency; what it relies on is tested in unit/test_sweep.py")
    done = run_small(line, tmp_path)
    assert len(done.stdout.splitlines()) >= 4
