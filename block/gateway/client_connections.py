"""Connections of clients: requests are read from them by llhttp, one after the other, and answers written to them."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple, Protocol, cast

import httptools

from block.gateway.account import Account, Accounts
from block.gateway.http1 import (
    CONTINUE,
    LAST_CHUNK,
    NOT_OF_REQUESTS,
    Header,
    HTTPRequest,
    chunk,
    header_lines,
    passed_on,
    status_line,
)
from block.gateway.openai import JSON, error_json

MAX_HEAD = 128 * 1024
"""Bytes of a request's first line and headers: vLLM takes headers of 64 KiB."""
TOO_LONG = f"the headers exceed {MAX_HEAD // 1024} KiB"
MAX_TARGET = 64 * 1024
"""Bytes of a path and its query."""
MAX_WAITING = 16
"""Requests of a connection that wait for the answers before theirs; while there are more, nothing is read."""
MAX_WAITING_BYTES = 2**20
"""The same of the bytes of their bodies."""
AT_ONCE = 16
"""Requests sent ahead that are answered before others have a turn."""
LINGER_S = 2.0
"""For a client to read why it is refused, while it still sends."""


class Owner(Protocol):
    """Whose the connections are."""

    max_body: int
    """Bytes of the longest body."""
    draining: bool
    """Whether connections end with the answer that is under way."""
    clients: set[ClientConnection]
    """Those that are open."""
    most_clients: int
    """How many of them may be."""
    accounts: Accounts | None
    """Of requests, if anybody asks for them."""

    def serve(self, client: ClientConnection, http: HTTPRequest) -> None:
        """Have a request answered, at once or later; `client.serving` is to be who is told of what happens."""
        ...

    def refused(self, status: int) -> None:
        """What is no request, or one too many, was answered with an error."""
        ...


class Serving(Protocol):
    """Who answers a request."""

    def client_left(self) -> None:
        """Nobody waits for the answer any more."""
        ...

    def pause(self) -> None:
        """The client does not read as fast as it is written to."""
        ...

    def resume(self) -> None:
        """It has read."""
        ...


class _Refusal(NamedTuple):
    """What is answered to what is no request, `http` as far as it was read; no other request is read after it."""

    status: int
    message: str
    http: HTTPRequest


class ClientConnection(asyncio.Protocol):
    """A client's connection. Its requests are answered in their order, with `reply`, or `begin`, `write` and `end`."""

    __slots__ = (
        "_body",
        "_deaf",
        "_full",
        "_head",
        "_headers",
        "_in_body",
        "_lingers",
        "_loop_runs",
        "_owner",
        "_parser",
        "_partial",
        "_paused",
        "_size",
        "_target",
        "_transport",
        "_waiting",
        "account",
        "begun",
        "heard",
        "http",
        "serving",
        "unsent",
    )

    def __init__(self, owner: Owner) -> None:
        self._owner = owner
        self._parser: httptools.HttpRequestParser | None = httptools.HttpRequestParser(self)
        self._waiting: deque[HTTPRequest | _Refusal] = deque()
        self._deaf = False  # nothing more is read as a request
        self._lingers = False  # and what is sent still is waited for, or the client would not see why
        self._paused = False
        self._full = False  # more is written than is sent
        self._partial = False  # a request has begun to come, and is not whole
        self._loop_runs = False
        self._head = 0  # bytes of the head that is being read
        self.http: HTTPRequest | None = None
        """The request that is being answered."""
        self.serving: Serving | None = None
        """Who answers it, if that takes longer than this moment."""
        self.begun = False
        """Whether the answer has begun to be written."""
        self.account: Account | None = None
        """What is told of the request that is being answered, if anybody asks for it."""
        self.heard = asyncio.get_running_loop().time()
        """When something came, was answered or sent last, by the loop's clock."""
        self.unsent = 0
        """Bytes that were waiting to be sent when `stalls` was asked last."""
        self._begin()

    # ------------------------------------------------------------------------------------------------------ the wire

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """It is open."""
        self._transport = cast(asyncio.Transport, transport)
        self._owner.clients.add(self)
        if len(self._owner.clients) > self._owner.most_clients:
            self._refuse(503, f"there are {self._owner.most_clients} connections already, as many as open files allow")
            self._answer_next()

    def connection_lost(self, error: Exception | None) -> None:
        """It is closed, by whomever."""
        self._owner.clients.discard(self)
        self._deaf = True
        self._waiting.clear()
        self._begin()
        self._parser = None  # which has this connection, too: none of both would go by itself
        self.http = None
        serving, self.serving = self.serving, None
        if serving is not None:
            serving.client_left()
        self._close_account()

    def pause_writing(self) -> None:
        """What was written waits to be sent."""
        self._full = True
        if self.serving is not None:
            self.serving.pause()

    def resume_writing(self) -> None:
        """It was sent."""
        self._full = False
        if self.serving is not None:
            self.serving.resume()
        self._answer_next()

    def data_received(self, data: bytes) -> None:
        """Read the requests in it."""
        if self._deaf:
            return
        self.heard = asyncio.get_running_loop().time()
        self._head += len(data)
        try:
            self._read(data)
        except httptools.HttpParserError as error:
            self._refuse(400, f"this is no request: {error}")
        if self._head > MAX_HEAD:
            self._refuse(431, TOO_LONG)
        self._answer_next()

    def _read(self, data: bytes) -> None:
        while data and not self._deaf and (parser := self._parser) is not None:
            try:
                parser.feed_data(data)
                return
            except httptools.HttpParserUpgrade as error:  # llhttp reads no further, but no other protocol is spoken
                method = parser.get_method()
                if method == b"CONNECT":
                    self._refuse(501, "CONNECT: this is no proxy to anywhere")
                    return
                first = b"%s %s HTTP/%s\r\n" % (method, self._target, parser.get_http_version().encode())
                same = header_lines(one for one in self._headers if one[0].lower() != b"upgrade")
                self._parser = httptools.HttpRequestParser(self)
                data = first + same + b"\r\n" + data[error.args[0] :]

    # ------------------------------------------------------------------------------------------------- what llhttp says

    def on_message_begin(self) -> None:
        """A request begins."""
        self._begin()
        self._partial = True

    def _begin(self) -> None:
        self._partial = False
        self._target = b""
        self._headers: list[Header] = []
        self._body: list[bytes] = []
        self._size = 0
        self._in_body = False

    def on_url(self, url: bytes) -> None:
        """A part of its target."""
        self._target += url

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header, or, behind the body, a trailer, which nobody asks for."""
        if not self._in_body:
            self._headers.append((name, value))

    def on_headers_complete(self) -> None:
        """The head is whole."""
        self._in_body = True
        self._head = 0
        if len(self._target) > MAX_TARGET:
            self._refuse(414, f"the path exceeds {MAX_TARGET // 1024} KiB")
        size = hosts = 0
        expects = False
        for name, value in self._headers:
            size += len(name) + len(value)
            lower = name.lower()
            hosts += lower == b"host"
            if lower == b"content-length" and int(value) > self._owner.max_body:
                self._refuse_body()
            elif lower == b"expect":
                expects = value.lower() == b"100-continue"
                if not expects:
                    self._refuse(417, f"Expect: {value.decode('latin-1')} is not known")
            elif lower == b"transfer-encoding" and value.strip().lower() != b"chunked":
                self._refuse(501, f"Transfer-Encoding: {value.decode('latin-1')} is not known; take chunked")
        if size > MAX_HEAD:
            self._refuse(431, TOO_LONG)
        assert self._parser is not None
        if hosts > 1 or (hosts == 0 and self._parser.get_http_version() == "1.1"):
            self._refuse(400, f"the request has {hosts} headers Host")
        if expects and self.http is None and not self._waiting and not self._deaf:
            self._transport.write(CONTINUE)

    def on_body(self, data: bytes) -> None:
        """A part of its body."""
        self._head = 0
        self._size += len(data)
        if self._size > self._owner.max_body:
            self._refuse_body()
        elif not self._deaf:
            self._body.append(data)

    def on_message_complete(self) -> None:
        """It is whole."""
        self._head = 0
        parser, body, target = self._parser, self._body, self._target
        if self._deaf or parser is None or parser.should_upgrade():
            return
        self._partial = False
        self._body = []  # or it would be kept until the next request comes
        if not target.startswith((b"/", b"*")):  # as a proxy is asked
            target = b"/" + target.partition(b"://")[2].partition(b"/")[2]
        if b"#" in target:
            self._refuse(400, "the path has a fragment")
            return
        self._target = b""  # what is refused behind it is another request
        request = HTTPRequest(
            parser.get_method(),
            target,
            passed_on(self._headers, NOT_OF_REQUESTS),
            body[0] if len(body) == 1 else b"".join(body),
            parser.should_keep_alive(),
            parser.get_http_version() != "1.0",
        )
        self._waiting.append(request)
        if self._must_wait() and not self._paused:
            self._paused = True
            self._transport.pause_reading()

    def _must_wait(self) -> bool:
        """Whether so much waits that no more is to be read."""
        waiting = self._waiting
        return len(waiting) > MAX_WAITING or (
            len(waiting) > 1
            and sum(len(one.body) for one in waiting if isinstance(one, HTTPRequest)) > MAX_WAITING_BYTES
        )

    def _refuse_body(self) -> None:
        self._refuse(413, f"the body exceeds gateway.max_body_mib={self._owner.max_body // 2**20}")

    def _refuse(self, status: int, message: str) -> None:
        if not self._deaf:
            self._deaf = self._lingers = True
            method = self._parser.get_method() if self._parser is not None and self._target else b""
            http = HTTPRequest(method, self._target, self._headers, b"", keeps=False)
            self._waiting.append(_Refusal(status, message, http))

    # ------------------------------------------------------------------------------------------------------- answering

    def _answer_next(self) -> None:
        """Have what waits answered, until one takes longer, or others are to have a turn, or the client is to read."""
        if self._loop_runs:
            return
        self._loop_runs = True
        for _ in range(AT_ONCE):
            if not self._waiting or self.http is not None or self._full:
                break
            one = self._waiting.popleft()
            if self._paused and not self._must_wait():
                self._paused = False
                self._transport.resume_reading()
            if isinstance(one, _Refusal):
                self.http = one.http
                self._open_account(one.http)
                self._owner.refused(one.status)
                self.reply(one.status, JSON, error_json(one.status, one.message))
            else:
                self.http = one
                if self._owner.accounts is not None:
                    self._open_account(one)
                self._owner.serve(self, one)
        else:
            asyncio.get_running_loop().call_soon(self._answer_next)
        self._loop_runs = False

    @property
    def full(self) -> bool:
        """Whether more was written than the client has read."""
        return self._full

    @property
    def busy(self) -> bool:
        """Whether a request is coming or being answered, or an answer being sent."""
        waits = self.http is not None or self._partial or bool(self._head or self._waiting)
        return not self.gone and (waits or self._transport.get_write_buffer_size() > 0)

    def stalls(self, since: float) -> bool:
        """Whether nothing has come or been sent since then, while nobody is at work for it."""
        left = self._transport.get_write_buffer_size()
        if left != self.unsent:
            self.unsent, self.heard = left, asyncio.get_running_loop().time()
        return self.heard < since and (left > 0 or self.http is None)

    @property
    def gone(self) -> bool:
        """Whether nobody reads what is written."""
        return self._transport.is_closing()

    def reply(self, status: int, headers: Sequence[Header], body: bytes, length: int | None = None) -> None:
        """The whole answer. length: what is said of the body's length where none is sent (HEAD, 304)."""
        if self.account is not None:
            self.account.status = status
        if not self.gone:
            assert self.http is not None
            head = self.http.method == b"HEAD"
            bare = status == 204 or ((status == 304 or (head and not body)) and length is None)
            says = b"" if bare else b"Content-Length: %d\r\n" % (len(body) if length is None else length)
            sent = b"" if head else body
            self._transport.write(
                b"%s%s%s%s\r\n%s" % (status_line(status), header_lines(headers), says, self._stays(), sent)
            )
        self._ended(self.http is not None and self.http.keeps)

    def begin(self, status: int, headers: Sequence[Header]) -> None:
        """The head of an answer whose length is not known; its body follows by `write` and `end`."""
        self.begun = True
        if self.account is not None:
            self.account.status = status
        assert self.http is not None
        how = b"Transfer-Encoding: chunked\r\n" if self.http.chunks else b""
        self._transport.write(b"%s%s%s%s\r\n" % (status_line(status), header_lines(headers), how, self._stays()))

    def write(self, data: bytes) -> None:
        """A part of the body."""
        assert self.http is not None
        self._transport.write(chunk(data) if self.http.chunks else data)

    def end(self) -> None:
        """The body is whole."""
        assert self.http is not None
        if self.http.chunks:
            self._transport.write(LAST_CHUNK)
        self._ended(self.http.keeps and self.http.chunks)

    def cut(self) -> None:
        """Break the answer off, so that the client sees that it is not whole."""
        self.serving = None
        self.abort()

    def abort(self) -> None:
        """Hang up, as if the client had."""
        self._deaf = True
        self._transport.abort()

    def close(self) -> None:
        """Say no more; what was written is sent."""
        self._deaf = True
        self._transport.close()

    def _stays(self) -> bytes:
        assert self.http is not None
        if not self.http.keeps or self._owner.draining or (self.begun and not self.http.chunks):
            return b"Connection: close\r\n"
        return b"" if self.http.chunks else b"Connection: keep-alive\r\n"

    def _open_account(self, http: HTTPRequest) -> None:
        if self._owner.accounts is not None:
            self.account = self._owner.accounts.open(self._transport.get_extra_info("peername"), http)

    def _close_account(self) -> None:
        account, self.account = self.account, None
        if account is not None:
            account.close()

    def _ended(self, keeps: bool) -> None:
        if self.account is not None:
            self._close_account()
        self.http = self.serving = None
        self.begun = False
        if keeps and not self._owner.draining and (self._waiting or not self._deaf):
            self.heard = asyncio.get_running_loop().time()
            self._answer_next()
            return
        self._waiting.clear()
        self._deaf = True
        if self._lingers:
            asyncio.get_running_loop().call_later(LINGER_S, self._transport.close)
        else:
            self._transport.close()
