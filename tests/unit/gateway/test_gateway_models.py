"""Servers of different models: a request goes where its model is, and the list of them is everybody's."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from aiohttp import web
from mock_servers import Mock, RunningGateway, eventually, run, running_gateway, whole

from block.gateway.http1 import HTTPRequest
from block.gateway.models import Models
from block.gateway.openai import model_of


def body(model: str) -> bytes:
    return json.dumps({"model": model, "prompt": "x", "input": "x"}).encode()


async def listed(gateway: RunningGateway) -> Any:
    async with gateway.client.get(gateway.url + "/v1/models") as answer:
        return await answer.json()


def test_a_request_goes_where_its_model_is_and_the_list_is_the_union() -> None:
    async def main() -> None:
        mocks = [Mock(models=["a", "both"]), Mock(models=["both", "b"])]
        async with running_gateway(mocks) as gateway:
            for path in ("/v1/completions", "/v1/embeddings"):
                for model in ("a", "b"):
                    assert [(await gateway.ask(body(model), path))[0] for _ in range(3)] == [200] * 3
            assert [{json.loads(seen[2])["model"] for seen in mock.seen} for mock in mocks] == [{"a"}, {"b"}]
            for _ in range(4):
                assert (await gateway.ask(body("both")))[0] == 200
            assert [len(mock.seen) for mock in mocks] == [8, 8]
            found = await listed(gateway)
            assert [(card["id"], card["by"]) for card in found["data"]] == [
                ("a", mocks[0].port),
                ("both", mocks[0].port),
                ("b", mocks[1].port),
            ]
            async with gateway.client.get(gateway.url + "/v1/models/b") as answer:
                assert answer.status == 200
            assert mocks[1].seen[-1][0] == "/v1/models/b"

    run(main())


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/embeddings"])
def test_a_model_that_no_server_has_is_refused_with_those_there_are(path: str) -> None:
    async def main() -> None:
        async with running_gateway([Mock(models=["a"]), Mock(models=["b"])]) as gateway:
            status, text, _ = await gateway.ask(body("c"), path)
            error = json.loads(text)["error"]
            assert (status, error["type"]) == (404, "NotFoundError")
            assert error["message"] == "The model `c` does not exist; there are a, b"
            assert [mock.seen for mock in gateway.mocks] == [[], []]

    run(main())


def test_changes_of_a_list_are_noticed_and_a_server_that_is_gone_keeps_its_own() -> None:
    async def main() -> None:
        async with running_gateway([Mock(models=["a"]), Mock(models=["b"])]) as gateway:
            gateway.mocks[1].models = ["a", "adapter"]
            async with asyncio.timeout(5):
                while (await gateway.ask(body("adapter")))[0] != 200:
                    await asyncio.sleep(0.01)
            assert (await gateway.ask(body("b")))[0] == 404
            await gateway.mocks[1].kill()
            assert (await gateway.ask(body("adapter")))[0] == 503  # and not another model's answer
            assert "adapter" in [card["id"] for card in (await listed(gateway))["data"]]
            await gateway.mocks[1].start()
            await eventually(lambda: len(gateway.dispatcher.active) == 2)
            assert (await gateway.ask(body("adapter")))[0] == 200

    run(main())


def test_servers_that_do_not_tell_may_serve_any_model() -> None:
    async def main() -> None:
        class Silent(Mock):
            async def _models(self, http: web.Request) -> web.Response:
                return web.Response(status=401)

        async with running_gateway([Mock(whole, models=["a"]), Silent()]) as gateway:
            for _ in range(2):
                assert (await gateway.ask(body("c")))[0] == 200
            assert (gateway.mocks[0].seen, len(gateway.mocks[1].seen)) == ([], 2)

    run(main())


def test_what_no_server_has_is_a_key_error_and_what_names_no_model_may_go_anywhere() -> None:
    models = Models()

    def places(name: object) -> set[int] | None:
        found = models.places(name)
        return None if found is None else {i for i in range(3) if i in found}

    assert places("x") == set()
    models.tell(0, None)
    models.tell(1, None)
    assert places("x") == {0, 1}
    models.tell(0, [{"id": "a"}])
    waits = models.places("x")
    assert (places("a"), places("x"), models.differ) == ({0, 1}, {1}, True)
    models.tell(1, [{"id": "b"}])
    assert (places("a"), places("b"), places(None), places("")) == ({0}, {1}, None, None)
    with pytest.raises(KeyError):
        models.places("x")
    assert waits is not None
    assert 1 not in waits
    begun = models.places("a")
    models.tell(2, [{"id": "a"}, {"id": "b"}])
    assert begun is not None
    assert 2 in begun
    models.forget(0)
    models.forget(1)
    assert (places("a"), models.differ) == ({2}, False)


@pytest.mark.parametrize(
    ("kind", "sent", "model"),
    [
        (b"application/json", b'{"model": "a"}', "a"),
        (b"application/json", b'{"model": 3}', None),
        (b"application/json", b"[", None),
        (
            b"multipart/form-data; boundary=x",
            b'--x\r\nContent-Disposition: form-data; name="model"\r\n\r\na\r\n--x--',
            "a",
        ),
        (b"multipart/form-data; boundary=x", b"--x--", None),
    ],
)
def test_a_body_names_its_model(kind: bytes, sent: bytes, model: str | None) -> None:
    assert model_of(HTTPRequest(b"POST", b"/x", [(b"content-type", kind)], sent)) == model
    assert model_of(HTTPRequest(b"GET", b"/v1/models/a%2Fb?x=1", [], b"")) == "a/b"
