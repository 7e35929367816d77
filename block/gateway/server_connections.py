"""Connections to a server: requests are written to them, and answers read from them by llhttp, as bytes come."""

from __future__ import annotations

import asyncio
import errno
import math
import ssl
from functools import cache
from typing import Protocol, cast
from urllib.parse import urlsplit

import httptools

from block.core.errors import message
from block.core.sockets import notice_lost_peer
from block.gateway.http1 import AnswerHead, Header, HTTPRequest, header_lines, passed_on

STALE_S = 1.0
"""A connection that was kept and fails sooner than this was closed before the request came."""
KEPT_S = 3.0
"""Connections are kept so long without a request. vLLM closes those that are idle for 5 s; who sends into the closing
loses the request.
"""
AGAIN_S = 0.05
"""From one try to open a connection to the next, while this process has too many open."""
_OURS = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.EADDRNOTAVAIL})
"""What goes wrong here, and tells nothing of a server."""


class TransportError(Exception):
    """What can go wrong between us and a server; the message says what did."""


class ConnectionLost(TransportError):
    """There is no connection to it, or no longer."""


class ConnectionReset(ConnectionLost):
    """The server, or what lies between, has ended a connection over which a request was sent."""


class ServerSilent(TransportError):
    """It has said nothing for as long as was to be waited. It may be busy."""


class NotHTTP(TransportError):
    """What it says is no HTTP."""


class ServerHangs(TransportError):
    """It accepts requests, and does nothing with them."""


class OutOfResources(TransportError):
    """This process cannot open a connection, to whomever."""


class Asking(Protocol):
    """Who has sent a request, and is told of the answer: its head, its parts, and its end; or that it is lost."""

    streams: bool
    """Whether the answer is asked for as a stream."""
    passing: bool
    """Whether the answer has begun to be passed on."""

    @property
    def replaceable(self) -> bool:
        """Whether the request could begin anew elsewhere."""
        ...

    def answer_begins(self, head: AnswerHead) -> None:
        """Its status and headers are there."""
        ...

    def answer_goes_on(self, data: bytes) -> None:
        """So much more of its body has come."""
        ...

    def answer_ends(self) -> None:
        """It is whole."""
        ...

    def lost(self, error: TransportError) -> None:
        """It will not be whole."""
        ...


class Sending:
    """A request on its way to a server, and its answer on the way back; `cancel` gives both up."""

    __slots__ = ("asking", "connection", "heard", "paused", "pool", "request", "sent")

    def __init__(self, pool: ServerPool, asking: Asking, request: bytes) -> None:
        self.pool = pool
        self.asking = asking
        self.request = request
        self.connection: ServerConnection | asyncio.Task[None] | None = None
        """That it was written to; a task while there is none yet, and None once the answer has ended."""
        self.sent = asyncio.get_running_loop().time()
        """When it was sent, and when something came of it last, by the loop's clock."""
        self.heard = self.sent
        self.paused = False

    def cancel(self) -> None:
        """Nobody waits for the answer: hang up, which cancels the request there. Nothing more is told."""
        connection = self.over()
        if isinstance(connection, asyncio.Task):
            connection.cancel()
        elif connection is not None:
            connection.close()

    def over(self) -> ServerConnection | asyncio.Task[None] | None:
        """Nothing more is told; returns what is left of it."""
        self.pool.under_way.discard(self)
        connection, self.connection = self.connection, None
        if isinstance(connection, ServerConnection):
            connection.sending = None
        return connection

    def pause(self) -> None:
        """Read no more of the answer, which holds up the server."""
        self.paused = True
        if isinstance(self.connection, ServerConnection) and not self.connection.transport.is_closing():
            self.connection.transport.pause_reading()

    def resume(self) -> None:
        """Read on."""
        self.paused = False
        self.heard = asyncio.get_running_loop().time()
        if isinstance(self.connection, ServerConnection) and not self.connection.transport.is_closing():
            self.connection.transport.resume_reading()


class ServerConnection(asyncio.Protocol):
    """A connection of `pool`; one request at a time."""

    __slots__ = (
        "_ended",
        "_extra",
        "_head",
        "_head_done",
        "_headers",
        "_interim",
        "_keeps",
        "_parser",
        "_parts",
        "_pool",
        "_until_close",
        "_uses",
        "idle_since",
        "sending",
        "transport",
    )

    def __init__(self, pool: ServerPool) -> None:
        self._pool = pool
        self._parser: httptools.HttpResponseParser | None = httptools.HttpResponseParser(self)
        self._uses = 0
        self._headers: list[Header] = []
        self.sending: Sending | None = None
        self.idle_since = 0.0
        self.on_message_begin()

    def begin(self, sending: Sending, now: float) -> None:
        """Write a request."""
        self.sending, sending.connection = sending, self
        sending.heard = now
        self._uses += 1
        self._parts: list[bytes] = []
        self._ended = self._extra = self._interim = self._head_done = False
        self._keeps = self._until_close = False
        self.transport.write(sending.request)

    # ------------------------------------------------------------------------------------------------------ the wire

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """It is open."""
        self.transport = cast(asyncio.Transport, transport)
        opened = transport.get_extra_info("socket")
        if opened is not None:
            notice_lost_peer(opened)

    def connection_lost(self, error: Exception | None) -> None:
        """It is closed, by whomever."""
        sending = self.sending
        self._parser = None  # which has this connection, too: none of both would go by itself
        if sending is None:
            self._pool.forget(self)
        elif self._head_done and self._until_close and error is None:
            self._end(sending)
        else:
            loop = asyncio.get_running_loop()
            sending.over()
            said = "the server closed the connection" if error is None else message(error)
            begun = self._head_done or self._headers
            if self._uses > 1 and not begun and loop.time() - sending.heard < STALE_S:
                self._pool.begin(sending)  # it may have been closed before the request came
            else:
                sending.asking.lost(ConnectionReset(said))

    def data_received(self, data: bytes) -> None:
        """Tell who asked what is in it."""
        sending = self.sending
        if sending is None:  # nothing was asked
            self.close()
            return
        sending.heard = self._pool.heard = asyncio.get_running_loop().time()
        told = self._head_done
        assert self._parser is not None, "it is open"
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            self._ended = False
            self._tell(sending, told)
            if self.sending is sending:
                sending.cancel()
                sending.asking.lost(NotHTTP(message(error)))
            return
        self._tell(sending, told)
        if self._ended and self.sending is sending:
            self._end(sending)

    def _tell(self, sending: Sending, told: bool) -> None:
        """What has come, of the head unless it was `told` before, and of the body."""
        asking = sending.asking
        if self._head_done and not told:
            asking.answer_begins(self._head)
        if self._parts and self.sending is sending:
            data = self._parts[0] if len(self._parts) == 1 else b"".join(self._parts)
            self._parts = []
            asking.answer_goes_on(data)

    def _end(self, sending: Sending) -> None:
        sending.over()
        if self._keeps and not self._extra and not self.transport.is_closing():
            if sending.paused:
                self.transport.resume_reading()
            self._headers = []
            self._pool.keep(self)
        else:
            self.close()
        sending.asking.answer_ends()

    def close(self) -> None:
        """Hang up."""
        self.transport.abort()

    # ------------------------------------------------------------------------------------------------- what llhttp says

    def on_message_begin(self) -> None:
        """An answer begins."""
        if self.sending is not None and self._ended:
            self._extra = True  # nobody asked for another
            return
        self._headers = []

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header, or, behind the body, a trailer, which is not passed on."""
        if not self._head_done:
            self._headers.append((name, value))

    def on_headers_complete(self) -> None:
        """The head is whole."""
        if self._ended:
            return
        assert self._parser is not None, "it is reading"
        status = self._parser.get_status_code()
        self._interim = 100 <= status < 200
        if self._interim:
            return
        self._head_done = True
        length: int | None = None
        chunked, kind, packed = False, b"", b""
        for name, value in self._headers:
            lower = name.lower()
            if lower == b"content-length":
                length = int(value)
            elif lower == b"content-type":
                kind = value
            elif lower == b"content-encoding":
                packed = value
            elif lower == b"transfer-encoding":
                chunked = True
        self._head = AnswerHead(status, passed_on(self._headers), length, kind, packed)
        self._keeps = self._parser.should_keep_alive()
        assert self.sending is not None
        if self.sending.request.startswith(b"HEAD "):  # llhttp would wait for a body
            self._ended, self._keeps = True, False
        elif length is None and not chunked and status not in (204, 304):
            self._until_close = True

    def on_body(self, data: bytes) -> None:
        """A part of its body."""
        if not self._ended:
            self._parts.append(data)

    def on_message_complete(self) -> None:
        """It is whole, or was only announced."""
        if self._interim:
            self._interim = False
            self._headers = []
        else:
            self._ended = True


@cache
def secure_context(ca_file: str | None) -> ssl.SSLContext:
    """For https to servers whose authority the system knows, or else is in this file. ValueError if there is none."""
    try:
        return ssl.create_default_context(cafile=ca_file)
    except OSError as error:  # also ssl.SSLError
        raise ValueError(f"gateway.ca_file={ca_file}: has no certificate to trust: {message(error)}") from error


class ServerPool:
    """Connections to the server at `url`, http or https, with a path before all others if it has one.

    connect_timeout_s: for it to accept a connection. read_timeout_s: longest silence before a request is lost.
    secure: for https. key: that the server wants with each request; None: none.
    """

    def __init__(
        self,
        url: str,
        connect_timeout_s: float,
        read_timeout_s: float,
        secure: ssl.SSLContext | None = None,
        key: str | None = None,
    ) -> None:
        self.url = url
        parts = urlsplit(url)
        assert parts.hostname is not None
        self._host = parts.hostname
        self._secure = secure if parts.scheme == "https" else None
        self._port = parts.port or (443 if self._secure else 80)
        self._prefix = parts.path.rstrip("/").encode()
        self._always = b"Host: %s\r\n" % parts.netloc.encode()
        if key is not None:
            self._always += b"Authorization: Bearer %s\r\n" % key.encode()
        self._connect_timeout_s = connect_timeout_s
        self._read_timeout_s = read_timeout_s
        self._watch_s = min(1.0, read_timeout_s / 8)
        self._idle: list[ServerConnection] = []  # the one that was used last is used next
        self.under_way: set[Sending] = set()
        """What has been sent, and not been answered whole."""
        self.heard = 0.0
        """When something came from the server last, by the loop's clock."""
        self._watched = False

    def send(self, asking: Asking, http: HTTPRequest, body: bytes) -> Sending:
        """Send a request, with another body; `asking` is told what comes of it, and nothing before this returns."""
        length = b"Content-Length: %d\r\n" % len(body) if body or http.method not in (b"GET", b"HEAD") else b""
        sending = Sending(
            self,
            asking,
            b"%s %s%s HTTP/1.1\r\n%s%s%s\r\n%s"
            % (http.method, self._prefix, http.target, self._always, header_lines(http.headers), length, body),
        )
        self.begin(sending)
        return sending

    def begin(self, sending: Sending) -> None:
        """Write a request to a connection that is kept, or to a new one."""
        loop = asyncio.get_running_loop()
        now = loop.time()
        sending.heard = now
        self.under_way.add(sending)
        if not self._watched:
            self._watched = True
            loop.call_later(self._watch_s, self._watch)
        while self._idle:
            connection = self._idle.pop()
            if now - connection.idle_since < KEPT_S and not connection.transport.is_closing():
                connection.begin(sending, now)
                return
            connection.close()
        sending.connection = loop.create_task(self._connect(sending))

    async def _connect(self, sending: Sending) -> None:
        loop = asyncio.get_running_loop()
        error: TransportError = ConnectionLost(f"accepts no connection within {self._connect_timeout_s:g} s")
        try:
            async with asyncio.timeout(self._connect_timeout_s):
                while True:
                    try:
                        _, connection = await loop.create_connection(
                            lambda: ServerConnection(self), self._host, self._port, ssl=self._secure
                        )
                        break
                    except OSError as cause:
                        if cause.errno not in _OURS:
                            raise
                        error = OutOfResources(message(cause))
                        await asyncio.sleep(AGAIN_S)
        except TimeoutError:
            pass
        except Exception as cause:  # also what is no OSError, such as a name that cannot be encoded
            error = ConnectionLost(message(cause))
        else:
            if sending.connection is None:  # given up meanwhile
                connection.close()
            else:
                connection.begin(sending, loop.time())
                if sending.paused:
                    sending.pause()
            return
        if sending.connection is not None:
            sending.over()
            sending.asking.lost(error)

    def _watch(self) -> None:
        """Give up what the server is silent about; a timer for each request would cost more than all its writing."""
        loop = asyncio.get_running_loop()
        long_ago = loop.time() - self._read_timeout_s
        for sending in [one for one in self.under_way if one.heard < long_ago and not one.paused]:
            sending.cancel()
            sending.asking.lost(ServerSilent(f"silent for {self._read_timeout_s:g} s"))
        self._watched = bool(self.under_way)
        if self._watched:
            loop.call_later(self._watch_s, self._watch)

    def quiet_s(self) -> float:
        """For how long the server has said nothing to what waits for it; 0 if nothing does."""
        since = min((one.sent for one in self.under_way if not one.paused), default=math.inf)
        return max(asyncio.get_running_loop().time() - max(since, self.heard), 0.0)

    def longest_wait_s(self) -> float:
        """How long the oldest request for a stream has waited whose answer has not begun; 0 if there is none."""
        waiting = [one.sent for one in self.under_way if one.asking.streams and not one.asking.passing]
        return asyncio.get_running_loop().time() - min(waiting) if waiting else 0.0

    def give_up(self, error: TransportError) -> None:
        """Lose all that can begin anew elsewhere."""
        for sending in [one for one in self.under_way if one.asking.replaceable]:
            sending.cancel()
            sending.asking.lost(error)

    def keep(self, connection: ServerConnection) -> None:
        """A connection is free."""
        connection.idle_since = asyncio.get_running_loop().time()
        self._idle.append(connection)

    def forget(self, connection: ServerConnection) -> None:
        """A connection that was free is closed."""
        if connection in self._idle:
            self._idle.remove(connection)

    def close_idle(self, older_s: float = KEPT_S) -> None:
        """Close those that have been free for so long."""
        now = asyncio.get_running_loop().time()
        old = [one for one in self._idle if now - one.idle_since >= older_s]
        self._idle = [one for one in self._idle if now - one.idle_since < older_s]
        for connection in old:
            connection.close()
