"""The one way this package compiles a function: numba, cached on disk, no GIL games, plain-Python when disabled.

``NUMBA_DISABLE_JIT=1`` runs every compiled function as ordinary Python: slow, but debuggable and visible to coverage.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba

F = TypeVar("F", bound=Callable[..., Any])


def compiled(function: F) -> F:
    """Compile `function` in nopython mode and cache the machine code next to its source."""
    return cast(F, numba.njit(cache=True, error_model="numpy", boundscheck=False)(function))
