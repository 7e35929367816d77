"""Shared by all tests: `tests/` itself is importable (`oracle`, `testbed`), and golden files can be regenerated."""

from __future__ import annotations

import signal
from pathlib import Path

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


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """All of tests/live is `live`; what is live or depends on how fast the machine is runs one after the other."""
    for item in items:
        if LIVE in item.path.parents:
            item.add_marker("live")
        if item.get_closest_marker("live") or item.get_closest_marker("timing"):
            item.add_marker(pytest.mark.xdist_group("live"))
