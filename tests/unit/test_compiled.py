"""Compiled functions: machine code is never older than its source, and plain Python computes the same."""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import block
from block.store.results import runs

PACKAGE = Path(block.__file__).parent
ROOT = PACKAGE.parent
PLAIN = os.environ.get("NUMBA_DISABLE_JIT") == "1"


def python(code: str, folder: Path = ROOT, **environment: str) -> str:
    """What a fresh interpreter in `folder`, from which it imports first, prints for `code`."""
    settings = {**os.environ, **environment}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=settings, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of the package, to be edited."""
    shutil.copytree(PACKAGE, tmp_path / "block", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path / "block"


def cache_folder(package: Path, cache: Path | None = None) -> Path:
    """Where the package at `package` keeps its machine code."""
    environment = {"NUMBA_CACHE_DIR": "" if cache is None else str(cache)}
    code = "import block.core.jit, numba; print(block.core.jit.__file__); print(numba.config.CACHE_DIR)"
    file, folder = python(code, package.parent, **environment).splitlines()
    assert Path(file).parent == package / "core"
    return Path(folder)


def append(path: Path, text: str) -> None:
    path.write_text(path.read_text() + text)


def test_the_cache_moves_when_a_compiled_module_changes(copy: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    folder = cache_folder(copy, cache)
    assert folder.parent == cache
    assert cache_folder(copy, cache) == folder
    seen = {folder}
    for changed in ("engine/scheduler.py", "core/snapshot.py"):  # snapshot holds constants that are compiled in
        append(copy / changed, "\n# changed\n")
        folder = cache_folder(copy, cache)
        assert folder not in seen
        seen.add(folder)


def test_the_cache_stays_when_another_module_changes(copy: Path, tmp_path: Path) -> None:
    folder = cache_folder(copy, tmp_path / "cache")
    append(copy / "run/console.py", "\n# changed\n")
    assert cache_folder(copy, tmp_path / "cache") == folder


def test_machine_code_lies_in_the_package_without_a_cache_folder(copy: Path) -> None:
    assert cache_folder(copy).parent == copy / "__pycache__"


def test_machine_code_of_an_older_source_is_removed_and_nothing_else(copy: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    old = cache_folder(copy, cache)
    old.mkdir(parents=True)
    other = cache / "of_another_package"
    other.mkdir()
    assert cache_folder(copy, cache) == old
    assert old.exists()
    append(copy / "engine/scheduler.py", "\n# changed\n")
    cache_folder(copy, cache)
    assert not old.exists()
    assert other.exists()


@pytest.mark.skipif(PLAIN, reason="nothing is compiled")
def test_division_by_zero_follows_numpy(copy: Path, tmp_path: Path) -> None:
    (tmp_path / "ratio.py").write_text(
        "from block.core.jit import compiled\n\n@compiled\ndef ratio(a, b):\n    return a / b\n"
    )
    environment = {"NUMBA_CACHE_DIR": str(tmp_path / "cache"), "NUMBA_DISABLE_JIT": "0"}
    printed = python("from ratio import ratio; print(ratio(1.0, 0.0), ratio(0.0, 0.0))", tmp_path, **environment)
    assert [float(word) for word in printed.split()] == pytest.approx([math.inf, math.nan], nan_ok=True)


@pytest.mark.slow
def test_plain_python_serves_the_same_requests(tmp_path: Path) -> None:
    keys = ["workload.num_requests=25", "cluster.num_gpus=2", "workload.qps=4", "tracking=none", f"runs_dir={tmp_path}"]
    for disable in ("1", "0"):
        environment = {**os.environ, "NUMBA_DISABLE_JIT": disable}
        command = [sys.executable, str(ROOT / "run.py"), *keys]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    plain, compiled = (run.requests() for run in runs(root=tmp_path))
    assert plain["instance_id"].tolist() == compiled["instance_id"].tolist()
    for column in ("first_token", "finished", "forecast_ttft", "forecast_e2e"):
        assert plain[column].to_numpy() == pytest.approx(compiled[column].to_numpy(), rel=1e-9)


def test_disabling_compilation_gives_plain_functions() -> None:
    code = (
        "import types; from block.engine.kv_cache import blocks_for; print(isinstance(blocks_for, types.FunctionType))"
    )
    assert python(code, NUMBA_DISABLE_JIT="1") == "True"
