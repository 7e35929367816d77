"""Keys of clients, admins and servers, and certificates of an authority of one's own."""

from __future__ import annotations

import asyncio
import ssl
import subprocess
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from mock_servers import ASKED, Mock, PluginMock, eventually, run, running_gateway, whole
from yarl import URL

from block.dispatch import policies
from block.gateway.keys import Keys
from block.gateway.server_connections import secure_context


def file(folder: Path, name: str, *lines: str) -> str:
    (folder / name).write_text("\n".join(lines) + "\n")
    return str(folder / name)


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Authorization": "Bearer one"}, 200),
        ({"authorization": "bearer  two "}, 200),
        ({"x-api-key": "two"}, 200),
        ({"Authorization": "Bearer admin"}, 200),
        ({}, 401),
        ({"Authorization": "Bearer three"}, 401),
        ({"Authorization": "Bearer"}, 401),
        ({"Authorization": "Basic one"}, 401),
        ({"x-api-key": ""}, 401),
    ],
)
def test_clients_show_a_key_which_no_server_sees(headers: dict[str, str], status: int, tmp_path: Path) -> None:
    async def main() -> None:
        keys = {
            "api_key_file": file(tmp_path, "clients", "one", "", "  two"),
            "admin_key_file": file(tmp_path, "admins", "admin"),
        }
        async with running_gateway([Mock()], **keys) as gateway:
            (mock,) = gateway.mocks
            for path in ("/v1/completions", "/v1/embeddings", "/anything"):
                answered, _, told = await gateway.ask(ASKED, path, headers=headers)
                assert answered == status
                assert ("WWW-Authenticate" in told) == (status == 401)
            assert len(mock.seen) == (3 if status == 200 else 0)
            for _, seen, _ in mock.seen:
                assert not {"Authorization", "x-api-key"} & set(seen)
            for path in ("/health", "/metrics"):
                async with gateway.client.get(gateway.url + path) as answer:
                    assert answer.status == 200
            preflight = {"Access-Control-Request-Method": "POST"}
            for asks, answers in ((preflight, 200), ({}, 401)):
                async with gateway.client.options(gateway.url + "/v1/completions", headers=asks) as answer:
                    assert answer.status == answers
            async with gateway.client.post(gateway.url + "/health") as answer:
                assert answer.status == 401

    run(main())


def test_without_keys_of_its_own_a_client_s_goes_to_the_server() -> None:
    async def main() -> None:
        async with running_gateway([Mock()]) as gateway:
            await gateway.ask(headers={"Authorization": "Bearer mine"})
            assert gateway.mocks[0].seen[0][1]["Authorization"] == "Bearer mine"

    run(main())


def test_who_changes_servers_shows_an_admin_s_key(tmp_path: Path) -> None:
    async def main() -> None:
        keys = {
            "api_key_file": file(tmp_path, "clients", "one"),
            "admin_key_file": file(tmp_path, "admins", "admin"),
            "admin": True,
        }
        async with running_gateway([Mock(), Mock()], **keys) as gateway:
            for key, status in (("one", 401), ("admin", 200)):
                headers = {"Authorization": f"Bearer {key}"}
                assert (await gateway.ask(b"", "/reset_prefix_cache", headers=headers))[0] == status
            for mock in gateway.mocks:
                ((path, seen, _),) = mock.seen
                assert (path, "Authorization" in seen) == ("/reset_prefix_cache", False)

    run(main())


def test_keys_change_while_the_gateway_runs(tmp_path: Path) -> None:
    async def main() -> None:
        clients = file(tmp_path, "clients", "old")
        async with running_gateway([Mock()], api_key_file=clients, discovery_interval_s=0.02) as gateway:

            async def may(key: str) -> bool:
                return (await gateway.ask(headers={"x-api-key": key}))[0] == 200

            assert (await may("old"), await may("new")) == (True, False)
            file(tmp_path, "clients", "old", "new")
            while not await may("new"):
                pass
            file(tmp_path, "clients", "new")
            while await may("old"):
                pass
            file(tmp_path, "clients", "")
            await asyncio.sleep(0.1)
            assert (await may("old"), await may("new")) == (False, True)

    run(main())


def test_a_key_file_that_is_half_written_lets_nobody_in_nor_locks_anybody_out(tmp_path: Path) -> None:
    path = file(tmp_path, "clients", "one", "two")
    keys = Keys(path, "gateway.api_key_file")

    def may(key: bytes) -> bool:
        return keys.shown([(b"x-api-key", key)])

    Path(path).write_text("one\ntw")
    keys.look()
    assert (may(b"two"), may(b"tw")) == (True, False)
    Path(path).write_text("one\ntwo\nthree\n")
    keys.look()
    assert not may(b"three")
    keys.look()
    assert (may(b"two"), may(b"three")) == (True, True)


def test_keys_that_cannot_be_read_change_no_others_and_that_is_told_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        clients, admins = file(tmp_path, "clients", "c"), file(tmp_path, "admins", "a")
        keys = {"api_key_file": clients, "admin_key_file": admins, "discovery_interval_s": 0.02}
        async with running_gateway([Mock()], **keys) as gateway:
            Path(clients).unlink()
            file(tmp_path, "admins", "b")
            async with asyncio.timeout(10):
                while (await gateway.ask(headers={"x-api-key": "b"}))[0] != 200:
                    await asyncio.sleep(0.01)
            assert (await gateway.ask(headers={"x-api-key": "a"}))[0] == 401
            assert (await gateway.ask(headers={"x-api-key": "c"}))[0] == 200
        assert [record.message for record in caplog.records] == [
            f"gateway.api_key_file={clients}: cannot be read: No such file or directory"
        ]

    run(main())


@pytest.mark.parametrize(
    "path", ["/servers", "/servers/", "/Servers", "/%73ervers", "/sleep", "/sleep/", "/v1/completions"]
)
def test_an_admin_s_key_gets_to_no_server(path: str, tmp_path: Path) -> None:
    async def main() -> None:
        keys = {"admin_key_file": file(tmp_path, "admins", "admin"), "admin": True}
        async with running_gateway([Mock()], **keys) as gateway:
            for method in ("GET", "POST", "DELETE"):
                url, shows = URL(gateway.url + path, encoded=True), {"Authorization": "Bearer admin"}
                async with gateway.client.request(method, url, headers=shows, data=ASKED) as answer:
                    await answer.read()
            assert not any("Authorization" in headers for _, headers, _ in gateway.mocks[0].seen)
            assert not any(b"servers" in asked.lower().encode() for asked, _, _ in gateway.mocks[0].seen)

    run(main())


@pytest.mark.parametrize("path", ["/sleep", "/reset_prefix_cache", "//v1/completions", "/v1/../sleep"])
def test_without_an_admin_s_key_a_client_s_is_needed_to_change_servers(path: str, tmp_path: Path) -> None:
    async def main() -> None:
        keys = {"api_key_file": file(tmp_path, "clients", "c"), "admin": True}
        async with running_gateway([Mock(), Mock()], **keys) as gateway:
            for shows, status in (({}, 401), ({"x-api-key": "c"}, 400 if "/." in path or "//" in path else 200)):
                async with gateway.client.post(URL(gateway.url + path, encoded=True), headers=shows) as answer:
                    assert answer.status == status
            assert [len(mock.seen) for mock in gateway.mocks] == [int(status == 200)] * 2

    run(main())


@pytest.mark.parametrize("kind", [Mock, PluginMock])
def test_servers_see_the_key_that_they_want(kind: type[Mock], tmp_path: Path) -> None:
    async def main() -> None:
        wants: dict[str, list[str]] = {}

        @web.middleware
        async def guard(http: web.Request, handler: Any) -> web.StreamResponse:
            wants.setdefault(http.path, []).append(http.headers.get("Authorization", ""))
            if http.headers.get("Authorization") != "Bearer s3cret" and http.path != "/health":
                return web.Response(status=401)
            return await handler(http)

        class Guarded(kind):  # type: ignore[valid-type,misc]
            def routes(self, app: web.Application) -> None:
                super().routes(app)
                app.middlewares.append(guard)

        key = file(tmp_path, "key", "s3cret")
        policy = policies.RoundRobin() if kind is Mock else policies.INFaaS()
        async with running_gateway([Guarded()], policy, server_key_file=key) as gateway:
            assert (await gateway.ask(headers={"Authorization": "Bearer mine"}))[0] == 200
            assert gateway.gateway.models.names == ["m", "tiny"]
            assert "/v1/completions" in wants
            assert ("/block/info" in wants) == (kind is PluginMock)
            assert {one for path, found in wants.items() if path != "/health" for one in found} == {"Bearer s3cret"}
        async with running_gateway([Guarded()], policy) as gateway:
            assert (await gateway.ask())[0] == (401 if kind is Mock else 503)

    run(main())


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        ([""], "gateway.api_key_file={}: is empty"),
        (["two words"], "gateway.api_key_file={}: line 1: is no key: it has blanks, or what is not ASCII"),
        (["fine", "nö"], "gateway.api_key_file={}: line 2: is no key: it has blanks, or what is not ASCII"),
    ],
)
def test_a_file_without_sound_keys_is_told(lines: list[str], says: str, tmp_path: Path) -> None:
    path = file(tmp_path, "keys", *lines)
    with pytest.raises(ValueError, match="key") as error:
        Keys(path, "gateway.api_key_file")
    assert str(error.value) == says.format(path)


def test_a_file_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"gateway.api_key_file=.*nowhere: cannot be read: No such file"):
        Keys(str(tmp_path / "nowhere"), "gateway.api_key_file")
    with pytest.raises(ValueError, match=r"gateway.ca_file=.*nowhere: has no certificate to trust"):
        secure_context(str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match=r"gateway.ca_file=.*keys: has no certificate to trust"):
        secure_context(file(tmp_path, "keys", "no certificate"))


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A certificate of its own authority, and its key."""
    folder = tmp_path_factory.mktemp("tls")
    made = [str(folder / "cert.pem"), str(folder / "key.pem")]
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=localhost"
    names = ["-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1", "-out", made[0], "-keyout", made[1]]
    subprocess.run([*command.split(), *names], check=True, capture_output=True)
    return made[0], made[1]


class Secure(Mock):
    """A server that speaks TLS."""

    context: ssl.SSLContext

    @property
    def url(self) -> str:
        return f"https://127.0.0.1:{self.port}{self.prefix}"

    async def start(self) -> None:
        app = web.Application()
        self.routes(app)
        self.runner = web.AppRunner(app, shutdown_timeout=0.01, access_log=None)
        await self.runner.setup()
        await web.TCPSite(self.runner, "127.0.0.1", 0, ssl_context=self.context).start()
        self.port = self.runner.addresses[0][1]


def secure(certificate: tuple[str, str], prefix: str = "") -> Secure:
    mock = Secure(prefix=prefix)
    mock.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    mock.context.load_cert_chain(*certificate)
    return mock


def test_servers_with_a_certificate_of_an_authority_of_one_s_own(certificate: tuple[str, str]) -> None:
    async def main() -> None:
        mocks = [secure(certificate, "/a/b"), secure(certificate)]
        async with running_gateway(mocks, ca_file=certificate[0]) as gateway:
            assert [(await gateway.ask())[0] for _ in range(6)] == [200] * 6
            assert [[path for path, _, _ in mock.seen] for mock in mocks] == [
                ["/a/b/v1/completions"] * 3,
                ["/v1/completions"] * 3,
            ]
        async with running_gateway([secure(certificate)]) as gateway:
            status, told, _ = await gateway.ask()
            assert (status, b"self-signed certificate" in told) == (503, True)

    run(main())


def test_a_url_of_http_to_a_server_of_https_is_told(certificate: tuple[str, str]) -> None:
    class Mistaken(Secure):
        @property
        def url(self) -> str:
            return super().url.replace("https", "http")

    async def main() -> None:
        mock = Mistaken()
        mock.context = secure(certificate).context
        async with running_gateway([mock]) as gateway:
            status, told, _ = await gateway.ask()
            assert (status, mock.url in told.decode()) == (503, True)
            assert len(told) < 300

    run(main())


def test_the_client_of_openai_shows_its_key_as_it_always_does(tmp_path: Path) -> None:
    openai = pytest.importorskip("openai")

    async def main() -> None:
        async with running_gateway([Mock(whole)], api_key_file=file(tmp_path, "keys", "sk-1")) as gateway:
            base = f"{gateway.url}/v1"
            async with openai.AsyncOpenAI(base_url=base, api_key="sk-1", http_client=None) as client:
                assert (await client.completions.create(model="m", prompt="x")).usage.completion_tokens == 7
            async with openai.AsyncOpenAI(base_url=base, api_key="sk-2", max_retries=0) as client:
                with pytest.raises(openai.AuthenticationError, match="no key, or a wrong one"):
                    await client.completions.create(model="m", prompt="x")
            await eventually(lambda: gateway.in_flight() == 0)

    run(main())


def test_a_client_without_a_key_leaves_no_mark_on_a_server(tmp_path: Path) -> None:
    async def main() -> None:
        async with running_gateway([Mock()], api_key_file=file(tmp_path, "keys", "k")) as gateway:
            async with aiohttp.ClientSession() as client, client.get(f"{gateway.url}/v1/models") as answer:
                assert answer.status == 401
            assert (await gateway.metrics())['block_requests_total{server="none",status="refused"}'] == 1

    run(main())
