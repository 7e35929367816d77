"""What the gateway reads in the bodies of requests and answers, and the tag that it adds."""

from __future__ import annotations

import json
from typing import Any

import pytest

from block.gateway.openai import Asked, BytesPerToken, completion_tokens, error_event, read, tagged

CHAT: list[dict[str, Any]] = [
    {"role": "system", "content": "12345678"},
    {"role": "user", "content": [{"type": "text", "text": "1234"}, {"type": "image_url", "image_url": {"url": "x"}}]},
    {"role": "assistant", "content": None},
]


@pytest.mark.parametrize(
    ("fields", "prompt", "expected"),
    [
        ({"prompt": [5, 6, 7]}, 3, 100),
        ({"prompt": [[5, 6, 7], [8]]}, 4, 100),
        ({"prompt": "12345678"}, 2, 100),
        ({"prompt": "123456789"}, 3, 100),
        ({"prompt": "三四"}, 2, 100),
        ({"prompt": ["1234", "1234"]}, 2, 100),
        ({"prompt": "\ud800"}, 1, 100),
        ({"prompt": []}, 1, 100),
        ({"prompt": {"a": 1}, "messages": "hm"}, 1, 100),
        ({"messages": CHAT}, 15, 100),
        ({"messages": [1, {}]}, 8, 100),
        ({"prompt": "a", "max_tokens": 7}, 1, 7),
        ({"prompt": "a", "max_tokens": 700}, 1, 100),
        ({"prompt": "a", "max_tokens": None}, 1, 100),
        ({"prompt": "a", "max_tokens": "7"}, 1, 100),
        ({"prompt": "a", "max_tokens": -7}, 1, 100),
        ({"messages": [], "max_completion_tokens": 9, "max_tokens": 7}, 1, 9),
        ({"input": "12345678", "instructions": "1234", "max_output_tokens": 9}, 3, 9),
        ({"input": CHAT}, 15, 100),
        ({"system": "12345678", "messages": [{"role": "user", "content": "1234"}], "max_tokens": 9}, 7, 9),
    ],
)
def test_a_body_says_how_long_its_prompt_and_its_response_are(
    fields: dict[str, Any], prompt: int, expected: int
) -> None:
    asked = read(json.dumps(fields).encode())
    assert (asked.prompt_tokens(4.0), asked.capped(100)) == (prompt, expected)


@pytest.mark.parametrize(
    ("body", "with_tag"),
    [
        (b'{"a": 1}', b'{"vllm_xargs":{"block_id": 5, "block_expected": 6},"a": 1}'),
        (b' \n{ "a" :1, "b": 0.10 } ', b' \n{"vllm_xargs":{"block_id": 5, "block_expected": 6}, "a" :1, "b": 0.10 } '),
        (b"{ }", b'{"vllm_xargs":{"block_id": 5, "block_expected": 6} }'),
        (b'{"vllm_xargs": 3}', b'{"vllm_xargs": 3}'),
    ],
)
def test_a_tag_goes_in_front_and_the_rest_keeps_its_bytes(body: bytes, with_tag: bytes) -> None:
    assert tagged(body, json.loads(body), 5, 6) == with_tag


@pytest.mark.parametrize(
    ("body", "rest"),
    [
        (b'{"vllm_xargs": {"mine": 1, "block_id": 9}, "a": 2}', {"mine": 1}),
        (b'{"vllm_xargs": null, "a": 2}', {}),
        (b'{"vllm_xargs": {"kv_cache_report_mode": "full", "mine": 1}, "a": 2}', {"mine": 1}),
        ('{"a": 2}'.encode("utf-16"), {}),
        ('{"a": 2}'.encode("utf-16-le"), {}),
        ('{"a": 2}'.encode("utf-8-sig"), {}),
    ],
)
def test_a_tag_joins_those_of_the_client(body: bytes, rest: dict[str, Any]) -> None:
    done = json.loads(tagged(body, json.loads(body), 5, 6).decode())
    assert done == {"a": 2, "vllm_xargs": {**rest, "block_id": 5, "block_expected": 6}}


def test_the_last_usage_of_an_answer_counts() -> None:
    assert completion_tokens(b'{"usage":{"completion_tokens": 3}} {"completion_tokens":41}') == 41
    assert completion_tokens(b'{"usage":null}') is None
    assert completion_tokens(b'"completion_tokens":null') is None
    assert json.loads(error_event(502, 'a "b"\n').strip().removeprefix(b"data: "))["error"]["message"] == 'a "b"\n'


def test_the_length_of_a_token_is_learned_of_each_model_and_forgotten() -> None:
    rates = BytesPerToken()
    assert rates.of("a") == rates.of(None) == 4.0
    asked = Asked(4, 9_000, None, {"model": "a"})
    for _ in range(20):
        rates.learn(asked, 3_004)
    assert 3.0 < rates.of("a") < 3.01
    assert rates.of("b") == 4.0
    for _ in range(200):
        rates.learn(asked, 1_504)
    assert 5.8 < rates.of("a") < 6.0
    assert asked.prompt_tokens(6.0) == 1_504
    for fields in ({"tools": []}, {"messages": [{"content": [{"type": "image_url"}]}]}):
        rates.learn(Asked(0, 9_000, None, {"model": "c", **fields}), 10)
    rates.learn(Asked(20, 100, None, {"model": "c"}), 20)
    assert dict(rates).keys() == {"a"}
