"""The token ids that the gateway makes of a request's prompt, against those of vLLM's own front end."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from tiny_tokenizer import SAID, save_tokenizer

from block.gateway.prompts import TokenizedPrompts
from block.workload.prompts import load_tokenizer

USER = {"role": "user", "content": SAID[1]}
TURNS = [{"role": "system", "content": SAID[0]}, USER, {"role": "assistant", "content": SAID[2]}, USER]
TOOL = {"type": "function", "function": {"name": "ask", "parameters": {"type": "object", "properties": {}}}}
STRICT = {"type": "function", "function": {"strict": True, "description": SAID[2], "name": "ask", "odd": 1}}
CALL = {"id": "1", "type": "function", "function": {"name": "ask", "arguments": '{"who": "me",  "when": 1}'}}
CALLED = [
    USER,
    {"role": "assistant", "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "1", "content": "now"},
    USER,
]
THOUGHT = {"role": "assistant", "content": None, "reasoning_content": "hm"}
PARTS = [{"type": "text", "text": SAID[1]}, {"type": "text", "text": SAID[2]}]
REQUESTS: dict[str, dict[str, Any]] = {
    "a text": {"prompt": SAID[1]},
    "a text without special tokens": {"prompt": SAID[1], "add_special_tokens": False},
    "a chat": {"messages": TURNS},
    "a chat in parts": {"messages": [TURNS[0], {"role": "user", "content": PARTS}]},
    "a chat with tools": {"messages": TURNS, "tools": [TOOL], "tool_choice": "none"},
    "a chat with a strict tool": {"messages": TURNS, "tools": [STRICT], "tool_choice": "none"},
    "a chat whose tools were called": {"messages": CALLED},
    "a chat with an effort": {"messages": TURNS, "reasoning_effort": "low"},
    "a chat with thoughts": {
        "messages": [USER, {**THOUGHT, "reasoning": SAID[2], "reasoning_content": "not that"}, USER]
    },
    "a chat with names and what is not known": {"messages": [{**USER, "name": "me", "odd": 1}, THOUGHT]},
    "a chat that goes on": {"messages": TURNS[:3], "add_generation_prompt": False, "continue_final_message": True},
    "a chat whose template is told something": {"messages": TURNS, "chat_template_kwargs": {"mood": "glad"}},
    "a chat with special tokens": {"messages": TURNS, "add_special_tokens": True},
    "token ids": {"prompt": list(range(5, 25))},
    "a response": {"input": SAID[1], "instructions": SAID[0]},
    "a response to items, with tools": {
        "input": [USER, {"role": "user", "content": [{"type": "input_text", "text": SAID[2]}]}],
        "tools": [{"type": "function", "name": "ask", "description": SAID[2], "parameters": {"type": "object"}}],
        "tool_choice": "none",
        "reasoning": {"effort": "low"},
    },
    "a message of Anthropic's": {
        "model": "m",
        "max_tokens": 5,
        "system": [{"type": "text", "text": SAID[0]}, {"type": "text", "text": SAID[2]}],
        "messages": [{"role": "user", "content": [{"type": "text", "text": SAID[1]}]}],
        "tools": [{"name": "ask", "description": SAID[2], "input_schema": {"type": "object"}}],
        "tool_choice": {"type": "none"},
    },
}


@pytest.fixture(scope="module")
def folder(vllm: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("model")
    save_tokenizer(made)
    (made / "config.json").write_text(json.dumps({**vllm.MODEL, "vocab_size": 512}))
    return made


@pytest.fixture(scope="module")
def front_end(folder: Path) -> Any:
    from vllm.engine.arg_utils import EngineArgs
    from vllm.renderers import renderer_from_config
    from vllm.renderers.online_renderer import OnlineRenderer

    config = EngineArgs(model=str(folder), max_model_len=2048).create_engine_config()
    return OnlineRenderer(
        config.model_config,
        renderer_from_config(config),
        request_logger=None,
        chat_template=None,
        chat_template_content_format="auto",
    )


def of_vllm(front_end: Any, fields: dict[str, Any]) -> list[int]:
    from vllm.entrypoints.anthropic.protocol import AnthropicMessagesRequest
    from vllm.entrypoints.anthropic.serving import AnthropicServingMessages
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest
    from vllm.entrypoints.openai.responses.protocol import ResponsesRequest

    if "prompt" in fields:
        (rendered,) = asyncio.run(front_end.render_completion(CompletionRequest(**fields)))
    elif "input" in fields:
        rendered = asyncio.run(front_end.render_responses(ResponsesRequest(**fields))).engine_input
    elif "system" in fields:
        as_chat = AnthropicServingMessages.to_chat_completion_request(AnthropicMessagesRequest(**fields))
        _, (rendered,) = asyncio.run(front_end.render_chat(as_chat))
    else:
        _, (rendered,) = asyncio.run(front_end.render_chat(ChatCompletionRequest(**fields)))
    return list(rendered["prompt_token_ids"])


@pytest.mark.filterwarnings("ignore:max_tokens is deprecated:DeprecationWarning")  # which vLLM looks at
@pytest.mark.parametrize("fields", REQUESTS.values(), ids=REQUESTS)
def test_the_tokens_are_those_that_vllm_computes(front_end: Any, folder: Path, fields: dict[str, Any]) -> None:
    read = TokenizedPrompts(load_tokenizer(str(folder), "gateway.tokenizer"), 1.0, pytest.fail)
    ours = read.tokens(json.loads(json.dumps(fields)))
    read.close()
    assert ours == of_vllm(front_end, fields)
    assert len(ours) > 10
