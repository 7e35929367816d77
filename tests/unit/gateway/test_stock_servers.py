"""Servers without the plugin: what the gateway sent to them is their state, and vLLM's events say what they cache."""

from __future__ import annotations

import asyncio
import json
import math
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from mock_servers import EVENTS, SSE, STREAMED, Mock, eventually, run, running_gateway, whole
from test_gateway_prefixes import LONG, OTHER, Letters, asking, served_by, sources, tokens

from block.core.snapshot import EXPECTED, ID, NUM_BLOCKS, NUM_COMPUTED_TOKENS, NUM_OUTPUT_TOKENS, NUM_PROMPT_TOKENS
from block.core.types import Forecast, Request, RequestRecord
from block.dispatch import policies
from block.gateway.config import GatewayConfig
from block.gateway.modelled import ModelledInstance, response_tokens

CACHE = 'vllm:cache_config_info{block_size="16",enable_prefix_caching="True",engine="0",num_gpu_blocks="501"} 1.0\n'


class Stock(Mock):
    """A vLLM server as it comes."""

    metrics = CACHE
    sources: dict[str, Any] = {}  # noqa: RUF012

    async def _metrics(self, http: web.Request) -> web.Response:
        return web.Response(text=f"# HELP x\n{self.metrics}")

    async def _sources(self, http: web.Request) -> web.Response:
        return web.json_response(self.sources)

    async def _models(self, http: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": name, "max_model_len": 4096} for name in self.models]})

    def routes(self, app: web.Application) -> None:
        app.router.add_get("/metrics", self._metrics)
        app.router.add_get("/kv_event_sources", self._sources)
        super().routes(app)


async def late(mock: Mock, http: web.Request) -> web.StreamResponse:
    await mock.go.wait()
    return await whole(mock, http)


@pytest.mark.parametrize(
    "policy", [policies.Block(), policies.BlockCache(), policies.LeastTokens(), policies.LlumnixMinus()]
)
def test_a_request_goes_where_less_was_sent(policy: policies.Policy) -> None:
    async def main() -> None:
        async with running_gateway([Stock(late), Stock(late)], policy, plugin=False) as gateway:
            for mock in gateway.mocks:
                mock.go.clear()
            long = json.dumps({"model": "m", "prompt": [1] * 4000}).encode()
            asked = [asyncio.create_task(gateway.ask(long))]
            await eventually(lambda: any(mock.seen for mock in gateway.mocks))
            (busy,) = [i for i, mock in enumerate(gateway.mocks) if mock.seen]
            asked.append(asyncio.create_task(gateway.ask(STREAMED)))
            await eventually(lambda: len(gateway.mocks[1 - busy].seen) == 1)
            for mock in gateway.mocks:
                mock.go.set()
            await asyncio.gather(*asked)
            upstreams = gateway.gateway.servers.values()
            assert [upstream.snapshot().seqs.shape[1] for upstream in upstreams] == [0, 0]

    run(main())


def test_what_a_server_shows_is_what_was_sent_there_as_far_as_it_has_come() -> None:
    async def main() -> None:
        async def two(mock: Mock, http: web.Request) -> web.StreamResponse:
            if b"stream" not in await http.read():
                return await late(mock, http)
            response = web.StreamResponse(headers=SSE)
            await response.prepare(http)
            for event in EVENTS[:3]:
                await response.write(event)
            await mock.go.wait()
            return response

        async with running_gateway([Stock(two)], policies.INFaaS(), plugin=False) as gateway:
            (mock,) = gateway.mocks
            mock.go.clear()
            asked = [asyncio.create_task(gateway.ask(STREAMED))]
            (server,) = gateway.gateway.servers.values()
            await eventually(lambda: server.snapshot().running == 1)
            asked += [asyncio.create_task(gateway.ask(b'{"prompt": "%s"}' % (b"x" * n))) for n in (400, 800)]
            await eventually(lambda: server.snapshot().seqs.shape[1] == 3)
            await asyncio.sleep(0.05)
            shown = server.snapshot()
            assert isinstance(server, ModelledInstance)
            assert server.settings is not None
            assert (server.settings.total_blocks, server.settings.max_model_len) == (500, 4096)
            assert (shown.running, shown.free_blocks, math.isnan(shown.step_started)) == (1, 499, True)
            ids = [record.request.id for record in gateway.dispatcher.history.records]
            rows = shown.seqs[[ID, NUM_PROMPT_TOKENS, NUM_OUTPUT_TOKENS, NUM_COMPUTED_TOKENS, NUM_BLOCKS, EXPECTED]]
            assert rows.T.tolist() == [
                [ids[0], 3, 3, 5, 1, 16],
                [ids[1], 100, 0, 0, 0, 16],
                [ids[2], 200, 0, 0, 0, 16],
            ]
            mock.go.set()
            await asyncio.gather(*asked)

    run(main())


def test_of_an_answer_that_comes_whole_its_forecast_tells_how_far_it_is() -> None:
    record = RequestRecord(Request(1, 0.0, 10, 100, 100), dispatched=5.0)
    assert response_tokens(record, 100.0) == 0
    record.forecast = Forecast(1.0, 11.0)
    assert [response_tokens(record, now) for now in (5.5, 6.0, 6.01, 8.5, 11.0, 16.0, 50.0)] == [
        0,
        0,
        1,
        25,
        50,
        100,
        100,
    ]
    record.first_token, record.output_tokens = 6.0, 7
    assert response_tokens(record, 50.0) == 7


def test_settings_that_are_not_told_are_assumed() -> None:
    async def main() -> None:
        silent = Stock()
        silent.metrics = ""
        odd = Stock()
        odd.metrics = CACHE.replace("501", "3")  # too few for the longest sequence
        keys = {"max_num_seqs": 7, "max_num_batched_tokens": 512}
        async with running_gateway([silent, odd], policies.Block(), plugin=False, **keys) as gateway:
            assumed = GatewayConfig(urls=("http://h:1",), plugin=False, **keys).assumed()  # type: ignore[arg-type]
            assert (assumed.max_num_seqs, assumed.max_num_batched_tokens) == (7, 512)
            for server in gateway.gateway.servers.values():
                assert isinstance(server, ModelledInstance)
                assert server.settings == assumed.settings(10_000)._replace(
                    max_model_len=4096 if server.instance_id == 0 else assumed.max_model_len
                )
            assert (await gateway.ask())[0] == 200

    run(main())


def test_a_request_goes_where_events_say_that_its_blocks_are(tmp_path: Path) -> None:
    zmq, msgspec = pytest.importorskip("zmq"), pytest.importorskip("msgspec")

    def stored(prompt: str) -> list[Any]:
        ids = tokens(prompt).tolist()[:320]
        hashes = list(range(len(ids) // 16))
        event = {"type": "BlockStored", "block_hashes": hashes, "parent_block_hash": None, "token_ids": ids}
        return [1.0, [{**event, "block_size": 16, "lora_id": None, "medium": "GPU"}]]

    async def main() -> None:
        with zmq.Context() as context, context.socket(zmq.PUB) as first, context.socket(zmq.PUB) as second:
            mocks = [Stock(whole), Stock(whole)]
            for number, (mock, publisher) in enumerate(zip(mocks, (first, second), strict=True)):
                endpoint = f"ipc://{tmp_path}/{number}"
                publisher.bind(endpoint)
                mock.sources = {"0": {"publisher": "zmq", "endpoint": endpoint, "replay_endpoint": None, "topic": "kv"}}
            async with running_gateway(mocks, policies.BlockCache(), plugin=False, tokenizer=Letters()) as gateway:
                async with asyncio.timeout(10):
                    while await sources(gateway) != ["events", "events"]:  # until both are connected
                        for publisher, prompt in ((first, OTHER), (second, LONG)):
                            batch = msgspec.msgpack.encode(stored(prompt))
                            publisher.send_multipart([b"kv", (0).to_bytes(8, "big"), batch])
                        await asyncio.sleep(0.02)
                asked = [asking(LONG), asking(OTHER), asking(LONG)]
                assert await served_by(gateway, *asked) == [1, 0, 1]

    run(main())


@pytest.mark.parametrize("key", ["max_num_seqs", "max_num_batched_tokens"])
def test_what_servers_with_the_plugin_tell_is_not_to_be_given(key: str) -> None:
    with pytest.raises(ValueError, match=f"gateway.{key}=5: servers tell it"):
        GatewayConfig(urls=("http://h:1",), **{key: 5})  # type: ignore[arg-type]
