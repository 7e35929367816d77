"""Clients that leave before their answer is whole: the request is cancelled, and no server is blamed."""

from __future__ import annotations

import asyncio
from collections import deque

import pytest
from aiohttp import web
from mock_servers import (
    ASKED,
    DONE,
    EVENTS,
    SSE,
    STREAMED,
    USAGE,
    Answer,
    Mock,
    eventually,
    hang,
    run,
    running_gateway,
    stream,
)


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


LAST = {
    "completion": [*EVENTS, USAGE, DONE],
    "message": [
        b'event: message_delta\ndata: {"usage":{"output_tokens":5}}\n\n',
        b"event: message_stop\n",
        b"data: {}\n\n",
    ],
    "response": [
        b"event: response.created\r\ndata: {}\r\n\r\n",
        b"event: response.comp",
        b'leted\r\ndata: {"response":',
        b'{"usage":{"input_tokens":3,"output_tokens":5}}}\r\n\r\n',
    ],
    "response that is cut short": [b'event: response.incomplete\ndata: {"usage":{"output_tokens":5}}\n\n'],
}


@pytest.mark.parametrize("events", LAST.values(), ids=LAST)
def test_a_client_that_goes_away_after_the_last_event_was_answered(events: list[bytes]) -> None:
    async def unended(mock: Mock, http: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers=SSE)
        await response.prepare(http)
        for event in events:
            await response.write(event)
            await asyncio.sleep(0.01)
        await mock.go.wait()
        return response

    async def main() -> None:
        async with running_gateway([Mock(unended)]) as gateway:
            gateway.mocks[0].go.clear()
            async with gateway.client.post(gateway.url + "/v1/responses", data=STREAMED) as answer:
                assert await answer.content.readexactly(len(b"".join(events))) == b"".join(events)
            await eventually(lambda: gateway.in_flight() == 0)
            (record,) = gateway.dispatcher.history.records
            assert (record.status, record.output_tokens) == ("ok", 5)
            assert (await gateway.metrics())['block_requests_total{server="0",status="ok"}'] == 1
            gateway.mocks[0].go.set()

    run(main())


def test_a_client_that_goes_away_within_the_last_event_was_not_answered() -> None:
    async def unended(mock: Mock, http: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers=SSE)
        await response.prepare(http)
        await response.write(b"event: message_start\ndata: {}\n\nevent: message_stop\ndata: {")
        return await hang(mock, http)

    async def main() -> None:
        async with running_gateway([Mock(unended)]) as gateway:
            async with gateway.client.post(gateway.url + "/v1/messages", data=STREAMED) as answer:
                await answer.content.readuntil(b"data: {}")
            await eventually(lambda: gateway.mocks[0].cancelled == 1 and gateway.in_flight() == 0)
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
