"""Start model servers, wait until they answer, and stop them for certain.

Each server is a process group of its own. It is told whom it must not outlive, so that the kernel ends it even when
this process is killed; what this process can still do, it does: SIGTERM, a while to end, SIGKILL to the group.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, NamedTuple, Protocol, Self, TypeVar

import aiohttp

from block.cluster.instance import LaunchFailed
from block.vllm_plugin.environment import PARENT

GRACE_S = 5.0
"""From SIGTERM to SIGKILL."""
POLL_S = 0.1
STOP_POLL_S = 0.02
_ERROR = re.compile(r"\b(\w*[Ee]rror|Incompatible): ")


class HostFiles(NamedTuple):
    """The arguments and the environment by which a server finds files of its host."""

    arguments: Sequence[str] = ()
    environment: Mapping[str, str] = {}


@dataclass(frozen=True)
class ServerSpec:
    """How to start one server: arguments of `vllm serve` without its address, environment on top of ours, its log.

    files: makes the files that it reads; called on its host. module: what Python runs.
    """

    arguments: Sequence[str]
    log: Path
    environment: Mapping[str, str] = field(default_factory=dict)
    files: Callable[[], HostFiles] = HostFiles
    module: str = "block.vllm_plugin.serve"

    def on_this_host(self, host: str, port: int) -> ServerSpec:
        """The same with its files, which are made here, and its address."""
        made = self.files()
        address = [f"--host={host}", f"--port={port}"]
        environment = {**self.environment, **made.environment}
        arguments = [*self.arguments, *made.arguments, *address]
        return replace(self, arguments=arguments, environment=environment, files=HostFiles)


class Server(Protocol):
    """A server that was started."""

    @property
    def url(self) -> str:
        """Where it listens; empty while that is not known. One that is started again may move."""
        ...

    @property
    def log(self) -> Path:
        """The file that has what it says."""
        ...

    @property
    def losses(self) -> int:
        """How many times it was lost: it ended, or its host is not there."""
        ...

    def ended(self) -> int | None:
        """Its exit status; None while it runs."""
        ...


@dataclass(frozen=True)
class ServerProcess:
    """A server of this host. `ended` returns its exit status, or None while it runs."""

    url: str
    pid: int
    log: Path
    ended: Callable[[], int | None]

    @property
    def losses(self) -> int:
        """1 if it has ended: nobody starts it again."""
        return int(self.ended() is not None)


class _Starter(Protocol):
    def start(self, spec: ServerSpec) -> tuple[int, Callable[[], int | None]]: ...


class Subprocesses(AbstractContextManager["Subprocesses"]):
    """Starts each server as a Python process of its own."""

    def start(self, spec: ServerSpec) -> tuple[int, Callable[[], int | None]]:
        """The process id, and what tells its exit status."""
        with spec.log.open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", spec.module, *spec.arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, **spec.environment, PARENT: str(os.getpid())},
                process_group=0,
            )
        return process.pid, process.poll

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Nothing of its own to end."""


class Zygote(AbstractContextManager["Zygote"]):
    """Imports vLLM once and forks each server from there. LaunchFailed if it does not come up or ends."""

    def __init__(self, log: Path, environment: Mapping[str, str], deadline_s: float = 60.0) -> None:
        self._log = log
        self._deadline_s = deadline_s
        self._environment = environment
        self._ended: dict[int, int] = {}

    def __enter__(self) -> Self:
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "block.vllm_plugin.zygote"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env={**os.environ, **self._environment, PARENT: str(os.getpid())},
                process_group=0,
            )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._requests, self._answers = self._process.stdin, self._process.stdout
        self._said = b""
        self._answer("ready")
        return self

    def start(self, spec: ServerSpec) -> tuple[int, Callable[[], int | None]]:
        """The process id, and what tells its exit status."""
        request = {"arguments": list(spec.arguments), "environment": dict(spec.environment), "log": str(spec.log)}
        try:
            self._requests.write(json.dumps(request).encode() + b"\n")
            self._requests.flush()
        except OSError as error:
            raise LaunchFailed(f"the zygote has ended; its log: {self._log}") from error
        pid = int(self._answer("pid"))
        return pid, lambda: self._status(pid)

    def _answer(self, key: str) -> Any:
        """The next answer that has `key`. LaunchFailed if it does not come in time."""
        deadline = time.monotonic() + self._deadline_s
        while True:
            for answer in self._listen(max(deadline - time.monotonic(), 0.0)):
                if key in answer:
                    return answer[key]
            if time.monotonic() > deadline:
                raise LaunchFailed(f"the zygote was not ready in time (backend.ready_timeout_s); its log: {self._log}")

    def _listen(self, seconds: float) -> list[dict[str, Any]]:
        """What the zygote says within so many seconds; notes the servers that have ended. LaunchFailed at its end."""
        if not select.select([self._answers], [], [], seconds)[0]:
            return []
        received = os.read(self._answers.fileno(), 65536)
        if not received:
            raise LaunchFailed(f"the zygote ended with status {self._process.wait()}; its log: {self._log}")
        *lines, self._said = (self._said + received).split(b"\n")
        answers = [json.loads(line) for line in lines]
        self._ended |= {answer["ended"]: answer["status"] for answer in answers if "ended" in answer}
        return answers

    def _status(self, pid: int) -> int | None:
        with suppress(LaunchFailed):  # at its end its servers are ended too
            self._listen(0.0)
        if pid not in self._ended and not _alive(pid):
            return -signal.SIGKILL
        return self._ended.get(pid)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the zygote; what it has forked and still runs is ended by the kernel."""
        with suppress(OSError):
            self._requests.close()
        try:
            self._process.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._answers.close()


S = TypeVar("S", bound=Server)


class Launcher(ABC, Generic[S]):
    """Starts servers, waits until they answer, and stops them one by one.

    deadline_s: wall-clock seconds for a server to be up; at_once: how many may be starting at a time (None: all).
    """

    def __init__(self, session: aiohttp.ClientSession, deadline_s: float, at_once: int | None = None) -> None:
        self._session = session
        self._deadline_s = deadline_s
        self._slots = asyncio.Semaphore(at_once or 1_000_000)
        self._ports: set[int] = set()
        self._servers: list[S] = []

    async def start(self, spec: ServerSpec) -> S:
        """A server that answers ``/health``. LaunchFailed if it does not come up; it is stopped then."""
        deadline = time.monotonic() + self._deadline_s
        async with self._slots:
            server = self._begin(spec, self._port())
            self._servers.append(server)
            try:
                await _healthy(self._session, server, deadline)
            except LaunchFailed:
                await self.stop(server)
                raise
            return server

    async def stop(self, server: S) -> None:
        """Stop a server and all its processes: by SIGTERM, and by SIGKILL if that does not do."""
        await self._end(server)
        self._servers.remove(server)

    @abstractmethod
    def _begin(self, spec: ServerSpec, port: int) -> S:
        """Start a server, which need not listen yet. port: one that no other server has."""

    @abstractmethod
    async def _end(self, server: S) -> None:
        """Stop a server; none of its processes is left when this returns."""

    def _port(self) -> int:
        """A free port that was not given before, for who has it may not listen yet."""
        while (port := free_ports(1)[0]) in self._ports:
            pass
        self._ports.add(port)
        return port


class LocalLauncher(Launcher[ServerProcess]):
    """Starts servers on this host. method: how; the others: as of `Launcher`."""

    def __init__(
        self, method: _Starter, session: aiohttp.ClientSession, deadline_s: float, at_once: int | None = None
    ) -> None:
        super().__init__(session, deadline_s, at_once)
        self._method = method

    def _begin(self, spec: ServerSpec, port: int) -> ServerProcess:
        pid, ended = self._method.start(spec.on_this_host("127.0.0.1", port))
        return ServerProcess(f"http://127.0.0.1:{port}", pid, spec.log, ended)

    async def _end(self, server: ServerProcess) -> None:
        for _ in stopping([server]):
            await asyncio.sleep(STOP_POLL_S)

    def stop_all(self) -> None:
        """Stop all servers that are left, as `stop` does, without letting the event loop run meanwhile."""
        for _ in stopping(self._servers):
            time.sleep(STOP_POLL_S)


@asynccontextmanager
async def launcher_for(
    starter: AbstractContextManager[_Starter], *, deadline_s: float, at_once: int | None = None
) -> AsyncIterator[LocalLauncher]:
    """A launcher on this host; all its servers are stopped when the context ends, however it ends."""
    with ExitStack() as stack:
        method = stack.enter_context(starter)
        async with aiohttp.ClientSession() as session:
            launcher = LocalLauncher(method, session, deadline_s, at_once)
            stack.callback(launcher.stop_all)
            yield launcher


async def _healthy(session: aiohttp.ClientSession, server: Server, deadline: float) -> None:
    while True:
        status = server.ended()
        if status is not None:
            raise LaunchFailed(f"a server ended with status {status} as it started; {_last_words(server.log)}")
        if server.url and await is_healthy(session, server.url):
            return
        if time.monotonic() > deadline:
            raise LaunchFailed(f"a server was not ready in time (backend.ready_timeout_s); {_last_words(server.log)}")
        await asyncio.sleep(POLL_S)


async def is_healthy(session: aiohttp.ClientSession, url: str) -> bool:
    """Whether a server's ``/health`` says it is well."""
    try:
        async with session.get(f"{url}/health", timeout=aiohttp.ClientTimeout(total=5)) as response:
            return response.status == 200
    except (aiohttp.ClientError, TimeoutError):
        return False


def _last_words(log: Path) -> str:
    """The first line of a log that tells of an error, which those after it follow from, and where the log is."""
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    errors = [line.strip() for line in lines if _ERROR.search(line) and "WARNING" not in line]
    return f"{errors[0]} (log: {log})" if errors else f"its log: {log}"


def free_ports(count: int) -> list[int]:
    """Different ports of this host that nobody listens on."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def stopping(servers: Sequence[ServerProcess]) -> Iterator[None]:
    """SIGTERM to the process groups, GRACE_S to end, SIGKILL to what is left of them; yields while there is to wait."""

    def over() -> bool:
        return all(one.ended() is not None for one in servers) and not any(_group_alive(one.pid) for one in servers)

    for number in (signal.SIGTERM, signal.SIGKILL):
        for server in servers:
            _signal(server.pid, number)
        deadline = time.monotonic() + GRACE_S
        while time.monotonic() < deadline and not over():
            yield


def _signal(group: int, number: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(group, number)


def _group_alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
