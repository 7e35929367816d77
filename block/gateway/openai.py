"""OpenAI's words: the model that a request names, the tag that tells a server its number, what answers count, errors.

Answers to OpenAI's responses and to Anthropic's messages are read as well, as vLLM speaks them.
"""

from __future__ import annotations

import json
import re
from typing import Any, NamedTuple
from urllib.parse import unquote

from block.gateway.http1 import HTTPRequest
from block.vllm_plugin.tags import TAG_EXPECTED, TAG_ID

JSON = [(b"Content-Type", b"application/json"), (b"Access-Control-Allow-Origin", b"*")]
"""Headers of the gateway's own answers; browsers may read them, as vLLM lets them."""

_PROMPT_TOKENS = re.compile(rb'"(?:prompt|input)_tokens":\s*(\d+)')
_CACHED_TOKENS = re.compile(rb'"(?:cached|cache_read_input)_tokens":\s*(\d+)')
_BESIDE_INPUT = re.compile(rb'"cache_(?:read|creation)_input_tokens":\s*(\d+)')
_MODEL_IN_FORM = re.compile(rb'name="?model"?\r\n(?:[^\r\n]+\r\n)*\r\n([^\r\n]*)\r\n')
_COMPLETION_TOKENS = re.compile(rb'"(?:completion|output)_tokens":\s*(\d+)')


def model_of(http: HTTPRequest) -> str | None:
    """The model that a request names in its path, or in its body, JSON or a form; None if it names none."""
    if http.path.startswith(b"/v1/models/"):
        return unquote(http.path.removeprefix(b"/v1/models/").decode("latin-1"))
    kind = next((value for name, value in http.headers if name.lower() == b"content-type"), b"")
    if kind.startswith(b"multipart/form-data"):
        found = _MODEL_IN_FORM.search(http.body)
        return None if found is None else found[1].decode(errors="replace")
    try:
        fields = json.loads(http.body)
    except (ValueError, RecursionError):
        return None
    named = fields.get("model") if isinstance(fields, dict) else None
    return named if isinstance(named, str) else None


def tagged(body: bytes, fields: dict[str, Any], number: int, expected_tokens: int) -> bytes:
    """The body with the tag that the plugin reads, in front of all that it holds; the rest keeps its bytes.

    Where that cannot be, because there are `vllm_xargs` already or the encoding is not UTF-8, it is written anew. A
    request does not get to have vLLM report in its cache events what was cached before: that would be counted twice.
    """
    tag = {TAG_ID: number, TAG_EXPECTED: expected_tokens}
    if "vllm_xargs" in fields or json.detect_encoding(body) != "utf-8":
        own = fields.get("vllm_xargs") or {}
        if not isinstance(own, dict):
            return body  # the server will refuse it
        kept = {name: value for name, value in own.items() if name != "kv_cache_report_mode"}
        return json.dumps({**fields, "vllm_xargs": {**kept, **tag}}).encode()
    head, brace, rest = body.partition(b"{")
    comma = b"," if fields else b""
    return b'%s%s"vllm_xargs":%s%s%s' % (head, brace, json.dumps(tag).encode(), comma, rest)


def completion_tokens(answer: bytes) -> int | None:
    """Response tokens by the last `usage` in these bytes; None if there is none."""
    if b'_tokens"' not in answer:
        return None
    found = _COMPLETION_TOKENS.findall(answer)
    return int(found[-1]) if found else None


class PromptUsage(NamedTuple):
    """What an answer says of its prompt: its tokens, and how many of them were cached (None: that is not said)."""

    tokens: int
    cached: int | None


def prompt_usage(answer: bytes) -> PromptUsage | None:
    """By the last `usage` in these bytes; None if there is none, or it counts no token."""
    if b'_tokens"' not in answer:
        return None
    prompt, cached = _PROMPT_TOKENS.findall(answer), _CACHED_TOKENS.findall(answer)
    if not prompt:
        return None
    tokens = int(prompt[-1])
    if b'"cache_' in answer:  # Anthropic's input is what was neither cached before nor newly
        tokens += sum(map(int, _BESIDE_INPUT.findall(answer, answer.rfind(b'"usage"'))))
    return PromptUsage(tokens, int(cached[-1]) if cached else None) if tokens else None


_KINDS = {
    403: "PermissionDeniedError",
    404: "NotFoundError",
    500: "InternalServerError",
    502: "BadGatewayError",
    503: "ServiceUnavailableError",
    504: "TimeoutError",
}
"""Of errors that are not the client's: "BadRequestError"."""


def error_json(status: int, message: str) -> bytes:
    """An error as OpenAI's API words it."""
    kind = _KINDS.get(status, "BadRequestError")
    return json.dumps({"error": {"message": message, "type": kind, "param": None, "code": status}}).encode()


def error_event(status: int, message: str, *, anthropic: bool = False) -> bytes:
    """`error_json` as the last event of a stream that breaks off; it ends whatever event was being sent.

    anthropic: as an event of Anthropic's, whose client passes over what has no name.
    """
    event, kind = (b"event: error\n", b'"type": "error", ') if anthropic else (b"", b"")
    return b"\n\n%sdata: {%s%s\n\n" % (event, kind, error_json(status, message)[1:])
