"""What the gateway reads in the bodies of requests and answers, and the tag that it adds."""

from __future__ import annotations

import json
from typing import Any

import pytest

from block.gateway.openai import completion_tokens, error_event, tagged


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
