"""Servers that write their answers byte by byte: closed connections, answers without a length, what is not HTTP."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from mock_servers import ANSWER, ASKED, Mock, run, running_gateway


@asynccontextmanager
async def bare_server(*answers: bytes | None) -> AsyncIterator[tuple[Mock, list[int]]]:
    """A server that gives, on each connection, one of these answers to each request; None hangs up. It is always well.

    Also the number of the connection that each request came on.
    """
    came: list[int] = []
    connections = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        number, left = connections, list(answers)
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                if head.startswith(b"GET "):
                    status = b"200 OK" if b" /health " in head else b"404 Not Found"
                    writer.write(b"HTTP/1.1 %s\r\nContent-Length: 0\r\nConnection: close\r\n\r\n" % status)
                    return
                await reader.readexactly(len(ASKED))
                came.append(number)
                answer = left.pop(0)
                if answer is None:
                    return
                writer.write(answer)
                if b"Content-Length" not in answer:
                    return
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield Mock(port=server.sockets[0].getsockname()[1]), came


OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"


def test_a_kept_connection_that_was_closed_meanwhile_is_not_its_server_s_fault() -> None:
    async def main() -> None:
        async with bare_server(OK, None) as (mock, came), running_gateway([mock], started=[]) as gateway:
            assert [(await gateway.ask())[:2] for _ in range(3)] == [(200, b"{}")] * 3
            assert len(came) == 5
            assert [came[0], came[1] - came[0], came[2] - came[1]] == [came[0], 0, 1]  # kept, then another
            assert gateway.dispatcher.ejected(0) == 0

    run(main())


def test_answers_may_follow_early_hints_or_end_with_the_connection() -> None:
    async def main() -> None:
        hints = b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n"
        endless = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n\r\n{}"
        for answer in (hints + OK, endless):
            async with bare_server(answer) as (mock, _), running_gateway([mock], started=[]) as gateway:
                assert (await gateway.ask())[:2] == (200, b"{}")

    run(main())


def test_a_server_that_speaks_no_http_is_passed_over_and_stays_active() -> None:
    async def main() -> None:
        async with (
            bare_server(b"what? Content-Length\r\n\r\n") as (mock, _),
            running_gateway([mock, Mock()], started=[1]) as gateway,
        ):
            assert (await gateway.ask())[:2] == (200, ANSWER)
            assert list(gateway.dispatcher.active) == [0, 1]

    run(main())
