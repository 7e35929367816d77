"""Servers on a Ray cluster: the actor that keeps one, and who starts and follows actors, on a Ray that is a script."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import aiohttp
import pytest
from commands import ROOT
from mock_servers import Mock

from block.backends import ray_launch
from block.backends.launch import HostFiles, ServerSpec, free_ports
from block.backends.ray_actor import Heard, News, ServerActor
from block.backends.ray_launch import RayLauncher, RayServer
from block.cluster.instance import LaunchFailed

PATHS = {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}


@pytest.fixture
def actor(tmp_path: Path) -> Iterator[Callable[..., ServerActor]]:
    """Makes actors that keep a server of mock_vllm."""
    made: list[ServerActor] = []

    def make(port: int, *arguments: str) -> ServerActor:
        spec = ServerSpec(arguments, tmp_path / "unused.log", PATHS, lambda: HostFiles(["--made"]), "mock_vllm")
        made.append(ServerActor(spec, port, lambda: "127.0.0.1"))
        return made[-1]

    yield make
    for one in made:
        one.stop()


def told(actor: ServerActor, heard: Heard, until: Callable[[bytes, int | None], bool]) -> tuple[bytes, News]:
    """What is said and told until it is enough."""
    text, deadline = b"", time.monotonic() + 30
    while time.monotonic() < deadline:
        news = actor.news(heard, 0.2)
        text, heard = text + news.said, news.heard
        if until(text, news.status):
            return text, news
    raise AssertionError(text)


def test_an_actor_tells_where_its_server_is_what_it_says_and_how_it_ended(actor: Callable[..., ServerActor]) -> None:
    (port,) = free_ports(1)
    one = actor(port)
    assert one.news(Heard(), 60.0).url == f"http://127.0.0.1:{port}"  # at once
    text, news = told(one, Heard(), lambda text, _: b"\n" in text)
    assert text == b"listening on 127.0.0.1:%d\n" % port
    assert one.news(Heard(news.heard.server, 10), 60.0).said == b"on 127.0.0.1:%d\n" % port  # an answer that was lost
    one.stop()
    assert one.news(news.heard, 60.0) == News(news.url, b"", -15, news.heard)


def test_an_actor_tells_all_that_a_server_has_said_before_how_it_ended(actor: Callable[..., ServerActor]) -> None:
    text, news = told(actor(*free_ports(1), "--no-such-option"), Heard(), lambda _, status: status is not None)
    assert text.endswith(b"ValueError: no-such-option\nand more of it\n")
    assert news.status == 2


def test_a_port_that_is_taken_is_replaced(actor: Callable[..., ServerActor]) -> None:
    one = actor(*free_ports(1))
    url = one.news(Heard(), 0.0).url
    told(one, Heard(), lambda text, _: b"listening" in text)
    other = actor(int(url.rpartition(":")[2]))
    assert other.news(Heard(), 0.0).url != url


def test_no_file_is_left_of_a_server(actor: Callable[..., ServerActor]) -> None:
    one = actor(*free_ports(1))
    assert not one._server.log.exists()
    assert os.fstat(one._log).st_nlink == 0


# ------------------------------------------------------------------------------------------------ the launcher's side


class Lost(Exception):
    """Ray's RayActorError."""


class Died(Lost):
    """Ray's ActorDiedError."""


class Call:
    """A method of an actor, as Ray shows it."""

    def __init__(self, method: Callable[..., Any]) -> None:
        self.remote = method


class Actor:
    """Tells what `Ray.script` says next, once there is something."""

    def __init__(self, ray: Ray) -> None:
        self.ray = ray
        self.news, self.stop = Call(self._news), Call(self._stop)

    async def _news(self, heard: Heard, patience_s: float) -> News:
        self.ray.heard.append(heard)
        while not self.ray.script:
            await asyncio.sleep(0.001)
        said = self.ray.script.pop(0)
        if isinstance(said, Exception):
            raise said
        return said

    async def _stop(self) -> None:
        self.ray.script.append(News("", b"bye\n", -15, Heard("last", 4)))
        self.ray.did.append("stop")


class Ray:
    """A Ray whose only actor does as the script says."""

    exceptions = SimpleNamespace(RayError=Lost, RayActorError=Lost, ActorDiedError=Died)
    util = SimpleNamespace(get_node_ip_address=lambda: "127.0.0.1")

    def __init__(self, *script: News | Exception) -> None:
        self.script = list(script)
        self.heard: list[Heard] = []
        self.did: list[str] = []
        self.options: dict[str, Any] = {}

    def remote(self, cls: type) -> Any:
        def options(**given: Any) -> Any:
            self.options = given
            return Call(lambda *_: Actor(self))

        assert cls is ServerActor
        return SimpleNamespace(options=options)

    def kill(self, actor: Actor, no_restart: bool = True) -> None:
        self.did.append("kill" if no_restart else "restart")

    def nodes(self) -> list[dict[str, Any]]:
        resources = [{"CPU": 8.0, "GPU": 4.0}, {"CPU": 8.0, "GPU": 4.0}, {"CPU": 2.0}]
        return [{"Alive": True, "Resources": one} for one in resources] + [{"Alive": False, "Resources": {"GPU": 9.0}}]

    def available_resources(self) -> dict[str, float]:
        return {"CPU": 18.0, "GPU": 7.0}


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_launch, "POLL_S", 0.001)


@asynccontextmanager
async def launching(ray: Ray) -> AsyncIterator[RayLauncher]:
    pytest.importorskip("ray")
    async with aiohttp.ClientSession() as session:
        launcher = RayLauncher(ray, None, [{"CPU": 1.0, "GPU": 2.0}] * 2, session, 30.0)
        try:
            yield launcher
        finally:
            await launcher.stop_all()


async def until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not true():
            await asyncio.sleep(0.001)


def test_a_server_that_ends_is_started_again_and_its_log_goes_on(tmp_path: Path) -> None:
    async def main() -> None:
        mock, moved = Mock(), Mock()
        await mock.start()
        await moved.start()
        ray = Ray(News(mock.url, b"", None, Heard("a", 0)), News(mock.url, b"one\n", None, Heard("a", 4)))
        async with launching(ray) as launcher:
            server: RayServer = await launcher.start(ServerSpec([], tmp_path / "0.log"))
            assert (server.url, server.ended(), server.losses) == (mock.url, None, 0)
            assert (ray.options["num_gpus"], ray.options["num_cpus"], ray.options["max_restarts"]) == (2.0, 1.0, -1)
            ended = News(mock.url, b"two\n", -9, Heard("a", 8))
            ray.script += [ended, ended._replace(said=b""), Lost("restarting")]
            ray.script += [News(moved.url, b"three\n", None, Heard("b", 6))]
            await until(lambda: server.url == moved.url)
            assert ray.heard[:6] == [Heard(), *[Heard("a", length) for length in (0, 4, 8, 8, 8)]]
            assert ray.did == ["restart"]  # once
            assert server.losses == 2
            assert server.ended() is None
        assert ray.did == ["restart", "stop", "kill"]
        assert launcher._free == [0, 1]
        for one in (mock, moved):
            await one.kill()

    asyncio.run(main())
    assert (tmp_path / "0.log").read_text() == "one\ntwo\nthree\nbye\n"


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ([News("http://127.0.0.1:1", b"ValueError: no\n", 3, Heard("a", 15))], "ended with status 3 .*ValueError: no"),
        ([Lost("its node is lost"), Died("ModuleNotFoundError: no\nblock")], "ended with status 1 .*ModuleNotFound"),
    ],
)
def test_a_server_that_does_not_come_up_is_stopped_and_told(
    script: list[News | Exception], said: str, tmp_path: Path
) -> None:
    async def main() -> None:
        async with launching(ray) as launcher:
            with pytest.raises(LaunchFailed, match=said):
                await launcher.start(ServerSpec([], tmp_path / "0.log"))
            assert launcher._servers == []

    ray = Ray(*script)
    asyncio.run(main())
    assert ray.did[-1] == "kill"
    assert "restart" not in ray.did


def test_what_there_is_no_room_for_is_told_at_once_and_after_the_time_it_is_an_error(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(ray_launch, "ROOM_S", 0.0)
    group = SimpleNamespace(wait=lambda seconds: False)
    wants = (
        "3 servers want 1 CPU and 4 GPU each (backend.placement=pack); the cluster's nodes are 1 with 2 CPU and 0 GPU, "
    )
    wants += "2 with 8 CPU and 4 GPU, of which 18 CPU and 7 GPU in all are free"
    with pytest.raises(LaunchFailed) as caught:
        asyncio.run(ray_launch._room(Ray(), group, [{"CPU": 1.0, "GPU": 4.0}] * 3, "pack", 0.05))
    assert str(caught.value) == f"no room (backend.ready_timeout_s): {wants}"
    assert caplog.text.count(f"waiting for room: {wants}") == 1


def test_ray_is_imported_only_where_it_is_used() -> None:
    program = "import sys, block.backends.ray_launch, block.run.command; assert 'ray' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)
