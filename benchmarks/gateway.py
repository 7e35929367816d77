"""What the gateway and other routers add to a direct connection, what one process of each carries, and what a killed
server costs.

    python benchmarks/gateway.py [peers=FOLDER] [rounds=5] [kill] [hang] [realtime]
    python benchmarks/gateway.py boards [rounds=5] [realtime]

FOLDER holds the commands `vllm-router` and `sglang-router` (both are packages of Python's registry, best in an
environment of their own); those that are there are measured, too. Four mock servers answer at once, or after as many ms
as a request asks tokens, so that a router's own time is what is seen. The routers share one core, of which one of them
at a time has work; the load and the mocks, which are bare protocols, share another one. Rounds through each router and
directly take turns, so that what else the machine does meets all. `realtime` runs all of it before what else there is
(SCHED_RR, which root may): P99 on a machine that is shared is that of its scheduler.

`boards`: what the policy `block` costs beside `round_robin`, over 12 servers with the plugin, each of which shows 48
sequences that run and 100 that wait.
"""

from __future__ import annotations

import asyncio
import copy
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import numpy as np
import uvloop
from testbed import busy_board

from block.backends.launch import free_ports
from block.engine.config import EngineConfig
from block.vllm_plugin import state_buffer

RATE = 1000  # requests/s
SETTINGS = {key: value for key, _, value in (one.partition("=") for one in sys.argv[1:])}
ROUNDS = int(SETTINGS.get("rounds", 5))
ROUND_S = 3.0
CLIENTS = 64
MOCKS = 4
BOARDS, RUN, WAIT = 12, 48, 100
SETTINGS_OF_A_BOARD = EngineConfig("v1", max_num_seqs=RUN).settings(5000)
EVENTS = 8  # of a streamed answer
ROOT = Path(__file__).resolve().parent.parent

ANSWER = json.dumps(
    {
        "id": "cmpl-1",
        "object": "text_completion",
        "model": "mock",
        "choices": [{"index": 0, "text": " token" * 16, "logprobs": None, "finish_reason": "length"}],
        "usage": {"prompt_tokens": 250, "completion_tokens": 16, "total_tokens": 266},
    }
).encode()
EVENT = b'data: {"id":"cmpl-1","object":"text_completion","choices":[{"index":0,"text":" token"}],"usage":null}\n\n'
LENGTH = re.compile(rb"content-length: *(\d+)", re.IGNORECASE)
TOKENS = re.compile(rb'"max_tokens": *(\d+)')


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


WHOLE = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%s" % (len(ANSWER), ANSWER)
HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n"


class Mock(asyncio.Protocol):
    """A server whose every answer is the same; a stream comes as an event a millisecond."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.data = b""

    def data_received(self, data: bytes) -> None:
        self.data += data
        head, found, body = self.data.partition(b"\r\n\r\n")
        if not found:
            return
        length = LENGTH.search(head)
        if length and len(body) < int(length[1]):
            return
        self.data = b""
        loop = asyncio.get_running_loop()
        tokens = TOKENS.search(body)
        delay = int(tokens[1]) / 1000 if tokens else 0.0
        if b'"stream":true' not in body:
            loop.call_later(delay, self.write, WHOLE) if delay else self.write(WHOLE)
            return
        self.write(HEAD)
        for i in range(EVENTS):
            loop.call_later(delay + i / 1000, self.write, chunk(EVENT))
        loop.call_later(delay + EVENTS / 1000, self.write, chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n")

    def write(self, data: bytes) -> None:
        if not self.transport.is_closing():
            self.transport.write(data)


class Board(Mock):
    """A server with the plugin, whose state is always the same."""

    def __init__(self) -> None:
        self.buffer, self.path = busy_board(RUN, WAIT, SETTINGS_OF_A_BOARD)

    def __call__(self) -> Board:
        """A connection of its: asyncio wants a new object for each."""
        return copy.copy(self)

    def data_received(self, data: bytes) -> None:
        told = {"vllm": "0", "buffer": self.path, "nonce": int(self.buffer.header[state_buffer.NONCE])}
        for path, said in ((b"GET /block/info", told), (b"GET /v1/models", {"data": [{"id": "mock"}]})):
            if data.startswith(path):
                body = json.dumps(said).encode()
                self.write(
                    b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(body)
                )
                self.write(body)
                return
        super().data_received(data)


class Client(asyncio.Protocol):
    """A connection that sends a request and waits for the end of the answer."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.done: asyncio.Future[bytes] | None = None

    def send(self, request: bytes) -> asyncio.Future[bytes]:
        self.data = b""
        self.missing: int | None = None
        self.done = asyncio.get_running_loop().create_future()
        self.first = 0.0
        self.transport.write(request)
        return self.done

    def data_received(self, data: bytes) -> None:
        if not self.data:
            self.first = time.perf_counter()
        self.data += data
        if self.missing is None:
            head, found, _ = self.data.partition(b"\r\n\r\n")
            if not found:
                return
            length = LENGTH.search(head)
            self.missing = len(head) + 4 + int(length[1]) if length else 0
        if self.done is None or self.done.done():
            return
        if len(self.data) == self.missing if self.missing else self.data.endswith(b"\r\n0\r\n\r\n"):
            self.done.set_result(self.data)

    def connection_lost(self, error: Exception | None) -> None:
        if self.done is not None and not self.done.done():
            self.done.set_exception(ConnectionResetError())


class Load:
    """Requests to `ports` in turn, over connections that are used again."""

    def __init__(self, ports: Sequence[int], *, stream: bool = False, tokens: int = 0) -> None:
        body = {"model": "mock", "prompt": "The quick brown fox. " * 50, "stream": stream}
        if tokens:
            body["max_tokens"] = tokens
        text = json.dumps(body, separators=(",", ":")).encode()
        self.request = b"POST /v1/completions HTTP/1.1\r\nhost: mock\r\ncontent-type: application/json\r\n"
        self.request += b"content-length: %d\r\n\r\n%s" % (len(text), text)
        self.ports = ports
        self.idle: dict[int, list[Client]] = {port: [] for port in ports}
        self.seconds: list[float] = []  # to the end of each answer
        self.firsts: list[float] = []  # to its first byte
        self.lost = 0
        self.broken = 0  # streams that were ended by an error event

    async def one(self, turn: int) -> None:
        port = self.ports[turn % len(self.ports)]
        idle = self.idle[port]
        client = idle.pop() if idle else await self.connect(port)
        began = time.perf_counter()
        try:
            answer = await client.send(self.request)
        except ConnectionResetError:
            self.lost += 1
            return
        self.seconds.append(time.perf_counter() - began)
        self.firsts.append(client.first - began)
        idle.append(client)
        if not answer.startswith(b"HTTP/1.1 200"):
            self.lost += 1
        elif b'data: {"error"' in answer:
            self.broken += 1

    async def connect(self, port: int) -> Client:
        _, client = await asyncio.get_running_loop().create_connection(Client, "127.0.0.1", port)
        return client

    async def open_loop(self, rate: float, seconds: float) -> None:
        began = time.perf_counter()
        async with asyncio.TaskGroup() as group:
            for turn in range(round(rate * seconds)):
                wait = began + turn / rate - time.perf_counter()
                if wait > 0:
                    await asyncio.sleep(wait)
                group.create_task(self.one(turn))

    async def closed_loop(self, clients: int, seconds: float) -> float:
        """Requests/s of `clients` that each send when they have their answer."""
        end = time.perf_counter() + seconds

        async def client(turn: int) -> None:
            while time.perf_counter() < end:
                await self.one(turn)

        await asyncio.gather(*(client(turn) for turn in range(clients)))
        return len(self.seconds) / seconds

    def close(self) -> None:
        for clients in self.idle.values():
            for client in clients:
                client.transport.close()


class Bench:
    """The mocks and the routers, as processes."""

    def __init__(self, mock_core: set[int], router_core: set[int]) -> None:
        boards = "boards" in SETTINGS
        port, *theirs = free_ports(5)
        self.ports = free_ports(BOARDS if boards else MOCKS)
        self.mock_core = mock_core
        self.mocks = [self.start_mock(*self.ports)] if boards else [self.start_mock(port) for port in self.ports]
        time.sleep(3.0)
        urls = [f"http://127.0.0.1:{port}" for port in self.ports]
        gateway = [sys.executable, "-m", "block.gateway", "gateway.host=127.0.0.1", f"gateway.urls=[{','.join(urls)}]"]
        commands = {"block": (port, [*gateway, "scheduler=round_robin", f"gateway.port={port}"])}
        if boards:
            block = ["scheduler=block", "model=llama2-7b", "cluster.gpu=a30", f"gateway.port={theirs[0]}"]
            commands = {"round_robin": commands["block"], "block": (theirs[0], [*gateway, *block])}
        alike = ["--host", "127.0.0.1", "--policy", "round_robin", "--worker-urls", *urls]
        peers = Path(SETTINGS.get("peers", "/nowhere"))
        for name, its_port, metrics, launch in (
            ("vllm-router", theirs[0], theirs[1], list[str]()),
            ("sglang-router", theirs[2], theirs[3], ["launch"]),
        ):
            if (peer := peers / name).exists():
                ports = ["--port", str(its_port), "--prometheus-port", str(metrics)]
                commands[name] = its_port, [str(peer), *launch, *ports, *alike]
        self.routers: dict[str, tuple[int, subprocess.Popen[bytes]]] = {}
        for name, (its_port, command) in commands.items():
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                preexec_fn=lambda: os.sched_setaffinity(0, router_core),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            self.routers[name] = its_port, process
            wait_for(its_port)
        print(f"{', '.join(self.routers)} over {len(self.ports)} servers")

    def start_mock(self, *ports: int) -> subprocess.Popen[bytes]:
        mock = subprocess.Popen([sys.executable, __file__, "mock", *map(str, ports)])
        os.sched_setaffinity(mock.pid, self.mock_core)
        return mock

    def stop(self) -> None:
        for process in (*(process for _, process in self.routers.values()), *self.mocks):
            process.kill()
            process.wait()

    def cpu_s(self, name: str) -> float:
        """The CPU time of a router."""
        fields = Path(f"/proc/{self.routers[name][1].pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def loads(self, *, stream: bool) -> dict[str, Load]:
        return {
            "direct": Load(self.ports, stream=stream),
            **{name: Load([port], stream=stream) for name, (port, _) in self.routers.items()},
        }

    async def added(self, *, stream: bool) -> None:
        loads = self.loads(stream=stream)
        rounds = []
        for _ in range(ROUNDS + 1):
            found = []
            for load in loads.values():
                load.firsts.clear()
                load.seconds.clear()
                await load.open_loop(RATE, ROUND_S)
                found.append(np.percentile([load.firsts, load.seconds], [50, 99], axis=1) * 1e3)
            rounds.append(found)
        kept = np.median(rounds[1:], axis=0)  # the first one warms up; [arm, percentile, first byte or last]
        for which, what in enumerate(("first byte", "last byte") if stream else ("answer",)):
            direct = kept[0, :, which]
            print(f"  {what}, direct: P50 {direct[0]:.2f} ms, P99 {direct[1]:.2f} ms; added by")
            for name, one in zip(list(loads)[1:], kept[1:, :, which], strict=True):
                print(f"    {name:14} P50 {one[0] - direct[0]:6.2f} ms, P99 {one[1] - direct[1]:6.2f} ms")
        for name, load in loads.items():
            assert load.lost == load.broken == 0, name
            load.close()

    async def most(self, *, stream: bool) -> None:
        for name, load in self.loads(stream=stream).items():
            await load.closed_loop(CLIENTS, 1.0)
            rates, cpu = [], []
            for _ in range(3):
                load.seconds.clear()
                before = self.cpu_s(name) if name in self.routers else 0.0
                rates.append(await load.closed_loop(CLIENTS, 2.0))
                cpu.append(((self.cpu_s(name) if name in self.routers else 0.0) - before) / len(load.seconds))
            load.close()
            what = "" if name == "direct" else f", {np.median(cpu) * 1e6:.0f} µs of CPU each"
            print(f"    {name:14} {np.median(rates):8,.0f} requests/s{what}")

    async def kill_one(self, *, stream: bool) -> None:
        for name, (port, _) in self.routers.items():
            load = Load([port], stream=stream, tokens=20)
            asyncio.get_running_loop().call_later(1.5, self.mocks[0].kill)
            await load.open_loop(RATE, 3.0)
            load.close()
            p99 = np.percentile(load.seconds, 99) * 1e3
            told = f"{len(load.seconds)} answers, {load.lost} lost, {load.broken} broken off, P99 {p99:.0f} ms"
            print(f"    {name:14} {told}")
            self.mocks[0].wait()
            self.mocks[0] = self.start_mock(self.ports[0])
            await asyncio.sleep(20.0)  # so that it is readmitted by all

    async def stop_one(self) -> None:
        """One mock is stopped for half of the time, as a server that hangs: it accepts connections and says nothing."""
        for name, (port, _) in self.routers.items():
            load = Load([port], tokens=20)
            loop = asyncio.get_running_loop()
            loop.call_later(5, self.mocks[0].send_signal, signal.SIGSTOP)
            loop.call_later(30, self.mocks[0].send_signal, signal.SIGCONT)
            await load.open_loop(200, 50.0)
            load.close()
            p99, most = np.percentile(load.seconds, [99, 100])
            print(f"    {name:14} {len(load.seconds)} answers, {load.lost} lost, P99 {p99:.2f} s, at most {most:.1f} s")

    async def run(self) -> None:
        if "hang" in SETTINGS:
            print(f"Answers after 20 ms, 200 requests/s for 50 s, one of {MOCKS} mocks hangs from 5 to 30 s")
            await self.stop_one()
            return
        for stream, what in ((False, "Answers"), (True, f"Streams of {EVENTS} events, one a ms")):
            print(f"{what}, {RATE} requests/s open loop")
            await self.added(stream=stream)
            if "boards" in SETTINGS:
                continue
            print(f"{what}, {CLIENTS} clients that ask without pause")
            await self.most(stream=stream)
            if "kill" in SETTINGS:
                print(f"{what}, {RATE} requests/s, the first byte after 20 ms, one of {MOCKS} mocks killed")
                await self.kill_one(stream=stream)


def wait_for(port: int) -> None:
    """Until somebody listens there, and answers a request."""
    body = b'{"model":"mock","prompt":"x"}'
    head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\nconnection: close\r\n"
    for _ in range(300):
        time.sleep(0.2)
        try:
            with socket.create_connection(("127.0.0.1", port), timeout=2) as client:
                client.sendall(head + b"content-length: %d\r\n\r\n%s" % (len(body), body))
                if client.recv(100).startswith(b"HTTP/1.1 200"):
                    return
        except OSError:
            continue
    raise SystemExit(f"nobody answers on port {port}")


async def serve_mocks(ports: Sequence[int]) -> None:
    loop = asyncio.get_running_loop()
    for port in ports:
        await loop.create_server(Mock if len(ports) == 1 else Board(), "127.0.0.1", port)
    await asyncio.Event().wait()


def main() -> None:
    if sys.argv[1:2] == ["mock"]:
        uvloop.run(serve_mocks([int(port) for port in sys.argv[2:]]))
    if "realtime" in SETTINGS:
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))
    cores = sorted(os.sched_getaffinity(0))
    mine, doors = set(cores[1:2] or cores), set(cores[:1])
    os.sched_setaffinity(0, mine)
    bench = Bench(mine, doors)
    try:
        uvloop.run(bench.run())
    finally:
        bench.stop()


if __name__ == "__main__":
    main()
