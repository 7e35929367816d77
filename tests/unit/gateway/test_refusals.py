"""What the gateway refuses: bodies that are no JSON object, and what changes a server."""

from __future__ import annotations

import json

import pytest
from mock_servers import ANSWER, Mock, run, running_gateway, says
from yarl import URL


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
