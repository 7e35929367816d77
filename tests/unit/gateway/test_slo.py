"""Objectives: requests whose forecasts miss them are served, refused, or wait; and what became of each is counted."""

from __future__ import annotations

import asyncio
import json
import math
import time

import pytest
from mock_servers import ASKED, STREAMED, PluginMock, eventually, run, running_gateway, stream, whole

from block.core.snapshot import ID
from block.core.types import Forecast, Request, RequestRecord
from block.dispatch import policies
from block.gateway.admission import Objectives, Slo
from block.vllm_plugin import state_buffer as b

# A step of the tests' latency model takes a second: a response of 5 tokens to a short prompt is done after 5.


def test_objectives_are_those_of_the_gateway_or_of_the_request_itself() -> None:
    slo = Slo(ttft_s=1.0)
    assert Slo().of([(b"Host", b"x")]) is None
    assert slo.of([]) == Objectives(1.0, None)
    assert slo.of([(b"X-SLO-TTFT-MS", b"250"), (b"x-slo-e2e-ms", b"1e3")]) == Objectives(0.25, 1.0)
    for value in (b"", b"soon", b"-1", b"0", b"nan", b"inf"):
        with pytest.raises(ValueError, match="x-slo-ttft-ms: "):
            slo.of([(b"x-slo-ttft-ms", value)])


def test_how_late_a_forecast_is_and_whether_an_answer_was_in_time() -> None:
    both = Objectives(1.0, 10.0)
    assert both.missed_by_s(None, 0.0) == both.missed_by_s(Forecast(1.0, 10.0), 0.0) == 0.0
    assert both.missed_by_s(Forecast(math.nan, math.nan), 0.0) == 0.0
    assert both.missed_by_s(Forecast(1.5, 12.0), 0.0) == 2.0
    assert both.missed_by_s(Forecast(0.5, 9.0), 0.75) == 0.25
    assert [both.lost(waited_s) for waited_s in (0.0, 0.9, 1.0)] == [False, False, True]
    assert not Objectives(None, 10.0).lost(9.0)
    record = RequestRecord(Request(1, 5.0, 10, 100, 100), first_token=6.0, finished=15.0)
    assert both.met(record)
    assert not Objectives(0.9, 10.0).met(record)
    assert not Objectives(1.0, 9.9).met(record)
    record.first_token = math.nan  # of an answer that came whole
    assert Objectives(1.0, None).met(record) is None
    assert both.met(record)


def test_a_request_that_would_miss_is_refused_and_told_when_to_come_again() -> None:
    async def main() -> None:
        async with running_gateway(
            [PluginMock(), PluginMock()], policies.Block(), slo=Slo(e2e_s=4.5, missed="refuse")
        ) as gateway:
            status, body, headers = await gateway.ask()
            assert (status, headers["Retry-After"]) == (429, "1")
            assert json.loads(body)["error"]["message"] == "its forecast misses its objective by 0.5 s"
            assert [mock.seen for mock in gateway.mocks] == [[], []]
            assert (await gateway.ask(headers={"x-slo-e2e-ms": "6000"}))[0] == 200
            assert (await gateway.ask(headers={"x-slo-ttft-ms": "what"}))[0] == 400
            metrics = await gateway.metrics()
            assert metrics['block_slo_total{outcome="refused"}'] == 1
            assert metrics['block_slo_total{outcome="met"}'] == 1
            assert metrics['block_requests_total{server="none",status="refused"}'] == 2

    run(main())


def test_a_request_is_served_anyway_unless_something_else_is_asked_for() -> None:
    async def main() -> None:
        async with running_gateway([PluginMock(stream)], policies.Block(), slo=Slo(ttft_s=1e-6)) as gateway:
            assert (await gateway.ask(STREAMED))[0] == 200
            assert (await gateway.metrics())['block_slo_total{outcome="missed"}'] == 1

    run(main())


@pytest.mark.parametrize("room", [True, False])
def test_a_request_waits_until_its_forecast_meets_its_objective_or_for_as_long_as_it_may(room: bool) -> None:
    async def main() -> None:
        slo = Slo(ttft_s=3.0, missed="queue", queue_s=5.0 if room else 0.2)
        async with running_gateway([PluginMock()], policies.Block(), slo=slo) as gateway:
            (mock,) = gateway.mocks
            assert isinstance(mock, PluginMock)
            mock.place(1, 16, 500)
            most = mock.settings.max_num_seqs  # no room for another, for long
            mock.buffer.seqs[:, :most] = mock.buffer.seqs[:, :1]
            mock.buffer.seqs[ID, :most] = range(most)
            mock.buffer.header[[b.COLUMNS, b.RUNNING]] = most
            began = time.monotonic()
            asked = [asyncio.create_task(gateway.ask()) for _ in range(3)]
            gone = asyncio.create_task(gateway.ask())
            await asyncio.sleep(0.1)
            gone.cancel()
            assert mock.seen == []
            if room:
                mock.buffer.header[[b.COLUMNS, b.RUNNING]] = 0  # it has gone
            statuses = [status for status, _, _ in await asyncio.gather(*asked)]
            assert statuses == [200 if room else 429] * 3
            assert time.monotonic() - began < 3.0
            await eventually(lambda: len(mock.seen) == (3 if room else 0))

    run(main())


def test_what_can_no_longer_be_in_time_waits_no_more() -> None:
    async def main() -> None:
        slo = Slo(ttft_s=0.5, missed="queue", queue_s=60.0)  # a step takes 1 s
        async with running_gateway([PluginMock()], policies.Block(), slo=slo) as gateway:
            status, body, _ = await gateway.ask()
            assert (status, b"misses its objective" in body, gateway.mocks[0].seen) == (429, True, [])

    run(main())


def test_a_client_that_asks_is_told_where_it_went_and_what_was_forecast() -> None:
    async def main() -> None:
        async with running_gateway([PluginMock(whole)], policies.Block()) as gateway:
            for body in (ASKED, STREAMED):
                _, _, headers = await gateway.ask(body, headers={"x-block-explain": "1"})
                assert headers["x-block-instance"] == gateway.mocks[0].url
                assert "ttft=" in headers["x-block-forecast"]
                gateway.mocks[0].answer = stream
            assert "x-block-instance" not in (await gateway.ask())[2]
        assert headers["x-block-forecast"].startswith("ttft=1.0")

    run(main())
