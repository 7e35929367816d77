"""The commands of docs/workloads.md run, on a trace with the columns that they name."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

import pytest
from commands import ROOT, command
from test_readme import lines, run_small

DOC = (ROOT / "docs" / "workloads.md").read_text()
ROWS = "5,20,5,20,0.0,0.0\n9,30,9,30,1.0,1.0\n7,10,7,10,4.0,4.0\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """One with my.csv."""
    (tmp_path / "my.csv").write_text(f"prompt_tokens,output_tokens,in,out,arrival,at\n{ROWS}")
    return tmp_path


@pytest.mark.parametrize("line", lines("python run.py", DOC))
def test_a_command_runs(line: str, folder: Path) -> None:
    if "gpteacher" in line and "BLOCK_DATA" not in os.environ:
        pytest.skip("BLOCK_DATA is not set: the pairs are not here")
    own = "my_chat" in line  # a sketch that the project does not have; any other is read in the same way
    done = run_small(line.replace("my_chat", "arxiv") if own else line, folder)
    if "my.csv" in line:
        assert "my.csv: 3 rows, read as" in done.stderr
        assert "replayed 66.7 times, for 200 requests" in done.stderr
        assert ("recorded at 0.5 requests/s, replayed as it is" in done.stderr) == ("qps=null" in line)


def test_a_sketch_is_made_of_ones_own_trace(folder: Path) -> None:
    (line,) = lines("python scripts/fit_workload.py", DOC)[-1:]
    script, *arguments = shlex.split(line)[1:]
    rows = "".join(f"{i % 90 + 1},{i % 70 + 1},{i}\n" for i in range(2000))
    (folder / "my.csv").write_text(f"prompt_tokens,output_tokens,arrival\n{rows}")
    done = command(script, *arguments, "--out", "sketches", folder=folder)
    assert done.returncode == 0, done.stderr
    assert (folder / "sketches" / "my_chat.json").exists()
