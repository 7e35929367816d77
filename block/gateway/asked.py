"""What the body of a request asks for: how much there is of its prompt, how many sequences, and how long they may get.

OpenAI's completions, chat completions and responses are read, and Anthropic's messages, as vLLM 0.32 treats them.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, NamedTuple

TOKENS_PER_MESSAGE = 4
"""What a chat template adds to each message, and to each call of a tool, about."""
COMPLETION_TOKENS = 16
"""The most that /v1/completions answers if a request does not say."""
MOST_SEQUENCES = 256
"""Sequences of one request that are told apart; more count as so many, with all their prompts' tokens."""

IMAGE, AUDIO, VIDEO, TOOLS = "image", "audio", "video", "tools"
"""What of a prompt is no text, and costs tokens: parts of messages; and the declared tools, in bytes of their JSON."""


class Asked(NamedTuple):
    """What a body asks for; `fields` are its own, parsed, `allowed_tokens` the most that it lets each response have.

    known_tokens: of its prompts, those of token ids and of templates. text_bytes: of their text, in UTF-8. extras: how
    much of what else there is. prompts: how many it has; samples: responses to each. least_tokens: that each response
    has; endless: whether each has all that it may. complete: whether nothing is in the prompts but what is counted.
    """

    known_tokens: int
    text_bytes: int
    allowed_tokens: int | None
    fields: dict[str, Any]
    extras: tuple[tuple[str, int], ...] = ()
    prompts: int = 1
    samples: int = 1
    least_tokens: int = 0
    endless: bool = False
    complete: bool = True

    @property
    def sequences(self) -> int:
        """How many of a server's sequences it becomes."""
        return min(self.prompts * self.samples, MOST_SEQUENCES)

    def each_prompt(self, tokens: int) -> int:
        """Prompt tokens of each sequence, in the mean, at least 1, where the prompts have so many together."""
        if self.prompts == self.samples == 1:
            return max(tokens, 1)
        return max(-(-tokens * self.samples // self.sequences), 1)

    def most_tokens(self, room: int | None = None) -> int | None:
        """The most that each response can have; None if that is not known. room: what its prompt leaves of the model's
        length.
        """
        allowed = self.allowed_tokens
        return room if allowed is None else allowed if room is None else min(allowed, room)

    def capped(self, tokens: int, room: int | None = None) -> int:
        """What to expect of each response that is thought to have so many tokens: as many as it must and may have."""
        most = self.most_tokens(room)
        if most is None:
            return max(tokens, self.least_tokens)
        return most if self.endless else min(max(tokens, self.least_tokens), most)


def read(body: bytes) -> Asked:
    """What `body` asks for. ValueError if it is no JSON object; all else is for the server to judge."""
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the body is not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise ValueError("the body is not a JSON object")
    count = _Count()
    for key, counted in _COUNTED:
        if key in fields:
            counted(count, fields[key])
    completes = "messages" not in fields and "input" not in fields
    prompt = fields.get("prompt")
    several = prompt if completes and isinstance(prompt, list) and prompt and not isinstance(prompt[0], int) else ()
    n = 1 if "input" in fields else fields.get("n", 1)
    least = fields.get("min_tokens", 0)
    return Asked(
        count.tokens,
        count.bytes,
        _allowed(fields, completes=completes),
        fields,
        tuple(count.extras.items()) if count.extras else (),
        len(several) or 1,
        min(n, MOST_SEQUENCES) if _is_number(n) else 1,
        least if _is_number(least) else 0,
        fields.get("ignore_eos") is True and not (fields.get("stop") or fields.get("stop_token_ids")),
        not (
            count.unknown
            or not _UNCOUNTED.isdisjoint(fields)
            or (several and _counts_each(fields.get("stream_options")))
        ),
    )


def _allowed(fields: dict[str, Any], *, completes: bool) -> int | None:
    """The most that a response may have, as far as the body says."""
    if completes:
        said = fields.get("max_tokens")
        if said is None or (said == 0 and fields.get("echo")):
            return COMPLETION_TOKENS if said is None else 1
    elif "input" in fields:
        said = fields.get("max_output_tokens")
    else:
        said = fields.get("max_completion_tokens")
        said = fields.get("max_tokens") if said is None else said
    return said if _is_number(said) else None


def _counts_each(options: Any) -> bool:
    """Whether a stream's usage is that of one prompt after the other."""
    return isinstance(options, dict) and bool(options.get("continuous_usage_stats"))


def _is_number(said: Any) -> bool:
    return type(said) is int and said > 0


def user_of(fields: dict[str, Any]) -> str | None:
    """Whom a request is for, as OpenAI's API has it, or Anthropic's; None if it does not say."""
    said = fields.get("safety_identifier") or fields.get("user")
    if said is None and isinstance(about := fields.get("metadata"), dict):
        said = about.get("user_id")
    return said if isinstance(said, str) and said else None


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


def _texts(message: Any) -> list[str]:
    """What a message says, part by part."""
    content = message.get("content") if isinstance(message, dict) else None
    parts = content if isinstance(content, list) else [{"text": content}]
    texts = [part.get("text") for part in parts if isinstance(part, dict)]
    return [text for text in texts if isinstance(text, str)]


class _Count:
    """What there is of a prompt, so far. unknown: whether there is more than can be counted."""

    __slots__ = ("bytes", "extras", "tokens", "unknown")

    def __init__(self) -> None:
        self.tokens = self.bytes = 0
        self.extras: dict[str, int] = {}
        self.unknown = False

    def text(self, said: Any) -> None:
        if isinstance(said, str):
            self.bytes += len(said) if said.isascii() else len(said.encode("utf-8", "surrogatepass"))

    def extra(self, kind: str, amount: int = 1) -> None:
        self.extras[kind] = self.extras.get(kind, 0) + amount

    def prompt(self, prompt: Any) -> None:
        """Of a completion: text, token ids, or a list of either."""
        if isinstance(prompt, str):
            self.text(prompt)
        elif isinstance(prompt, list) and prompt and isinstance(prompt[0], int):
            self.tokens += len(prompt)
        elif isinstance(prompt, list):
            for one in prompt:
                self.text(one)
                if isinstance(one, list):
                    self.tokens += len(one)

    def messages(self, messages: Any) -> None:
        """Of a chat, or the items of a response's input."""
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        if not isinstance(messages, list):
            return
        self.tokens += TOKENS_PER_MESSAGE * len(messages)
        # Templates write what was thought since the user last spoke, and no more (DeepSeek's and Qwen's, for two).
        asked = next((i for i in range(len(messages) - 1, -1, -1) if _is_question(messages[i])), -1)
        for i, message in enumerate(messages):
            if isinstance(message, dict):
                self.message(message, thinks=i > asked)

    def message(self, message: dict[str, Any], *, thinks: bool) -> None:
        """One message or item. thinks: whether what was thought counts."""
        kind = message.get("type")
        if kind == "reasoning":
            if thinks:
                self.content(message.get("content") or message.get("summary"), thinks=True)
            return
        self.content(message.get("content"), thinks=thinks)
        if len(message) == 2 and "role" in message and "content" in message:
            return  # as most are
        if kind in ("function_call", "custom_tool_call"):
            self.call(message.get("name"), message.get("arguments", message.get("input")))
        elif kind in ("function_call_output", "custom_tool_call_output"):
            self.content(message.get("output"), thinks=False)
        if thinks:
            thoughts = message.get("reasoning")
            self.text(message.get("reasoning_content") if thoughts is None else thoughts)
        calls = message.get("tool_calls")
        for call in calls if isinstance(calls, list) else ():
            if isinstance(call, dict) and isinstance(function := call.get("function"), dict):
                self.call(function.get("name"), function.get("arguments"))

    def content(self, content: Any, *, thinks: bool) -> None:
        """A text, or parts."""
        if not isinstance(content, list):
            self.text(content)
            return
        for part in content:
            if isinstance(part, dict):
                self.part(part, thinks=thinks)
            else:
                self.text(part)

    def part(self, part: dict[str, Any], *, thinks: bool) -> None:
        """A part of a message; what is no text counts by itself, and its data, in base64, do not."""
        kind = part.get("type")
        if not isinstance(kind, str):
            kind = next((key for key in part if key in _MEDIA), "text")
        if kind in _MEDIA:
            self.extra(_MEDIA[kind])
        elif kind == "thinking":
            self.text(part.get("thinking") if thinks else None)
        elif kind == "tool_use":
            self.call(part.get("name"), part.get("input"))
        elif kind == "tool_result":  # which becomes a message of its own
            self.tokens += TOKENS_PER_MESSAGE
            self.content(part.get("content"), thinks=False)
        elif "text" in part:
            self.text(part["text"])
        elif kind == "refusal":
            self.text(part.get("refusal"))
        elif kind != "redacted_thinking":
            self.unknown = True

    def call(self, name: Any, arguments: Any) -> None:
        """A call of a tool."""
        self.tokens += TOKENS_PER_MESSAGE
        self.text(name)
        self.text(_spelt(arguments) if isinstance(arguments, dict) else arguments)

    def system(self, said: Any) -> None:
        """What is said before all messages."""
        if said:
            self.tokens += TOKENS_PER_MESSAGE
            self.content(said, thinks=False)

    def tools(self, tools: Any) -> None:
        """What templates write of them: their JSON."""
        if isinstance(tools, list) and tools:
            self.extra(TOOLS, len(_spelt(tools).encode("utf-8", "surrogatepass")))


def _is_question(message: Any) -> bool:
    """Whether a user speaks, and does not only hand over what tools have found."""
    if not isinstance(message, dict) or message.get("role") != "user":
        return False
    content = message.get("content")
    only_results = isinstance(content, list) and all(
        isinstance(part, dict) and part.get("type") == "tool_result" for part in content
    )
    return not (content and only_results)


def _spelt(said: Any) -> str:
    try:
        return json.dumps(said, ensure_ascii=False)
    except RecursionError:  # which no server would take
        return ""


_MEDIA = {
    "image": IMAGE,
    "image_url": IMAGE,
    "input_image": IMAGE,
    "image_embeds": IMAGE,
    "audio_url": AUDIO,
    "input_audio": AUDIO,
    "audio_embeds": AUDIO,
    "video_url": VIDEO,
    "video_embeds": VIDEO,
}

_COUNTED: list[tuple[str, Callable[[_Count, Any], None]]] = [
    ("prompt", _Count.prompt),
    ("messages", _Count.messages),
    ("input", _Count.messages),  # of a response: a text, or items
    ("system", _Count.system),
    ("instructions", _Count.system),
    ("tools", _Count.tools),
]

_UNCOUNTED = frozenset(
    ("prompt_embeds", "previous_response_id", "documents", "truncate_prompt_tokens", "chat_template")
)
"""By these there is more in a prompt, or less, than can be counted here."""
