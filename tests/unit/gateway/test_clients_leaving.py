"""Clients that leave before their answer is whole: the request is cancelled, and no server is blamed."""

from __future__ import annotations

import asyncio
from collections import deque

import pytest
from aiohttp import web
from mock_servers import ASKED, EVENTS, SSE, STREAMED, Answer, Mock, eventually, hang, run, running_gateway, stream


@pytest.mark.parametrize(
    ("answer", "body"), [(hang, ASKED), (hang, STREAMED), (stream, STREAMED)], ids=["whole", "no byte", "in a stream"]
)
def test_a_client_that_goes_away_cancels_its_request(answer: Answer, body: bytes) -> None:
    async def main() -> None:
        async with running_gateway([Mock(answer)]) as gateway:
            mock = gateway.mocks[0]
            mock.go.clear()
            asked = asyncio.create_task(gateway.ask(body))
            await eventually(lambda: len(mock.seen) == 1 and gateway.in_flight() == 1)
            await asyncio.sleep(0.05)
            asked.cancel()
            await eventually(lambda: mock.cancelled == 1 and gateway.in_flight() == 0)
            assert list(gateway.dispatcher.active) == [0]
            assert (await gateway.metrics())['block_requests_total{server="0",status="cancelled"}'] == 1

    run(main())


def test_a_client_that_goes_away_while_it_is_written_to_is_not_its_server_s_fault() -> None:
    async def main() -> None:
        async def endless(mock: Mock, http: web.Request) -> web.StreamResponse:
            response = web.StreamResponse(headers=SSE)
            await response.prepare(http)
            while True:
                await response.write(EVENTS[0] * 100)
                await asyncio.sleep(0)

        async with running_gateway([Mock(endless)]) as gateway:
            for _ in range(20):
                reader, writer = await gateway.connect()
                writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{}")
                await reader.read(10_000)
                writer.transport.abort()
            await eventually(lambda: gateway.in_flight() == 0 and gateway.mocks[0].cancelled == 20)
            assert list(gateway.dispatcher.active) == [0]
            assert (await gateway.metrics())['block_requests_total{server="0",status="cancelled"}'] == 20

    run(main())


def test_a_client_that_goes_away_in_the_midst_of_its_request_is_no_error(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        async with running_gateway([Mock()]) as gateway:
            _, writer = await gateway.connect()
            writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 20\r\n\r\n{")
            await asyncio.sleep(0.05)
            writer.transport.abort()
            await asyncio.sleep(0.05)
            assert gateway.mocks[0].seen == []
            assert gateway.dispatcher.history.records == deque()

    run(main())
    assert caplog.records == []
