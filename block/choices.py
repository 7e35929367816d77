"""What there is to choose from, told so that a near miss is seen at once."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches


def choose(given: str, choices: Sequence[str]) -> str:
    """The advice for a name that is none of the `choices`: the one that is spelt like it, if any, and all of them."""
    near = get_close_matches(given, choices, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    return f"{hint}choose from {', '.join(choices)}"
