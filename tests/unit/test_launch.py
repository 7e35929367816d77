"""Starting and stopping servers, played by small scripts."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from block.backends import launch
from block.backends.launch import ServerSpec, free_ports, launcher_for
from block.cluster.instance import LaunchFailed

SERVER = textwrap.dedent(
    """
    import http.server, os, signal, subprocess, sys, time
    behaviour, port = sys.argv[1], int(next(a for a in sys.argv if a.startswith("--port=")).split("=")[1])
    if behaviour == "ends":
        sys.exit("ValueError: cannot start")
    if behaviour == "deaf":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(503 if behaviour == "sick" else 200)
            self.end_headers()
        def log_message(self, *a): pass
    http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
    """
)


class Scripts(AbstractContextManager["Scripts"]):
    """Starts SERVER with the spec's arguments."""

    def start(self, spec: ServerSpec) -> tuple[int, Callable[[], int | None]]:
        with spec.log.open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-c", SERVER, *spec.arguments], stdout=log, stderr=log, process_group=0
            )
        return process.pid, process.poll

    def __exit__(self, *_: Any) -> None:
        pass


@asynccontextmanager
async def running(specs: list[ServerSpec], starter: Scripts, **how: Any) -> AsyncIterator[list[launch.ServerProcess]]:
    """The servers of a launcher that has started them all at once."""
    async with launcher_for(starter, **how) as launcher:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(launcher.start(spec)) for spec in specs]
        yield [task.result() for task in tasks]


def specs(folder: Path, *behaviours: str) -> list[ServerSpec]:
    return [ServerSpec([behaviour], folder / f"{i}.log") for i, behaviour in enumerate(behaviours)]


def gone(pid: int) -> bool:
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        try:
            os.killpg(pid, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.02)
    return False


def test_servers_answer_in_the_context_and_are_gone_after_it(tmp_path: Path) -> None:
    async def main() -> list[launch.ServerProcess]:
        async with running(specs(tmp_path, "well", "well"), Scripts(), deadline_s=30) as servers:
            assert len({server.url for server in servers}) == 2
            assert [server.log.name for server in servers] == ["0.log", "1.log"]
            assert all(server.ended() is None for server in servers)
            return servers

    servers = asyncio.run(main())
    assert all(gone(server.pid) for server in servers)
    assert [server.ended() for server in servers] == [-signal.SIGTERM] * 2


def test_an_error_inside_stops_the_servers_too(tmp_path: Path) -> None:
    pids: list[int] = []

    async def main() -> None:
        async with running(specs(tmp_path, "well"), Scripts(), deadline_s=30) as servers:
            pids.extend(server.pid for server in servers)
            raise LookupError("something")

    with pytest.raises(LookupError):
        asyncio.run(main())
    assert all(gone(pid) for pid in pids)


def test_a_server_that_does_not_listen_to_sigterm_is_killed_with_all_its_children(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "GRACE_S", 0.3)

    async def main() -> list[launch.ServerProcess]:
        async with running(specs(tmp_path, "deaf"), Scripts(), deadline_s=30) as servers:
            return servers

    (server,) = asyncio.run(main())
    assert server.ended() == -signal.SIGKILL
    assert gone(server.pid)


@pytest.mark.parametrize(
    ("behaviour", "deadline", "said"),
    [
        ("ends", 30.0, r"ended with status 1 .*ValueError: cannot start .*1\.log"),
        ("sick", 0.5, r"ready_timeout_s.*1\.log"),
    ],
)
def test_a_server_that_does_not_come_up_is_told_and_the_others_are_stopped(
    tmp_path: Path, behaviour: str, deadline: float, said: str
) -> None:
    async def main() -> None:
        async with running(specs(tmp_path, "well", behaviour), Scripts(), deadline_s=deadline):
            raise AssertionError("it is not up")

    with pytest.raises(ExceptionGroup) as caught:
        asyncio.run(main())
    (error,) = caught.value.exceptions
    assert isinstance(error, LaunchFailed)
    assert re.search(said, str(error)), error


def test_as_many_start_at_once_as_may(tmp_path: Path) -> None:
    started: list[float] = []

    class Counting(Scripts):
        def start(self, spec: ServerSpec) -> tuple[int, Callable[[], int | None]]:
            started.append(time.monotonic())
            return super().start(spec)

    async def main() -> None:
        async with running(specs(tmp_path, "well", "well"), Counting(), deadline_s=30, at_once=1):
            pass

    asyncio.run(main())
    assert started[1] - started[0] > 0.05  # the second waits until the first is well


def test_one_server_of_several_can_be_stopped_and_another_started(tmp_path: Path) -> None:
    async def main() -> None:
        async with launcher_for(Scripts(), deadline_s=30) as launcher:
            first, second = [await launcher.start(spec) for spec in specs(tmp_path, "well", "well")]
            await launcher.stop(first)
            assert gone(first.pid)
            assert first.ended() == -signal.SIGTERM
            assert second.ended() is None
            third = await launcher.start(specs(tmp_path, "well")[0])
            assert third.url not in (first.url, second.url)
            pids.extend([second.pid, third.pid])

    pids: list[int] = []
    asyncio.run(main())
    assert all(gone(pid) for pid in pids)


def test_a_server_that_does_not_come_up_later_is_stopped_and_the_others_run_on(tmp_path: Path) -> None:
    async def main() -> None:
        async with launcher_for(Scripts(), deadline_s=1.0) as launcher:
            well = await launcher.start(specs(tmp_path, "well")[0])
            with pytest.raises(LaunchFailed, match="ready_timeout_s"):
                await launcher.start(specs(tmp_path, "sick")[0])
            assert [server.pid for server in launcher._servers] == [well.pid]
            assert well.ended() is None

    asyncio.run(main())


def test_free_ports_differ() -> None:
    assert len(set(free_ports(50))) == 50
