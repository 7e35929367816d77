"""The gateway's metrics: outcomes, times, and what is in flight."""

from __future__ import annotations

import asyncio
import json

from aiohttp import web
from mock_servers import STREAMED, Mock, eventually, run, running_gateway, stream


def test_metrics_tell_outcomes_times_and_what_is_in_flight() -> None:
    async def main() -> None:
        async with running_gateway([Mock(stream), Mock()]) as gateway:
            gateway.mocks[0].go.clear()
            asked = asyncio.create_task(gateway.ask(STREAMED))
            await eventually(lambda: gateway.in_flight() == 1)
            assert (await gateway.ask())[0] == 200
            before = await gateway.metrics()
            gateway.mocks[0].go.set()
            await asked
            after = await gateway.metrics()
        assert before['block_in_flight{server="0"}'] == 1
        assert 'block_in_flight{server="0"}' not in after
        for i in "01":
            assert after[f'block_requests_total{{server="{i}",status="ok"}}'] == 1
            assert after[f'block_instance_active{{server="{i}"}}'] == 1
        assert after["block_active_instances"] == 2
        assert (
            after['block_ttft_seconds_count{server="0"}'] == 1
        )  # of an answer that is no stream, the first token is not seen
        assert after['block_e2e_seconds_count{server="0"}'] + after['block_e2e_seconds_count{server="1"}'] == 2
        for name in ("block_retries_total", "block_predicted_e2e_seconds_count", "block_forecast_seconds_count"):
            assert name not in after  # there, and 0

    run(main())


def test_prompts_are_counted_by_the_tokens_that_servers_count() -> None:
    async def main() -> None:
        async def answer(mock: Mock, http: web.Request) -> web.StreamResponse:
            words = len(json.loads(await http.read())["prompt"].split())
            return web.json_response({"usage": {"prompt_tokens": words, "completion_tokens": 1}})

        async with running_gateway([Mock(answer)]) as gateway:
            body = json.dumps({"model": "m", "prompt": "elephant " * 2000}).encode()
            for _ in range(4):
                assert (await gateway.ask(body))[0] == 200
            counted = [one.request.prompt_tokens for one in gateway.dispatcher.history.records]
            assert counted[0] == 4500
            assert 2000 <= counted[-1] < 2150
            assert 8 < (await gateway.metrics())['block_bytes_per_token{model="m"}'] < 9

    run(main())
