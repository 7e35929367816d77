"""The engine as plain Python: it passes the same tests, and coverage sees into what is otherwise compiled."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ENGINE = ("scheduler", "engine", "predictor", "latency")


@pytest.mark.slow
@pytest.mark.skipif(os.environ.get("NUMBA_DISABLE_JIT") == "1", reason="this is that pass")
@pytest.mark.parametrize("part", ENGINE)
def test_the_tests_of_the_engine_pass_without_a_compiler(part: str, pytestconfig: pytest.Config) -> None:
    """If coverage is measured, what these find out lies beside the workers' and is combined with it."""
    measured = bool(pytestconfig.getoption("cov_source"))
    coverage = ["coverage", "run", "--parallel-mode", "--source=block", "-m"] if measured else []
    command = [sys.executable, "-m", *coverage, "pytest", f"tests/unit/test_{part}.py", "-q", "-p", "no:cacheprovider"]
    environment = {**os.environ, "NUMBA_DISABLE_JIT": "1"}
    for name in [name for name in environment if name.startswith(("PYTEST_", "COV_"))]:
        del environment[name]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
