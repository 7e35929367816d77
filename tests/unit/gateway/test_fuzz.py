"""Bytes that nobody foresaw, from clients and from servers: no crash, no hang, no request smuggled, no gauge leaked."""

from __future__ import annotations

import asyncio
import os
import random
import time
from contextlib import suppress

import pytest
from mock_servers import ASKED, STREAMED, Mock, eventually, running_gateway, stream, whole
from test_bare_servers import bare_server

SECONDS = float(os.environ.get("BLOCK_FUZZ_S", "2"))
"""For each of the tests; an hour once, a moment in every run of the tests."""

PIECES = [
    *(
        b"GET ",
        b"POST ",
        b"HEAD ",
        b"OPTIONS ",
        b"/v1/completions",
        b"/v1/embeddings",
        b"/health",
        b"/sleep",
        b" HTTP/1.1",
    ),
    *(b" HTTP/1.0", b" HTTP/2.0", b"\r\n", b"\r\n\r\n", b"\n", b"\r", b": ", b" ", b"\t", b"\x00", b"\xff"),
    *(
        b"Host: x\r\n",
        b"Content-Length: 51\r\n",
        b"Content-Length: 5\r\n",
        b"Content-Length: 0\r\n",
        b"Content-Length:",
    ),
    *(b"Transfer-Encoding: chunked\r\n", b"Transfer-Encoding: gzip, chunked\r\n", b"Connection: close\r\n"),
    *(b"Connection: keep-alive, X\r\n", b"Expect: 100-continue\r\n", b"Upgrade: h2c\r\n", b"Connection: Upgrade\r\n"),
    *(b"Content-Encoding: gzip\r\n", b"0\r\n\r\n", b"33\r\n", b"5\r\n", b"ffffffffff\r\n", b";x=y", b"{}", b"{", b"}"),
    *(b"HTTP/1.1 200 OK\r\n", b"HTTP/1.1 100 Continue\r\n\r\n", b"HTTP/1.1 204 No\r\n", b"HTTP/1.1 503 X\r\n"),
    *(b"Content-Type: text/event-stream\r\n", b"Content-Type: application/json\r\n", b'data: {"error": {}}\n\n'),
    *(b'data: {"a": 1}\n\n', b"data: [DONE]\n\n", b": x\n\n", b'"usage":{"prompt_tokens":1,"completion_tokens":2}'),
    *(ASKED, STREAMED),
]
REQUEST = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%s"
SOUND = [REQUEST % (len(body), body) for body in (ASKED, STREAMED)]
ANSWERS = [
    b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}",
    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
    b'10\r\ndata: {"a": 1}\n\n\r\n0\r\n\r\n',
]


def crashes(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What was logged with an exception, but that a mock was hung up on."""
    told = [str(entry.exc_info[1]) for entry in caplog.records if entry.exc_info]
    return [text for text in told if text != "Cannot write to closing transport"]


def scrambled(rng: random.Random, sound: list[bytes]) -> bytes:
    """Pieces in any order, or what is sound with bytes changed, left out and put in."""
    if rng.random() < 0.3:
        return b"".join(rng.choices(PIECES, k=rng.randint(1, 12)))
    data = bytearray(b"".join(rng.choices(sound, k=rng.randint(1, 3))))
    for _ in range(rng.randint(0, 4)):
        at = rng.randrange(len(data) + 1)
        data[at : at + rng.randint(0, 3)] = rng.choice([b"", rng.choice(PIECES), bytes([rng.randrange(256)])])
    return bytes(data)


def test_whatever_clients_send(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        rng = random.Random(0)
        async with running_gateway([Mock(whole), Mock(stream)]) as gateway:
            end = time.monotonic() + SECONDS

            async def client() -> None:
                while time.monotonic() < end:
                    reader, writer = await gateway.connect()
                    data = scrambled(rng, SOUND)
                    cut = rng.randrange(len(data) + 1)
                    writer.write(data[:cut])
                    await asyncio.sleep(0)
                    writer.write(data[cut:])
                    with suppress(TimeoutError, ConnectionError):
                        await asyncio.wait_for(reader.read(rng.choice([0, 1, 10_000])), 0.02)
                    writer.transport.abort() if rng.random() < 0.5 else writer.close()

            await asyncio.gather(*(client() for _ in range(8)))
            await eventually(lambda: gateway.in_flight() == 0 and not gateway.gateway.clients)
            assert list(gateway.dispatcher.active) == [0, 1]
            sent = sum(
                number
                for name, number in (await gateway.metrics()).items()
                if name.startswith("block_requests_total") and "none" not in name
            )
            assert sent > SECONDS
            assert sum(len(mock.seen) for mock in gateway.mocks) <= sent  # none came that was not sent
            assert [(await gateway.ask())[0] for _ in range(2)] == [200, 200]

    asyncio.run(asyncio.wait_for(main(), SECONDS + 20))
    assert crashes(caplog) == []


def test_whatever_servers_answer(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        rng = random.Random(1)
        end = time.monotonic() + SECONDS
        while time.monotonic() < end:
            answers = [scrambled(rng, ANSWERS) for _ in range(40)]
            async with (
                bare_server(*answers) as (mock, _),
                running_gateway([mock, Mock()], started=[1], read_timeout_s=0.05) as gateway,
            ):
                for _ in range(20):
                    asked = asyncio.create_task(gateway.ask())
                    if rng.random() < 0.2:
                        await asyncio.sleep(0.002)
                        asked.cancel()
                    done = (await asyncio.gather(asked, return_exceptions=True))[0]
                    if isinstance(done, tuple):
                        assert done[0] in (200, 204, 502, 503, 504)
                await eventually(lambda: gateway.in_flight() == 0)

    asyncio.run(asyncio.wait_for(main(), SECONDS + 20))
    assert crashes(caplog) == []
