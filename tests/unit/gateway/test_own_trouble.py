"""The gateway's own troubles: too few open files are not the servers' fault, and are told as what they are."""

from __future__ import annotations

import asyncio
import errno
import json
from typing import Any

import pytest
from mock_servers import ANSWER, Mock, run, running_gateway

from block.gateway import client_connections


@pytest.mark.parametrize("lasts", [False, True])
def test_connections_that_cannot_be_opened_are_waited_for_and_no_server_is_set_aside(
    lasts: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        async with running_gateway([Mock(), Mock()], connect_timeout_s=0.3) as gateway:
            loop: Any = asyncio.get_running_loop()
            opens, tries = loop.create_connection, 0

            async def scarce(protocol: Any, host: str, port: int, **more: Any) -> Any:
                nonlocal tries
                tries += 1
                if lasts or tries < 3:
                    raise OSError(errno.EMFILE, "Too many open files")
                return await opens(protocol, host, port, **more)

            async with gateway.client.get(gateway.url + "/health") as answer:  # so that the client has a connection
                assert answer.status == 200
            monkeypatch.setattr(loop, "create_connection", scarce)
            status, body, headers = await gateway.ask()
            assert status == (503 if lasts else 200)
            assert list(gateway.dispatcher.active) == [0, 1]
            if lasts:
                assert "Too many open files" in json.loads(body)["error"]["message"]
                assert headers["Retry-After"] == "1"
            else:
                assert (body, tries) == (ANSWER, 3)
            monkeypatch.undo()

    run(main())


def test_a_client_too_many_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_connections, "LINGER_S", 0.05)

    async def main() -> None:
        async with running_gateway([Mock()]) as gateway:
            assert (await gateway.ask())[0] == 200  # and keeps its connection
            gateway.gateway.most_clients = 1
            reader, writer = await gateway.connect()
            head, _, body = (await reader.read()).partition(b"\r\n\r\n")
            writer.close()
            assert head.startswith(b"HTTP/1.1 503 ")
            assert "1 connections already" in json.loads(body)["error"]["message"]
            assert (await gateway.ask())[0] == 200
            assert (await gateway.metrics())['block_requests_total{server="none",status="failed"}'] == 1

    run(main())
