"""Servers that fail: which requests begin anew elsewhere, which servers are ejected, what the client is told."""

from __future__ import annotations

import asyncio
import json
import socket
from dataclasses import dataclass
from typing import Any

import pytest
from aiohttp import web
from mock_servers import (
    ANSWER,
    ASKED,
    DONE,
    EVENTS,
    SSE,
    STREAMED,
    Answer,
    Mock,
    cut,
    eventually,
    hang,
    run,
    running_gateway,
    says,
    stream,
    whole,
)

from block.dispatch import policies


@pytest.mark.parametrize(
    "broken",
    [cut(), cut(sse=False), cut(b'{"choices', sse=False)],
    ids=["no byte of a stream", "no byte", "half an answer"],
)
def test_a_request_whose_answer_breaks_before_its_first_byte_begins_anew_elsewhere(broken: Answer) -> None:
    async def main() -> None:
        async with running_gateway([Mock(broken), Mock()], probe_interval_s=60) as gateway:
            gateway.mocks[0].well = False
            assert (await gateway.ask())[:2] == (200, ANSWER)
            assert list(gateway.dispatcher.active) == [1]
            assert [len(mock.seen) for mock in gateway.mocks] == [1, 1]
            assert gateway.mocks[1].seen[0][2] == ASKED
            metrics = await gateway.metrics()
            assert metrics["block_retries_total"] == 1
            assert metrics['block_ejections_total{server="0"}'] == 1
            assert metrics["block_active_instances"] == 1

    run(main())


def test_a_request_on_which_servers_hang_up_does_not_cost_the_others_their_servers() -> None:
    async def poisoned(mock: Mock, http: web.Request) -> web.StreamResponse:
        if b"poison" in await http.read():
            return await cut()(mock, http)
        return await whole(mock, http)

    async def main() -> None:
        async with running_gateway([Mock(poisoned) for _ in range(3)]) as gateway:
            status, body, _ = await gateway.ask(b'{"prompt": "poison"}')
            assert (status, json.loads(body)["error"]["type"]) == (503, "ServiceUnavailableError")
            assert [len(mock.seen) for mock in gateway.mocks] == [1, 1, 1]
            assert list(gateway.dispatcher.active) == [0, 1, 2]
            assert (await gateway.ask())[:2] == (200, ANSWER)

    run(main())


def test_a_server_that_is_down_is_ejected_and_comes_back() -> None:
    async def main() -> None:
        async with running_gateway([Mock(), Mock()]) as gateway:
            await gateway.mocks[0].kill()
            assert [(await gateway.ask())[0] for _ in range(4)] == [200] * 4
            assert list(gateway.dispatcher.active) == [1]
            await gateway.mocks[0].start()
            await eventually(lambda: len(gateway.dispatcher.active) == 2)
            assert [(await gateway.ask())[0] for _ in range(4)] == [200] * 4
            assert len(gateway.mocks[0].seen) == 2

    run(main())


@pytest.mark.parametrize("status", [502, 503])
def test_a_server_that_turns_a_request_away_is_passed_over_and_stays_active(status: int) -> None:
    async def main() -> None:
        async with running_gateway([Mock(says(status)), Mock()]) as gateway:
            assert [(await gateway.ask())[0] for _ in range(4)] == [200] * 4
            assert [len(mock.seen) for mock in gateway.mocks] == [2, 4]
            assert list(gateway.dispatcher.active) == [0, 1]

    run(main())


def test_a_client_that_all_servers_turn_away_gets_the_last_answer() -> None:
    async def main() -> None:
        async with running_gateway([Mock(says(503, b"full", **{"Retry-After": "9"})) for _ in range(2)]) as gateway:
            status, body, headers = await gateway.ask()
            assert (status, body, headers["Retry-After"]) == (503, b"full", "9")
            assert [len(mock.seen) for mock in gateway.mocks] == [1, 1]
            assert (await gateway.metrics())["block_retries_total"] == 1

    run(main())


@pytest.mark.parametrize("status", [400, 401, 404, 422, 429, 500, 501])
def test_an_error_that_a_healthy_server_answers_is_passed_on(status: int) -> None:
    async def main() -> None:
        async with running_gateway([Mock(says(status)), Mock()]) as gateway:
            assert (await gateway.ask())[:2] == (status, b'{"error": {"message": "no"}}')
            assert list(gateway.dispatcher.active) == [0, 1]
            assert len(gateway.mocks[1].seen) == 0
            outcome = "refused" if status < 500 else "failed"
            assert (await gateway.metrics())[f'block_requests_total{{server="0",status="{outcome}"}}'] == 1

    run(main())


DEAD = b'data: {"error": {"message": "EngineDeadError"}}\n\n'


async def begins_with_an_error(mock: Mock, http: web.Request) -> web.StreamResponse:
    return web.Response(body=DEAD + DONE, headers=SSE)


@pytest.mark.parametrize("answer", [says(500), begins_with_an_error], ids=["answer", "stream"])
def test_a_server_whose_engine_died_is_ejected_and_its_requests_begin_anew(answer: Answer) -> None:
    async def main() -> None:
        async with running_gateway([Mock(answer), Mock()], probe_interval_s=60) as gateway:
            gateway.mocks[0].well = False
            assert (await gateway.ask())[:2] == (200, ANSWER)
            assert list(gateway.dispatcher.active) == [1]

    run(main())


def test_an_error_that_a_healthy_server_streams_is_passed_on() -> None:
    async def main() -> None:
        async with running_gateway([Mock(begins_with_an_error), Mock()]) as gateway:
            assert (await gateway.ask(STREAMED))[:2] == (200, DEAD + DONE)
            assert list(gateway.dispatcher.active) == [0, 1]
            assert (await gateway.metrics())['block_requests_total{server="0",status="failed"}'] == 1

    run(main())


def test_after_the_first_byte_a_stream_ends_with_an_error_event() -> None:
    async def main() -> None:
        async with running_gateway([Mock(cut(EVENTS[0], b'data: {"cho')), Mock()]) as gateway:
            status, body, _ = await gateway.ask(STREAMED)
            assert status == 200
            assert body.startswith(EVENTS[0])
            last = body.removesuffix(b"\n\n").rpartition(b"\n\n")[2]
            error = json.loads(last.removeprefix(b"data: "))["error"]
            assert error["code"] == 502
            assert gateway.mocks[0].url in error["message"]
            assert DONE not in body
            assert gateway.mocks[1].seen == []
            assert gateway.dispatcher.history.records[0].status == "failed"

    run(main())


MESSAGE = b'event: message_start\ndata: {"type":"message_start"}\n\n'
FAILED = b'event: error\ndata: {"type":"error","error":{"type":"internal_error","message":"dead"}}\n\n'


def test_a_message_of_anthropic_s_that_breaks_off_ends_with_an_error_of_anthropic_s() -> None:
    async def main() -> None:
        async with running_gateway([Mock(cut(MESSAGE))]) as gateway:
            _, body, _ = await gateway.ask(STREAMED, "/v1/messages")
            name, data = body.removeprefix(MESSAGE).strip().split(b"\n")
            told = json.loads(data.removeprefix(b"data: "))
            assert (name, told["type"], told["error"]["code"]) == (b"event: error", "error", 502)

    run(main())


def test_an_error_in_the_midst_of_a_message_of_anthropic_s_fails_it() -> None:
    async def main() -> None:
        async with running_gateway([Mock(lambda mock, http: answer(MESSAGE + FAILED))]) as gateway:
            assert (await gateway.ask(STREAMED, "/v1/messages"))[1] == MESSAGE + FAILED
            assert (await gateway.metrics())['block_requests_total{server="0",status="failed"}'] == 1

    async def answer(body: bytes) -> web.StreamResponse:
        return web.Response(body=body, headers=SSE)

    run(main())


def test_a_silent_server_fails_its_request_and_stays_active() -> None:
    async def main() -> None:
        async def pause(mock: Mock, http: web.Request) -> web.StreamResponse:
            mock.go.clear()
            return await stream(mock, http)

        async with running_gateway([Mock(hang), Mock(pause)], read_timeout_s=0.1) as gateway:
            status, body, _ = await gateway.ask()
            assert (status, json.loads(body)["error"]["type"]) == (504, "TimeoutError")
            status, body, _ = await gateway.ask(STREAMED)
            assert status == 200
            assert b'data: {"error"' in body
            assert list(gateway.dispatcher.active) == [0, 1]
            await eventually(lambda: [mock.cancelled for mock in gateway.mocks] == [1, 1])

    run(main())


def test_a_server_that_takes_no_connection_is_ejected() -> None:
    async def main() -> None:
        with socket.socket() as full, socket.socket() as first:
            full.bind(("127.0.0.1", 0))
            full.listen(0)  # room for one, which nobody accepts
            first.connect(full.getsockname())
            deaf = Mock(port=full.getsockname()[1])
            async with running_gateway(
                [deaf, Mock()], started=[1], connect_timeout_s=0.2, probe_interval_s=60
            ) as gateway:
                assert list(gateway.dispatcher.active) == [1]
                gateway.dispatcher.instance_up(0, 0.0)
                assert (await gateway.ask())[:2] == (200, ANSWER)
                assert list(gateway.dispatcher.active) == [1]
                assert gateway.dispatcher.history.records[0].retries == 1

    run(main())


def test_a_gateway_without_a_server_answers_with_errors_and_is_not_healthy() -> None:
    async def main() -> None:
        async with running_gateway([Mock(), Mock()], started=[]) as gateway:
            status, body, _ = await gateway.ask()
            told = json.loads(body)["error"]["message"]
            assert (status, told.count("Connect call failed"), told[:21]) == (503, 2, "no instance is left; ")
            for path in ("/health", "/v1/models"):
                async with gateway.client.get(gateway.url + path) as answer:
                    assert answer.status == 503
            assert (await gateway.metrics())['block_requests_total{server="none",status="failed"}'] == 2
            await gateway.mocks[1].start()
            await eventually(lambda: len(gateway.dispatcher.active) == 1)
            async with gateway.client.get(gateway.url + "/health") as answer:
                assert (answer.status, await answer.json()) == (200, {"active": 1, "instances": 2})
            assert (await gateway.ask())[0] == 200

    run(main())


def test_no_request_is_lost_when_one_of_four_servers_is_killed() -> None:
    async def main() -> None:
        async def slow(mock: Mock, http: web.Request) -> web.StreamResponse:
            await asyncio.sleep(0.02)
            return await whole(mock, http)

        async with running_gateway([Mock(slow) for _ in range(4)]) as gateway:
            asked = []
            for i in range(200):
                asked.append(asyncio.create_task(gateway.ask()))
                await asyncio.sleep(0.002)
                if i == 100:
                    await gateway.mocks[0].kill()
            answers = await asyncio.gather(*asked)
            assert [answer[:2] for answer in answers] == [(200, ANSWER)] * 200
            assert list(gateway.dispatcher.active) == [1, 2, 3]
            assert (await gateway.metrics())["block_retries_total"] >= 1

    run(main())


def test_a_bug_of_a_policy_is_an_error_to_the_client_and_one_line_of_the_log(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        @dataclass(frozen=True)
        class Broken(policies.Random):  # type: ignore[misc]
            def choose(self, *_: Any) -> Any:
                raise ZeroDivisionError

        async with running_gateway([Mock()], Broken()) as gateway:
            status, body, _ = await gateway.ask()
            assert (status, json.loads(body)["error"]["type"]) == (500, "InternalServerError")

    run(main())
    (entry,) = [entry for entry in caplog.records if "raised" in entry.getMessage()]
    assert "Broken: choose raised ZeroDivisionError (tests/unit/gateway/test_failures.py:" in entry.getMessage()
    assert entry.exc_info is None


GIVEN_UP = b'{"choices":[{"index":0,"text":"","finish_reason":"abort"}],"usage":{"completion_tokens":0}}'


def given_up(*events: bytes) -> Answer:
    """What vLLM answers to a request that it gives up, for it is told to end: whole, or after these events."""

    async def answer(mock: Mock, http: web.Request) -> web.StreamResponse:
        if not json.loads(await http.read()).get("stream"):
            return web.Response(body=GIVEN_UP, content_type="application/json")
        response = web.StreamResponse(headers=SSE)
        await response.prepare(http)
        for event in (*events, b"data: " + GIVEN_UP + b"\n\n", DONE):
            await response.write(event)
        return response

    return answer


@pytest.mark.parametrize("body", [ASKED, STREAMED])
def test_what_a_server_gives_up_before_it_has_begun_begins_anew(body: bytes) -> None:
    async def main() -> None:
        async with running_gateway([Mock(given_up()), Mock(stream if body is STREAMED else whole)]) as gateway:
            status, text, _ = await gateway.ask(body)
            assert (status, b"abort" in text) == (200, False)
            metrics = await gateway.metrics()
            assert metrics['block_requests_total{server="1",status="ok"}'] == metrics["block_retries_total"] == 1
            assert metrics["block_active_instances"] == 2
        async with running_gateway([Mock(given_up())]) as gateway:  # and there is no other
            status, text, _ = await gateway.ask(body)
            assert (status, b"abort" in text) == (200, True)
            assert (await gateway.metrics())['block_requests_total{server="0",status="failed"}'] == 1

    run(main())


def test_a_stream_that_is_given_up_in_the_middle_has_failed() -> None:
    async def main() -> None:
        async with running_gateway([Mock(given_up(EVENTS[0])), Mock(stream)]) as gateway:
            status, text, _ = await gateway.ask(STREAMED)
            assert (status, text.startswith(EVENTS[0]), b"abort" in text) == (200, True, True)
            assert (await gateway.metrics())['block_requests_total{server="0",status="failed"}'] == 1

    run(main())
