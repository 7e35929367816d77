"""The wire: requests byte by byte, what is no request, and answers in every framing that HTTP/1.1 has."""

from __future__ import annotations

import asyncio
import gzip
import json
import zlib

import pytest
from aiohttp import web
from mock_servers import (
    ANSWER,
    ASKED,
    DONE,
    EVENTS,
    SSE,
    STREAMED,
    Mock,
    RunningGateway,
    eventually,
    run,
    running_gateway,
    says,
    stream,
    whole,
)
from test_bare_servers import bare_server

from block.gateway import client_connections
from block.gateway.http1 import TooLong, unpacked

HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n"
POST = HEAD + b"Content-Length: %d\r\n\r\n%s" % (len(ASKED), ASKED)


@pytest.fixture(autouse=True)
def _brief(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_connections, "LINGER_S", 0.05)


async def talk(gateway: RunningGateway, *parts: bytes, pause_s: float = 0.0) -> bytes:
    """What comes back for these bytes until the gateway closes the connection."""
    reader, writer = await gateway.connect()
    for part in parts:
        writer.write(part)
        if pause_s:
            await asyncio.sleep(pause_s)
    try:
        return await asyncio.wait_for(reader.read(), 5)
    finally:
        writer.close()


def statuses(answers: bytes) -> list[int]:
    return [int(part[:3]) for part in answers.split(b"HTTP/1.1 ")[1:]]


LAST = b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (HEAD + b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n{}", 400),
        (HEAD + b"Transfer-Encoding: chunked\r\nContent-Length: 2\r\n\r\n2\r\n{}\r\n0\r\n\r\n", 400),
        (HEAD + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n{} ", 400),
        (HEAD + b"Content-Length: 2\r\nContent-Length: 2\r\n\r\n{}", 400),
        (HEAD + b"Content-Length: +2\r\n\r\n{}", 400),
        (HEAD + b"Content-Length: -1\r\n\r\n", 400),
        (HEAD + b"Content-Length: 99999999999999999999999\r\n\r\n", 400),
        (HEAD + b"Transfer-Encoding: xchunked\r\n\r\n{}", 501),
        (HEAD + b"Transfer-Encoding: gzip, chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n", 501),
        (b"CONNECT h:443 HTTP/1.1\r\nHost: h:443\r\n\r\n", 501),
        (b"POST /v1/completions HTTP/1.1\r\nContent-Length: 2\r\n\r\n{}", 400),
        (HEAD + b"Host: y\r\nContent-Length: 2\r\n\r\n{}", 400),
        (b"POST /sleep#x HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{}", 400),
        (b"POST http://a/sleep#x HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{}", 400),
        (HEAD + b"Transfer-Encoding: chunked, identity\r\n\r\n{}", 400),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n{}\r\n0\r\n\r\n", 400),
        (HEAD + b"X : 1\r\n\r\n", 400),
        (HEAD + b"X: a\r\n b\r\n\r\n", 400),
        (HEAD + b"X: a\x00b\r\n\r\n", 400),
        (HEAD + b"Expect: 200-ok\r\n\r\n", 417),
        (b"POST /v1/completions\xff HTTP/1.1\r\n\r\n", 400),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400),
        (b"HELLO\r\n\r\n", 400),
        (b"GET /" + b"x" * 70_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n", 414),
        (b"GET / HTTP/1.1\r\nX: " + b"x" * 140_000 + b"\r\n\r\n", 431),
        (b"GET / HTTP/1.1\r\n" + b"X: %s\r\n" % (b"x" * 1000) * 140 + b"\r\n", 431),
        (b"GET / HTTP/1.1\r\nX: " + b"x" * 140_000, 431),
        (HEAD + b"Content-Length: 2000000\r\n\r\n", 413),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + b"ffff\r\n%s\r\n" % (b" " * 0xFFFF) * 20, 413),
        (HEAD + b"Content-Encoding: br\r\nContent-Length: 2\r\nConnection: close\r\n\r\n{}", 400),
    ],
)
@pytest.mark.parametrize("whole_at_once", [True, False])
def test_what_is_no_request_gets_its_status_reaches_no_server_and_is_not_logged(
    request_: bytes, status: int, whole_at_once: bool, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        async with running_gateway([Mock()], max_body_mib=1) as gateway:
            parts = [request_ + LAST] if whole_at_once else [request_[:30], request_[30:], LAST]
            answer = await talk(gateway, *parts, pause_s=0 if whole_at_once else 0.01)
            assert statuses(answer) == [status]
            assert b"\r\nConnection: close\r\n" in answer
            error = json.loads(answer.partition(b"\r\n\r\n")[2])["error"]
            assert (error["code"], error["type"]) == (status, "BadRequestError")
            assert gateway.mocks[0].seen == []
            assert (await gateway.metrics())['block_requests_total{server="none",status="refused"}'] == 1

    run(main())
    assert caplog.records == []


def test_headers_of_64_kib_pass() -> None:
    async def main() -> None:
        async with running_gateway([Mock()]) as gateway:
            large = b"X: %s\r\n" % (b"x" * 60_000)
            asked = HEAD + large + b"Connection: close\r\nContent-Length: %d\r\n\r\n%s" % (len(ASKED), ASKED)
            # The mock, which is no vLLM, takes no header of more than 8 kB: that it says so is an answer of its own.
            assert statuses(await talk(gateway, asked)) == [400]
            assert (await gateway.metrics())['block_requests_total{server="0",status="refused"}'] == 1

    run(main())


def test_requests_that_are_sent_before_their_answers_are_answered_in_their_order() -> None:
    async def main() -> None:
        async with running_gateway([Mock(), Mock(says(418, b"second"))]) as gateway:
            answers = await talk(gateway, POST * 40 + LAST)
            assert statuses(answers) == [200, 418] * 20 + [200]
            assert answers.endswith(b'{"active": 2, "instances": 2}')
            mixed = await talk(gateway, POST + b"GET /x HTTP/1.1\r\nHost : x\r\n\r\n" + POST)
            assert statuses(mixed) == [200, 400]

    run(main())


def test_byte_by_byte_is_the_same_request() -> None:
    async def main() -> None:
        async with running_gateway([Mock()]) as gateway:
            reader, writer = await gateway.connect()
            for byte in POST.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n", 1):
                writer.write(bytes([byte]))
                await asyncio.sleep(0)
            assert (await reader.read()).endswith(ANSWER)
            writer.close()
            assert gateway.mocks[0].seen[0][2] == ASKED

    run(main())


def test_a_chunked_request_passes_and_its_trailers_do_not() -> None:
    async def main() -> None:
        async with running_gateway([Mock()]) as gateway:
            chunks = b"".join(b"%x;note=1\r\n%s\r\n" % (len(part), part) for part in (ASKED[:7], ASKED[7:]))
            sent = (
                HEAD + b"Connection: close\r\nTransfer-Encoding: chunked\r\n\r\n" + chunks + b"0\r\nX-Late: 1\r\n\r\n"
            )
            assert statuses(await talk(gateway, sent)) == [200]
            ((_, headers, body),) = gateway.mocks[0].seen
            assert body == ASKED
            assert headers["Content-Length"] == str(len(ASKED))
            assert not {"X-Late", "Transfer-Encoding"} & set(headers)

    run(main())


def test_a_client_that_expects_to_be_told_to_go_on_is_told() -> None:
    async def main() -> None:
        async with running_gateway([Mock()]) as gateway:
            reader, writer = await gateway.connect()
            writer.write(HEAD + b"Expect: 100-Continue\r\nContent-Length: %d\r\n\r\n" % len(ASKED))
            assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
            writer.write(ASKED)
            assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200 ")
            assert await reader.readexactly(len(ANSWER)) == ANSWER
            writer.close()

    run(main())


@pytest.mark.parametrize("keeps", [False, True])
def test_a_client_of_http_1_0_gets_no_chunks_and_keeps_its_connection_if_it_says_so(keeps: bool) -> None:
    async def main() -> None:
        async with running_gateway([Mock(stream), Mock(whole)]) as gateway:
            stays = b"Connection: keep-alive\r\n" if keeps else b""
            head = b"POST /v1/completions HTTP/1.0\r\n" + stays + b"Content-Length: %d\r\n\r\n"
            streamed = await talk(gateway, head % len(STREAMED) + STREAMED)
            assert b"chunked" not in streamed
            assert streamed.partition(b"\r\n\r\n")[2].startswith(EVENTS[0])
            assert streamed.endswith(DONE)
            gateway.mocks[0].answer = whole
            asked = head % len(ASKED) + ASKED
            answers = await talk(gateway, asked + asked + b"GET /health HTTP/1.0\r\n\r\n")
            assert statuses(answers) == ([200, 200, 200] if keeps else [200])
            assert (b"Connection: keep-alive" in answers) == keeps

    run(main())


def test_head_has_the_headers_and_no_body() -> None:
    async def main() -> None:
        async with running_gateway([Mock(says(200, b"12345"))]) as gateway:
            for path in (b"/ping", b"/health", b"/metrics", b"/v1/models"):
                answer = await talk(gateway, b"HEAD %s HTTP/1.1\r\nHost: x\r\n\r\n" % path + LAST)
                assert statuses(answer) == [200, 200]
                first = answer.split(b"HTTP/1.1 ")[1]
                assert first.endswith(b"\r\n\r\n")
                assert b"\r\nContent-Length: 0\r\n" not in first
            assert gateway.mocks[0].seen[0][0] == "/ping"

    run(main())


@pytest.mark.parametrize("target", [b"http://elsewhere:1/v1/completions?a=b", b"/v1/completions?a=b"])
def test_a_target_may_be_absolute(target: bytes) -> None:
    async def main() -> None:
        async with running_gateway([Mock()]) as gateway:
            sent = POST.replace(b"/v1/completions", target).replace(b"Host: x", b"Host: x\r\nConnection: close")
            assert statuses(await talk(gateway, sent)) == [200]
            assert gateway.mocks[0].seen[0][0] == "/v1/completions?a=b"

    run(main())


@pytest.mark.parametrize("other", [b"h2c\r\nHTTP2-Settings: AAA", b"websocket"])
def test_a_client_that_would_like_another_protocol_is_answered_in_this_one(other: bytes) -> None:
    async def main() -> None:
        async with running_gateway([Mock()]) as gateway:
            asks = b"Host: x\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: " + other
            answers = await talk(gateway, POST.replace(b"Host: x", asks) + POST + LAST)
            assert statuses(answers) == [200, 200, 200]
            assert answers.count(ANSWER) == 2
            assert [seen[2] for seen in gateway.mocks[0].seen] == [ASKED, ASKED]
            assert not {"Upgrade", "HTTP2-Settings", "Connection"} & set(gateway.mocks[0].seen[0][1])

    run(main())


@pytest.mark.parametrize("encoding", ["gzip", "two gzip", "deflate", "raw deflate", "identity"])
def test_a_packed_request_is_unpacked(encoding: str) -> None:
    raw = zlib.compressobj(wbits=-15)
    packed = {
        "gzip": gzip.compress(ASKED),
        "deflate": zlib.compress(ASKED),
        "raw deflate": raw.compress(ASKED) + raw.flush(),
        "identity": ASKED,
        "two gzip": gzip.compress(ASKED[:9]) + gzip.compress(ASKED[9:]),
    }[encoding]
    assert unpacked(packed, encoding.split()[-1].encode(), len(ASKED)) == ASKED
    if encoding != "identity":
        with pytest.raises(TooLong):
            unpacked(packed, encoding.split()[-1].encode(), len(ASKED) - 1)
        with pytest.raises(ValueError, match="too soon"):
            unpacked(packed[:-1], encoding.split()[-1].encode(), 10**6)
    with pytest.raises(ValueError, match="is not gzip"):
        unpacked(b"what", b"gzip", 10**6)


ERRORS = {
    "in one piece": [b'data: {"error": {"message": "dead"}}\n\n'],
    "split": [b'data: {"er', b'ror": {"message": "dead"}}\n', b"\n"],
    "after a comment": [b": hm\n\n", b'data: {"error": {"message": "dead"}}\n\n'],
    "of a kind": [b'event: error\ndata: {"type": "error", "message": "dead"}\n\n'],
    "after a line": [b'\r\ndata: {"error": {"message": "dead"}}\r\n\r\n'],
    "without a space": [b'data:{"error": {"message": "dead"}}\n\n'],
    "with spaces": [b'data: { "error" : {"message": "dead"}}\n\n'],
    "carriage returns": [b'data: {"error": {"message": "dead"}}\r\r'],
    "in lines": [b'data: {"error":\ndata: {"message": "dead"}}\n\n'],
}


@pytest.mark.parametrize("well", [False, True])
@pytest.mark.parametrize("pieces", ERRORS.values(), ids=ERRORS)
def test_a_stream_that_begins_with_an_error_however_it_is_spelt(pieces: list[bytes], well: bool) -> None:
    async def answer(mock: Mock, http: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers=SSE)
        await response.prepare(http)
        for piece in pieces:
            await response.write(piece)
            await asyncio.sleep(0.005)
        return response

    async def main() -> None:
        async with running_gateway([Mock(answer), Mock()], probe_interval_s=60) as gateway:
            gateway.mocks[0].well = well
            status, body, _ = await gateway.ask(STREAMED)
            assert (status, body) == (200, b"".join(pieces) if well else ANSWER)
            assert list(gateway.dispatcher.active) == ([0, 1] if well else [1])
            record = gateway.dispatcher.history.records[0]
            assert record.status == ("failed" if well else "ok")

    run(main())


def test_an_answer_is_whole_at_done_and_who_leaves_there_has_cancelled_nothing() -> None:
    async def answer(mock: Mock, http: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers=SSE)
        await response.prepare(http)
        for event in (*EVENTS, DONE[:9], DONE[9:]):
            await response.write(event)
            await asyncio.sleep(0.002)
        await mock.go.wait()
        return response

    async def main() -> None:
        async with running_gateway([Mock(answer)]) as gateway:
            gateway.mocks[0].go.clear()
            reader, writer = await gateway.connect()
            writer.write(HEAD + b"Content-Length: %d\r\n\r\n%s" % (len(STREAMED), STREAMED))
            await reader.readuntil(b"NE]\n\n")
            writer.close()
            await eventually(lambda: gateway.in_flight() == 0)
            gateway.mocks[0].go.set()
            metrics = await gateway.metrics()
            assert metrics['block_requests_total{server="0",status="ok"}'] == 1
            assert metrics['block_e2e_seconds_count{server="0"}'] == 1
            assert not any("cancelled" in name for name in metrics)
            assert gateway.dispatcher.history.records[0].output_tokens == 5
            assert gateway.mocks[0].cancelled == 0

    run(main())


CHUNKED = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


def test_a_stream_whose_chunks_turn_into_something_else_is_broken_off_at_once() -> None:
    async def main() -> None:
        broken = CHUNKED + chunk(EVENTS[0]) + b"zz\r\nContent-Length"
        async with bare_server(broken) as (mock, _), running_gateway([mock], started=[]) as gateway:
            status, body, _ = await gateway.ask()
            assert status == 200
            assert body.startswith(EVENTS[0] + b"\n\ndata: {")
            assert b'"error"' in body
            assert list(gateway.dispatcher.active) == [0]

    run(main())


def test_a_packed_stream_that_breaks_is_cut_for_no_event_can_be_written_into_it() -> None:
    async def answer(mock: Mock, http: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={**SSE, "Content-Encoding": "gzip"})
        await response.prepare(http)
        await response.write(gzip.compress(EVENTS[0])[:-2])
        await asyncio.sleep(0.02)
        assert http.transport is not None
        http.transport.abort()
        return response

    async def main() -> None:
        async with running_gateway([Mock(answer)]) as gateway:
            answers = await talk(gateway, POST)
            assert statuses(answers) == [200]
            assert not answers.endswith(b"0\r\n\r\n")
            assert b"error" not in answers

    run(main())


@pytest.mark.parametrize(
    ("answer", "body"),
    [
        (
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
            + chunk(b"ab")
            + chunk(b"c")
            + b"0\r\nX: 1\r\n\r\n",
            b"abc",
        ),
        (b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n\r\n{}", b"{}"),
        (b"HTTP/1.0 200 OK\r\n\r\nabc", b"abc"),
        (b"HTTP/1.1 200\r\nContent-Length: 3\r\n\r\nabc", b"abc"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", b""),
        (b"HTTP/1.1 204 No Content\r\nContent-Length: 0\r\n\r\n", b""),
        (
            b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early\r\nX: 1\r\n\r\n"
            b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\na",
            b"a",
        ),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\naHTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nextra", b"a"),
    ],
)
def test_answers_of_every_framing_pass(answer: bytes, body: bytes) -> None:
    async def main() -> None:
        async with bare_server(answer) as (mock, _), running_gateway([mock], started=[]) as gateway:
            for _ in range(2):
                assert (await gateway.ask())[1] == body
            records = gateway.dispatcher.history.records
            assert [one.status for one in records] == ["ok", "ok"]

    run(main())


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\nabc",
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nab\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX\x00: 2\r\n\r\n",
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: Upgrade\r\n\r\n",
        b"HTTP/2 200\r\n\r\n",
    ],
)
def test_a_server_whose_answer_is_ambiguous_is_passed_over(answer: bytes) -> None:
    async def main() -> None:
        async with bare_server(answer) as (mock, _), running_gateway([mock, Mock()], started=[1]) as gateway:
            assert (await gateway.ask())[:2] == (200, ANSWER)
            assert list(gateway.dispatcher.active) == [0, 1]

    run(main())
