"""How tests compose, build and run what a user types: in this process, in one forked for it, or in a new one."""

from __future__ import annotations

import atexit
import copy
import functools
import importlib.util
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType

import one_composition  # noqa: F401
import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from block.run import config, hydra_schema

ROOT = Path(__file__).resolve().parents[1]
CONF = ROOT / "conf"
SMALL = ["workload.num_requests=150", "cluster.num_gpus=3", "tracking=none"]
TINY = [SMALL[0], "workload.qps=6", *SMALL[1:]]


def choices(group: str) -> list[str]:
    """The yaml files of a group."""
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def composed(*overrides: str, hydra: bool = False) -> DictConfig:
    """What Hydra makes of conf/ and the overrides; with its own settings if `hydra`."""
    return copy.deepcopy(_composed(overrides, hydra))


@functools.cache
def _composed(overrides: tuple[str, ...], hydra: bool) -> DictConfig:
    hydra_schema.register()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("config", overrides=list(overrides), return_hydra_config=hydra)


def built(*overrides: str) -> config.RunConfig:
    return config.build(composed(*overrides))


def command(
    script: str,
    *arguments: str,
    folder: Path,
    environment: Mapping[str, str] | None = None,
    timeout: float = 120,
) -> subprocess.CompletedProcess[str]:
    """`python script arguments` in `folder`, to its end, in a process forked from one that has imported everything."""
    server = _server()
    assert server.stdin is not None
    with tempfile.TemporaryDirectory() as outputs:
        out, err = Path(outputs) / "out", Path(outputs) / "err"
        typed = {"script": str(ROOT / script), "arguments": arguments, "folder": str(folder)}
        request = {**typed, "environment": _environment(environment), "out": str(out), "err": str(err)}
        server.stdin.write(json.dumps(request).encode() + b"\n")
        server.stdin.flush()
        pid = _answer(server, 120)
        try:
            code = _answer(server, timeout)
        except TimeoutError:
            os.killpg(pid, signal.SIGKILL)
            _answer(server, 10)
            raise AssertionError(f"{script} {arguments}: not at its end after {timeout} s: {err.read_text()}") from None
        return subprocess.CompletedProcess([script, *arguments], code, out.read_text(), err.read_text())


@functools.cache
def _server() -> subprocess.Popen[bytes]:
    """The process that `command` forks, one for all tests."""
    server = subprocess.Popen(
        [sys.executable, str(ROOT / "tests" / "command_server.py")],
        cwd=ROOT,
        env=_environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        bufsize=0,
    )
    atexit.register(server.communicate)  # which closes its input, at which it ends
    return server


def _answer(server: subprocess.Popen[bytes], timeout: float) -> int:
    """The server's next line; TimeoutError if it does not come in `timeout` seconds."""
    assert server.stdout is not None
    if not select.select([server.stdout], [], [], timeout)[0]:
        raise TimeoutError
    line = server.stdout.readline()
    assert line, "the command server has ended"
    return int(line)


def start(
    script: str, arguments: Sequence[str], folder: Path, environment: Mapping[str, str] | None = None
) -> subprocess.Popen[str]:
    """`python script arguments` in `folder`, in a new process and a process group of its own."""
    return subprocess.Popen(
        [sys.executable, str(ROOT / script), *arguments],
        cwd=folder,
        env=_environment(environment),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def new_process(
    script: str, *arguments: str, folder: Path, environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """The same, to its end."""
    process = start(script, arguments, folder, environment)
    try:
        out, err = process.communicate(timeout=120)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def _environment(more: Mapping[str, str] | None = None) -> dict[str, str]:
    """This process's, without what would change how a command answers."""
    settings = {key: value for key, value in os.environ.items() if key not in ("HYDRA_FULL_ERROR", "COLUMNS")}
    return {**settings, "WANDB_MODE": "offline", **(more or {})}


def alive(group: int) -> bool:
    """Whether a process of the group is left."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def load_script(name: str) -> ModuleType:
    """The module that a file of scripts/ is."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def covering(config: pytest.Config) -> list[str]:
    """What stands between `python` and a script or -m module so that its coverage is measured if that of the tests is.

    What it finds out lies beside the workers' data in the folder COVERAGE_FILE names, and is combined with it.
    """
    if not config.getoption("cov_source"):
        return []
    return ["-m", "coverage", "run", "--parallel-mode", "--source=block"]
