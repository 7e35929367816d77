"""One client, one request or one server costs no other: memory, time, health checks, and what is being watched."""

from __future__ import annotations

import asyncio
import gc
import json
import time
from typing import Any

import pytest
from aiohttp import web
from mock_servers import (
    ANSWER,
    ASKED,
    EVENTS,
    SSE,
    STREAMED,
    Mock,
    PluginMock,
    eventually,
    hang,
    run,
    running_gateway,
    says,
    stream,
    whole,
)

from block.dispatch import policies, routers
from block.gateway import app, client_connections
from block.gateway.client_connections import ClientConnection

POST = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%s"
METRICS = b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n"


def test_a_connection_that_is_closed_leaves_nothing() -> None:
    async def main() -> None:
        async with running_gateway([Mock()]) as gateway:
            gc.collect()
            gc.disable()
            try:
                body = json.dumps({"prompt": "x" * 10**6}).encode()
                for close in ("closed", "aborted in its body", "closed"):
                    reader, writer = await gateway.connect()
                    writer.write((POST % (len(body), body))[: -1 if "aborted" in close else None])
                    if "aborted" in close:
                        await asyncio.sleep(0.05)
                        writer.transport.abort()
                    else:
                        await reader.readuntil(ANSWER[-20:])
                        writer.close()
                await eventually(lambda: not gateway.gateway.clients)
                await asyncio.sleep(0.05)
                alive = [one for one in gc.get_objects() if isinstance(one, ClientConnection)]
                assert alive == []
            finally:
                gc.enable()

    run(main())


def test_requests_sent_ahead_do_not_keep_others_waiting_and_unread_answers_do_not_pile_up() -> None:
    async def main() -> None:
        async with running_gateway([Mock()]) as gateway:
            _, writer = await gateway.connect()
            writer.write(METRICS * 5000)  # and nothing is read
            await asyncio.sleep(0.01)
            began = time.monotonic()
            assert (await gateway.ask())[0] == 200
            assert time.monotonic() - began < 2.0  # and not the 5 s that all of them take
            await eventually(lambda: any(one.full for one in gateway.gateway.clients))
            await asyncio.sleep(0.3)
            (client,) = [one for one in gateway.gateway.clients if one.full]
            assert client._transport.get_write_buffer_size() < 2**20
            writer.transport.abort()
            await eventually(lambda: client not in gateway.gateway.clients)

    run(main())


def test_a_stream_to_a_client_that_has_not_read_yet_waits_for_it() -> None:
    async def main() -> None:
        sent = 0

        async def answer(mock: Mock, http: web.Request) -> web.StreamResponse:
            nonlocal sent
            if b"stream" not in await http.read():
                return web.Response(body=b"x" * 8 * 2**20, headers={"Content-Type": "application/json"})
            response = web.StreamResponse(headers=SSE)
            await response.prepare(http)
            while True:
                await response.write(EVENTS[0] * 1000)
                sent += len(EVENTS[0]) * 1000

        async with running_gateway([Mock(answer)]) as gateway:
            _, writer = await gateway.connect()
            writer.write(POST % (len(ASKED), ASKED) + POST % (len(STREAMED), STREAMED))
            await asyncio.sleep(0.5)
            assert sent == 0  # the answer before it is not read
            (client,) = gateway.gateway.clients
            assert client._transport.get_write_buffer_size() < 9 * 2**20
            writer.transport.abort()

    run(main())


def test_a_client_that_does_not_read_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "IDLE_S", 0.2)
    monkeypatch.setattr(app, "SWEEP_S", 0.05)

    async def main() -> None:
        async def answer(mock: Mock, http: web.Request) -> web.StreamResponse:
            return web.Response(body=b"x" * 2**23, headers={"Content-Type": "application/json"})

        async with running_gateway([Mock(answer)]) as gateway:
            _, writer = await gateway.connect()
            writer.write(POST % (len(ASKED), ASKED))
            await eventually(lambda: len(gateway.gateway.clients) == 1)
            await eventually(lambda: len(gateway.gateway.clients) == 0)
            writer.close()

    run(main())


def test_an_answer_is_read_to_its_end_and_a_request_comes_to_its_end_when_the_gateway_stops() -> None:
    async def main() -> None:
        async def answer(mock: Mock, http: web.Request) -> web.StreamResponse:
            large = len(await http.read()) > 10**6
            return web.Response(body=b"x" * (1 if large else 2**24), headers={"Content-Type": "application/json"})

        async with running_gateway([Mock(answer)], grace_s=5.0) as gateway:
            reader, writer = await gateway.connect()
            writer.write(POST % (len(ASKED), ASKED))
            head = await reader.readuntil(b"\r\n\r\n")
            body = json.dumps({"prompt": "x" * 2 * 10**6}).encode()
            late, uploads = await gateway.connect()
            uploads.write((POST % (len(body), body))[: 10**6])
            await asyncio.sleep(0.05)
            stopping = asyncio.create_task(gateway.stop())
            await asyncio.sleep(0.3)
            uploads.write((POST % (len(body), body))[10**6 :])
            assert (await late.read()).endswith(b"\r\n\r\nx")
            read = 0
            while data := await reader.read(2**20):
                read += len(data)
                await asyncio.sleep(0.01)
            assert b"Content-Length: %d" % read in head
            await stopping
            writer.close()
            uploads.close()

    run(main())


def test_a_server_whose_health_hangs_costs_the_others_nothing() -> None:
    class Sick(Mock):
        asked = 0

        async def _health(self, http: web.Request) -> web.Response:
            self.asked += 1
            if self.well:
                return web.Response()
            await self.never.wait()
            raise AssertionError

    async def main() -> None:
        sick = Sick(says(500))
        async with running_gateway([sick, Mock()], policies.LeastRequests(), hang_floor_s=0.2) as gateway:
            sick.well = False
            asked = sick.asked
            tasks = [asyncio.create_task(gateway.ask()) for _ in range(300)]
            await asyncio.sleep(1.0)
            assert 1 in gateway.dispatcher.active
            assert sick.asked - asked < 10  # one at a time
            for task in tasks:
                task.cancel()

    run(main())


def test_requests_that_are_not_for_a_model_need_no_forecast() -> None:
    async def main() -> None:
        async with running_gateway([PluginMock()], policies.Block()) as gateway:
            async with gateway.client.get(gateway.url + "/version") as answer:
                assert answer.status == 200
            assert "block_forecast_seconds_count" not in await gateway.metrics()

    run(main())


def test_a_request_that_cannot_be_read_or_is_given_up_while_it_is_read_is_answered_and_counted() -> None:
    deep = json.dumps({"messages": [{"role": "assistant", "tool_calls": [{"function": {"arguments": "[" * 10**5}}]}]})

    async def main() -> None:
        async with running_gateway([Mock()], routers.CacheAware()) as gateway:
            assert (await gateway.ask(deep.encode(), "/v1/chat/completions"))[0] == 200

            begun = asyncio.Event()

            async def never(*_: Any) -> Any:
                begun.set()
                await asyncio.sleep(60)

            gateway.gateway.groups.all[0]._read_prompt = never  # type: ignore[method-assign]
            asked = asyncio.create_task(gateway.ask())
            await begun.wait()
            asked.cancel()
            async with asyncio.timeout(5):
                while (await gateway.metrics()).get('block_requests_total{server="none",status="cancelled"}') != 1:
                    await asyncio.sleep(0.01)

            async def broken(*_: Any) -> Any:
                raise ZeroDivisionError

            gateway.gateway.groups.all[0]._read_prompt = broken  # type: ignore[method-assign]
            assert (await gateway.ask())[0] == 500

    run(main())


def test_a_server_that_says_odd_things_of_its_models_is_watched_on() -> None:
    class Odd(Mock):
        async def _models(self, http: web.Request) -> web.Response:
            return web.Response(body=b"[" * 10**5)

    async def main() -> None:
        async with running_gateway([Odd(), Mock()]) as gateway:
            await gateway.mocks[1].kill()
            assert [(await gateway.ask())[0] for _ in range(2)] == [200, 200]
            assert list(gateway.dispatcher.active) == [0]
            await gateway.mocks[1].start()
            await eventually(lambda: len(gateway.dispatcher.active) == 2)

    run(main())


def test_the_last_server_is_not_set_aside_and_one_hard_prompt_costs_each_server_at_most_one_look() -> None:
    async def main() -> None:
        async def hard(mock: Mock, http: web.Request) -> web.StreamResponse:
            if b"hard" in await http.read():
                await asyncio.sleep(1.0)
            return await stream(mock, http)

        keys = {"hang_floor_s": 0.1, "probe_interval_s": 0.05}
        async with running_gateway([Mock(hard) for _ in range(4)], **keys) as gateway:
            for _ in range(8):
                assert (await gateway.ask(STREAMED))[0] == 200
            body = b'{"prompt":"hard","stream":true}'
            assert (await gateway.ask(body))[0] == 200
            assert sum(gateway.dispatcher.ejected(i) for i in range(4)) == 1
        async with running_gateway([Mock(hang)], **keys) as gateway:
            gateway.mocks[0].well = True
            asked = asyncio.create_task(gateway.ask(STREAMED))
            await asyncio.sleep(0.5)
            assert list(gateway.dispatcher.active) == [0]
            asked.cancel()

    run(main())


def test_a_word_in_a_prompt_makes_no_stream() -> None:
    async def main() -> None:
        async def slow(mock: Mock, http: web.Request) -> web.StreamResponse:
            await asyncio.sleep(0.6 if b"metadata" in await http.read() else 0.0)
            return await (whole if b"metadata" in await http.read() else stream)(mock, http)

        async with running_gateway([Mock(slow), Mock(slow)], hang_floor_s=0.1) as gateway:
            for _ in range(4):
                assert (await gateway.ask(STREAMED))[0] == 200
            assert (await gateway.ask(b'{"prompt": "x", "metadata": {"stream": true}}'))[:2] == (200, ANSWER)
            assert len(gateway.dispatcher.active) == 2

    run(main())


def test_a_loaded_adapter_is_there_at_once() -> None:
    async def main() -> None:
        async def load(mock: Mock, http: web.Request) -> web.StreamResponse:
            mock.models = [*mock.models, "wolf"]
            return web.Response(text="ok")

        async with running_gateway([Mock(load), Mock(load)], admin=True, models_interval_s=60) as gateway:
            assert (await gateway.ask(b'{"model": "wolf"}'))[0] == 404
            assert (await gateway.ask(b"{}", "/v1/load_lora_adapter"))[0] == 200
            for mock in gateway.mocks:
                mock.answer = whole
            assert (await gateway.ask(b'{"model": "wolf"}'))[0] == 200

    run(main())


def test_a_path_that_is_spelt_otherwise_is_the_same_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_connections, "LINGER_S", 0.05)

    async def main() -> None:
        async with running_gateway([PluginMock()], policies.Block()) as gateway:
            _, writer = await gateway.connect()
            writer.write((POST % (len(ASKED), ASKED)).replace(b"completions", b"%63ompletions"))
            await eventually(lambda: len(gateway.mocks[0].seen) == 1)
            assert b"vllm_xargs" in gateway.mocks[0].seen[0][2]
            writer.close()

    run(main())
