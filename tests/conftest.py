"""Shared by all tests: `tests/` itself is importable (`oracle`, `testbed`), and golden files can be regenerated."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

# The same examples in every run: a test fails for a change of the code, never for the luck of a draw.
settings.register_profile("fixed", derandomize=True, deadline=None, database=None)
settings.load_profile("fixed")

# A shell's background job ignores Ctrl-C, and so would every command that it starts and that a test interrupts.
signal.signal(signal.SIGINT, signal.default_int_handler)

LIVE = Path(__file__).parent / "live"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--regenerate", action="store_true", help="rewrite the files of tests/golden")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if LIVE in item.path.parents:
            item.add_marker("live")


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
