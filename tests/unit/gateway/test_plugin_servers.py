"""Servers with the vLLM plugin: policies look at their state, and tag what they send."""

from __future__ import annotations

import asyncio
import json
import math
from typing import Any

import pytest
from mock_servers import LIMITS, STREAMED, Mock, PluginMock, eventually, run, running_gateway, stream

from block.dispatch import policies


def tag_of(mock: Mock) -> dict[str, Any]:
    return dict(json.loads(mock.seen[-1][2])["vllm_xargs"])


@pytest.mark.parametrize(
    ("policy", "forecasts"), [(policies.Block(), 2), (policies.INFaaS(), 0), (policies.LeastTokens(), 0)]
)
def test_policies_that_look_at_servers_send_a_request_where_there_is_room(
    policy: policies.Policy, forecasts: int
) -> None:
    async def main() -> None:
        async with running_gateway([PluginMock(stream), PluginMock(stream)], policy) as gateway:
            busy, idle = gateway.mocks
            assert isinstance(busy, PluginMock)
            busy.place(1, 1000, 500)
            for _ in range(2):
                assert (await gateway.ask(STREAMED))[0] == 200
            assert (busy.seen, len(idle.seen)) == ([], 2)
            body = idle.seen[-1][2]
            assert body.startswith(b'{"vllm_xargs":{')
            assert body.endswith(b"}," + STREAMED[1:])
            assert tag_of(idle) == {
                "block_id": gateway.dispatcher.history.records[1].request.id,
                "block_expected": 16,
            }
            metrics = await gateway.metrics()
            for name in ("ttft_seconds", "ttft_ratio", "e2e_seconds", "e2e_ratio"):
                assert metrics.get(f"block_predicted_{name}_count", 0) == forecasts
            assert metrics.get("block_forecast_seconds_count", 0) == forecasts

    run(main())


def test_servers_may_differ_in_their_settings_and_prompts_may_be_estimated_too_long() -> None:
    async def main() -> None:
        small = LIMITS._replace(total_blocks=200, max_model_len=1024)
        async with running_gateway([PluginMock(), PluginMock(settings=small)], policies.Block()) as gateway:
            assert (await gateway.ask(b'{"prompt": "%s"}' % (b"x" * 40_000)))[0] == 200
            scores = gateway.dispatcher.history.decisions[-1][1].scores
            assert len(scores) == 2
            assert all(math.isfinite(score) for score in scores)

    run(main())


def test_a_choice_without_a_forecast_is_counted_as_a_fallback() -> None:
    async def main() -> None:
        async with running_gateway([PluginMock()], policies.Block()) as gateway:
            mock = gateway.mocks[0]
            assert isinstance(mock, PluginMock)
            mock.place(1, 100_000, 5)  # more than the server can hold
            assert (await gateway.ask())[0] == 200
            assert (await gateway.metrics())['block_fallbacks_total{reason="no forecast"}'] == 1

    run(main())


def test_a_server_without_the_plugin_gets_nothing_by_a_policy_that_looks_at_servers(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def main() -> None:
        async with running_gateway([Mock(), PluginMock()], policies.INFaaS()) as gateway:
            assert [(await gateway.ask())[0] for _ in range(4)] == [200] * 4
            assert gateway.mocks[0].seen == []
            await asyncio.sleep(0.2)  # probed again and again, and told once

    run(main())
    told = [record.message for record in caplog.records if "plugin" in record.message]
    assert len(told) == 1
    assert "python -m block.vllm_plugin.serve" in told[0]


def test_the_state_of_a_server_that_comes_back_is_read_anew() -> None:
    async def main() -> None:
        async with running_gateway([PluginMock(), PluginMock()], policies.INFaaS()) as gateway:
            first, second = gateway.mocks
            assert isinstance(first, PluginMock)
            assert isinstance(second, PluginMock)
            second.place(1, 1000, 500)
            await first.kill()
            assert (await gateway.ask())[0] == 200
            assert list(gateway.dispatcher.active) == [1]
            first.renew()
            await first.start()
            await eventually(lambda: len(gateway.dispatcher.active) == 2)
            first.place(1, 15_000, 500)
            assert (await gateway.ask())[0] == 200
            assert [len(mock.seen) for mock in gateway.mocks] == [0, 2]

    run(main())


def test_a_scheduler_that_stops_while_it_publishes_stops_nothing_else() -> None:
    async def main() -> None:
        async with running_gateway([PluginMock(), PluginMock()], policies.INFaaS()) as gateway:
            stuck, sound = gateway.mocks
            assert isinstance(stuck, PluginMock)
            stuck.place(1, 1000, 500)
            assert (await gateway.ask())[0] == 200
            stuck.buffer.begin()
            assert [(await gateway.ask())[0] for _ in range(3)] == [200] * 3
            assert len(sound.seen) == 4
            await stuck.kill()
            gateway.dispatcher.instance_down(0, "as if it had been chosen", 0.0)
            await stuck.start()  # and publishes no more
            await asyncio.sleep(0.2)
            assert list(gateway.dispatcher.active) == [1]
            stuck.buffer.end()
            await eventually(lambda: len(gateway.dispatcher.active) == 2)

    run(main())
