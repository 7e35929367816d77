"""Where the package's own files lie: the one place that knows, in a checkout and in an installed wheel.

`conf/` and the tracked fits under `artifacts/` stand at the top of the repository; a wheel has copies of them inside
the package.
"""

from __future__ import annotations

from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]
"""The folder of the package `block`."""

CHECKOUT = PACKAGE.parent if (PACKAGE.parent / "pyproject.toml").is_file() else None
"""The top of the repository; None if the package was installed without one."""

_TOP = CHECKOUT or PACKAGE / "shipped"


def shipped(*parts: str) -> Path:
    """A file or folder that comes with the package, by its path from the top of the repository."""
    return _TOP.joinpath(*parts)


def find(path: str) -> Path:
    """A file that the user names: in the current folder, or else one that comes with the package. It need not exist."""
    here = Path(path).expanduser()
    return here if here.exists() or here.is_absolute() else shipped(path)
