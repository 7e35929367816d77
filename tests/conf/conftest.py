"""Coverage is measured in a few of these tests: its tracer makes the compositions, all alike, twice as slow."""

from __future__ import annotations

import pytest

COVERED = ("test_one_line_names_key_value_and_choices", "test_a_key_without_effect_is_named_with_the_reason")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "tests/conf/" in item.path.as_posix() and getattr(item, "originalname", None) not in COVERED:
            item.add_marker("no_cover")
