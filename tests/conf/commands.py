"""How the tests of the configuration compose, build and run: in this process, or by the command line in another."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from block.run import config

ROOT = Path(__file__).resolve().parents[2]
CONF = ROOT / "conf"
SMALL = ["workload.num_requests=150", "cluster.num_gpus=3", "tracking=none"]
TINY = [SMALL[0], "workload.qps=6", *SMALL[1:]]


def choices(group: str) -> list[str]:
    """The yaml files of a group."""
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def composed(*overrides: str, hydra: bool = False) -> DictConfig:
    """What Hydra makes of conf/ and the overrides; with its own settings if `hydra`."""
    config.register()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("config", overrides=list(overrides), return_hydra_config=hydra)


def built(*overrides: str) -> config.RunConfig:
    return config.build(composed(*overrides))


def start(
    script: str, arguments: Sequence[str], folder: Path, environment: Mapping[str, str] | None = None
) -> subprocess.Popen[str]:
    """`python script arguments` in `folder`, in a process group of its own."""
    settings = {key: value for key, value in os.environ.items() if key not in ("HYDRA_FULL_ERROR", "COLUMNS")}
    return subprocess.Popen(
        [sys.executable, str(ROOT / script), *arguments],
        cwd=folder,
        env={**settings, "WANDB_MODE": "offline", **(environment or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def command(
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


def alive(group: int) -> bool:
    """Whether a process of the group is left."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True
