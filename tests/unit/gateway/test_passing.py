"""What passes through the gateway: bodies, headers, streams and the list of models, unchanged."""

from __future__ import annotations

import asyncio
import gzip
import json

import pytest
from aiohttp import web
from mock_servers import (
    ANSWER,
    ASKED,
    DONE,
    EVENTS,
    SSE,
    STREAMED,
    USAGE,
    Mock,
    eventually,
    run,
    running_gateway,
    says,
    stream,
)


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_bytes_pass_unchanged_both_ways(path: str) -> None:
    async def main() -> None:
        async with running_gateway([Mock()]) as gateway:
            status, body, headers = await gateway.ask(ASKED, f"{path}?a=b%20c", headers={"Authorization": "Bearer x"})
            assert (status, body, headers["X-Own"]) == (200, ANSWER, "1")
            assert headers["Content-Type"] == "application/json"
            ((seen_path, seen, seen_body),) = gateway.mocks[0].seen
            assert (seen_path, seen_body) == (f"{path}?a=b%20c", ASKED)
            assert seen["Authorization"] == "Bearer x"
            assert seen["Host"] == f"127.0.0.1:{gateway.mocks[0].port}"

    run(main())


def test_a_server_may_lie_below_a_path() -> None:
    async def main() -> None:
        async with running_gateway([Mock(prefix="/one")]) as gateway:
            assert (await gateway.ask(ASKED, "/v1/completions?a=b"))[:2] == (200, ANSWER)
            assert gateway.mocks[0].seen[0][0] == "/one/v1/completions?a=b"

    run(main())


def test_headers_of_one_connection_do_not_pass_and_none_is_made_up() -> None:
    async def main() -> None:
        async with running_gateway([Mock(says(200, b"{}", **{"Keep-Alive": "timeout=9", "X-Much": "1"}))]) as gateway:
            reader, writer = await gateway.connect()
            lines = [
                b"POST /v1/completions HTTP/1.1",
                b"Host: x",
                b"Connection: close, X-Mine",
                b"X-Mine: 1",
                b"TE: gzip",
            ]
            lines += [b"Keep-Alive: 3", b"X-Two: a", b"X-Two: b", b"Content-Length: %d" % len(ASKED), b"", ASKED]
            writer.write(b"\r\n".join(lines))
            head, _, body = (await reader.read()).partition(b"\r\n\r\n")
            writer.close()
            await writer.wait_closed()
            assert body == b"{}"
            assert b"X-Much: 1" in head
            assert b"Keep-Alive" not in head
            ((_, seen, _),) = gateway.mocks[0].seen
            assert sorted(seen.items()) == [
                ("Content-Length", str(len(ASKED))),
                ("Host", f"127.0.0.1:{gateway.mocks[0].port}"),
                ("X-Two", "a"),
                ("X-Two", "b"),
            ]

    run(main())


def test_a_compressed_answer_stays_compressed_and_a_compressed_request_is_unpacked() -> None:
    async def main() -> None:
        packed = gzip.compress(ANSWER)
        async with running_gateway([Mock(says(200, packed, **{"Content-Encoding": "gzip"}))]) as gateway:
            status, body, headers = await gateway.ask(gzip.compress(ASKED), headers={"Content-Encoding": "gzip"})
            assert (status, body, headers["Content-Encoding"]) == (200, packed, "gzip")
            ((_, seen, seen_body),) = gateway.mocks[0].seen
            assert seen_body == ASKED
            assert "Content-Encoding" not in seen

    run(main())


def test_a_stream_passes_as_it_comes() -> None:
    async def main() -> None:
        async with running_gateway([Mock(stream)]) as gateway:
            mock = gateway.mocks[0]
            mock.go.clear()
            async with gateway.client.post(gateway.url + "/v1/completions", data=STREAMED) as answer:
                assert answer.status == 200
                assert answer.headers["Content-Type"] == SSE["Content-Type"]
                assert await answer.content.readany() == EVENTS[0]  # while the rest does not exist yet
                assert gateway.in_flight() == 1
                mock.go.set()
                assert await answer.content.read() == b"".join([*EVENTS[1:], USAGE, DONE])
            assert mock.seen[0][2] == STREAMED
            await eventually(lambda: gateway.in_flight() == 0)
            (record,) = gateway.dispatcher.history.records
            assert (record.status, record.output_tokens, record.request.prompt_tokens) == ("ok", 5, 3)
            assert record.request.arrival <= record.dispatched <= record.first_token < record.finished

    run(main())


def test_without_usage_the_events_of_a_stream_are_counted() -> None:
    async def main() -> None:
        async def answer(mock: Mock, http: web.Request) -> web.StreamResponse:
            return web.Response(body=b"".join([*EVENTS, DONE]), headers=SSE)

        async with running_gateway([Mock(answer)]) as gateway:
            assert (await gateway.ask(STREAMED))[1] == b"".join([*EVENTS, DONE])
            assert gateway.dispatcher.history.records[0].output_tokens == 5

    run(main())


def test_large_bodies_pass_and_those_above_the_limit_do_not() -> None:
    async def main() -> None:
        async with running_gateway([Mock()], max_body_mib=8) as gateway:
            large = b'{"prompt": "%s"}' % (b"x" * 7 * 2**20)
            assert (await gateway.ask(large, headers={"Expect": "100-continue"}))[0] == 200
            assert gateway.mocks[0].seen[0][2] == large
            assert "Expect" not in gateway.mocks[0].seen[0][1]
            status, body, _ = await gateway.ask(large + b" " * 2**20 * 2)
            assert status == 413
            assert json.loads(body)["error"]["message"] == "the body exceeds gateway.max_body_mib=8"
            assert len(gateway.mocks[0].seen) == 1

    run(main())


def test_a_client_that_does_not_read_holds_up_its_server_and_does_not_fill_the_gateway_s_memory() -> None:
    async def main() -> None:
        sent = 0

        async def answer(mock: Mock, http: web.Request) -> web.StreamResponse:
            nonlocal sent
            response = web.StreamResponse(headers=SSE)
            await response.prepare(http)
            while True:
                await response.write(b"data: %s\n\n" % (b"x" * 2**16))
                sent += 2**16

        async with (
            running_gateway([Mock(answer)]) as gateway,
            gateway.client.post(gateway.url + "/v1/completions", data=STREAMED) as reply,
        ):
            await reply.content.readany()
            before = -1
            while sent != before:
                before = sent
                await asyncio.sleep(0.1)
            assert sent < 64 * 2**20
            reply.close()
            await eventually(lambda: gateway.mocks[0].cancelled == 1)

    run(main())


def test_a_response_is_asked_for_where_it_is_kept() -> None:
    async def answer(mock: Mock, http: web.Request) -> web.StreamResponse:
        body = json.loads(await http.read() or b"{}")
        event = json.dumps({"type": "response.created", "response": {"id": f"resp_{mock.port}", "status": "queued"}})
        if not body.get("stream"):
            return web.json_response({"id": f"resp_{mock.port}", "object": "response", "output": []})
        response = web.StreamResponse(headers=SSE)
        await response.prepare(http)
        await response.write(f"event: response.created\ndata: {event}\n\n".encode())
        return response

    async def main() -> None:
        async with running_gateway([Mock(answer), Mock(answer), Mock(answer)]) as gateway:
            for stream in (True, False):
                body = json.dumps({"model": "m", "input": "hello", "stream": stream}).encode()
                for _ in gateway.mocks:
                    assert (await gateway.ask(body, "/v1/responses"))[0] == 200
            for mock in gateway.mocks:
                before, name = len(mock.seen), f"resp_{mock.port}"
                for _ in range(3):
                    async with gateway.client.get(f"{gateway.url}/v1/responses/{name}") as answered:
                        assert answered.status == 200
                    assert (await gateway.ask(b"", f"/v1/responses/{name}/cancel"))[0] == 200
                    goes_on = {"model": "m", "input": "and", "previous_response_id": name}
                    assert (await gateway.ask(json.dumps(goes_on).encode(), "/v1/responses"))[0] == 200
                assert len(mock.seen) == before + 9
            async with gateway.client.get(f"{gateway.url}/v1/responses/resp_nobody_s") as answered:
                assert answered.status == 200  # a server says what it has

    run(main())
