"""Server-sent events, as far as the gateway reads them: how a stream begins, and whether it has said that it ends."""

from __future__ import annotations

import json
import re

MOST = 2**20
"""Bytes of a stream that are looked at for its first event."""

_DONE = re.compile(rb"(?:^|[\r\n])data: ?\[DONE\]")
_LAST = re.compile(rb"event: ?(?:message_stop|response\.(?:completed|incomplete))(?=[\r\n])")
"""How the last event of Anthropic's messages and of OpenAI's responses begins, with no ``[DONE]`` after it. No line of
JSON ends so: that it begins a line, which is slow to look for, need not be asked.
"""
_ERROR = re.compile(rb'(?:^|[\r\n])data: ?\{\s*(?:"type"\s*:\s*"error"\s*,\s*)?"error"\s*:\s*[^n\s]')
_ABORTED = re.compile(rb'"finish_reason": ?"abort"')
_TAIL = 64
"""Bytes of what came last that may be the beginning of what is looked for."""


class Events:
    """The events of one stream, as its bytes come."""

    __slots__ = ("_held", "_last", "_tail", "aborted", "count", "done", "failed")

    def __init__(self) -> None:
        self._held: bytes | None = b""
        self._tail = b""
        self._last = False  # whether the last event has begun
        self.count = 0
        """Ends of events that have come."""
        self.done = False
        """Whether it has told that nothing follows, with ``[DONE]`` or its last event."""
        self.failed = False
        """Whether an event of it is an error, or says that the response was given up."""
        self.aborted = False
        """Whether the first one says so."""

    def first(self, data: bytes) -> bytes | None:
        """More of a stream whose first event with data is not whole yet: all that came, once it is, and then `failed`
        tells whether that event is an error, and `aborted` whether it gives the response up.
        """
        assert self._held is not None
        self._held += data
        said = _first_data(self._held)
        if said is None and len(self._held) < MOST:
            return None
        self.aborted = said is not None and is_aborted(said)
        self.failed = self.aborted or (said is not None and _is_error(said))
        whole, self._held = self._held, None
        return whole

    @property
    def held(self) -> bytes:
        """What has come while the first event is not whole."""
        return self._held or b""

    def note(self, data: bytes) -> None:
        """What these bytes, which follow those before, tell."""
        seen = self._tail + data
        ends = _ends(seen)
        self.count += ends
        if b"[DONE]" in seen or b'"error"' in seen or b'"abort"' in seen:
            self.done = self.done or _DONE.search(seen) is not None
            self.failed = self.failed or _ERROR.search(seen) is not None or is_aborted(seen)
        if self._last:
            self.done = self.done or ends > 0
        elif b"event:" in seen and (last := _LAST.search(seen)) is not None:
            self._last = True
            self.done = self.done or _ends(seen[last.end() :]) > 0
        self._tail = b"" if seen.endswith((b"\n\n", b"\r\n\r\n")) else _after_last_event(seen)[-_TAIL:]


def is_aborted(answer: bytes) -> bool:
    """Whether a server says that it has given the response up, as vLLM does that is told to end."""
    return b'"abort"' in answer and _ABORTED.search(answer) is not None


def _ends(seen: bytes) -> int:
    return seen.count(b"\n\n") + seen.count(b"\r\n\r\n")


def _after_last_event(seen: bytes) -> bytes:
    """What has come of the event that is not whole."""
    ends = [seen.rfind(end) + len(end) for end in (b"\n\n", b"\r\n\r\n") if end in seen]
    return seen[max(ends, default=0) :]


def _first_data(stream: bytes) -> bytes | None:
    """The data of the first event that has some, if it is whole; lines may end in any of the standard's ways."""
    text = stream.removeprefix(b"\xef\xbb\xbf").replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    for event in text.split(b"\n\n")[:-1]:
        fields = [line.partition(b":") for line in event.split(b"\n")]
        data = [value.removeprefix(b" ") for name, _, value in fields if name == b"data"]
        if data:
            return b"\n".join(data)
    return None


def _is_error(data: bytes) -> bool:
    if b"error" not in data:
        return False
    try:
        said = json.loads(data)
    except ValueError:
        return False
    return isinstance(said, dict) and (
        said.get("error") is not None or "error" in (said.get("type"), said.get("object"))
    )
