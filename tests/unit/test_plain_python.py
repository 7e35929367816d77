"""The engine as plain Python: it passes the same tests, and coverage sees into what is otherwise compiled."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from commands import covering

ROOT = Path(__file__).resolve().parents[2]
ENGINE = ("scheduler", "engine", "predictor", "latency")


@pytest.mark.slow
@pytest.mark.skipif(os.environ.get("NUMBA_DISABLE_JIT") == "1", reason="this is that pass")
@pytest.mark.parametrize("part", ENGINE)
def test_the_tests_of_the_engine_pass_without_a_compiler(part: str, pytestconfig: pytest.Config) -> None:
    command = [sys.executable, *covering(pytestconfig), "-m", "pytest", f"tests/unit/test_{part}.py", "-q"]
    command += ["-p", "no:cacheprovider"]
    environment = {**os.environ, "NUMBA_DISABLE_JIT": "1"}
    for name in [name for name in environment if name.startswith(("PYTEST_", "COV_"))]:
        del environment[name]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
