"""Where files lie: the package's own, in a checkout and in an installed wheel, the data, and what is cached.

`conf/` and the tracked fits under `artifacts/` stand at the top of the repository; a wheel has copies of them inside
the package.
"""

from __future__ import annotations

import os
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]
"""The folder of the package `block`."""

CHECKOUT = PACKAGE.parent if (PACKAGE.parent / "pyproject.toml").is_file() else None
"""The top of the repository; None if the package was installed without one."""

_TOP = CHECKOUT or PACKAGE / "shipped"


def shipped(*parts: str) -> Path:
    """A file or folder that comes with the package, by its path from the top of the repository."""
    return _TOP.joinpath(*parts)


def data_folders() -> list[Path]:
    """Where data files are looked for, in this order: $BLOCK_DATA (if set), ~/.cache/block."""
    named = os.environ.get("BLOCK_DATA")
    return ([Path(named)] if named else []) + [Path.home() / ".cache" / "block"]


def cache_folder() -> Path:
    """Where what can be made again is kept: $BLOCK_CACHE, else ~/.cache/block."""
    return Path(os.environ.get("BLOCK_CACHE") or Path.home() / ".cache" / "block")


def find(path: str) -> Path:
    """A file that the user names: in the current folder, or else one that comes with the package. It need not exist."""
    here = Path(path).expanduser()
    return here if here.exists() or here.is_absolute() else shipped(path)
