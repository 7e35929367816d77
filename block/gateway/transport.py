"""HTTP to the servers, by aiohttp's connections and parser, without its session.

A `ClientSession` takes longer over a request than all the rest of the gateway, with what a proxy has no use for
(cookies, redirects, retries, a task that writes the body), and so what it has use for is called here.
"""

from __future__ import annotations

import asyncio
import time
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import aiohttp
from aiohttp.client_proto import ResponseHandler
from aiohttp.connector import Connection
from aiohttp.http import HttpProcessingError, RawResponseMessage
from aiohttp.streams import StreamReader
from multidict import CIMultiDictProxy
from yarl import URL

from block.core.errors import message

STALE_S = 1.0
"""A connection that was kept and fails sooner than this was closed before the request came."""
READ_BUFFER = 2**16
"""Bytes of an answer that may wait to be read before the server has to."""


class TransportError(Exception):
    """What can go wrong between us and a server; the message says what did."""


class ConnectionLost(TransportError):
    """There is no connection to it, or no longer."""


class ServerSilent(TransportError):
    """It has said nothing for as long as was to be waited. It may be busy."""


class NotHTTP(TransportError):
    """What it says is no HTTP."""


@contextmanager
def transport_errors() -> Iterator[None]:
    """Within, whatever aiohttp raises is a TransportError: here alone it is told apart."""
    try:
        yield
    except aiohttp.SocketTimeoutError as error:
        raise ServerSilent(message(error)) from error
    except HttpProcessingError as error:
        raise NotHTTP(message(error)) from error
    except (aiohttp.ClientError, TimeoutError, OSError) as error:
        raise ConnectionLost(message(error)) from error


class Answer(NamedTuple):
    """What a server answers; `content` is its body as it comes. To be closed, which hangs up unless all was read."""

    status: int
    headers: CIMultiDictProxy[str]
    content: StreamReader
    connection: Connection

    async def read(self) -> bytes:
        """The whole body. TransportError if it does not come."""
        with transport_errors():
            return await self.content.read()

    async def read_some(self) -> bytes:
        """What has come of the body; nothing at its end. TransportError if no more comes."""
        with transport_errors():
            return await self.content.readany()

    def close(self) -> None:
        """Let go of the connection."""
        self.connection.close()


class Transport:
    """Requests to the server at `url`, over the connections of `session`."""

    def __init__(self, url: str, session: aiohttp.ClientSession) -> None:
        connector = session.connector
        assert connector is not None
        self._connector = connector
        self._timeout = session.timeout
        # What connections are asked for by; it is never sent.
        self._key = aiohttp.ClientRequest("POST", URL(url), loop=asyncio.get_running_loop())
        self._used: weakref.WeakSet[ResponseHandler] = weakref.WeakSet()
        self._prefix = self._key.url.raw_path.rstrip("/").encode()
        self._host = self._key.headers["Host"].encode()

    async def post(self, path: str, headers: Iterable[tuple[bytes, bytes]], body: bytes) -> Answer:
        """Send a request; returns when the headers of its answer are there. TransportError if they do not come."""
        lines = [b"POST %s%s HTTP/1.1\r\nHost: %s" % (self._prefix, path.encode(), self._host)]
        lines += [b"%s: %s" % header for header in headers]
        lines.append(b"Content-Length: %d\r\n\r\n" % len(body))
        with transport_errors():
            return await self._send(b"\r\n".join(lines) + body)

    async def _send(self, request: bytes) -> Answer:
        while True:
            connection = await self._connector.connect(self._key, [], self._timeout)
            protocol = connection.protocol
            assert protocol is not None
            kept = protocol in self._used
            self._used.add(protocol)
            sent = time.monotonic()
            try:
                head, content = await self._ask(protocol, request)
            except (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError):
                connection.close()
                if not (kept and time.monotonic() - sent < STALE_S):
                    raise
                continue  # the server may have closed it before the request came
            except BaseException:
                connection.close()
                raise
            content.on_eof(connection.release)
            return Answer(head.code, head.headers, content, connection)

    async def _ask(self, protocol: ResponseHandler, request: bytes) -> tuple[RawResponseMessage, StreamReader]:
        protocol.set_response_params(
            auto_decompress=False,
            read_until_eof=True,
            read_timeout=self._timeout.sock_read,
            read_bufsize=READ_BUFFER,
        )
        assert protocol.transport is not None
        protocol.transport.write(request)
        protocol.start_timeout()
        while True:
            head, content = await protocol.read()
            if head.code >= 200:  # others only announce it
                return head, content
