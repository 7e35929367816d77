"""The package, built as a wheel and installed without its checkout, works in an empty folder."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import urllib.error
import urllib.request
import zipfile
from pathlib import Path

import pytest
from commands import ROOT

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"  # where a build leaves nothing behind, and finds nothing of an earlier one
    for name in ("block", "conf", "artifacts", "paper_figures"):
        unwanted = shutil.ignore_patterns("__pycache__", "runs", "capacity", "sweeps", "figures")
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=unwanted)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--quiet"]
    options = ["--no-deps", "--no-build-isolation", "--wheel-dir", str(folder)]
    subprocess.run([*pip, *options, str(source)], check=True, timeout=120, env=environment())
    (found,) = folder.glob("block_serving-*.whl")
    return found


@pytest.fixture(scope="module")
def commands(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the commands of an environment that has the wheel, and beside it what this one has."""
    folder = tmp_path_factory.mktemp("installed")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True, timeout=60)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", str(folder / "bin" / "python")]
    subprocess.run(
        [*pip, "install", "--quiet", "--no-deps", "--no-index", str(wheel)], check=True, timeout=60, env=environment()
    )
    packages = next(folder.glob("lib/python3*/site-packages"))
    (packages / "others.pth").write_text(sysconfig.get_path("purelib"))
    return folder / "bin"


def environment(**more: str) -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "BLOCK_DATA")}
    return {**kept, "NUMBA_DISABLE_JIT": "1", **more}


def test_a_wheel_has_what_code_reads_and_nothing_else_of_the_repository(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    conf = {f"block/shipped/conf/{path.relative_to(ROOT / 'conf')}" for path in (ROOT / "conf").rglob("*.yaml")}
    fits = {f"block/shipped/artifacts/{path.parent.name}/{path.name}" for path in ROOT.glob("artifacts/l*/*.*[nz]")}
    assert conf | fits | {"block/py.typed"} <= names
    assert not [name for name in names if not name.startswith(("block/", "paper_figures/", "block_serving-"))]


def test_what_both_commands_import_is_installed_with_them(wheel: Path) -> None:
    """The environment of `commands` has everything, and so would not tell."""
    (metadata,) = [name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".dist-info/METADATA")]
    required = re.findall(r"^Requires-Dist: ([\w-]+)[^;\n]*$", zipfile.ZipFile(wheel).read(metadata).decode(), re.M)
    assert {"aiohttp", "prometheus-client", "uvloop", "hydra-core", "numba"} <= set(required)


def test_block_run_serves_a_workload_in_an_empty_folder(commands: Path, tmp_path: Path) -> None:
    keys = ["scheduler=block", "workload.num_requests=10", "workload.qps=4", "cluster.num_gpus=2", "tracking=none"]
    done = subprocess.run(
        [commands / "block-run", *keys], cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "10 sent, 10 ok" in done.stdout
    assert "step times: operator profiles" in done.stderr, "a fit, and no roofline"
    assert len(list(tmp_path.glob("artifacts/runs/*/run.json"))) == 1


def test_a_wrong_key_is_told_by_the_installed_command_in_one_line(commands: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [commands / "block-run", "scheduler=blok"], cwd=tmp_path, env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: scheduler=blok: did you mean block?")
    assert len(done.stderr.splitlines()) == 1


def test_block_gateway_answers_in_an_empty_folder(commands: Path, tmp_path: Path) -> None:
    command = [
        commands / "block-gateway",
        "scheduler=round_robin",
        "gateway.urls=[http://127.0.0.1:9]",
        "gateway.port=0",
    ]
    with subprocess.Popen(command, cwd=tmp_path, env=environment(), stdout=subprocess.PIPE, text=True) as gateway:
        try:
            assert gateway.stdout is not None
            port = gateway.stdout.readline().split(":")[2]
            with pytest.raises(urllib.error.HTTPError, match="503") as answer:  # no server answers behind it
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=30)
            assert answer.value.read() == b'{"active": 0, "instances": 1}'
        finally:
            gateway.terminate()
    assert gateway.returncode == 0
