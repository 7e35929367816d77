"""OpenAI's words: what the body of a request asks for, the tag that tells a server its number, and errors.

Those of OpenAI's responses and of Anthropic's messages are read as well, as vLLM speaks them.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from urllib.parse import unquote

from block.gateway.http1 import HTTPRequest
from block.vllm_plugin.tags import TAG_EXPECTED, TAG_ID

BYTES_PER_TOKEN = 4
"""Length of an average token in UTF-8, for prompts that are text, as long as nothing else is known."""
TOKENS_PER_MESSAGE = 4
"""What a chat template adds to each message, about."""

JSON = [(b"Content-Type", b"application/json"), (b"Access-Control-Allow-Origin", b"*")]
"""Headers of the gateway's own answers; browsers may read them, as vLLM lets them."""

_PROMPT_TOKENS = re.compile(rb'"(?:prompt|input)_tokens":\s*(\d+)')
_CACHED_TOKENS = re.compile(rb'"(?:cached|cache_read_input)_tokens":\s*(\d+)')
_MODEL_IN_FORM = re.compile(rb'name="?model"?\r\n(?:[^\r\n]+\r\n)*\r\n([^\r\n]*)\r\n')
_COMPLETION_TOKENS = re.compile(rb'"(?:completion|output)_tokens":\s*(\d+)')


class Asked(NamedTuple):
    """What a body asks for; `fields` are its own, parsed, `allowed_tokens` the most that it lets a response have.

    known_tokens: of the prompt, those of token ids and of templates. text_bytes: of its text, in UTF-8.
    """

    known_tokens: int
    text_bytes: int
    allowed_tokens: int | None
    fields: dict[str, Any]

    def prompt_tokens(self, bytes_per_token: float) -> int:
        """Of the whole prompt, at least 1; of several prompts, the sum."""
        return max(self.known_tokens + math.ceil(self.text_bytes / bytes_per_token), 1)

    def capped(self, tokens: int) -> int:
        """So many response tokens, or as many as are allowed."""
        return tokens if self.allowed_tokens is None else min(tokens, self.allowed_tokens)


def read(body: bytes) -> Asked:
    """What `body` asks for. ValueError if it is no JSON object; all else is for the server to judge."""
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the body is not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise ValueError("the body is not a JSON object")
    tokens = size = 0
    for key, counted in _COUNTED:
        if key in fields:
            more, text = counted(fields[key])
            tokens += more
            size += text
    allowed = fields.get("max_completion_tokens") or fields.get("max_tokens") or fields.get("max_output_tokens")
    limit = int(allowed) if isinstance(allowed, int) and allowed > 0 else None
    return Asked(tokens, size, limit, fields)


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


def prompt_text(fields: dict[str, Any]) -> str | None:
    """The text that is asked about: the prompt, or all messages in their order; None if it is token ids, or nothing."""
    prompt, messages = fields.get("prompt"), fields.get("messages")
    if (asked := fields.get("input")) is not None:
        prompt, messages = asked, asked
    texts = prompt if isinstance(prompt, list) else [prompt]
    if isinstance(messages, list):
        texts = [text for message in messages for text in _texts(message)]
    said = [text for text in texts if isinstance(text, str)]
    return "\n".join(said) if said else None


_Size = tuple[int, int]  # known tokens, and bytes of text


def _prompt_size(prompt: Any) -> _Size:
    if isinstance(prompt, str):
        return 0, _bytes(prompt)
    if not isinstance(prompt, list):
        return 0, 0
    if prompt and isinstance(prompt[0], int):
        return len(prompt), 0
    return sum(len(one) for one in prompt if isinstance(one, list)), sum(
        _bytes(one) for one in prompt if isinstance(one, str)
    )


def _messages_size(messages: Any) -> _Size:
    if not isinstance(messages, list):
        return 0, 0
    return TOKENS_PER_MESSAGE * len(messages), sum(_bytes(text) for message in messages for text in _texts(message))


def _texts(message: Any) -> list[str]:
    """What a message says, part by part."""
    content = message.get("content") if isinstance(message, dict) else None
    parts = content if isinstance(content, list) else [{"text": content}]
    texts = [part.get("text") for part in parts if isinstance(part, dict)]
    return [text for text in texts if isinstance(text, str)]


def _input_size(asked: Any) -> _Size:
    return (0, _bytes(asked)) if isinstance(asked, str) else _messages_size(asked)


def _bytes(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))


_COUNTED: list[tuple[str, Callable[[Any], _Size]]] = [
    ("prompt", _prompt_size),
    ("messages", _messages_size),
    ("system", _prompt_size),
    ("input", _input_size),  # of a response: a text, or messages
    ("instructions", _prompt_size),
]


class BytesPerToken:
    """How long a token of each model is in UTF-8: 4 at first, and then by what servers count of prompts."""

    def __init__(self) -> None:
        self._of: dict[str, tuple[float, float]] = {}  # by model: bytes and tokens, the older ones less

    def of(self, model: object) -> float:
        """By what is known of a model."""
        known = self._of.get(model) if isinstance(model, str) else None
        return BYTES_PER_TOKEN if known is None else known[0] / known[1]

    def learn(self, asked: Asked, tokens: int) -> None:
        """A server has counted so many tokens of a prompt."""
        model, more = asked.fields.get("model"), tokens - asked.known_tokens
        if not isinstance(model, str) or more <= 0 or asked.text_bytes == 0 or not _only_text(asked.fields):
            return
        size, count = self._of.get(model, (BYTES_PER_TOKEN * _PRIOR, _PRIOR))
        kept = max(1.0 - more / _REMEMBERED, 0.0)
        self._of[model] = kept * size + asked.text_bytes, kept * count + more

    def __iter__(self) -> Iterator[tuple[str, float]]:
        """Models, and the bytes of their tokens."""
        return ((model, size / count) for model, (size, count) in self._of.items())


def _only_text(fields: dict[str, Any]) -> bool:
    """Whether nothing but what is counted is in a prompt: no tools, images or sounds."""
    messages = fields.get("messages", fields.get("input"))
    contents = [one.get("content") for one in messages if isinstance(one, dict)] if isinstance(messages, list) else []
    parts = [part for content in contents if isinstance(content, list) for part in content]
    return "tools" not in fields and all(isinstance(part, dict) and "text" in part for part in parts)


_PRIOR = 500.0  # tokens that this counts as
_REMEMBERED = 100_000  # tokens that are not forgotten yet


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
    if not prompt or int(prompt[-1]) == 0:
        return None
    return PromptUsage(int(prompt[-1]), int(cached[-1]) if cached else None)


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


def error_event(status: int, message: str) -> bytes:
    """`error_json` as the last event of a stream that breaks off; it ends whatever event was being sent."""
    return b"\n\ndata: " + error_json(status, message) + b"\n\n"
