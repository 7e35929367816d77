"""Shared by all tests: `tests/` itself is importable (`oracle`, `testbed`), and golden files can be regenerated."""

from __future__ import annotations

import pytest
from hypothesis import settings

# The same examples in every run: a test fails for a change of the code, never for the luck of a draw.
settings.register_profile("fixed", derandomize=True, deadline=None, database=None)
settings.load_profile("fixed")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--regenerate", action="store_true", help="rewrite the files of tests/golden")
