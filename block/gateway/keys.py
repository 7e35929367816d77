"""Keys: what clients and admins have to show, and what servers want to see."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable
from pathlib import Path

from block.gateway.http1 import Header

SHOWN_IN = frozenset({b"authorization", b"x-api-key"})
"""Headers that a key may be in: as OpenAI's clients send it, after Bearer, or as Anthropic's do."""


class Keys:
    """Those of a file, one a line; `refresh` reads it again. ValueError if it cannot be read, or has none; `key` is
    what the file is called by then.
    """

    def __init__(self, file: str, key: str) -> None:
        self._file = Path(file)
        self._digests: list[bytes] = []
        try:
            lines = read_keys(self._file)
        except OSError as error:
            raise ValueError(f"{key}={file}: cannot be read: {error.strerror}") from error
        except ValueError as error:
            raise ValueError(f"{key}={file}: {error}") from error
        if not lines:
            raise ValueError(f"{key}={file}: has no key; write one a line")
        self.first = lines[0]
        """The first of them."""
        self._know(lines)

    def _know(self, lines: Iterable[str]) -> None:
        self._digests = [hashlib.sha256(line.encode()).digest() for line in lines]

    def refresh(self) -> None:
        """Read the file again. What cannot be read, or is empty, changes nothing: nobody is let in or locked out by it.

        OSError or ValueError if it cannot be read.
        """
        if lines := read_keys(self._file):
            self._know(lines)

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


def read_keys(file: Path) -> list[str]:
    """The keys in a file. OSError if it cannot be read, ValueError for what no header can hold."""
    lines = [line.strip() for line in file.read_text(errors="replace").splitlines()]
    for number, line in enumerate(lines, 1):
        if not line.isascii() or any(not "!" <= one <= "~" for one in line):
            raise ValueError(f"line {number} is no key: it has blanks, or what is not ASCII")
    return [line for line in lines if line]
