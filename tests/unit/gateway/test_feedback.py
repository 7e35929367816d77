"""What is thought of responses, corrected by those that have finished."""

from __future__ import annotations

import asyncio
import json
from statistics import median

import numpy as np
import pytest
from aiohttp import web
from mock_servers import Mock, PluginMock, run, running_gateway
from test_gateway_lengths import Slow, expected_of

from block.dispatch import policies
from block.gateway.asked import Asked
from block.gateway.feedback import MOST_USERS, ResponseLengths

M = ("m", "constant")


def asked(allowed: int | None = None, **more: object) -> Asked:
    return Asked(1, 0, allowed, {"model": "m"})._replace(**more)


def test_the_error_falls_after_lengths_shift() -> None:
    """Responses of some 100 tokens, then of some 600, of which the gateway thinks 256."""
    rng = np.random.default_rng(5)
    lengths = ResponseLengths()
    errors, without = [], []
    for mean in (100, 600):
        for tokens in rng.lognormal(np.log(mean), 0.4, 400).round().tolist():
            thought = lengths.corrected(asked(), 256, estimated=False)
            errors.append(abs(thought - tokens) / tokens)
            without.append(abs(256 - tokens) / tokens)
            lengths.answered(asked(), 256, None, int(tokens), estimated=False)
    for begin in (0, 400):
        early, late = median(errors[begin : begin + 20]), median(errors[begin + 300 : begin + 400])
        assert late < 0.35 < min(early, median(without[begin : begin + 400]))


def test_a_user_whose_responses_are_others_is_known_by_them() -> None:
    rng = np.random.default_rng(6)
    lengths = ResponseLengths()
    for _ in range(200):
        for user, mean in (("brief", 50), ("long", 800)):
            lengths.learn(M, user, 256, mean * rng.uniform(0.8, 1.2), cut=False)
    assert 256 * lengths.factor(M, "brief") < 90
    assert 256 * lengths.factor(M, "long") > 700
    assert 350 < 256 * lengths.factor(M, "nobody") < 500
    assert 256 * lengths.factor(M, "nobody") == 256 * lengths.factor(M)
    assert lengths.factor(("other", "constant"), "brief") == 1.0


@pytest.mark.parametrize("limit", [400, 1000])
@pytest.mark.parametrize("spread", [0.3, 1.0])
def test_what_limits_cut_off_does_not_make_others_short(limit: int, spread: float) -> None:
    rng = np.random.default_rng(7)
    lengths = ResponseLengths()
    thought = []
    for tokens in rng.lognormal(np.log(300) - spread**2 / 2, spread, 3000):
        lengths.answered(asked(limit), 256, limit, min(max(round(tokens), 1), limit), estimated=False)
        thought.append(256 * lengths.factor(M))
    assert 270 < np.mean(thought[1000:]) < 330


def test_what_does_not_end_by_itself_teaches_nothing() -> None:
    lengths = ResponseLengths()
    lengths.answered(asked(500, endless=True), 256, 500, 500, estimated=False)
    lengths.answered(asked(least_tokens=500), 256, None, 500, estimated=False)
    lengths.answered(asked(500, samples=3), 256, 500, 700, estimated=False)  # one of them may have been cut
    assert list(lengths) == []
    lengths.answered(asked(500, samples=3), 256, 500, 300, estimated=False)
    assert [(model, by, factor < 1) for model, by, factor in lengths] == [("m", "constant", True)]


def test_responses_that_are_all_cut_off_never_make_it_explode() -> None:
    lengths = ResponseLengths()
    for _ in range(3000):
        lengths.learn(M, None, 256, 16, cut=True)
    assert 0.9 < lengths.factor(M) < 1.1
    for _ in range(3000):
        lengths.learn(M, "u", 256, 100_000, cut=True)
    assert 300 < lengths.factor(M, "u") < 4000


def test_the_users_that_are_remembered_are_the_latest() -> None:
    lengths = ResponseLengths()
    for i in range(MOST_USERS + 2):
        lengths.learn(M, str(i), 256, 2560, cut=False)
        lengths.learn(M, "0", 256, 2560, cut=False)
    assert len(lengths._users) == MOST_USERS
    assert lengths.factor(M, "1") == lengths.factor(M)
    assert lengths.factor(M, "0") != lengths.factor(M)


@pytest.mark.parametrize("feedback", [True, False])
def test_the_gateway_corrects_what_it_tags_and_shows_the_drift(feedback: bool) -> None:
    async def answer(mock: Mock, http: web.Request) -> web.StreamResponse:
        await http.read()
        return web.json_response({"usage": {"prompt_tokens": 3, "completion_tokens": 1024}})

    async def main() -> None:
        body = json.dumps({"model": "m", "user": "u", "messages": [{"role": "user", "content": "hi"}]}).encode()
        limited = body.replace(b'"user": "u"', b'"max_tokens": 64')
        async with running_gateway([PluginMock(answer)], policies.LeastTokens(), length_feedback=feedback) as gateway:
            for _ in range(30):
                assert (await gateway.ask(body, "/v1/chat/completions"))[0] == 200
            await gateway.ask(limited, "/v1/chat/completions")
            tags = expected_of(gateway.mocks[0])
            assert tags[0] == 256
            assert (800 < tags[-2] <= 1024) if feedback else (tags[-2] == 256)
            assert tags[-1] == 64
            metrics = await gateway.metrics()
            assert metrics["block_predicted_length_ratio_count"] == 31
            late = metrics['block_predicted_length_ratio_bucket{le="0.7"}']
            assert late == 31 if not feedback else late < 20
            assert 3 < metrics['block_length_factor{by="constant",model="m"}'] < 4

    run(main())


def test_estimates_and_what_stands_in_for_them_are_corrected_each_by_itself() -> None:
    async def answer(mock: Mock, http: web.Request) -> web.StreamResponse:
        await http.read()
        return web.json_response({"usage": {"prompt_tokens": 3, "completion_tokens": 40}})

    async def main() -> None:
        said = json.dumps({"model": "m", "prompt": "x" * 20, "max_tokens": 999}).encode()
        async with running_gateway(
            [PluginMock(answer)], policies.LeastTokens(), lengths=Slow(), estimate_timeout_s=5.0
        ) as gateway:
            await asyncio.gather(*(gateway.ask(said) for _ in range(20)))
            await gateway.ask(b'{"model": "m", "prompt": [1], "max_tokens": 999}')
            metrics = await gateway.metrics()
            assert metrics['block_length_factor{by="estimate",model="m"}'] > 1
            assert metrics['block_length_factor{by="constant",model="m"}'] < 1

    run(main())


def test_policies_that_look_at_no_lengths_learn_none() -> None:
    async def main() -> None:
        async with running_gateway([Mock()]) as gateway:
            assert (await gateway.ask())[0] == 200
            assert not any("length" in name for name in await gateway.metrics())

    run(main())
