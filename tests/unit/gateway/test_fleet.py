"""Servers that come and go: by a file, by a name's addresses, by an admin; and none is cut off."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from mock_servers import (
    ASKED,
    DONE,
    STREAMED,
    Mock,
    PluginMock,
    RunningGateway,
    eventually,
    run,
    running_gateway,
    stream,
    whole,
)

from block.backends.launch import free_ports
from block.dispatch import policies
from block.dispatch.routers import CacheAware, Preble
from block.gateway import discovery, upstreams
from block.gateway.config import GatewayConfig
from block.gateway.urls import server_url

SOON = {"discovery_interval_s": 0.02}


async def asked(gateway: RunningGateway, requests: int) -> list[int]:
    """How many of so many requests each mock got."""
    before = [len(mock.seen) for mock in gateway.mocks]
    assert [(await gateway.ask())[0] for _ in range(requests)] == [200] * requests
    return [len(mock.seen) - seen for mock, seen in zip(gateway.mocks, before, strict=True)]


def in_metrics(text: dict[str, float]) -> set[str]:
    """The mocks that a metric has a label of."""
    return {name.partition('server="')[2].partition('"')[0] for name in text if 'server="' in name}


def test_a_file_is_followed_and_what_is_wrong_in_it_takes_no_server_away(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        mocks = [Mock(), Mock(), Mock()]
        for mock in mocks:
            await mock.start()
        file = tmp_path / "servers.txt"
        file.write_text(f"# the first two\n{mocks[0].url}/\n\n  {mocks[1].url}  # by the window\n")
        async with running_gateway(mocks, started=[], urls=(), urls_file=str(file), **SOON) as gateway:
            assert await asked(gateway, 6) == [3, 3, 0]
            file.write_text(f"{mocks[1].url}\n{mocks[2].url}\n")
            await eventually(lambda: gateway.urls() == [mocks[1].url, mocks[2].url])
            assert await asked(gateway, 6) == [0, 3, 3]
            file.write_text("# nothing yet\n")
            await eventually(lambda: "is empty" in caplog.text)
            file.write_text(f"{mocks[0].url}\nhttp//typo\n")
            await eventually(lambda: "http//typo" in caplog.text)
            file.unlink()
            await eventually(lambda: "No such file" in caplog.text)
            assert await asked(gateway, 6) == [0, 3, 3]
            file.write_text(f"{mocks[0].url}\n")
            await eventually(lambda: gateway.urls() == [mocks[0].url])
            assert "well again" in caplog.text
            assert caplog.text.count("http//typo") == 1

    run(main())


def test_every_address_of_a_name_is_a_server_and_what_cannot_be_resolved_stays(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pods: list[str] = ["127.0.0.2", "127.0.0.3", "127.0.0.4"]

    async def addresses(host: str) -> list[str]:
        assert host == "vllm"
        if not pods:
            raise OSError("Name or service not known")
        return list(pods)

    monkeypatch.setattr(discovery, "addresses", addresses)

    async def main() -> None:
        (port,) = free_ports(1)
        mocks = [Mock(host=f"127.0.0.{i}", port=port) for i in (2, 3, 4)]
        async with running_gateway(mocks, urls=(f"dns+http://vllm:{port}",), **SOON) as gateway:
            assert await asked(gateway, 30) == [10, 10, 10]
            del pods[1]
            await eventually(lambda: len(gateway.urls()) == 2)
            assert await asked(gateway, 30) == [15, 0, 15]
            pods.clear()
            await eventually(lambda: "vllm cannot be resolved: Name or service not known" in caplog.text)
            assert await asked(gateway, 30) == [15, 0, 15]
            pods.append("127.0.0.3")
            await eventually(lambda: gateway.urls() == [mocks[1].url])

    run(main())


def test_the_addresses_of_a_name_are_those_that_the_system_knows() -> None:
    assert asyncio.run(discovery.addresses("127.0.0.1")) == ["127.0.0.1"]
    assert asyncio.run(discovery.addresses("localhost"))


def test_a_host_that_has_addresses_of_both_kinds_is_one_server(monkeypatch: pytest.MonkeyPatch) -> None:
    found = ["::1", "10.0.0.2", "10.0.0.1", "10.0.0.2"]

    async def resolved(*_: Any, **__: Any) -> list[Any]:
        return [(None, None, None, "", (address, 0)) for address in found]

    monkeypatch.setattr(asyncio.BaseEventLoop, "getaddrinfo", resolved)
    assert asyncio.run(discovery.addresses("h")) == ["10.0.0.1", "10.0.0.2"]
    found[:] = ["::2", "::1"]
    assert asyncio.run(discovery.addresses("h")) == ["::1", "::2"]


def test_a_name_of_several_addresses_that_counts_as_one_server_is_told(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def addresses(host: str) -> list[str]:
        return ["10.0.0.1", "10.0.0.2"] if host == "many" else ["127.0.0.1"]

    monkeypatch.setattr(discovery, "addresses", addresses)

    async def warned() -> None:
        await discovery.warn_of_many("http://many:8000")
        await discovery.warn_of_many("dns+http://many:8000")
        await discovery.warn_of_many("http://localhost:8000")

    asyncio.run(warned())
    (told,) = caplog.messages
    assert told == "http://many:8000: one server, with 2 addresses; dns+http://many:8000 makes each a server"


@pytest.fixture
def keys(tmp_path: Path) -> dict[str, str]:
    (tmp_path / "admins").write_text("sesame\n")
    return {"admin_key_file": str(tmp_path / "admins")}


async def servers(gateway: RunningGateway, method: str = "GET", url: str = "", key: str = "sesame") -> tuple[int, Any]:
    """What /servers answers."""
    headers = {"Authorization": f"Bearer {key}"}
    data = json.dumps({"url": url}) if url else None
    async with gateway.client.request(method, f"{gateway.url}/servers", headers=headers, data=data) as answer:
        return answer.status, json.loads(await answer.read())


@pytest.mark.parametrize("kind", [Mock, PluginMock])
def test_an_admin_adds_a_server_and_one_that_leaves_ends_what_it_began(keys: dict[str, str], kind: type[Mock]) -> None:
    async def main() -> None:
        mocks: Sequence[Mock] = [kind(stream), kind(stream)]
        policy = policies.INFaaS() if kind is PluginMock else policies.RoundRobin()
        for mock in mocks:
            await mock.start()
        first, second = mocks
        async with running_gateway(mocks, policy, started=[], urls=(first.url,), **keys) as gateway:
            status, told = await servers(gateway, "POST", second.url)
            assert (status, told["state"], told["url"]) == (201, "active", second.url)
            assert len(gateway.urls()) == 2
            first.go.clear()
            second.go.clear()
            asking = [asyncio.create_task(gateway.ask(STREAMED)) for _ in range(2)]
            await eventually(lambda: sum(len(mock.seen) for mock in mocks) == 2)
            busy = [len(mock.seen) for mock in mocks]
            status, told = await servers(gateway, "DELETE", first.url)
            assert (status, told["state"], told["requests"]) == (202, "leaving", busy[0])
            assert gateway.urls() == [second.url]
            first.go.set()
            second.go.set()
            for task in asking:
                status, text, _ = await task
                assert (status, text[-len(DONE) :]) == (200, DONE)
            await eventually(lambda: len(gateway.gateway.servers) == 1)
            assert [one["url"] for one in (await servers(gateway))[1]["servers"]] == [second.url]
            assert in_metrics(await gateway.metrics()) == {"1"}
            assert await asked(gateway, 4) == [0, 4]
            assert (await servers(gateway, "POST", first.url))[0] == 201
            assert len(gateway.urls()) == 2

    run(main())


def test_who_leaves_by_mistake_stays(keys: dict[str, str]) -> None:
    async def main() -> None:
        async with running_gateway([Mock(stream), Mock()], **keys) as gateway:
            slow = gateway.mocks[0]
            slow.go.clear()
            asking = asyncio.create_task(gateway.ask(STREAMED))
            await eventually(lambda: len(slow.seen) == 1)
            await servers(gateway, "DELETE", slow.url)
            assert len(gateway.urls()) == 1
            status, told = await servers(gateway, "POST", slow.url)
            assert (status, told["state"], len(gateway.urls())) == (201, "active", 2)
            slow.go.set()
            assert (await asking)[0] == 200
            assert len(gateway.gateway.servers) == 2

    run(main())


def test_a_request_on_a_server_that_leaves_and_dies_begins_anew(keys: dict[str, str]) -> None:
    async def main() -> None:
        async def waits(mock: Mock, http: Any) -> Any:
            await mock.go.wait()
            return await stream(mock, http)

        async with running_gateway([Mock(waits), Mock()], **keys) as gateway:
            first = gateway.mocks[0]
            first.go.clear()
            asking = asyncio.create_task(gateway.ask())
            await eventually(lambda: len(first.seen) == 1)
            await servers(gateway, "DELETE", first.url)
            await first.kill()
            assert (await asking)[0] == 200
            await eventually(lambda: len(gateway.gateway.servers) == 1)

    run(main())


def test_a_server_that_is_added_before_it_is_up_gets_requests_when_it_is(keys: dict[str, str]) -> None:
    async def main() -> None:
        (port,) = free_ports(1)
        mocks = [Mock(), Mock(port=port)]
        async with running_gateway(mocks, started=[0], urls=(), **keys) as gateway:
            assert (await gateway.ask())[0] == 503
            status, told = await servers(gateway, "POST", mocks[1].url)
            assert (status, told["state"]) == (201, "down")
            assert "Connect call failed" in told["reason"]
            assert "Connect call failed" in (await gateway.ask())[1].decode()
            await mocks[1].start()
            await eventually(lambda: gateway.urls() == [mocks[1].url])
            assert await asked(gateway, 2) == [0, 2]

    run(main())


def test_what_is_asked_of_the_list_wrongly_is_refused(keys: dict[str, str]) -> None:
    async def main() -> None:
        async with running_gateway([Mock()], **keys) as gateway:
            assert (await servers(gateway, key="guess"))[0] == 401
            assert (await servers(gateway, "PUT", "http://h:1"))[0] == 405
            assert (await servers(gateway, "POST"))[0] == 400
            for wrong in ("h1:8000", " http://h1:8000", "http://h1\n:8000", "dns+http://h1:8000"):
                status, told = await servers(gateway, "POST", wrong)
                assert (status, told["error"]["message"][:4]) == (400, "url=")
            assert (await servers(gateway, "DELETE", "http://h:1"))[0] == 404
            assert gateway.urls() == [gateway.mocks[0].url]
        async with running_gateway([Mock()]) as gateway:
            status, told = await servers(gateway)
            assert (status, "gateway.admin_key_file" in told["error"]["message"]) == (403, True)
            assert gateway.mocks[0].seen == []

    run(main())


def test_a_server_that_does_not_answer_holds_up_no_other_change(
    keys: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upstreams, "HEALTH_S", 1.0)

    async def main() -> None:
        async with running_gateway([Mock(), Mock()], **keys) as gateway:
            with socket.socket() as hole:  # which accepts, and says nothing
                hole.bind(("127.0.0.1", 0))
                hole.listen()
                url = f"http://127.0.0.1:{hole.getsockname()[1]}"
                joining = asyncio.create_task(servers(gateway, "POST", url))
                await eventually(lambda: len(gateway.gateway.servers) == 3)
                assert (await servers(gateway, "DELETE", gateway.mocks[0].url))[0] == 202
                assert gateway.urls() == [gateway.mocks[1].url]
                assert not joining.done()
                assert (await servers(gateway, "DELETE", url))[0] == 202
                await eventually(lambda: len(gateway.gateway.servers) == 1)
            assert (await joining)[0] == 409

    run(main())


def test_one_server_is_one_however_its_url_is_written(keys: dict[str, str]) -> None:
    async def main() -> None:
        async with running_gateway([Mock()], **keys) as gateway:
            (mock,) = gateway.mocks
            for written in (mock.url.upper(), mock.url + "/"):
                assert (await servers(gateway, "POST", written))[1]["url"] == mock.url
            assert len(gateway.gateway.servers) == 1

    run(main())
    assert server_url("HTTP://H:80/", "url") == "http://h"
    assert server_url("https://h:443/a/", "url") == "https://h/a"
    assert server_url("dns+http://[::1]:8000", "url") == "dns+http://[::1]:8000"


def test_a_retry_goes_by_what_servers_serve_by_then(keys: dict[str, str]) -> None:
    async def main() -> None:
        async def waits(mock: Mock, http: Any) -> Any:
            await mock.go.wait()
            return await whole(mock, http)

        mocks = [Mock(waits, models=["m"]), Mock(models=["z"]), Mock(models=["m"])]
        for mock in mocks:
            await mock.start()
        async with running_gateway(mocks, started=[], urls=(mocks[0].url,), **keys) as gateway:
            mocks[0].go.clear()
            asking = [asyncio.create_task(gateway.ask()) for _ in range(4)]
            await eventually(lambda: len(mocks[0].seen) == 4)
            for mock in mocks[1:]:
                assert (await servers(gateway, "POST", mock.url))[0] == 201
            await mocks[0].kill()
            assert [(await task)[0] for task in asking] == [200] * 4
            assert [len(mock.seen) for mock in mocks] == [4, 0, 4]

    run(main())


@pytest.mark.parametrize("policy", [CacheAware(), Preble()])
def test_policies_forget_servers_that_are_gone(policy: Any, keys: dict[str, str]) -> None:
    async def main() -> None:
        async with running_gateway([Mock(), Mock()], policy, **keys) as gateway:
            for _ in range(3):
                for mock in gateway.mocks:
                    body = json.dumps({"model": "m", "prompt": f"{mock.port} " * 100}).encode()
                    assert (await gateway.ask(body))[0] == 200
                    await servers(gateway, "DELETE", mock.url)
                    await eventually(lambda: len(gateway.gateway.servers) == 1)
                    await servers(gateway, "POST", mock.url)
            assert set(policy._sent._of) <= set(gateway.gateway.servers)

    run(main())


def test_servers_come_and_go_under_load_and_no_request_is_lost(keys: dict[str, str]) -> None:
    async def main() -> None:
        mocks = [Mock() for _ in range(4)]
        async with running_gateway(mocks, **keys) as gateway:
            done = asyncio.Event()
            statuses: list[int] = []

            async def ask() -> None:
                while not done.is_set():
                    statuses.append((await gateway.ask())[0])

            async def turn(mock: Mock) -> None:
                for _ in range(10):
                    await servers(gateway, "DELETE", mock.url)
                    await servers(gateway, "POST", mock.url)

            asking = [asyncio.create_task(ask()) for _ in range(8)]
            await asyncio.gather(*map(turn, mocks[:3]))
            done.set()
            await asyncio.gather(*asking)
            assert set(statuses) == {200}
            await eventually(lambda: len(gateway.urls()) == 4)

    run(main())


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"urls": ("dns+https://vllm:8000",)}, "certificates are of names"),
        ({"urls": ("dns+http://",)}, "must be of the form http://host:port, https://host:port or dns+http://name:port"),
        ({"urls": ("http://h:1",), "discovery_interval_s": 1.0}, "gateway.discovery_interval_s=1.0: has no effect"),
        ({"urls": ("http://h:1",), "ca_file": "f"}, "gateway.ca_file=f: has no effect, for no server is of https"),
        ({"urls_file": "f", "discovery_interval_s": 0.0}, "gateway.discovery_interval_s=0.0: must be greater than 0"),
    ],
)
def test_wrong_keys_are_told(given: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says.replace("+", r"\+")):
        GatewayConfig(**given)


def test_a_body_that_is_asked_of_the_list_may_name_its_server_in_the_query(keys: dict[str, str]) -> None:
    async def main() -> None:
        async with running_gateway([Mock(), Mock()], **keys) as gateway:
            url = f"{gateway.url}/servers?url={gateway.mocks[0].url}"
            async with gateway.client.delete(url, headers={"x-api-key": "sesame"}) as answer:
                assert answer.status == 202
            assert gateway.urls() == [gateway.mocks[1].url]
            assert (await gateway.ask(ASKED))[0] == 200

    run(main())
