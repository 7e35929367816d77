"""Response lengths that the gateway estimates from prompts: batches, limits, and what stands in."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Sequence

import numpy as np
import pytest
from mock_servers import ASKED, Mock, PluginMock, run, running_gateway

from block.core.arrays import Ints
from block.dispatch import policies
from block.lengths import Estimates


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
        async with running_gateway([PluginMock()], policies.Block(), lengths=reader, estimate_timeout_s=5.0) as gateway:
            bodies = [b'{"prompt": "%s", "max_tokens": 99}' % (b"x" * (10 + i)) for i in range(9)]
            answers = await asyncio.gather(*(gateway.ask(body) for body in bodies))
            assert {status for status, _, _ in answers} == {200}
            assert sorted(expected_of(gateway.mocks[0])) == list(range(10, 19))
            assert len(reader.batches) < 9
            assert threading.get_ident() not in reader.threads
            metrics = await gateway.metrics()
            assert metrics["block_length_seconds_count"] == 9
            assert metrics.get('block_length_fallbacks_total{reason="timeout"}', 0) == 0
            record = gateway.dispatcher.history.records[0]
            assert record.dispatched - record.request.arrival >= 0.05  # the wait for the estimate is part of its time

    run(main())


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (b'{"prompt": "hello", "max_tokens": 3}', 3),
        (b'{"prompt": ["hello", "you"]}', 9),
        (b'{"messages": [{"role": "user", "content": "hi"}, {"content": [{"type": "text", "text": "ho"}]}]}', 5),
        (b'{"prompt": [1, 2, 3]}', 16),
        (b'{"prompt": [1, 2, 3], "max_tokens": 700}', 256),
        (b'{"prompt": [1, 2, 3], "max_tokens": 7}', 7),
        (b'{"prompt": ""}', 0),
        (b"{}", 16),
    ],
)
def test_an_estimate_comes_from_the_text_of_a_prompt_and_is_capped_by_a_limit(body: bytes, expected: int) -> None:
    async def main() -> None:
        async with running_gateway(
            [PluginMock()], policies.LeastTokens(), lengths=Slow(), estimate_timeout_s=5.0
        ) as gateway:
            assert (await gateway.ask(body))[0] == 200
            assert expected_of(gateway.mocks[0]) == [expected]
            no_text = int(expected in (256, 16, 7))
            counted = (await gateway.metrics()).get('block_length_fallbacks_total{reason="no_text"}', 0)
            assert counted == no_text

    run(main())


@pytest.mark.parametrize(
    ("reader", "reason"), [(Slow(pause_s=0.3), "timeout"), (Slow(fails=True), "failed")], ids=["slow", "failing"]
)
def test_without_an_estimate_in_time_a_constant_stands_in_and_is_counted(
    reader: Slow, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        async with running_gateway(
            [PluginMock()],
            policies.Block(),
            lengths=reader,
            estimate_timeout_s=0.02,
            expected_output_tokens=77,
            length_feedback=False,
        ) as gateway:
            assert [(await gateway.ask(ASKED.replace(b"5}", b"500}")))[0] for _ in range(3)] == [200] * 3
            assert expected_of(gateway.mocks[0]) == [77] * 3
            assert (await gateway.metrics())[f'block_length_fallbacks_total{{reason="{reason}"}}'] == 3

    run(main())
    told = [record.message for record in caplog.records if "no response lengths" in record.message]
    assert len(told) == (reason == "failed")


def test_policies_that_need_no_lengths_do_not_wait_for_estimates() -> None:
    async def main() -> None:
        reader = Slow()
        async with running_gateway([Mock()], policies.RoundRobin(), lengths=reader) as gateway:
            assert (await gateway.ask())[0] == 200
            assert reader.batches == []
            assert gateway.mocks[0].seen[0][2] == ASKED

    run(main())
