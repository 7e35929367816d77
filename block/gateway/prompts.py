"""What the prompt of a request is: how many tokens, and the hashes of its blocks, by which prefixes are found again.

With the model's tokenizer both are what a server computes, so that its prefix cache can be looked up. Without one, the
bytes of the text stand for tokens: good enough to know again what was sent before.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, Protocol, TypeGuard

import numpy as np

from block.core.arrays import Ints
from block.core.errors import one_line
from block.core.hashing import hash_tokens, root

log = logging.getLogger(__name__)

TIMEOUT, FAILED, NOT_TEXT = "timeout", "failed", "not_text"
"""Why the tokens of a prompt are not known: too slow, the tokenizer or the chat template raised, or there are images,
embeddings, calls of tools as Anthropic has them, or a conversation that its server remembers.
"""


class Prompt(NamedTuple):
    """Of a request: its prompts' tokens, None if only their text tells; and the hashes of its full blocks, None if it
    is not known what it shares, as of several prompts.
    """

    tokens: int | None
    hashes: Ints | None
    exact: bool = False
    """Whether they are the tokens that a server has."""


UNKNOWN = Prompt(None, None)


class Prompts(Protocol):
    """Reads prompts, one way or another."""

    async def read(self, fields: Mapping[str, Any], block_size: int, adapter: str | None) -> Prompt:
        """The prompt of the request with these fields, in blocks of so many tokens. adapter: the one it asks for."""
        ...

    def close(self) -> None:
        """Read no more."""
        ...


class TextPieces:
    """Hashes pieces of what was sent, as long as a block is about. They are those of no server's blocks.

    bytes_per_token: of a model's text; where it says something else than before, nothing is known again.
    """

    def __init__(self, bytes_per_token: Callable[[object], float]) -> None:
        self._bytes_per_token = bytes_per_token

    async def read(self, fields: Mapping[str, Any], block_size: int, adapter: str | None) -> Prompt:
        """Of token ids, text, or messages with tools."""
        each = _each(fields)
        said, messages = each[0].get("prompt") if len(each) == 1 else None, fields.get("messages")
        if _is_tokens(said):
            return _hashed(said, block_size, _extra_keys(fields, adapter))
        if isinstance(messages, list):
            said = _spelt_out(messages, fields.get("tools"), fields.get("system"))
        if not isinstance(said, str):
            return UNKNOWN
        text = np.frombuffer(said.encode("utf-8", "surrogatepass"), dtype=np.uint8)
        keys = [f"model {fields.get('model')}", *_extra_keys(fields, None)]
        piece = round(block_size * self._bytes_per_token(fields.get("model")))
        return Prompt(None, hash_tokens(text.astype(np.int64), max(piece, 1), root(*keys)))

    def close(self) -> None:
        """There is nothing to end."""


class TokenizedPrompts:
    """Reads prompts as a vLLM server does, by its tokenizer and chat template, in a thread of its own.

    tokenizer: of transformers. timeout_s: how long a request waits for that. fell_back: told why the tokens of a prompt
    are not known.
    """

    def __init__(self, tokenizer: Any, timeout_s: float, fell_back: Callable[[str], None]) -> None:
        self._tokenizer = tokenizer
        self._timeout_s = timeout_s
        self._fell_back = fell_back
        self._thread = ThreadPoolExecutor(1, "tokenizer")
        self._complained = False

    async def read(self, fields: Mapping[str, Any], block_size: int, adapter: str | None) -> Prompt:
        """As the server counts and hashes it; UNKNOWN, and that is counted, if there is no telling in time."""
        keys, each = _extra_keys(fields, adapter), _each(fields)
        if len(each) == 1 and _is_tokens(said := each[0].get("prompt")) and not fields.get("truncate_prompt_tokens"):
            return _hashed(said, block_size, keys)
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(self._timeout_s):
                found = await loop.run_in_executor(self._thread, lambda: [self.tokens(one) for one in each])
        except TimeoutError:
            self._fell_back(TIMEOUT)
            return UNKNOWN
        except Exception as error:  # templates raise whatever they like at messages that they do not like
            self._fell_back(FAILED)
            if not self._complained:
                log.warning("a prompt's tokens are not known: %s", one_line(error))
            self._complained = True
            return UNKNOWN
        known = [tokens for tokens in found if tokens is not None]
        if len(known) < len(found):
            self._fell_back(NOT_TEXT)
            return UNKNOWN
        if len(known) == 1:
            return _hashed(known[0], block_size, keys)
        return Prompt(sum(map(len, known)), None, exact=True)

    def tokens(self, fields: Mapping[str, Any]) -> list[int] | None:
        """The token ids of a request's prompt; None if they do not follow from its text. Any error of a template's."""
        if any(fields.get(key) is not None for key in _OTHERWISE):
            return None
        fields = _as_chat(fields)
        prompt, messages = fields.get("prompt"), fields.get("messages")
        if messages is None and _is_tokens(prompt):
            return prompt
        if messages is None and isinstance(prompt, str):
            special = bool(fields.get("add_special_tokens", True))
            return list(self._tokenizer(prompt, add_special_tokens=special).input_ids)
        if not isinstance(messages, list):
            return None
        flat = [_flat(message) for message in messages]
        if None in flat:
            return None
        text = self._tokenizer.apply_chat_template(
            flat,
            tools=[_tool(one) for one in fields.get("tools") or ()] or None,
            documents=fields.get("documents"),
            add_generation_prompt=fields.get("add_generation_prompt", True),
            continue_final_message=fields.get("continue_final_message", False),
            tokenize=False,
            **_template_keys(fields),
        )
        special = bool(fields.get("add_special_tokens", False))
        return list(self._tokenizer(text, add_special_tokens=special).input_ids)

    def close(self) -> None:
        """Those that wait get no answer."""
        self._thread.shutdown(wait=False, cancel_futures=True)


_OTHERWISE = (
    "truncate_prompt_tokens",
    "chat_template",  # one that a client sends is not to be run here
    "prompt_embeds",
    "previous_response_id",
    "previous_input_messages",
    "thinking",
    "output_config",
)
"""Keys by which a prompt is not what its text and its messages say alone."""


def _each(fields: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    """A request for each of its prompts."""
    prompts = fields.get("prompt")
    if "messages" in fields or "input" in fields or not isinstance(prompts, list) or not prompts:
        return [fields]
    return [fields] if isinstance(prompts[0], int) else [{**fields, "prompt": one} for one in prompts]


def _as_chat(fields: Mapping[str, Any]) -> Mapping[str, Any]:
    """What asks for a response, or is Anthropic's, as the chat that vLLM makes of it; without messages if it cannot be
    said.
    """
    items, first, tools = fields.get("messages"), fields.get("system"), fields.get("tools")
    if "input" in fields:
        said, first = fields["input"], fields.get("instructions")
        items = [{"role": "user", "content": said}] if isinstance(said, str) else said
        if not (isinstance(items, list) and all(isinstance(one, dict) and one.get("role") in _ASKS for one in items)):
            return {}
        tools = [{"function": one} for one in tools or () if one["type"] == "function"]
        effort = (fields.get("reasoning") or {}).get("effort")
        fields = {**fields, "reasoning_effort": effort, "add_special_tokens": True}  # as vLLM has it, twice or not
    elif isinstance(first, list):
        texts = [one["text"] for one in first if one["type"] == "text"]
        first = "".join(text for text in texts if not text.startswith("x-anthropic-billing-header"))
    if isinstance(items, list) and first:
        items = [{"role": "system", "content": first}, *items]
    return {**fields, "messages": items, "tools": tools}


_ASKS = ("system", "developer", "user")
"""Roles of items that vLLM takes as they are for messages."""


def _template_keys(fields: Mapping[str, Any]) -> dict[str, Any]:
    """What a request has its template know, and what vLLM adds to it; templates use what they know."""
    own = dict(fields.get("chat_template_kwargs") or {})
    effort = fields.get("reasoning_effort")
    if effort is not None:
        own = {"enable_thinking": effort != "none", **own, "reasoning_effort": effort}
    return own


def _spelt_out(messages: list[Any], tools: Any, system: Any) -> str | None:
    """All that messages and tools say, in one text; None if there is more than text."""
    said = [json.dumps(one, ensure_ascii=False) for one in (tools, system) if one]
    for message in messages:
        try:
            flat = _flat(message)
        except (TypeError, ValueError, LookupError, AttributeError, RecursionError):  # no message
            return None
        if flat is None:
            return None
        calls = json.dumps(flat["tool_calls"], ensure_ascii=False) if "tool_calls" in flat else ""
        said.append(f"{flat['role']}: {flat['content']}{calls}")
    return "\n".join(said)


def _flat(message: Mapping[str, Any]) -> dict[str, Any] | None:
    """A message as vLLM hands it to most templates: its content one text, its tools called with objects, and nothing
    that vLLM does not know. None if it is more than text.
    """
    role, content, calls = message["role"], message.get("content"), message.get("tool_calls")
    if isinstance(content, list):
        parts = [
            part.get("text") if isinstance(part, dict) and part.get("type") in ("text", "input_text") else None
            for part in content
        ]
        if not all(isinstance(text, str) for text in parts):
            return None
        content = "\n".join(parts)  # type: ignore[arg-type]
    flat = {"role": role, "content": "" if content is None else content}
    if role == "assistant" and calls:
        flat["tool_calls"] = [{**call, "function": _called(call["function"])} for call in calls]
    thoughts = message.get("reasoning") if message.get("reasoning") is not None else message.get("reasoning_content")
    if role == "assistant" and thoughts is not None:
        flat["reasoning"] = flat["reasoning_content"] = thoughts
    if role == "tool" and "tool_call_id" in message:
        flat["tool_call_id"] = message["tool_call_id"]
    if role == "developer":
        flat["tools"] = message.get("tools")
    return flat | {name: message[name] for name in ("name", "task") if isinstance(message.get(name), str)}


def _called(function: Mapping[str, Any]) -> dict[str, Any]:
    """A call of a function, with its arguments as an object; OpenAI has them as JSON."""
    arguments = function.get("arguments") or {}
    return {**function, "arguments": json.loads(arguments) if isinstance(arguments, str) else arguments}


def _tool(tool: Mapping[str, Any]) -> dict[str, Any]:
    """A tool as vLLM hands it to templates: what is not given is None, and what it does not know is left out."""
    function = tool["function"] if "input_schema" not in tool else {**tool, "parameters": tool["input_schema"]}
    known = {name: function.get(name) for name in ("name", "description", "parameters")}
    known |= {name: function[name] for name in ("strict", "defer_loading") if function.get(name) is not None}
    return {"type": "function", "function": known}


def _is_tokens(prompt: Any) -> TypeGuard[list[int]]:
    return isinstance(prompt, list) and bool(prompt) and all(type(one) is int and 0 <= one < 2**31 for one in prompt)


def _hashed(tokens: Sequence[int], block_size: int, keys: Sequence[str]) -> Prompt:
    return Prompt(len(tokens), hash_tokens(np.array(tokens, dtype=np.int64), block_size, root(*keys)), exact=True)


def _extra_keys(fields: Mapping[str, Any], adapter: str | None) -> list[str]:
    """What tells a prompt from others of the same tokens, as `block.vllm_plugin.prefixes` names it."""
    keys = [f"adapter {adapter}"] if adapter else []
    salt = fields.get("cache_salt")
    return [*keys, f"salt {salt}"] if salt else keys
