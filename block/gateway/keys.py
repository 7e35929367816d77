"""Keys: what clients and admins have to show, and what servers want to see."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable

from block.gateway.http1 import Header
from block.gateway.watched_file import WatchedLines

SHOWN_IN = frozenset({b"authorization", b"x-api-key"})
"""Headers that a key may be in: as OpenAI's clients send it, after Bearer, or as Anthropic's do."""


class Keys:
    """Those of a file, one a line. key: what names the file, for errors. ValueError if it is of no use."""

    def __init__(self, file: str, key: str) -> None:
        self._lines = WatchedLines(file, key, _sound)
        self._know()

    def _know(self) -> None:
        self._digests = [hashlib.sha256(line.encode()).digest() for line in self._lines.now]

    @property
    def first(self) -> str:
        """The first of them."""
        return self._lines.now[0]

    def look(self) -> None:
        """Read the file again, as of `WatchedLines.look`."""
        if self._lines.look():
            self._know()

    def shown(self, headers: Iterable[Header]) -> bool:
        """Whether a request with these headers has one; it takes as long to see for any."""
        for name, value in headers:
            lower = name.lower()
            if lower in SHOWN_IN:
                given = value.strip()
                if lower == b"authorization":
                    scheme, _, given = given.partition(b" ")
                    if scheme.lower() != b"bearer":
                        continue
                digest = hashlib.sha256(given.strip()).digest()
                if sum(hmac.compare_digest(digest, one) for one in self._digests):  # all of them are looked at
                    return True
        return False


def _sound(line: str) -> str:
    """A key. ValueError for what no header can hold."""
    if any(not "!" <= one <= "~" for one in line):
        raise ValueError("is no key: it has blanks, or what is not ASCII")
    return line
