"""Several models behind one gateway, each with a policy and a latency model of its own."""

from __future__ import annotations

import asyncio
import json
import random
import sys
from typing import Any

import pytest
from mock_servers import LIMITS, Mock, PluginMock, RunningGateway, eventually, run, running_gateway
from test_gateway_command import command
from testbed import constant_latency

from block.dispatch import policies
from block.dispatch.config import DispatchConfig
from block.engine.config import EngineSettings
from block.gateway.groups import Plan
from block.vllm_plugin.tags import TAG_ID


def serving(*models: str, settings: EngineSettings = LIMITS) -> PluginMock:
    mock = PluginMock(settings=settings)
    mock.models = models
    return mock


def plan(policy: policies.Policy, factor: float = 1.0) -> Plan:
    return Plan(policy, DispatchConfig(), random.Random(0), constant_latency().scaled(factor, 0.0))


async def ask(gateway: RunningGateway, model: str, **fields: Any) -> tuple[int, str, str]:
    """Status, and where it went by which forecast."""
    body = json.dumps({"model": model, "prompt": "x" * 400, "max_tokens": 50, **fields}).encode()
    status, _, headers = await gateway.ask(body, headers={"x-block-explain": "1"})
    return status, headers.get("x-block-instance", ""), headers.get("x-block-forecast", "")


def e2e(forecast: str) -> float:
    return float(forecast.partition("e2e=")[2])


def test_each_model_has_a_policy_and_step_times_of_its_own() -> None:
    async def main() -> None:
        mocks = [serving("slow"), serving("slow"), serving("fast", "adapter"), serving("other")]
        plans = {"slow": plan(policies.Block(), 4.0), "fast": plan(policies.Block())}
        async with running_gateway(mocks, policies.RoundRobin(), plans=plans) as gateway:
            slow = await ask(gateway, "slow")
            fast = await ask(gateway, "fast")
            other = await ask(gateway, "other")
            assert [one[0] for one in (slow, fast, other)] == [200] * 3
            assert e2e(slow[2]) == pytest.approx(4 * e2e(fast[2]), rel=0.1)
            assert slow[1] in [mocks[0].url, mocks[1].url]
            assert (fast[1], other[1:]) == (mocks[2].url, (mocks[3].url, ""))
            assert (await ask(gateway, "adapter"))[1:] == fast[1:]
            tagged = [TAG_ID.encode() in mock.seen[0][2] for mock in mocks if mock.seen]
            assert tagged == [True, True, False]  # round robin looks at no server
            assert (await ask(gateway, "nobody's"))[0] == 404
            metrics = await gateway.metrics()
            assert metrics["block_active_instances"] == 4
            assert metrics["block_predicted_e2e_seconds_count"] == 3

    run(main())


def test_a_busy_server_of_one_model_is_left_out_for_it_only() -> None:
    async def main() -> None:
        mocks = [serving("a"), serving("a"), serving("b")]
        async with running_gateway(mocks, policies.RoundRobin(), plans={"a": plan(policies.INFaaS())}) as gateway:
            mocks[0].place(7, 10_000, 500)
            mocks[2].place(7, 10_000, 500)
            for _ in range(3):
                assert (await ask(gateway, "a"))[0] == 200
                assert (await ask(gateway, "b"))[0] == 200
            assert [len(mock.seen) for mock in mocks] == [0, 3, 3]

    run(main())


def test_a_server_that_changes_its_model_changes_its_group_and_ends_what_it_began() -> None:
    async def main() -> None:
        async def waits(mock: Mock, http: Any) -> Any:
            await mock.go.wait()
            return await answers(mock, http)

        moves, stays = serving("a"), serving("b")
        answers = moves.answer
        moves.answer = waits
        async with running_gateway(
            [moves, stays], policies.RoundRobin(), plans={"b": plan(policies.INFaaS())}
        ) as gateway:
            moves.go.clear()
            begun = asyncio.create_task(ask(gateway, "a"))
            await eventually(lambda: len(moves.seen) == 1)
            moves.models = ["b"]
            await eventually(lambda: gateway.gateway.groups.of(0) is gateway.gateway.groups.of(1))
            assert (await ask(gateway, "a"))[0] == 404
            stays.place(7, 10_000, 500)
            moves.go.set()
            assert (await begun)[0] == 200
            assert (await ask(gateway, "b"))[1] == moves.url
            await stays.kill()
            assert (await ask(gateway, "b"))[1] == moves.url

    run(main())


def test_what_names_no_model_goes_to_any_server() -> None:
    async def main() -> None:
        mocks = [serving("a"), serving("a")]
        async with running_gateway(mocks, policies.RoundRobin(), plans={"a": plan(policies.RoundRobin())}) as gateway:
            assert [(await gateway.ask(b"{}", path))[0] for path in ("/v1/completions", "/tokenize")] == [200, 200]

    run(main())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ("scheduler=nothing", "scheduler=nothing: "),
        ("gateway.port=1", "gateway.port=1: a model has only scheduler, model, "),
        ("scheduler=random lengths=compact", "lengths=compact: has no effect: this policy does not look"),
        ("workload.qps=3", "workload.qps=3: a model has only scheduler"),
        ("model=llama9", "model=llama9: "),
        ('scheduler="block', 'scheduler="block: No closing quotation'),
    ],
)
def test_wrong_keys_of_a_model_are_told_in_one_line(keys: str, says: str) -> None:
    async def main() -> None:
        wrong = [
            "scheduler=round_robin",
            "gateway.urls=[http://127.0.0.1:9]",
            f"gateway.models=[{{name: m, keys: '{keys}'}}]",
        ]
        gateway = await command(*wrong)
        _, errors = await gateway.communicate()
        (line,) = errors.decode().splitlines()
        assert line.startswith(f"error: gateway.models: m: {says}")
        assert gateway.returncode == 2

    run(main())


@pytest.mark.slow
def test_a_command_gives_each_model_its_own() -> None:
    async def main() -> None:
        mocks = [serving("llama"), serving("qwen")]
        for mock in mocks:
            await mock.start()
        own = "gateway.models=[{name: qwen, keys: 'scheduler=block model=qwen2-7b cluster.gpu=a100-40gb'}]"
        urls = f"gateway.urls=[{mocks[0].url},{mocks[1].url}]"
        gateway = await command("scheduler=block", "model=llama2-7b", "cluster.gpu=a30", urls, own, "gateway.port=0")
        assert gateway.stdout is not None
        address = (await gateway.stdout.readline()).decode().split(": ")[0]
        forecasts = {}
        for name in ("llama", "qwen"):
            asks = await asyncio.create_subprocess_exec(
                *[sys.executable, "-c", ASKS, address, name], stdout=asyncio.subprocess.PIPE
            )
            forecasts[name] = e2e((await asks.communicate())[0].decode())
        assert forecasts["llama"] > 1.5 * forecasts["qwen"] > 0  # an A100 has twice the bandwidth of an A30
        gateway.terminate()
        await gateway.communicate()
        for mock in mocks:
            await mock.runner.cleanup()

    asyncio.run(asyncio.wait_for(main(), 60))


ASKS = """
import json, sys, urllib.request
body = json.dumps({"model": sys.argv[2], "prompt": "x" * 400, "max_tokens": 50}).encode()
asked = urllib.request.Request(sys.argv[1] + "/v1/completions", body, {"x-block-explain": "1"})
print(urllib.request.urlopen(asked).headers["x-block-forecast"])
"""
