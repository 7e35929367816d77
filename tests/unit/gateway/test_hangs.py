"""Servers that hang: set aside soon, their requests served elsewhere, and back when they do something again."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import numpy as np
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
    PluginMock,
    RunningGateway,
    eventually,
    hang,
    run,
    running_gateway,
    stream,
    whole,
)

from block.core.snapshot import NUM_SCHEDULED_TOKENS
from block.dispatch import policies
from block.vllm_plugin import state_buffer as b

BRIEF: dict[str, Any] = {"hang_floor_s": 0.1, "probe_interval_s": 0.05}


class Silent(Mock):
    """A server that accepts connections, and says nothing while `silent`."""

    silent = True

    async def _health(self, http: web.Request) -> web.Response:
        while self.silent:
            await asyncio.sleep(0.01)
        return await super()._health(http)

    async def _complete(self, http: web.Request) -> web.StreamResponse:
        if self.silent:
            self.answer = hang
        return await super()._complete(http)


async def took(gateway: RunningGateway, body: bytes = ASKED) -> float:
    began = time.monotonic()
    assert (await gateway.ask(body))[0] == 200
    return time.monotonic() - began


@pytest.mark.parametrize("policy", [policies.RoundRobin(), policies.LeastRequests()])
def test_a_server_that_says_nothing_is_set_aside_and_back_when_it_speaks(policy: policies.Policy) -> None:
    async def main() -> None:
        hung = Silent()
        hung.silent = False
        async with running_gateway([hung, Mock(), Mock()], policy, **BRIEF) as gateway:
            hung.silent, hung.answer = True, hang
            seconds = await asyncio.gather(*(took(gateway) for _ in range(30)))
            assert max(seconds) < 1.0
            assert len(hung.seen) > 0
            assert list(gateway.dispatcher.active) == [1, 2]
            assert [one.status for one in gateway.dispatcher.history.records] == ["ok"] * 30
            ejections = gateway.dispatcher.history.ejections
            assert len(ejections) == 1
            assert "hangs: silent for " in ejections[0][2]
            hung.silent, hung.answer = False, whole
            await eventually(lambda: len(gateway.dispatcher.active) == 3)
            assert max([await took(gateway) for _ in range(6)]) < 1.0

    run(main())


def test_a_server_that_answers_slowly_is_not_set_aside_while_it_says_that_it_is_well() -> None:
    async def slow(mock: Mock, http: web.Request) -> web.StreamResponse:
        await asyncio.sleep(0.6)
        return await whole(mock, http)

    async def main() -> None:
        async with running_gateway([Mock(slow), Mock()], **BRIEF) as gateway:
            assert (await gateway.ask())[:2] == (200, ANSWER)
            assert gateway.mocks[1].seen == []
            assert gateway.dispatcher.ejected(0) == 0

    run(main())


def test_a_stream_that_does_not_begin_while_others_do_is_begun_anew_and_its_server_left_alone() -> None:
    async def main() -> None:
        async with running_gateway([Mock(stream), Mock(stream)], **BRIEF) as gateway:
            stuck, sound = gateway.mocks
            assert max([await took(gateway, STREAMED) for _ in range(4)]) < 0.5
            stuck.answer = hang  # and /health says that all is well
            seconds = await asyncio.gather(*(took(gateway, STREAMED) for _ in range(4)))
            assert max(seconds) < 1.0
            assert list(gateway.dispatcher.active) == [1]
            assert "hangs: no event of a stream for " in gateway.dispatcher.history.ejections[0][2]
            assert len(sound.seen) == 6
            stuck.answer = stream
            await eventually(lambda: len(gateway.dispatcher.active) == 2)
            assert max([await took(gateway, STREAMED) for _ in range(4)]) < 0.5

    run(main())


@pytest.mark.parametrize(
    ("policy", "local"), [(policies.INFaaS(), True), (policies.Block(), True), (policies.Block(), False)]
)
def test_a_step_that_overruns_its_forecast_is_a_hang_until_steps_move(policy: policies.Policy, local: bool) -> None:
    async def main() -> None:
        mocks = PluginMock(hang, local=local), PluginMock(local=local)
        async with running_gateway(mocks, policy, hang_factor=0.2, **BRIEF) as gateway:
            stuck, sound = gateway.mocks
            assert isinstance(stuck, PluginMock)
            assert isinstance(sound, PluginMock)
            sound.place(1, 2000, 300)
            stuck.place(2, 16, 300)
            stuck.buffer.begin()
            stuck.buffer.seqs[NUM_SCHEDULED_TOKENS, 0] = 1
            stuck.buffer.times[b.STARTED] = time.monotonic()
            stuck.buffer.end()
            servers = gateway.gateway.servers
            await eventually(lambda: all(servers[i].snapshot().seqs.size for i in (0, 1)))
            assert await took(gateway) < 1.5
            assert [len(mock.seen) for mock in gateway.mocks] == [1, 1]
            assert "hangs: a step of " in gateway.dispatcher.history.ejections[0][2]
            await asyncio.sleep(0.2)
            assert list(gateway.dispatcher.active) == [1]  # though /health says that all is well
            stuck.buffer.begin()
            stuck.buffer.times[b.STARTED] = np.nan
            stuck.buffer.end()
            stuck.answer = whole
            await eventually(lambda: len(gateway.dispatcher.active) == 2)

    run(main())


def test_a_stream_that_has_begun_stays_where_it_is() -> None:
    async def pauses(mock: Mock, http: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers=SSE)
        await response.prepare(http)
        await response.write(EVENTS[0])
        await mock.go.wait()
        await response.write(DONE)
        return response

    async def main() -> None:
        hung = Silent(pauses)
        hung.silent = False
        async with running_gateway([hung, Mock()], **BRIEF) as gateway:
            hung.go.clear()
            asked = asyncio.create_task(gateway.ask(STREAMED))
            await eventually(lambda: len(hung.seen) == 1)
            hung.silent = True
            await eventually(lambda: list(gateway.dispatcher.active) == [1])
            hung.silent = False
            hung.go.set()
            assert (await asked)[1] == EVENTS[0] + DONE
            await eventually(lambda: len(gateway.dispatcher.active) == 2)

    run(main())
