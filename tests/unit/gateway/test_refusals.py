"""What the gateway refuses: bodies that are no JSON object, and what changes a server."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import pytest
from mock_servers import ANSWER, Mock, PluginMock, run, running_gateway, says
from yarl import URL

from block.gateway.routes import CHANGES as CHANGES_SERVERS


@pytest.mark.parametrize("body", [b"", b"{", b'"text"', b"[1]", b"\xff{}", b"[" * 100_000, b'{"a": 1} x'])
def test_a_body_that_is_no_json_object_reaches_no_server(body: bytes) -> None:
    async def main() -> None:
        async with running_gateway([Mock()]) as gateway:
            status, text, headers = await gateway.ask(body)
            error = json.loads(text)["error"]
            assert (status, error["code"], error["type"]) == (400, 400, "BadRequestError")
            assert error["message"].startswith("the body is not ")
            assert headers["Content-Type"].startswith("application/json")
            assert gateway.mocks[0].seen == []
            assert (await gateway.metrics())['block_requests_total{server="none",status="refused"}'] == 1

    run(main())


CHANGES = ["/sleep", "/sleep?level=1", "//sleep", "/sleep/", "/%73leep", "/v1/load_lora_adapter", "/x/../sleep"]
CHANGES += ["/sleep%0A", "/sleep%0D", "/sleep%00", "/sleep%20", "/weight_checker", "/inference/v1/abort_requests"]


@pytest.mark.parametrize("path", CHANGES)
def test_what_changes_a_server_reaches_none(path: str) -> None:
    async def main() -> None:
        async with running_gateway([Mock()]) as gateway:
            url = URL(gateway.url + path, encoded=True)
            async with gateway.client.post(url, data=b"{}") as answer:
                error = (await answer.json())["error"]
            assert (answer.status, error["type"]) == (403, "PermissionDeniedError")
            assert "gateway.admin=true" in error["message"]
            assert gateway.mocks[0].seen == []
            assert (await gateway.metrics())['block_requests_total{server="none",status="refused"}'] == 1

    run(main())


def test_what_a_server_shows_of_itself_is_not_the_gateway_s() -> None:
    async def main() -> None:
        async with (
            running_gateway([PluginMock()]) as gateway,
            gateway.client.get(gateway.url + "/block/info") as answer,
        ):
            assert (answer.status, (await answer.json())["error"]["type"]) == (404, "NotFoundError")

    run(main())


def test_an_administrator_changes_all_servers_and_is_told_of_one_that_refuses() -> None:
    async def main() -> None:
        async with running_gateway([Mock(), Mock(says(200, b"two"))], admin=True) as gateway:
            assert (await gateway.ask(b"{}", "/sleep?level=1"))[:2] == (200, ANSWER)
            assert [mock.seen[0][0::2] for mock in gateway.mocks] == [("/sleep?level=1", b"{}")] * 2
            gateway.mocks[1].answer = says(404, b"none")
            assert (await gateway.ask(b"{}", "/v1/load_lora_adapter"))[:2] == (404, b"none")
            await gateway.mocks[0].kill()
            status, body, _ = await gateway.ask(b"{}", "/sleep")
            assert (status, json.loads(body)["error"]["code"]) == (502, 502)

    run(main())


def test_every_route_of_vllm_is_known_to_change_a_server_or_not_to() -> None:
    vllm = importlib.util.find_spec("vllm")
    if vllm is None or not vllm.submodule_search_locations:
        pytest.skip("vLLM is not installed")
    entrypoints = Path(vllm.submodule_search_locations[0]) / "entrypoints"
    text = "\n".join(path.read_text() for path in entrypoints.rglob("api_router.py"))
    posts = set(re.findall(r'router\.(?:post|put|delete)\(\s*"(/[^"]*)"', text))
    assert "/sleep" in posts
    assert {one.encode() for one in posts} - CHANGES_SERVERS <= HARMLESS


HARMLESS = {
    *(b"/classify", b"/cohere/v2/chat", b"/cohere/v2/chat/render", b"/detokenize", b"/generative_scoring"),
    *(
        b"/inference/v1/generate",
        b"/invocations",
        b"/is_scaling_elastic_ep",
        b"/ping",
        b"/pooling",
        b"/rerank",
        b"/score",
    ),
    *(b"/tokenize", b"/v1/audio/transcriptions", b"/v1/audio/translations", b"/v1/chat/completions"),
    *(b"/v1/chat/completions/batch", b"/v1/chat/completions/derender", b"/v1/chat/completions/render"),
    *(b"/v1/completions", b"/v1/completions/derender", b"/v1/completions/render", b"/v1/embeddings", b"/v1/messages"),
    *(b"/v1/messages/count_tokens", b"/v1/messages/render", b"/v1/rerank", b"/v1/responses", b"/v1/responses/render"),
    *(b"/v1/responses/{response_id}/cancel", b"/v1/score", b"/v1/systemone", b"/v2/embed", b"/v2/rerank"),
}
