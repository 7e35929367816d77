"""HTTP/1.1 on the wire, for both sides: what of a message is passed on, and how its first lines are written."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence
from http import HTTPStatus
from typing import NamedTuple

Header = tuple[bytes, bytes]
"""Name and value, as they were sent."""

OF_ONE_CONNECTION = frozenset(
    {
        b"connection",
        b"keep-alive",
        b"proxy-authenticate",
        b"proxy-authorization",
        b"proxy-connection",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
        b"content-length",
    }
)
"""Headers of a message as it was sent to us, not of what is passed on."""
NOT_OF_REQUESTS = frozenset({b"host", b"expect", b"http2-settings"})
"""Headers of requests that are answered here, or written anew for each server."""

LAST_CHUNK = b"0\r\n\r\n"
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"

_REASONS = {status.value: status.phrase.encode() for status in HTTPStatus}


class HTTPRequest(NamedTuple):
    """A request as it came, whole.

    target: path and query. headers: those that are passed on. keeps: whether the connection may be used again.
    chunks: whether the client knows chunked answers.
    """

    method: bytes
    target: bytes
    headers: Sequence[Header]
    body: bytes
    keeps: bool = True
    chunks: bool = True

    @property
    def path(self) -> bytes:
        """The target without its query."""
        return self.target.partition(b"?")[0]


class AnswerHead(NamedTuple):
    """How a server's answer begins; headers: those that are passed on. length: of its body in bytes; None: unknown.

    kind, packed: its Content-Type and Content-Encoding, empty if it has none.
    """

    status: int
    headers: Sequence[Header]
    length: int | None
    kind: bytes
    packed: bytes


def passed_on(headers: Iterable[Header], more: frozenset[bytes] = frozenset()) -> list[Header]:
    """The headers that are not of one connection: neither the usual ones, nor those that `Connection` names, nor
    `more`, in lower case.
    """
    dropped, kept = OF_ONE_CONNECTION, []
    for one in headers:
        name = one[0].lower()
        if name == b"connection":
            dropped = dropped.union(token.strip().lower() for token in one[1].split(b","))
        elif name not in dropped and name not in more:
            kept.append(one)
    if dropped is not OF_ONE_CONNECTION:  # the header that names them may come behind them
        kept = [one for one in kept if one[0].lower() not in dropped]
    return kept


def header_lines(headers: Iterable[Header]) -> bytes:
    """As they are written, each with the end of its line."""
    return b"".join([b"%s: %s\r\n" % one for one in headers])


def status_line(status: int) -> bytes:
    """The first line of an answer."""
    return b"HTTP/1.1 %d %s\r\n" % (status, _REASONS.get(status, b""))


def chunk(data: bytes) -> bytes:
    """A piece of a chunked body."""
    return b"%x\r\n%s\r\n" % (len(data), data)


class TooLong(ValueError):
    """More than what is allowed came out of what was packed."""


def unpacked(body: bytes, encoding: bytes, most: int) -> bytes:
    """A body without its Content-Encoding. TooLong beyond `most` bytes, ValueError if it cannot be unpacked."""
    for name in reversed([one.strip().lower() for one in encoding.split(b",")]):
        if name in (b"", b"identity"):
            continue
        if name not in (b"gzip", b"x-gzip", b"deflate"):
            raise ValueError(f"Content-Encoding: {name.decode('latin-1')} is not known; take gzip, deflate or none")
        raw = name == b"deflate" and body[:1] and (body[0] & 15 != 8 or int.from_bytes(body[:2], "big") % 31)
        parts: list[bytes] = []
        left = body  # gzip may have several, one after the other
        while left or not parts:
            unpack = zlib.decompressobj(-zlib.MAX_WBITS if raw else zlib.MAX_WBITS | 32)
            try:
                parts.append(unpack.decompress(left, most + 1))
            except zlib.error as error:
                raise ValueError(f"the body is not {name.decode()}: {error}") from error
            if sum(map(len, parts)) > most:
                raise TooLong
            if not unpack.eof:
                raise ValueError(f"the body is not {name.decode()}: it ends too soon")
            left = unpack.unused_data
        body = b"".join(parts)
    return body
