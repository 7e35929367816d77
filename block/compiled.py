"""The one way this package compiles a function: numba, cached on disk, plain Python under ``NUMBA_DISABLE_JIT=1``.

numba's own cache looks at the file of the function only, not at those it calls into. Compiled code here calls across
modules, so the cache lives in a folder named after the hash of all sources that take part: an edited or upgraded
package never runs yesterday's machine code. The folder is in `$NUMBA_CACHE_DIR` or in the package's own `__pycache__`.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

import numba
import numpy as np

F = TypeVar("F", bound=Callable[..., Any])

Index = cast(Callable[[Any], int], np.uint64)
"""An index that is never negative. Of any other, compiled code asks whether it counts from the end, and no loop over
such ones is vectorised.
"""

_PREFIX = "compiled-"


def _sources() -> str:
    """Hash of the modules that define compiled functions and of the constants in `types` that are compiled in."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        text = path.read_bytes()
        if b"@compiled" in text or path.name == "types.py":
            digest.update(text)
    return digest.hexdigest()[:16]


def _cache_folder() -> Path:
    base = Path(os.environ.get("NUMBA_CACHE_DIR") or Path(__file__).parent / "__pycache__")
    folder = base / f"{_PREFIX}{_sources()}"
    if not folder.exists():
        for stale in base.glob(f"{_PREFIX}*"):
            shutil.rmtree(stale, ignore_errors=True)
    return folder


numba.config.CACHE_DIR = str(_cache_folder())


def compiled(function: F) -> F:
    """Compile `function` in nopython mode; the machine code is cached. Division by zero follows numpy, not Python."""
    return cast(F, numba.njit(cache=True, error_model="numpy")(function))
