"""What is known of prompts and of prefix caches: by tokenizer or by text, from tables or by what was sent."""

from __future__ import annotations

import asyncio
import json
import time
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from mock_servers import LIMITS, PluginMock, RunningGateway, run, running_gateway, says

from block.core.hashing import hash_tokens, root
from block.dispatch import policies, routers
from block.engine.prefix_table import note, table_size
from block.gateway.openai import PromptUsage, prompt_usage
from block.gateway.prompts import UNKNOWN, TextPieces, TokenizedPrompts
from block.vllm_plugin import state_buffer as b

CACHING = LIMITS._replace(enable_prefix_caching=True)
LONG, OTHER = "abcdefgh" * 40, "ijklmnop" * 40


class Letters:
    """A tokenizer whose tokens are the letters; a chat is its messages, each behind the first letter of its role."""

    def __init__(self, pause_s: float = 0.0) -> None:
        self._pause_s = pause_s

    def __call__(self, text: str, add_special_tokens: bool) -> Any:
        time.sleep(self._pause_s)
        return SimpleNamespace(input_ids=[1] * add_special_tokens + [ord(letter) for letter in text])

    def apply_chat_template(self, messages: Any, **_: Any) -> str:
        return "".join(message["role"][0] + message["content"] for message in messages)


def tokens(text: str) -> np.ndarray[Any, Any]:
    return np.array([1, *map(ord, text)])


class CachingMock(PluginMock):
    """A server with a prefix cache; `has` puts the first blocks of a prompt there."""

    def __init__(self, answer: Any = None, block_size: int = 16, tells: bool = True) -> None:
        self._tells = tells
        super().__init__(answer or says(200), CACHING._replace(block_size=block_size))

    def renew(self) -> None:
        super().renew()
        if self._tells:
            self.buffer.header[b.PLACES] = table_size(100)

    def has(self, prompt: np.ndarray[Any, Any], *keys: str) -> None:
        table = self.buffer.prefix_table
        assert table is not None
        hashes = hash_tokens(prompt, self.settings.block_size, root(*keys))
        note(table, np.stack([hashes, np.ones_like(hashes), np.zeros_like(hashes)], axis=1))


def asking(prompt: str, **fields: Any) -> bytes:
    return json.dumps({"model": "tiny", "prompt": prompt, "max_tokens": 5, **fields}).encode()


async def sources(gateway: RunningGateway) -> list[str]:
    """How it is known of each server what it has, by the metrics."""
    metrics = await gateway.metrics()
    found = {
        i: how
        for i in range(len(gateway.mocks))
        for how in ("table", "events", "sent", "none")
        if f'block_prefix_source{{server="{i}",source="{how}"}}' in metrics
    }
    return [found[i] for i in sorted(found)]


async def served_by(gateway: RunningGateway, *bodies: bytes) -> list[int]:
    for body in bodies:
        assert (await gateway.ask(body))[0] == 200
    return [decision.instance_id for _, decision, _ in gateway.dispatcher.history.decisions][-len(bodies) :]


def test_a_request_goes_where_the_blocks_of_its_prompt_are() -> None:
    async def main() -> None:
        async with running_gateway([CachingMock(), CachingMock()], policies.BlockCache(), tokenizer=Letters()) as one:
            assert await sources(one) == ["table", "table"]
            first, second = one.mocks
            assert isinstance(first, CachingMock)
            assert isinstance(second, CachingMock)
            second.has(tokens(LONG))
            first.has(tokens(OTHER))
            assert await served_by(one, asking(LONG), asking(OTHER), asking(LONG)) == [1, 0, 1]
            assert one.dispatcher.history.records[0].request.prompt_tokens == len(LONG) + 1
            chat = json.dumps({"model": "tiny", "messages": [{"role": "user", "content": LONG}]}).encode()
            first.has(np.array([ord("u"), *map(ord, LONG)]))
            assert (await one.ask(chat, "/v1/chat/completions"))[0] == 200
            assert one.dispatcher.history.decisions[-1][1].instance_id == 0

    run(main())


def test_adapters_and_salts_have_blocks_of_their_own() -> None:
    async def main() -> None:
        first, second = CachingMock(), CachingMock()
        first.models = second.models = ["tiny", "wolf"]
        async with running_gateway([first, second], policies.BlockCache(), tokenizer=Letters()) as one:
            first.has(tokens(LONG), "adapter wolf")
            second.has(tokens(LONG), "adapter wolf", "salt pepper")
            wolf = asking(LONG, model="wolf")
            assert await served_by(one, wolf, asking(LONG, model="wolf", cache_salt="pepper"), wolf) == [0, 1, 0]

    run(main())


@pytest.mark.parametrize("told", ["tells nothing", "is not asked", "has no tokenizer"])
def test_else_a_request_goes_where_its_like_was_sent(told: str) -> None:
    async def main() -> None:
        mocks = [CachingMock(tells=told != "tells nothing") for _ in range(2)]
        keys = {
            "tokenizer": None if told == "has no tokenizer" else Letters(),
            "prefixes": "sent" if told == "is not asked" else "told",
        }
        async with running_gateway(mocks, policies.BlockCache(), **keys) as one:
            assert await sources(one) == ["sent", "sent"]
            first = await served_by(one, asking(LONG))
            again = await served_by(one, *[asking(LONG + letter) for letter in "rstuvw"])
            assert set(again) == set(first)
            assert len(set(await served_by(one, *[asking(letter + LONG) for letter in "abcdefgh"]))) == 2

    run(main())


def test_an_answer_tells_that_less_was_cached_than_was_thought_and_metrics_count_it() -> None:
    """80 tokens, of which the server had half at first, and then none."""
    usage = b'{"usage": {"prompt_tokens": 80, "completion_tokens": 5, "prompt_tokens_details": {"cached_tokens": %d}}}'

    async def main() -> None:
        mock = CachingMock(says(200, usage % 40))
        async with running_gateway([mock], policies.BlockCache()) as one:
            await served_by(one, asking(LONG), asking(LONG))
            assert one.dispatcher.history.records[-1].cached_tokens == 40
            metrics = await one.metrics()
            assert metrics['block_prompt_tokens_total{server="0"}'] == 160
            assert metrics['block_cached_tokens_total{server="0"}'] == 80
            assert "block_prompt_mismatches_total" not in metrics  # by its bytes, it is not the tokens
            index, request = one.dispatcher._prefixes, one.dispatcher.history.records[-1].request
            assert index is not None
            assert index.hits(request, [0]).tolist() == [
                [64, 0]
            ]  # all but the last block, whose end is computed always
            mock.answer = says(200, usage % 0)
            await served_by(one, asking(OTHER), asking(LONG))
            assert one.dispatcher.history.records[-1].cached_tokens == 0
            assert index.hits(one.dispatcher.history.records[-2].request, [0]).tolist() == [[64, 0]]

    run(main())


def test_half_of_what_was_thought_is_no_miss_if_it_was_thought_by_text() -> None:
    usage = b'{"usage": {"prompt_tokens": 80, "completion_tokens": 5, "prompt_tokens_details": {"cached_tokens": 56}}}'

    async def main() -> None:
        async with running_gateway([CachingMock(says(200, usage))], policies.BlockCache()) as one:
            await served_by(one, *[asking(letter * 320) for letter in "abcd"], asking("d" * 320))
            index, records = one.dispatcher._prefixes, one.dispatcher.history.records
            assert index is not None
            assert [index.hits(record.request, [0])[0, 0] for record in records] == [64] * 5

    run(main())


def test_a_tokenizer_that_is_not_the_servers_is_noticed() -> None:
    usage = b'{"usage": {"prompt_tokens": %d, "completion_tokens": 5}}'

    async def main() -> None:
        mock = CachingMock(says(200, usage % (len(LONG) + 1)))
        async with running_gateway([mock], policies.BlockCache(), tokenizer=Letters()) as one:
            await served_by(one, asking(LONG))
            assert "block_prompt_mismatches_total" not in await one.metrics()
            mock.answer = says(200, usage % 99)
            await served_by(one, asking(LONG))
            assert (await one.metrics())["block_prompt_mismatches_total"] == 1

    run(main())


@pytest.mark.parametrize("tokenizer", [Letters(), None], ids=["by tokens", "by text"])
def test_a_server_with_other_blocks_is_not_known_to_have_any(tokenizer: Letters | None) -> None:
    def cached_in(gateway: RunningGateway) -> list[list[int]]:
        """Of a prompt like the last one, what each server is thought to have."""
        index = gateway.dispatcher._prefixes
        assert index is not None
        return index.hits(gateway.dispatcher.history.records[-1].request, [0, 1, 2]).tolist()

    async def main() -> None:
        mocks = [CachingMock(), CachingMock(block_size=32), PluginMock(says(200))]
        async with running_gateway(mocks, policies.BlockCache(), tokenizer=tokenizer) as one:
            assert await sources(one) == ["table" if tokenizer else "sent", "none", "none"]
            first, second = mocks[:2]
            assert isinstance(first, CachingMock)
            assert isinstance(second, CachingMock)
            second.has(tokens(LONG))
            for _ in range(6):
                await served_by(one, asking(LONG))
            first.has(tokens(LONG)[:48])
            at_first, at_others = cached_in(one)[0], cached_in(one)[1:]
            assert at_others == [[0, 0], [0, 0]]
            assert at_first[0] >= (48 if tokenizer else 0)

    run(main())


def test_a_gateway_that_starts_before_its_servers_knows_them_when_they_come() -> None:
    async def main() -> None:
        mocks = [CachingMock(), CachingMock()]
        async with running_gateway(mocks, policies.BlockCache(), started=[], tokenizer=Letters()) as one:
            assert await sources(one) == ["none", "none"]
            mocks[1].has(tokens(LONG))
            for mock in mocks:
                await mock.start()
            async with asyncio.timeout(10):
                while len(one.dispatcher.active) < 2:
                    await asyncio.sleep(0.01)
            assert await served_by(one, asking(LONG)) == [1]
            assert await sources(one) == ["table", "table"]

    run(main())


@pytest.mark.parametrize(
    ("body", "tokenizer", "reason"),
    [
        (asking(LONG), Letters(pause_s=0.3), "timeout"),
        (json.dumps({"messages": [{"content": "x"}]}).encode(), Letters(), "failed"),
        (
            json.dumps({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}).encode(),
            Letters(),
            "not_text",
        ),
        (json.dumps({"prompt": [LONG, OTHER], "truncate_prompt_tokens": 9}).encode(), Letters(), "not_text"),
        (json.dumps({"messages": [], "chat_template": "{{ 1 }}"}).encode(), Letters(), "not_text"),
    ],
)
def test_a_prompt_whose_tokens_are_not_known_goes_by_its_bytes_and_is_counted(
    body: bytes, tokenizer: Letters, reason: str
) -> None:
    async def main() -> None:
        keys = {"tokenizer": tokenizer, "tokenize_timeout_s": 0.1}
        async with running_gateway([CachingMock()], policies.BlockCache(), **keys) as one:
            assert (await one.ask(body))[0] == 200
            assert one.dispatcher.history.records[-1].request.block_hashes is None
            assert (await one.metrics())[f'block_prompt_fallbacks_total{{reason="{reason}"}}'] == 1

    run(main())


def test_routers_that_go_by_what_they_sent_know_a_prompt_again() -> None:
    """With any servers: these policies look at counts only."""
    from mock_servers import Mock

    async def main() -> None:
        async with running_gateway([Mock(says(200)) for _ in range(3)], routers.CacheAware()) as one:
            first = await served_by(one, asking(LONG))
            elsewhere = await served_by(one, asking(OTHER))
            assert first != elsewhere
            assert (
                await served_by(one, asking(LONG + "x"), asking(OTHER + "x"), asking(LONG)) == first + elsewhere + first
            )
            assert await sources(one) == []

    run(main())


def test_pieces_of_text_share_what_messages_share() -> None:
    async def main() -> None:
        turns = [{"role": "user", "content": LONG}, {"role": "assistant", "content": OTHER}]
        pieces = TextPieces(lambda model: 4.0)
        short, whole = [(await pieces.read({"messages": turns[:n], "tools": [1]}, 16, None)).hashes for n in (1, 2)]
        assert short is not None
        assert whole is not None
        assert len(whole) > len(short) > 4
        assert (short == whole[: len(short)]).all()
        longer = (await TextPieces(lambda model: 8.0).read({"messages": turns, "tools": [1]}, 16, None)).hashes
        assert longer is not None
        assert len(longer) == len(whole) // 2  # a block has more text
        tools = [{"function": {"description": "x" * 4000}}]
        one, two = [
            await pieces.read({"messages": [{"role": "user", "content": text * 20}], "tools": tools}, 16, None)
            for text in ("我们都是服务器。", "今天天气很好吗？")
        ]
        assert one.hashes is not None
        assert two.hashes is not None
        alike = int((one.hashes == two.hashes).sum())
        assert alike == len(f"{json.dumps(tools)}\nuser: ") // 64  # the tools, and nothing of what is asked
        other = (await pieces.read({"messages": turns, "tools": [2]}, 16, None)).hashes
        assert other is not None
        assert not set(other.tolist()) & set(whole.tolist())
        exact = await pieces.read({"prompt": list(range(40))}, 16, None)
        assert exact.tokens == 40
        assert exact.hashes is not None
        assert exact.hashes.tolist() == hash_tokens(np.arange(40), 16).tolist()
        assert await pieces.read({"prompt": [LONG, OTHER]}, 16, None) == UNKNOWN
        assert (
            await pieces.read({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 16, None) == UNKNOWN
        )
        named = [(await pieces.read({"prompt": LONG, "model": name}, 16, None)).hashes for name in "ab"]
        assert named[0] is not None
        assert (named[0] != named[1]).all()

    run(main())


def test_token_ids_need_no_tokenizer() -> None:
    async def main() -> None:
        read = TokenizedPrompts(None, 1.0, pytest.fail)
        found = await read.read({"prompt": list(range(40)), "cache_salt": "s"}, 16, "wolf")
        read.close()
        assert found.tokens == 40
        assert found.hashes is not None
        assert found.hashes.tolist() == hash_tokens(np.arange(40), 16, root("adapter wolf", "salt s")).tolist()

    run(main())


@pytest.mark.parametrize(
    ("answer", "usage"),
    [
        (b'{"usage":{"prompt_tokens":40,"prompt_tokens_details":{"cached_tokens":10}}}', (40, 10)),
        (b'"prompt_tokens":8,"cached_tokens":8,"prompt_tokens":40,"cached_tokens": 4', (40, 4)),
        (b'{"usage":{"prompt_tokens":0,"prompt_tokens_details":{"cached_tokens":0}}}', None),
        (b'{"usage":{"prompt_tokens":40}}', (40, None)),
        (b'{"usage":{}}', None),
    ],
)
def test_an_answer_tells_what_its_prompt_was(answer: bytes, usage: PromptUsage | None) -> None:
    assert prompt_usage(answer) == usage


ODD = [
    {"model": ["a"], "prompt": LONG},
    {"prompt": [10**30, -1], "cache_salt": {"a": 1}},
    {"prompt": [True, 2], "add_special_tokens": "no"},
    {"messages": ["x", 3, None], "tools": {"a": 1}},
    {"messages": [{"role": 5, "content": {"a": 1}, "tool_calls": [7]}], "chat_template_kwargs": [1]},
    {"messages": [{"role": "user", "content": [5, {"type": "text"}]}], "tools": [{"function": 1}]},
    {"messages": [], "prompt": "\ud800", "documents": 1},
    {"prompt": "x", "cache_salt": "\ud800", "model": "\ud800"},
    {"prompt": [1, 2, 3], "cache_salt": "\ud800"},
    {"prompt": "x", "truncate_prompt_tokens": 3, "reasoning_effort": 7},
    {},
]


@pytest.mark.parametrize("tokenizer", [None, Letters()], ids=["by text", "by tokens"])
def test_whatever_a_body_holds_is_for_the_server_to_judge(tokenizer: Letters | None) -> None:
    async def main() -> None:
        async with running_gateway([CachingMock()], policies.BlockCache(), tokenizer=tokenizer) as one:
            for fields in ODD:
                status = 404 if fields.get("model") == "\ud800" else 200  # a name that no server has
                assert (await one.ask(json.dumps(fields).encode()))[0] == status, fields

    run(main())
