"""Shared by all tests: `tests/` itself is importable (`oracle`, `testbed`), and golden files can be regenerated."""

from __future__ import annotations

import gc
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

# The same examples in every run: a test fails for a change of the code, never for the luck of a draw.
settings.register_profile("fixed", derandomize=True, deadline=None, database=None)
settings.load_profile("fixed")

# A shell's background job ignores Ctrl-C, and so would every command that it starts and that a test interrupts.
signal.signal(signal.SIGINT, signal.default_int_handler)

TESTS = Path(__file__).parent
LIVE = TESTS / "live"

# Coverage is measured in quick unit tests, live ones and two of tests/conf: its tracer makes others twice as slow.
# That of the engine is measured where it is plain Python (test_plain_python.py), not where it is compiled.
PLAIN = os.environ.get("NUMBA_DISABLE_JIT") == "1"
COMPILED = [f"unit/test_{name}.py" for name in ("engine", "scheduler", "predictor")]
COMPILED += [f"live/test_twin_{name}.py" for name in ("vllm", "prefix_cache")]
UNTRACED = [TESTS / name for name in ("conf", "invariants", "golden", "unit/test_figures.py", *COMPILED)]
TRACED = ("test_one_line_names_key_value_and_choices", "test_a_key_without_effect_is_named_with_the_reason")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--regenerate", action="store_true", help="rewrite the files of tests/golden")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if LIVE in item.path.parents:
            item.add_marker("live")


def pytest_collection_finish() -> None:
    """Collections that look at all that was imported, or come after each 700 objects, take some 5 % of the time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """pytest-cov's own marker for it, no_cover, does nothing in the workers of pytest-xdist."""
    untraced = item.get_closest_marker("slow") or any(item.path.is_relative_to(place) for place in UNTRACED)
    tracer = sys.gettrace() if untraced and not PLAIN and getattr(item, "originalname", None) not in TRACED else None
    if tracer is not None:
        sys.settrace(None)
    yield
    if tracer is not None:
        sys.settrace(tracer)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """One worker takes all of tests/live, first of all; the others take the other tests, one at a time.

    `--dist=loadgroup` would do it by marks, but silently does not with pytest 9.2 and xdist 3.8.
    """
    from xdist.scheduler import LoadScopeScheduling  # type: ignore[import-untyped]

    class LiveTogether(LoadScopeScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            return "live" if nodeid.startswith("tests/live/") else nodeid

    return LiveTogether(config, log)
