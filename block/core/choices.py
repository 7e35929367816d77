"""What there is to choose from, told so that a near miss is seen at once."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches

MOST_HINTS = 4  # more are no hint


def did_you_mean(given: str, choices: Sequence[str]) -> str:
    """The advice for a name that is none of the `choices`: those that are spelt like it, if any, and all of them.

    Spelt like it are those that begin with it, letter case and punctuation aside (``A100``: a100-40gb or a100-80gb);
    else the nearest.
    """
    plain = {choice: _plain(choice) for choice in choices}
    wanted = _plain(given)
    near = [choice for choice in choices if wanted and plain[choice] == wanted]
    near = near or [choice for choice in choices if len(wanted) > 1 and plain[choice].startswith(wanted)]
    if not near:
        nearest = get_close_matches(wanted, list(plain.values()), n=1)
        near = [choice for choice in choices if plain[choice] in nearest][:1]
    hint = f"did you mean {' or '.join(near)}? " if 0 < len(near) <= MOST_HINTS else ""
    return f"{hint}choose from {', '.join(choices)}"


def _plain(name: str) -> str:
    """`name` in small letters, without what separates its parts."""
    return "".join(letter for letter in name.lower() if letter.isalnum() or letter == ".")
