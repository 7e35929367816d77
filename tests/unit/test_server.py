"""The gateway with scripted servers behind it: what passes, what is retried, what is counted, and how it ends."""

from __future__ import annotations

import asyncio
import gzip
import json
import math
import os
import re
import runpy
import signal
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import pytest
from aiohttp import web
from mock_servers import (
    ANSWER,
    ASKED,
    DONE,
    EVENTS,
    LIMITS,
    SSE,
    STREAMED,
    USAGE,
    Answer,
    Mock,
    PluginMock,
    cut,
    eventually,
    hang,
    house,
    run,
    says,
    stream,
    whole,
)

from block.backends.launch import free_ports
from block.core.arrays import Ints
from block.dispatch import policies
from block.gateway.config import GatewayConfig
from block.gateway.openai import completion_tokens, error_event, read, tagged
from block.lengths import Estimates

ROOT = Path(__file__).resolve().parents[2]


# ------------------------------------------------------------------------------------------------------ what passes


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_bytes_pass_unchanged_both_ways(path: str) -> None:
    async def main() -> None:
        async with house([Mock()]) as one:
            status, body, headers = await one.ask(ASKED, f"{path}?a=b%20c", headers={"Authorization": "Bearer x"})
            assert (status, body, headers["X-Own"]) == (200, ANSWER, "1")
            assert headers["Content-Type"] == "application/json"
            ((seen_path, seen, seen_body),) = one.mocks[0].seen
            assert (seen_path, seen_body) == (f"{path}?a=b%20c", ASKED)
            assert seen["Authorization"] == "Bearer x"
            assert seen["Host"] == f"127.0.0.1:{one.mocks[0].port}"

    run(main())


def test_a_server_may_lie_below_a_path() -> None:
    async def main() -> None:
        async with house([Mock(prefix="/one")]) as one:
            assert (await one.ask(ASKED, "/v1/completions?a=b"))[:2] == (200, ANSWER)
            assert one.mocks[0].seen[0][0] == "/one/v1/completions?a=b"

    run(main())


def test_headers_of_one_connection_do_not_pass_and_none_is_made_up() -> None:
    async def main() -> None:
        async with house([Mock(says(200, b"{}", **{"Keep-Alive": "timeout=9", "X-Much": "1"}))]) as one:
            reader, writer = await asyncio.open_connection(*one.url[7:].split(":"))
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
            ((_, seen, _),) = one.mocks[0].seen
            assert sorted(seen.items()) == [
                ("Content-Length", str(len(ASKED))),
                ("Host", f"127.0.0.1:{one.mocks[0].port}"),
                ("X-Two", "a"),
                ("X-Two", "b"),
            ]

    run(main())


def test_what_is_compressed_stays_so_on_its_way_back_and_is_unpacked_on_its_way_in() -> None:
    async def main() -> None:
        packed = gzip.compress(ANSWER)
        async with house([Mock(says(200, packed, **{"Content-Encoding": "gzip"}))]) as one:
            status, body, headers = await one.ask(gzip.compress(ASKED), headers={"Content-Encoding": "gzip"})
            assert (status, body, headers["Content-Encoding"]) == (200, packed, "gzip")
            ((_, seen, seen_body),) = one.mocks[0].seen
            assert seen_body == ASKED
            assert "Content-Encoding" not in seen

    run(main())


def test_a_stream_passes_as_it_comes() -> None:
    async def main() -> None:
        async with house([Mock(stream)]) as one:
            mock = one.mocks[0]
            mock.go.clear()
            async with one.client.post(one.url + "/v1/completions", data=STREAMED) as answer:
                assert answer.status == 200
                assert answer.headers["Content-Type"] == SSE["Content-Type"]
                assert await answer.content.readany() == EVENTS[0]  # while the rest does not exist yet
                assert one.in_flight() == 1
                mock.go.set()
                assert await answer.content.read() == b"".join([*EVENTS[1:], USAGE, DONE])
            assert mock.seen[0][2] == STREAMED
            await eventually(lambda: one.in_flight() == 0)
            (record,) = one.gateway.dispatcher.history.records
            assert (record.status, record.output_tokens, record.request.prompt_tokens) == ("ok", 5, 3)
            assert record.request.arrival <= record.dispatched <= record.first_token < record.finished

    run(main())


def test_without_usage_the_events_of_a_stream_are_counted() -> None:
    async def main() -> None:
        async def answer(mock: Mock, http: web.Request) -> web.StreamResponse:
            return web.Response(body=b"".join([*EVENTS, DONE]), headers=SSE)

        async with house([Mock(answer)]) as one:
            assert (await one.ask(STREAMED))[1] == b"".join([*EVENTS, DONE])
            assert one.gateway.dispatcher.history.records[0].output_tokens == 5

    run(main())


def test_large_bodies_pass_and_those_above_the_limit_do_not() -> None:
    async def main() -> None:
        async with house([Mock()], max_body_mib=8) as one:
            large = b'{"prompt": "%s"}' % (b"x" * 7 * 2**20)
            assert (await one.ask(large, headers={"Expect": "100-continue"}))[0] == 200
            assert one.mocks[0].seen[0][2] == large
            assert "Expect" not in one.mocks[0].seen[0][1]
            status, body, _ = await one.ask(large + b" " * 2**20 * 2)
            assert status == 413
            assert json.loads(body)["error"]["message"] == "the body exceeds gateway.max_body_mib=8"
            assert len(one.mocks[0].seen) == 1

    run(main())


def test_a_client_that_does_not_read_holds_up_its_server_and_not_the_door_s_memory() -> None:
    async def main() -> None:
        sent = 0

        async def answer(mock: Mock, http: web.Request) -> web.StreamResponse:
            nonlocal sent
            response = web.StreamResponse(headers=SSE)
            await response.prepare(http)
            while True:
                await response.write(b"data: %s\n\n" % (b"x" * 2**16))
                sent += 2**16

        async with house([Mock(answer)]) as one, one.client.post(one.url + "/v1/completions", data=STREAMED) as reply:
            await reply.content.readany()
            before = -1
            while sent != before:
                before = sent
                await asyncio.sleep(0.1)
            assert sent < 64 * 2**20
            reply.close()
            await eventually(lambda: one.mocks[0].cancelled == 1)

    run(main())


def test_models_come_from_the_first_server_that_answers() -> None:
    async def main() -> None:
        async with house([Mock(), Mock(), Mock()], started=[1, 2]) as one:
            for _ in range(2):
                async with one.client.get(one.url + "/v1/models") as answer:
                    assert (answer.status, await answer.json()) == (200, {"data": [{"id": "tiny"}]})
                one.gateway.dispatcher.instance_up(0, 0.0)  # where nobody listens

    run(main())


# ------------------------------------------------------------------------------------------------------ what does not


@pytest.mark.parametrize("body", [b"", b"{", b'"text"', b"[1]", b"\xff{}", b"[" * 100_000, b'{"a": 1} x'])
def test_what_is_no_json_object_reaches_no_server(body: bytes) -> None:
    async def main() -> None:
        async with house([Mock()]) as one:
            status, text, headers = await one.ask(body)
            error = json.loads(text)["error"]
            assert (status, error["code"], error["type"]) == (400, 400, "BadRequestError")
            assert error["message"].startswith("the body is not ")
            assert headers["Content-Type"].startswith("application/json")
            assert one.mocks[0].seen == []
            assert (await one.metrics())['block_requests_total{instance="none",status="refused"}'] == 1

    run(main())


@pytest.mark.parametrize(
    ("method", "path"),
    [("GET", "/"), ("GET", "/v1/completions"), ("POST", "/v1/embeddings"), ("HEAD", "/x"), ("PUT", "/health")],
)
def test_an_unknown_route_is_told_as_openai_would(method: str, path: str) -> None:
    async def main() -> None:
        async with house([Mock()]) as one, one.client.request(method, one.url + path) as answer:
            assert answer.status == 404
            if method != "HEAD":
                error = (await answer.json())["error"]
                assert error["message"] == f"no such route: {method} {path}"
                assert error["type"] == "NotFoundError"

    run(main())


# ------------------------------------------------------------------------------------------------------ failures


@pytest.mark.parametrize(
    "broken",
    [cut(), cut(sse=False), cut(b'{"choices', sse=False)],
    ids=["no byte of a stream", "no byte", "half an answer"],
)
def test_what_breaks_before_the_first_byte_begins_anew_elsewhere(broken: Answer) -> None:
    async def main() -> None:
        async with house([Mock(broken), Mock()], probe_interval_s=60) as one:
            assert (await one.ask())[:2] == (200, ANSWER)
            assert list(one.gateway.dispatcher.active) == [1]
            assert [len(mock.seen) for mock in one.mocks] == [1, 1]
            assert one.mocks[1].seen[0][2] == ASKED
            metrics = await one.metrics()
            assert metrics["block_retries_total"] == 1
            assert metrics['block_ejections_total{instance="0"}'] == 1
            assert metrics["block_active_instances"] == 1

    run(main())


def test_a_server_that_is_down_is_taken_out_and_back_in() -> None:
    async def main() -> None:
        async with house([Mock(), Mock()]) as one:
            await one.mocks[0].kill()
            assert [(await one.ask())[0] for _ in range(4)] == [200] * 4
            assert list(one.gateway.dispatcher.active) == [1]
            await one.mocks[0].start()
            await eventually(lambda: len(one.gateway.dispatcher.active) == 2)
            assert [(await one.ask())[0] for _ in range(4)] == [200] * 4
            assert len(one.mocks[0].seen) == 2

    run(main())


@pytest.mark.parametrize("status", [502, 503])
def test_a_server_that_turns_away_is_passed_over_and_stays(status: int) -> None:
    async def main() -> None:
        async with house([Mock(says(status)), Mock()]) as one:
            assert [(await one.ask())[0] for _ in range(4)] == [200] * 4
            assert [len(mock.seen) for mock in one.mocks] == [2, 4]
            assert list(one.gateway.dispatcher.active) == [0, 1]

    run(main())


def test_when_all_turn_away_the_client_gets_the_last_one_s_word() -> None:
    async def main() -> None:
        async with house([Mock(says(503, b"full", **{"Retry-After": "9"})) for _ in range(2)]) as one:
            status, body, headers = await one.ask()
            assert (status, body, headers["Retry-After"]) == (503, b"full", "9")
            assert [len(mock.seen) for mock in one.mocks] == [1, 1]
            assert (await one.metrics())["block_retries_total"] == 2

    run(main())


@pytest.mark.parametrize("status", [400, 401, 404, 422, 429, 500, 501])
def test_an_error_of_the_request_s_is_passed_on_as_it_is(status: int) -> None:
    async def main() -> None:
        async with house([Mock(says(status)), Mock()]) as one:
            assert (await one.ask())[:2] == (status, b'{"error": {"message": "no"}}')
            assert list(one.gateway.dispatcher.active) == [0, 1]
            assert len(one.mocks[1].seen) == 0
            outcome = "refused" if status < 500 else "failed"
            assert (await one.metrics())[f'block_requests_total{{instance="0",status="{outcome}"}}'] == 1

    run(main())


DEAD = b'data: {"error": {"message": "EngineDeadError"}}\n\n'


async def begins_with_an_error(mock: Mock, http: web.Request) -> web.StreamResponse:
    return web.Response(body=DEAD + DONE, headers=SSE)


@pytest.mark.parametrize("answer", [says(500), begins_with_an_error], ids=["answer", "stream"])
def test_a_server_whose_engine_died_is_taken_out_and_its_requests_begin_anew(answer: Answer) -> None:
    async def main() -> None:
        async with house([Mock(answer), Mock()], probe_interval_s=60) as one:
            one.mocks[0].well = False
            assert (await one.ask())[:2] == (200, ANSWER)
            assert list(one.gateway.dispatcher.active) == [1]

    run(main())


def test_an_error_that_a_healthy_server_streams_is_passed_on() -> None:
    async def main() -> None:
        async with house([Mock(begins_with_an_error), Mock()]) as one:
            assert (await one.ask(STREAMED))[:2] == (200, DEAD + DONE)
            assert list(one.gateway.dispatcher.active) == [0, 1]
            assert (await one.metrics())['block_requests_total{instance="0",status="failed"}'] == 1

    run(main())


def test_after_the_first_byte_a_stream_ends_with_an_error_event() -> None:
    async def main() -> None:
        async with house([Mock(cut(EVENTS[0], b'data: {"cho')), Mock()]) as one:
            status, body, _ = await one.ask(STREAMED)
            assert status == 200
            assert body.startswith(EVENTS[0])
            last = body.removesuffix(b"\n\n").rpartition(b"\n\n")[2]
            error = json.loads(last.removeprefix(b"data: "))["error"]
            assert error["code"] == 502
            assert one.mocks[0].url in error["message"]
            assert DONE not in body
            assert one.mocks[1].seen == []
            assert one.gateway.dispatcher.history.records[0].status == "failed"

    run(main())


def test_silence_fails_a_request_and_not_its_server() -> None:
    async def main() -> None:
        async def pause(mock: Mock, http: web.Request) -> web.StreamResponse:
            mock.go.clear()
            return await stream(mock, http)

        async with house([Mock(hang), Mock(pause)], read_timeout_s=0.1) as one:
            status, body, _ = await one.ask()
            assert (status, json.loads(body)["error"]["type"]) == (504, "TimeoutError")
            status, body, _ = await one.ask(STREAMED)
            assert status == 200
            assert b'data: {"error"' in body
            assert list(one.gateway.dispatcher.active) == [0, 1]
            await eventually(lambda: [mock.cancelled for mock in one.mocks] == [1, 1])

    run(main())


def test_a_server_that_takes_no_connection_is_taken_out() -> None:
    async def main() -> None:
        with socket.socket() as full, socket.socket() as first:
            full.bind(("127.0.0.1", 0))
            full.listen(0)  # room for one, which nobody accepts
            first.connect(full.getsockname())
            deaf = Mock(port=full.getsockname()[1])
            async with house([deaf, Mock()], started=[1], connect_timeout_s=0.2, probe_interval_s=60) as one:
                assert list(one.gateway.dispatcher.active) == [1]
                one.gateway.dispatcher.instance_up(0, 0.0)
                assert (await one.ask())[:2] == (200, ANSWER)
                assert list(one.gateway.dispatcher.active) == [1]
                assert one.gateway.dispatcher.history.records[0].retries == 1

    run(main())


def test_without_a_server_there_is_an_error_and_no_health() -> None:
    async def main() -> None:
        async with house([Mock(), Mock()], started=[]) as one:
            status, body, _ = await one.ask()
            assert (status, json.loads(body)["error"]["message"]) == (503, "no instance is left")
            for path in ("/health", "/v1/models"):
                async with one.client.get(one.url + path) as answer:
                    assert answer.status == 503
            assert (await one.metrics())['block_requests_total{instance="none",status="failed"}'] == 1
            await one.mocks[1].start()
            await eventually(lambda: len(one.gateway.dispatcher.active) == 1)
            async with one.client.get(one.url + "/health") as answer:
                assert (answer.status, await answer.json()) == (200, {"active": 1, "instances": 2})
            assert (await one.ask())[0] == 200

    run(main())


def test_nothing_is_lost_when_one_of_four_servers_is_killed() -> None:
    async def main() -> None:
        async def slow(mock: Mock, http: web.Request) -> web.StreamResponse:
            await asyncio.sleep(0.02)
            return await whole(mock, http)

        async with house([Mock(slow) for _ in range(4)]) as one:
            asked = []
            for i in range(200):
                asked.append(asyncio.create_task(one.ask()))
                await asyncio.sleep(0.002)
                if i == 100:
                    await one.mocks[0].kill()
            answers = await asyncio.gather(*asked)
            assert [answer[:2] for answer in answers] == [(200, ANSWER)] * 200
            assert list(one.gateway.dispatcher.active) == [1, 2, 3]
            assert (await one.metrics())["block_retries_total"] >= 1

    run(main())


def test_a_bug_is_answered_too_and_that_of_a_policy_is_one_line_of_the_log(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        @dataclass(frozen=True)
        class Broken(policies.Random):  # type: ignore[misc]
            def choose(self, *_: Any) -> Any:
                raise ZeroDivisionError

        async with house([Mock()], Broken()) as one:
            status, body, _ = await one.ask()
            assert (status, json.loads(body)["error"]["type"]) == (500, "InternalServerError")

    run(main())
    (entry,) = [entry for entry in caplog.records if "raised" in entry.getMessage()]
    assert "Broken: choose raised ZeroDivisionError (tests/unit/test_server.py:" in entry.getMessage()
    assert entry.exc_info is None


# ------------------------------------------------------------------------------------------------------ bare servers


@asynccontextmanager
async def bare(*answers: bytes | None) -> AsyncIterator[tuple[Mock, list[int]]]:
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
                if head.startswith(b"GET /health"):
                    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
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
        async with bare(OK, None) as (mock, came), house([mock], started=[]) as one:
            assert [(await one.ask())[:2] for _ in range(3)] == [(200, b"{}")] * 3
            assert len(came) == 5
            assert [came[0], came[1] - came[0], came[2] - came[1]] == [came[0], 0, 1]  # kept, then another
            assert one.gateway.dispatcher.ejected(0) == 0

    run(main())


def test_answers_may_be_announced_or_end_with_the_connection() -> None:
    async def main() -> None:
        hints = b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n"
        endless = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n\r\n{}"
        for answer in (hints + OK, endless):
            async with bare(answer) as (mock, _), house([mock], started=[]) as one:
                assert (await one.ask())[:2] == (200, b"{}")

    run(main())


def test_a_server_that_speaks_no_http_is_passed_over_and_stays() -> None:
    async def main() -> None:
        async with bare(b"what? Content-Length\r\n\r\n") as (mock, _), house([mock, Mock()], started=[1]) as one:
            assert (await one.ask())[:2] == (200, ANSWER)
            assert list(one.gateway.dispatcher.active) == [0, 1]

    run(main())


# ------------------------------------------------------------------------------------------------------ clients that go


@pytest.mark.parametrize(
    ("answer", "body"), [(hang, ASKED), (hang, STREAMED), (stream, STREAMED)], ids=["whole", "no byte", "in a stream"]
)
def test_a_client_that_goes_away_cancels_its_request(answer: Answer, body: bytes) -> None:
    async def main() -> None:
        async with house([Mock(answer)]) as one:
            mock = one.mocks[0]
            mock.go.clear()
            asked = asyncio.create_task(one.ask(body))
            await eventually(lambda: len(mock.seen) == 1 and one.in_flight() == 1)
            await asyncio.sleep(0.05)
            asked.cancel()
            await eventually(lambda: mock.cancelled == 1 and one.in_flight() == 0)
            assert list(one.gateway.dispatcher.active) == [0]
            assert (await one.metrics())['block_requests_total{instance="0",status="cancelled"}'] == 1

    run(main())


def test_a_client_that_goes_away_while_it_is_written_to_is_not_its_server_s_fault() -> None:
    async def main() -> None:
        async def endless(mock: Mock, http: web.Request) -> web.StreamResponse:
            response = web.StreamResponse(headers=SSE)
            await response.prepare(http)
            while True:
                await response.write(EVENTS[0] * 100)
                await asyncio.sleep(0)

        async with house([Mock(endless)]) as one:
            for _ in range(20):
                reader, writer = await asyncio.open_connection(*one.url[7:].split(":"))
                writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{}")
                await reader.read(10_000)
                writer.transport.abort()
            await eventually(lambda: one.in_flight() == 0 and one.mocks[0].cancelled == 20)
            assert list(one.gateway.dispatcher.active) == [0]
            assert (await one.metrics())['block_requests_total{instance="0",status="cancelled"}'] == 20

    run(main())


def test_a_client_that_goes_away_in_the_midst_of_its_request_is_no_error(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        async with house([Mock()]) as one:
            _, writer = await asyncio.open_connection(*one.url[7:].split(":"))
            writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 20\r\n\r\n{")
            await asyncio.sleep(0.05)
            writer.transport.abort()
            await asyncio.sleep(0.05)
            assert one.mocks[0].seen == []
            assert one.gateway.dispatcher.history.records == deque()

    run(main())
    assert caplog.records == []


# ------------------------------------------------------------------------------------------------------ metrics


def test_metrics_tell_outcomes_times_and_what_is_in_flight() -> None:
    async def main() -> None:
        async with house([Mock(stream), Mock()]) as one:
            one.mocks[0].go.clear()
            asked = asyncio.create_task(one.ask(STREAMED))
            await eventually(lambda: one.in_flight() == 1)
            assert (await one.ask())[0] == 200
            before = await one.metrics()
            one.mocks[0].go.set()
            await asked
            after = await one.metrics()
        assert before['block_in_flight{instance="0"}'] == 1
        assert 'block_in_flight{instance="0"}' not in after
        for i in "01":
            assert after[f'block_requests_total{{instance="{i}",status="ok"}}'] == 1
            assert after[f'block_instance_active{{instance="{i}"}}'] == 1
        assert after["block_active_instances"] == 2
        assert after["block_ttft_seconds_count"] == 1  # of an answer that is no stream, the first token is not seen
        assert after["block_e2e_seconds_count"] == 2
        for name in ("block_retries_total", "block_predicted_e2e_seconds_count", "block_forecast_seconds_count"):
            assert name not in after  # there, and 0

    run(main())


# ------------------------------------------------------------------------------------------------------ with the plugin


def tag_of(mock: Mock) -> dict[str, Any]:
    return dict(json.loads(mock.seen[-1][2])["vllm_xargs"])


@pytest.mark.parametrize(
    ("policy", "forecasts"), [(policies.Block(), 2), (policies.INFaaS(), 0), (policies.LeastTokens(), 0)]
)
def test_policies_that_look_send_a_request_where_there_is_room(policy: policies.Policy, forecasts: int) -> None:
    async def main() -> None:
        async with house([PluginMock(stream), PluginMock(stream)], policy) as one:
            busy, idle = one.mocks
            assert isinstance(busy, PluginMock)
            busy.place(1, 1000, 500)
            for _ in range(2):
                assert (await one.ask(STREAMED))[0] == 200
            assert (busy.seen, len(idle.seen)) == ([], 2)
            body = idle.seen[-1][2]
            assert body.startswith(b'{"vllm_xargs":{')
            assert body.endswith(b"}," + STREAMED[1:])
            assert tag_of(idle) == {
                "block_id": one.gateway.dispatcher.history.records[1].request.id,
                "block_expected": 256,
            }
            metrics = await one.metrics()
            for name in ("ttft_seconds", "ttft_ratio", "e2e_seconds", "e2e_ratio"):
                assert metrics.get(f"block_predicted_{name}_count", 0) == forecasts
            assert metrics.get("block_forecast_seconds_count", 0) == forecasts

    run(main())


def test_servers_may_differ_in_their_settings_and_prompts_may_be_estimated_too_long() -> None:
    async def main() -> None:
        small = LIMITS._replace(total_blocks=200, max_model_len=1024)
        async with house([PluginMock(), PluginMock(settings=small)], policies.Block()) as one:
            assert (await one.ask(b'{"prompt": "%s"}' % (b"x" * 40_000)))[0] == 200
            scores = one.gateway.dispatcher.history.decisions[-1][1].scores
            assert len(scores) == 2
            assert all(math.isfinite(score) for score in scores)

    run(main())


def test_a_fallback_is_counted() -> None:
    async def main() -> None:
        async with house([PluginMock()], policies.Block()) as one:
            mock = one.mocks[0]
            assert isinstance(mock, PluginMock)
            mock.place(1, 100_000, 5)  # more than the server can hold
            assert (await one.ask())[0] == 200
            assert (await one.metrics())['block_fallbacks_total{reason="no forecast"}'] == 1

    run(main())


def test_a_server_without_the_plugin_gets_nothing_by_a_policy_that_looks(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        async with house([Mock(), PluginMock()], policies.INFaaS()) as one:
            assert [(await one.ask())[0] for _ in range(4)] == [200] * 4
            assert one.mocks[0].seen == []
            await asyncio.sleep(0.2)  # probed again and again, and told once

    run(main())
    told = [record.message for record in caplog.records if "plugin" in record.message]
    assert len(told) == 1
    assert "python -m block.vllm_plugin.serve" in told[0]


def test_a_server_that_comes_back_is_looked_at_anew() -> None:
    async def main() -> None:
        async with house([PluginMock(), PluginMock()], policies.INFaaS()) as one:
            first, second = one.mocks
            assert isinstance(first, PluginMock)
            assert isinstance(second, PluginMock)
            second.place(1, 1000, 500)
            await first.kill()
            assert (await one.ask())[0] == 200
            assert list(one.gateway.dispatcher.active) == [1]
            first.renew()
            await first.start()
            await eventually(lambda: len(one.gateway.dispatcher.active) == 2)
            first.place(1, 15_000, 500)
            assert (await one.ask())[0] == 200
            assert [len(mock.seen) for mock in one.mocks] == [0, 2]

    run(main())


def test_a_scheduler_that_stops_while_it_publishes_stops_nothing_else() -> None:
    async def main() -> None:
        async with house([PluginMock(), PluginMock()], policies.INFaaS()) as one:
            stuck, sound = one.mocks
            assert isinstance(stuck, PluginMock)
            stuck.place(1, 1000, 500)
            assert (await one.ask())[0] == 200
            stuck.buffer.begin()
            assert [(await one.ask())[0] for _ in range(3)] == [200] * 3
            assert len(sound.seen) == 4
            await stuck.kill()
            one.gateway.dispatcher.instance_down(0, "as if it had been chosen", 0.0)
            await stuck.start()  # and publishes no more
            await asyncio.sleep(0.2)
            assert list(one.gateway.dispatcher.active) == [1]
            stuck.buffer.end()
            await eventually(lambda: len(one.gateway.dispatcher.active) == 2)

    run(main())


# ------------------------------------------------------------------------------------------------------ bodies

CHAT: list[dict[str, Any]] = [
    {"role": "system", "content": "12345678"},
    {"role": "user", "content": [{"type": "text", "text": "1234"}, {"type": "image_url", "image_url": {"url": "x"}}]},
    {"role": "assistant", "content": None},
]


@pytest.mark.parametrize(
    ("fields", "prompt", "expected"),
    [
        ({"prompt": [5, 6, 7]}, 3, 100),
        ({"prompt": [[5, 6, 7], [8]]}, 4, 100),
        ({"prompt": "12345678"}, 2, 100),
        ({"prompt": "123456789"}, 3, 100),
        ({"prompt": "三四"}, 2, 100),
        ({"prompt": ["1234", "1234"]}, 2, 100),
        ({"prompt": "\ud800"}, 1, 100),
        ({"prompt": []}, 1, 100),
        ({"prompt": {"a": 1}, "messages": "hm"}, 1, 100),
        ({"messages": CHAT}, 15, 100),
        ({"messages": [1, {}]}, 8, 100),
        ({"prompt": "a", "max_tokens": 7}, 1, 7),
        ({"prompt": "a", "max_tokens": 700}, 1, 100),
        ({"prompt": "a", "max_tokens": None}, 1, 100),
        ({"prompt": "a", "max_tokens": "7"}, 1, 100),
        ({"prompt": "a", "max_tokens": -7}, 1, 100),
        ({"messages": [], "max_completion_tokens": 9, "max_tokens": 7}, 1, 9),
    ],
)
def test_what_a_body_asks_for(fields: dict[str, Any], prompt: int, expected: int) -> None:
    asked = read(json.dumps(fields).encode())
    assert (asked.prompt_tokens, asked.capped(100)) == (prompt, expected)


@pytest.mark.parametrize(
    ("body", "with_tag"),
    [
        (b'{"a": 1}', b'{"vllm_xargs":{"block_id": 5, "block_expected": 6},"a": 1}'),
        (b' \n{ "a" :1, "b": 0.10 } ', b' \n{"vllm_xargs":{"block_id": 5, "block_expected": 6}, "a" :1, "b": 0.10 } '),
        (b"{ }", b'{"vllm_xargs":{"block_id": 5, "block_expected": 6} }'),
        (b'{"vllm_xargs": 3}', b'{"vllm_xargs": 3}'),
    ],
)
def test_a_tag_goes_in_front_and_the_rest_keeps_its_bytes(body: bytes, with_tag: bytes) -> None:
    assert tagged(body, json.loads(body), 5, 6) == with_tag


@pytest.mark.parametrize(
    ("body", "rest"),
    [
        (b'{"vllm_xargs": {"mine": 1, "block_id": 9}, "a": 2}', {"mine": 1}),
        (b'{"vllm_xargs": null, "a": 2}', {}),
        ('{"a": 2}'.encode("utf-16"), {}),
        ('{"a": 2}'.encode("utf-16-le"), {}),
        ('{"a": 2}'.encode("utf-8-sig"), {}),
    ],
)
def test_a_tag_joins_those_of_the_client(body: bytes, rest: dict[str, Any]) -> None:
    done = json.loads(tagged(body, json.loads(body), 5, 6).decode())
    assert done == {"a": 2, "vllm_xargs": {**rest, "block_id": 5, "block_expected": 6}}


def test_the_last_usage_counts() -> None:
    assert completion_tokens(b'{"usage":{"completion_tokens": 3}} {"completion_tokens":41}') == 41
    assert completion_tokens(b'{"usage":null}') is None
    assert completion_tokens(b'"completion_tokens":null') is None
    assert json.loads(error_event(502, 'a "b"\n').strip().removeprefix(b"data: "))["error"]["message"] == 'a "b"\n'


# ------------------------------------------------------------------------------------------------------ the command


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({}, "gateway.urls=[]: give at least one, such as [http://host:8000]"),
        ({"urls": ["h1:8000"]}, "gateway.urls=h1:8000: must be of the form http://host:port"),
        ({"urls": ["http://"]}, "gateway.urls=http:: must be of the form"),
        ({"urls": ["http://h:port"]}, "gateway.urls=http://h:port: must be of the form"),
        ({"urls": ["http://me:key@h:1"]}, "gateway.urls=http://me:key@h:1: must be of the form"),
        ({"urls": ["http://h:1", "http://h:1/"]}, "gateway.urls=http://h:1: given twice"),
        ({"port": 70000}, "gateway.port=70000: must be between 1 and 65535"),
        ({"expected_output_tokens": 0}, "gateway.expected_output_tokens=0: must be at least 1"),
        ({"max_body_mib": 0}, "gateway.max_body_mib=0: must be at least 1"),
        ({"probe_interval_s": 0.0}, "gateway.probe_interval_s=0.0: must be greater than 0"),
        ({"connect_timeout_s": math.inf}, "gateway.connect_timeout_s=inf: must be greater than 0"),
        ({"read_timeout_s": -1.0}, "gateway.read_timeout_s=-1.0: must be greater than 0"),
        ({"grace_s": -1.0}, "gateway.grace_s=-1.0: must be 0 or more seconds"),
    ],
)
def test_a_wrong_key_is_told_with_its_value(keys: dict[str, Any], says: str) -> None:
    if "urls" not in keys and keys:
        keys = {"urls": ["http://h:1"], **keys}
    with pytest.raises(ValueError, match=re.escape(says)):
        GatewayConfig(**keys)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "error: gateway.urls=[]: give at least one"),
        (["gateway.urls=[h1:8000]"], "error: gateway.urls=h1:8000: must be"),
        (["gateway.prot=80"], "error: gateway.prot: no such key; did you mean port? choose from urls, host, port"),
        (["gateway.port=http"], "error: gateway.port=http: wants an integer"),
        (["scheduler=roundrobin"], "error: scheduler=roundrobin: did you mean round_robin?"),
        (
            ["gateway.urls=[http://h:1]", "scheduler=random", "scheduler._target_=nobody_s_policy.Two"],
            "error: scheduler._target_=nobody_s_policy.Two: candidates, for request 0 of 1 instances, returned [0, 1]: "
            "1 is not between 0 and 0 (nobody_s_policy.py:6)",
        ),
    ],
)
def test_a_wrong_command_ends_in_one_line(
    arguments: list[str],
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nobody_s_policy.py").write_text(
        "from dataclasses import dataclass\nfrom block.dispatch.policies import Random\n\n"
        "@dataclass(frozen=True)\nclass Two(Random):\n    def candidates(self, *_):\n        return [0, 1]\n"
    )
    monkeypatch.setattr(sys, "argv", ["block.gateway", *arguments])
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("block.gateway", run_name="__main__")
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert line.startswith(says)
    assert (captured.out, ended.value.code) == ("", 2)


async def command(*arguments: str) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "block.gateway",
        "gateway.host=127.0.0.1",
        *arguments,
        env={**os.environ, "HYDRA_FULL_ERROR": "0"},
        cwd=ROOT,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )


def connects(port: int) -> bool:
    with socket.socket() as one:
        return one.connect_ex(("127.0.0.1", port)) == 0


def test_a_process_says_where_it_listens_and_finishes_its_streams_when_told_to_stop() -> None:
    async def main() -> None:
        mock = Mock(stream)
        await mock.start()
        mock.go.clear()
        urls = f"gateway.urls=[{mock.url},http://127.0.0.1:{free_ports(1)[0]}]"
        gateway = await command("scheduler=round_robin", urls, "gateway.port=0")
        assert gateway.stdout is not None
        line = (await gateway.stdout.readline()).decode()
        assert line.endswith(f": round_robin over 2 servers: {urls[len('gateway.urls=[') : -1].replace(',', ', ')}\n")
        address = line.split(": ")[0]
        port = int(address.rpartition(":")[2])
        async with aiohttp.ClientSession() as client:
            async with client.get(f"{address}/health") as answer:
                assert (answer.status, await answer.json()) == (200, {"active": 1, "instances": 2})
            async with client.post(f"{address}/v1/completions", data=STREAMED) as answer:
                assert await answer.content.readany() == EVENTS[0]
                gateway.send_signal(signal.SIGTERM)
                while connects(port):
                    await asyncio.sleep(0.01)
                mock.go.set()
                assert (await answer.content.read()).endswith(DONE)
        _, errors = await gateway.communicate()
        assert gateway.returncode == 0
        (warning,) = errors.decode().splitlines()
        assert "does not answer yet" in warning
        await mock.runner.cleanup()

    run(main())


def test_a_stream_that_outlasts_the_grace_period_is_cut_and_its_request_cancelled() -> None:
    async def main() -> None:
        async with house([Mock(stream)], grace_s=0.1) as one:
            mock = one.mocks[0]
            mock.go.clear()
            asked = asyncio.create_task(one.ask(STREAMED))
            await eventually(lambda: one.in_flight() == 1)
            await asyncio.sleep(0.05)
            await one.stop()
            with pytest.raises(aiohttp.ClientError):
                await asked
            await eventually(lambda: mock.cancelled == 1)

    run(main())


def test_a_port_that_is_taken_is_told() -> None:
    async def main() -> None:
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            port = taken.getsockname()[1]
            gateway = await command("scheduler=random", "gateway.urls=[http://127.0.0.1:9]", f"gateway.port={port}")
            _, errors = await gateway.communicate()
        last = errors.decode().splitlines()[-1]
        assert last.startswith(f"error: gateway.port={port}: cannot listen on 127.0.0.1: ")
        assert "in use" in last
        assert gateway.returncode == 2

    run(main())


# ---------------------------------------------------------------------------------------------------- response lengths


class Slow:
    """Estimates the number of a prompt's characters, as slowly as it is told to, and remembers its batches."""

    outrun_share = 0.0

    def __init__(self, pause_s: float = 0.0, fails: bool = False) -> None:
        self.pause_s = pause_s
        self.fails = fails
        self.batches: list[list[str]] = []
        self.threads: set[int] = set()

    def estimate(self, output_tokens: Ints, rng: np.random.Generator) -> Ints:
        raise NotImplementedError

    def predict(self, prompts: Sequence[str]) -> Estimates:
        self.batches.append(list(prompts))
        self.threads.add(threading.get_ident())
        time.sleep(self.pause_s)
        if self.fails:
            raise ValueError("cannot say")
        return Estimates(np.array([len(prompt) for prompt in prompts]), np.ones(len(prompts)))


def expected_of(mock: Mock) -> list[int]:
    return [json.loads(body)["vllm_xargs"]["block_expected"] for _, _, body in mock.seen]


def test_requests_are_tagged_by_their_prompts_in_batches_and_off_the_loop() -> None:
    async def main() -> None:
        reader = Slow(pause_s=0.05)
        async with house([PluginMock()], policies.Block(), lengths=reader, estimate_timeout_s=5.0) as one:
            bodies = [b'{"prompt": "%s"}' % (b"x" * (10 + i)) for i in range(9)]
            assert {(await answer)[0] for answer in [asyncio.ensure_future(one.ask(body)) for body in bodies]} == {200}
            assert sorted(expected_of(one.mocks[0])) == list(range(10, 19))
            assert len(reader.batches) < 9
            assert threading.get_ident() not in reader.threads
            metrics = await one.metrics()
            assert metrics["block_length_seconds_count"] == 9
            assert metrics.get('block_length_fallbacks_total{reason="timeout"}', 0) == 0
            record = one.gateway.dispatcher.history.records[0]
            assert record.dispatched - record.request.arrival >= 0.05  # the wait for the estimate is part of its time

    run(main())


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (b'{"prompt": "hello", "max_tokens": 3}', 3),
        (b'{"prompt": ["hello", "you"]}', 9),
        (b'{"messages": [{"role": "user", "content": "hi"}, {"content": [{"type": "text", "text": "ho"}]}]}', 5),
        (b'{"prompt": [1, 2, 3]}', 256),
        (b'{"prompt": [1, 2, 3], "max_tokens": 7}', 7),
        (b'{"prompt": ""}', 0),
        (b"{}", 256),
    ],
)
def test_what_is_estimated_is_the_text_and_a_limit_caps_it(body: bytes, expected: int) -> None:
    async def main() -> None:
        async with house([PluginMock()], policies.LeastTokens(), lengths=Slow(), estimate_timeout_s=5.0) as one:
            assert (await one.ask(body))[0] == 200
            assert expected_of(one.mocks[0]) == [expected]
            no_text = int(expected in (256, 7))
            counted = (await one.metrics()).get('block_length_fallbacks_total{reason="no_text"}', 0)
            assert counted == no_text

    run(main())


@pytest.mark.parametrize(
    ("reader", "reason"), [(Slow(pause_s=0.3), "timeout"), (Slow(fails=True), "failed")], ids=["slow", "failing"]
)
def test_without_an_estimate_in_time_a_constant_stands_in_and_is_counted(
    reader: Slow, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        async with house(
            [PluginMock()], policies.Block(), lengths=reader, estimate_timeout_s=0.02, expected_output_tokens=77
        ) as one:
            assert [(await one.ask(ASKED.replace(b', "max_tokens": 5', b"")))[0] for _ in range(3)] == [200] * 3
            assert expected_of(one.mocks[0]) == [77] * 3
            assert (await one.metrics())[f'block_length_fallbacks_total{{reason="{reason}"}}'] == 3

    run(main())
    told = [record.message for record in caplog.records if "no response lengths" in record.message]
    assert len(told) == (reason == "failed")


def test_policies_that_count_do_not_wait_for_estimates() -> None:
    async def main() -> None:
        reader = Slow()
        async with house([Mock()], policies.RoundRobin(), lengths=reader) as one:
            assert (await one.ask())[0] == 200
            assert reader.batches == []
            assert one.mocks[0].seen[0][2] == ASKED

    run(main())
