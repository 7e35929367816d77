"""What the gateway refuses: bodies that are no JSON object, and routes that it does not have."""

from __future__ import annotations

import json

import pytest
from mock_servers import Mock, run, running_gateway


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
            assert (await gateway.metrics())['block_requests_total{instance="none",status="refused"}'] == 1

    run(main())


@pytest.mark.parametrize(
    ("method", "path"),
    [("GET", "/"), ("GET", "/v1/completions"), ("POST", "/v1/embeddings"), ("HEAD", "/x"), ("PUT", "/health")],
)
def test_an_unknown_route_is_answered_as_openai_would(method: str, path: str) -> None:
    async def main() -> None:
        async with running_gateway([Mock()]) as gateway, gateway.client.request(method, gateway.url + path) as answer:
            assert answer.status == 404
            if method != "HEAD":
                error = (await answer.json())["error"]
                assert error["message"] == f"no such route: {method} {path}"
                assert error["type"] == "NotFoundError"

    run(main())
