"""The one way this package compiles a function: numba, cached on disk, plain Python under ``NUMBA_DISABLE_JIT=1``.

numba's own cache looks at the file of the function only, not at those it calls into. Compiled code here calls across
modules, so the cache lives in a folder named after the hash of all sources that take part: an edited or upgraded
package never runs yesterday's machine code. The folder is in `$NUMBA_CACHE_DIR` or in the package's own `__pycache__`.

What is compiled in spite of that is timed, and said if it takes long: a run's wall time leaves it out.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar, cast

import numba
import numpy as np
from numba.core import event

from block.core.paths import PACKAGE

F = TypeVar("F", bound=Callable[..., Any])

Index = cast(Callable[[Any], int], np.uint64)
"""An index that is never negative. Of any other, compiled code asks whether it counts from the end, and no loop over
such ones is vectorised.
"""

LONG_S = 1.0
"""To compile for longer is worth a line."""

_PREFIX = "compiled-"


def _sources() -> str:
    """Hash of the modules that define compiled functions and of the constants in `snapshot` that are compiled in."""
    digest = hashlib.sha256()
    for path in sorted(PACKAGE.rglob("*.py")):
        text = path.read_bytes()
        if b"@compiled" in text or path.name == "snapshot.py":
            digest.update(text)
    return digest.hexdigest()[:16]


def _cache_folder() -> Path:
    base = Path(os.environ.get("NUMBA_CACHE_DIR") or PACKAGE / "__pycache__")
    folder = base / f"{_PREFIX}{_sources()}"
    if not folder.exists():
        for stale in base.glob(f"{_PREFIX}*"):
            shutil.rmtree(stale, ignore_errors=True)
    return folder


numba.config.CACHE_DIR = str(_cache_folder())


class _Stopwatch(event.Listener):  # type: ignore[misc]
    """Times what numba compiles; what it loads from the cache it does not tell."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._depth = 0  # of functions that are compiled for others
        self._said = False

    def on_start(self, event: Any) -> None:
        """A function is about to be compiled."""
        self._depth += 1
        if self._depth == 1:
            self._began = time.perf_counter()
            self._alarm = threading.Timer(LONG_S, self._say)
            self._alarm.daemon = True
            if not self._said:
                self._alarm.start()

    def on_end(self, event: Any) -> None:
        """The function is compiled, or cannot be."""
        self._depth -= 1
        if self._depth == 0:
            self._alarm.cancel()
            self.seconds += time.perf_counter() - self._began

    def _say(self) -> None:
        self._said = True
        print("compiling, once for this version of the code: half a minute or so", file=sys.stderr, flush=True)


_locked = False  # by this process
_stopwatch = _Stopwatch()
event.register("numba:compile", _stopwatch)


def seconds() -> float:
    """How long this process has been compiling so far. To load compiled code, some 0.1 s, is not compiling."""
    return _stopwatch.seconds


@contextmanager
def one_at_a_time() -> Iterator[None]:
    """Of processes that would compile the same, one does at a time, and the others load what it has compiled.

    Within another, it does nothing: who compiles several things holds one lock over all.
    """
    global _locked
    if _locked:
        yield
        return
    try:
        folder = Path(numba.config.CACHE_DIR)
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / "lock").open("w")
    except OSError:  # no cache, then
        yield
        return
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        _locked = True
        try:
            yield
        finally:
            _locked = False


def compiled(function: F) -> F:
    """Compile `function` in nopython mode; the machine code is cached. Division by zero follows numpy, not Python.

    It must not allocate: it counts no references, which would cost the scheduler's twin half of its speed, where each
    part takes the arrays of an engine from one tuple.
    """
    return cast(F, numba.njit(cache=True, error_model="numpy", _nrt=False)(function))


def inlined(function: F) -> F:
    """`compiled`, and put in where it is called: what is called at each step and does little, but may call what does
    much. Else the call itself, which hands over an engine's arrays one by one, would be what costs.
    """
    return cast(F, numba.njit(cache=True, error_model="numpy", _nrt=False, forceinline=True)(function))


def plain(function: F) -> F:
    """The Python function that was compiled: to be called from Python where it returns parts of arrays, which compiled
    code that counts no references cannot hand out.
    """
    return cast(F, getattr(function, "py_func", function))
