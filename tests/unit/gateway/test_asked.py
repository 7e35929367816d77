"""How much a request asks for, worked by hand from how vLLM 0.32 treats it, and what the gateway makes of it."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from aiohttp import web
from mock_servers import Mock, PluginMock, eventually, run, running_gateway
from test_gateway_prefixes import Letters
from test_stock_servers import Stock, late

from block.core.snapshot import ID, NUM_PROMPT_TOKENS
from block.dispatch import policies
from block.gateway.asked import MOST_SEQUENCES, Asked, prompt_text, read, user_of
from block.gateway.feedback import PromptRates

PICTURE = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 10_000}}
CHAT: list[dict[str, Any]] = [
    {"role": "system", "content": "12345678"},
    {"role": "user", "content": [{"type": "text", "text": "1234"}, "1234"]},
    {"role": "assistant", "content": None},
]
CALL = {"id": "1", "type": "function", "function": {"name": "asks", "arguments": '{"a": 12}   '}}
USER = {"role": "user", "content": "1234"}
TOOL = {"type": "function", "function": {"name": "ask", "parameters": {"type": "object"}}}
TOOL_BYTES = len(json.dumps([TOOL]))
THOUGHT = {"role": "assistant", "content": "1234", "reasoning_content": "12345678"}
PLAIN = ["a", "b"]


def of(fields: dict[str, Any]) -> Asked:
    return read(json.dumps(fields).encode())


@pytest.mark.parametrize(
    ("fields", "tokens"),
    [
        ({"prompt": [5, 6, 7]}, 3),
        ({"prompt": [[5, 6, 7], [8]]}, 4),
        ({"prompt": "12345678"}, 2),
        ({"prompt": "123456789"}, 3),
        ({"prompt": "三四"}, 2),
        ({"prompt": ["1234", "1234"]}, 2),
        ({"prompt": "\ud800"}, 1),
        ({"prompt": []}, 0),
        ({"prompt": {"a": 1}, "messages": "hm"}, 5),
        ({"messages": CHAT}, 12 + 4),
        ({"messages": [1, {}]}, 8),
        ({"input": "12345678", "instructions": "1234"}, 4 + 2 + 4 + 1),
        ({"input": CHAT}, 12 + 4),
        ({"input": [{"role": "user", "content": [{"type": "input_text", "text": "1234"}]}]}, 4 + 1),
        ({"system": "12345678", "messages": [USER]}, 4 + 2 + 4 + 1),
        ({"system": [{"type": "text", "text": "12345678"}], "messages": [USER]}, 4 + 2 + 4 + 1),
        # Declared tools are written into the prompt; formats of responses are not, nor functions as of old.
        ({"messages": [USER], "tools": [TOOL]}, 5 + -(-TOOL_BYTES // 4)),
        ({"messages": [USER], "tools": [TOOL], "tool_choice": "none"}, 5 + -(-TOOL_BYTES // 4)),
        ({"messages": [USER], "functions": [TOOL], "response_format": {"type": "json_schema", "json_schema": {}}}, 5),
        # Calls of tools, and what they have found.
        ({"messages": [{"role": "assistant", "tool_calls": [CALL]}]}, 4 + 4 + 1 + 3),
        ({"messages": [{"role": "tool", "tool_call_id": "1", "content": "1234"}]}, 4 + 1),
        ({"input": [{"type": "function_call", "name": "asks", "arguments": "1234", "call_id": "1"}]}, 4 + 4 + 2),
        ({"input": [{"type": "function_call_output", "call_id": "1", "output": "1234"}]}, 4 + 1),
        ({"messages": [{"role": "assistant", "content": [{"type": "tool_use", "name": "asks", "input": {}}]}]}, 10),
        ({"messages": [{"role": "user", "content": [{"type": "tool_result", "content": "1234"}]}]}, 4 + 4 + 1),
        # What was thought counts since the user's last question.
        ({"messages": [USER, THOUGHT, USER]}, 3 * 5),
        ({"messages": [USER, THOUGHT]}, 2 * 5 + 2),
        ({"messages": [USER, {"role": "assistant", "content": [{"type": "thinking", "thinking": "1234"}]}]}, 9 + 1),
        ({"input": [USER, {"type": "reasoning", "summary": [], "content": [{"text": "1234"}]}]}, 5 + 4 + 1),
        # A picture costs what it costs, and not what its data are long.
        ({"messages": [{"role": "user", "content": [PICTURE, PICTURE]}]}, 4 + 2 * 576),
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {"data": "A" * 999}}]}]}, 4 + 576),
        ({"messages": [{"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}]}, 4 + 750),
        ({"messages": [{"role": "user", "content": [{"video_url": {"url": "x"}}]}]}, 4 + 8192),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "data:x"}]}]}, 4 + 576),
    ],
)
def test_a_body_says_how_long_its_prompts_are_together(fields: dict[str, Any], tokens: int) -> None:
    assert PromptRates().tokens(of(fields)) == tokens


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"prompt": "a", "max_tokens": 7}, 7),
        ({"prompt": "a", "max_tokens": 700}, 100),
        ({"prompt": "a"}, 16),
        ({"prompt": "a", "max_tokens": None}, 16),
        ({"prompt": "a", "max_tokens": 0, "echo": True}, 1),
        ({"prompt": "a", "max_tokens": "7"}, 100),
        ({"prompt": "a", "max_tokens": -7}, 100),
        ({"prompt": "a", "max_tokens": 70, "max_completion_tokens": 9}, 70),
        ({"prompt": "a", "max_tokens": 700, "stream": True}, 100),
        ({"messages": [], "max_completion_tokens": 9, "max_tokens": 7}, 9),
        ({"messages": [], "max_completion_tokens": None, "max_tokens": 7}, 7),
        ({"messages": []}, 100),
        ({"messages": [], "min_tokens": 120}, 120),
        ({"messages": [], "min_tokens": 120, "max_tokens": 110}, 110),
        ({"messages": [], "ignore_eos": True, "max_tokens": 300}, 300),
        ({"messages": [], "ignore_eos": True}, 1000),
        ({"messages": [], "ignore_eos": True, "stop": ["x"], "max_tokens": 300}, 100),
        ({"input": "a", "max_output_tokens": 9, "max_tokens": 7}, 9),
        ({"input": "a"}, 100),
    ],
)
def test_a_body_says_how_long_a_response_may_and_must_be(fields: dict[str, Any], expected: int) -> None:
    """Of one that is thought to have 100 tokens, where the model has room for 1,000."""
    assert of(fields).capped(100, 1000) == expected


@pytest.mark.parametrize(
    ("fields", "sequences", "each_prompt"),
    [
        ({"prompt": "x" * 40}, 1, 10),
        ({"prompt": "x" * 40, "n": 4}, 4, 10),
        ({"prompt": "x" * 40, "n": 4, "best_of": 9}, 4, 10),  # vLLM 0.32 passes over best_of
        ({"prompt": ["x" * 40, "x" * 80]}, 2, 15),
        ({"prompt": [[1, 2, 3], [4]], "n": 3}, 6, 2),
        ({"prompt": [[1, 2, 3]]}, 1, 3),
        ({"prompt": [1, 2, 3], "n": None}, 1, 3),
        ({"messages": [USER], "n": 2}, 2, 5),
        ({"input": "1234", "n": 2}, 1, 5),  # a response has no samples
        ({"prompt": "x" * 40, "n": 10**9}, MOST_SEQUENCES, 10),
        ({"prompt": ["x" * 40] * 1024}, MOST_SEQUENCES, 40),
    ],
)
def test_samples_and_prompts_are_sequences_of_their_own(
    fields: dict[str, Any], sequences: int, each_prompt: int
) -> None:
    asked = of(fields)
    assert (asked.sequences, asked.each_prompt(PromptRates().tokens(asked))) == (sequences, each_prompt)


@pytest.mark.parametrize(
    ("more", "complete"),
    [
        ({}, True),
        ({"prompt_embeds": "AAAA"}, False),
        ({"truncate_prompt_tokens": 3}, False),
        ({"stream_options": {"continuous_usage_stats": True}}, False),
    ],
)
def test_what_is_not_counted_teaches_nothing(more: dict[str, Any], complete: bool) -> None:
    asked = of({"model": "m", "prompt": ["a" * 4_000, "b"], **more})
    rates = PromptRates()
    rates.learn(asked, 2_000)
    assert asked.complete == complete
    assert (rates.bytes_per_token("m") < 4) == complete


def test_who_asks_and_what_is_said() -> None:
    assert user_of({"user": "a", "safety_identifier": "b"}) == "b"
    assert user_of({"user": "a"}) == "a"
    assert user_of({"metadata": {"user_id": "c"}}) == "c"
    assert user_of({"user": 5, "metadata": 7}) is None
    assert prompt_text({"prompt": PLAIN}) == "a\nb"


def test_what_text_and_pictures_cost_is_learned_of_each_model_and_forgotten() -> None:
    rates = PromptRates()
    assert rates.bytes_per_token("a") == rates.bytes_per_token(None) == 4.0
    asked = Asked(4, 9_000, None, {"model": "a"})
    for _ in range(20):
        rates.learn(asked, 3_004)
    assert 3.0 < rates.bytes_per_token("a") < 3.02
    assert rates.bytes_per_token("b") == 4.0
    for _ in range(200):
        rates.learn(asked, 1_504)
    assert 5.8 < rates.bytes_per_token("a") < 6.0
    picture = of({"model": "a", "messages": [{"role": "user", "content": [PICTURE, {"type": "text", "text": "hi"}]}]})
    for _ in range(100):
        rates.learn(picture, 1_405)
    assert 1_380 < rates.tokens(picture) < 1_405
    assert dict(rates.learned("image")).keys() == {"a"}
    rates.learn(Asked(20, 100, None, {"model": "c"}), 20)
    rates.learn(Asked(0, 100, None, {"model": "c"}, (("image", 1), ("tools", 9))), 2_000)
    assert list(rates.learned("text")) == [("a", pytest.approx(1 / rates.bytes_per_token("a")))]


def test_a_rate_is_kept_as_long_as_it_is_about_right() -> None:
    rates = PromptRates()
    asked = Asked(0, 4_000, None, {"model": "a"})
    assert rates.steady("a") == 4.0
    rates.learn(asked, 1_050)
    assert (rates.steady("a"), rates.bytes_per_token("a") < 4.0) == (4.0, True)
    for _ in range(50):
        rates.learn(asked, 2_000)
    assert rates.steady("a") == rates.bytes_per_token("a") < 2.2


@pytest.mark.parametrize(
    ("fields", "columns"),
    [({"prompt": "x" * 400, "n": 4}, [100] * 4), ({"prompt": ["x" * 400, "x" * 800]}, [150] * 2)],
)
def test_several_sequences_are_that_many_on_their_server(fields: dict[str, Any], columns: list[int]) -> None:
    async def main() -> None:
        async with running_gateway([Stock(late)], policies.LeastTokens(), plugin=False) as gateway:
            (mock,), (server,) = gateway.mocks, gateway.gateway.servers.values()
            mock.go.clear()
            asked = asyncio.create_task(gateway.ask(json.dumps(fields).encode()))
            await eventually(lambda: server.snapshot().seqs.shape[1] > 0)
            shown = server.snapshot().seqs
            (record,) = gateway.dispatcher.history.records
            assert shown[NUM_PROMPT_TOKENS].tolist() == columns
            assert set(shown[ID].tolist()) == {record.request.id}
            assert gateway.in_flight() == len(columns)
            mock.go.set()
            await asked

    run(main())


@pytest.mark.parametrize("policy", [policies.LeastRequests(), policies.LeastTokens(), policies.Block()])
def test_who_was_sent_eight_samples_has_more_to_do(policy: policies.Policy) -> None:
    """In transit to a server that does not show them, and runs eight sequences at a time."""

    async def main() -> None:
        mocks = [PluginMock(late), PluginMock(late)]
        async with running_gateway(mocks, policy) as gateway:
            for mock in mocks:
                mock.go.clear()
            tasks = []
            for body in [b'{"prompt": [1, 2, 3], "n": 8}', *[b'{"prompt": [1, 2, 3]}'] * 3]:
                tasks.append(asyncio.create_task(gateway.ask(body)))
                await eventually(lambda: sum(len(mock.seen) for mock in mocks) == len(tasks))
            first = next(mock for mock in mocks if b'"n": 8' in mock.seen[0][2])
            assert len(first.seen) == 1
            for mock in mocks:
                mock.go.set()
            await asyncio.gather(*tasks)

    run(main())


def test_a_tokenizer_counts_all_prompts_of_a_list() -> None:
    async def answer(mock: Mock, http: web.Request) -> web.StreamResponse:
        return web.json_response({"usage": {"prompt_tokens": 7, "completion_tokens": 6}})

    async def main() -> None:
        body = {"model": "m", "prompt": ["ab", "abc"], "n": 3}
        async with running_gateway([PluginMock(answer)], policies.Block(), tokenizer=Letters()) as gateway:
            gateway.gateway.groups.all[0]._block_size = 16  # as with servers that cache
            assert (await gateway.ask(json.dumps(body).encode()))[0] == 200
            request = gateway.dispatcher.history.records[-1].request
            assert (request.prompt_tokens, request.sequences, request.block_hashes) == (4, 6, None)
            assert "block_prompt_mismatches_total" not in await gateway.metrics()

    run(main())
