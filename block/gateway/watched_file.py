"""Files that are read again as they change. One that is half written, or that cannot be read, changes nothing."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

log = logging.getLogger(__name__)


class WatchedLines:
    """What `read` makes of each line of a file, "" for none: `now`, as of the last look that found something new.

    key: what names the file, for errors. ValueError if it cannot be read, has nothing, or `read` raises one.
    """

    def __init__(self, file: str, key: str, read: Callable[[str], str]) -> None:
        self._file = Path(file)
        self._name = f"{key}={file}"
        self._read_line = read
        self._said = ""
        self.now: Sequence[str] = self._read()
        self._seen = self.now

    def look(self) -> bool:
        """Read the file again; whether `now` is new. It must be found twice, for the first may be half of it.

        What is wrong is logged, once.
        """
        try:
            found = self._read()
        except ValueError as error:
            self._say(str(error))
            return False
        self._say("")
        before, self._seen = self._seen, found
        if found != before or found == self.now:
            return False
        self.now = found
        return True

    def _read(self) -> list[str]:
        try:
            text = self._file.read_text(encoding="utf-8-sig", errors="replace")
        except OSError as error:
            raise ValueError(f"{self._name}: cannot be read: {error.strerror}") from error
        found = []
        for number, line in enumerate(text.splitlines(), 1):
            try:
                found.append(self._read_line(line.strip()))
            except ValueError as error:
                raise ValueError(f"{self._name}: line {number}: {error}") from error
        if not any(found):
            raise ValueError(f"{self._name}: is empty")
        return [one for one in found if one]

    def _say(self, what: str) -> None:
        if what != self._said:
            log.warning("%s", what or f"{self._name}: is well again")
        self._said = what
