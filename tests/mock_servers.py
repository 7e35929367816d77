"""Scripted model servers, with the plugin or without it, and a gateway in front of them."""

from __future__ import annotations

import asyncio
import io
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import aiohttp
from aiohttp import web
from multidict import CIMultiDictProxy
from testbed import constant_latency

from block.backends.launch import free_ports
from block.core.snapshot import EXPECTED, ID, MAX_TOKENS, NUM_PROMPT_TOKENS, TARGET
from block.dispatch import policies
from block.dispatch.config import DispatchConfig
from block.dispatch.core import Dispatcher
from block.engine.config import EngineSettings
from block.gateway.app import Gateway
from block.gateway.config import GatewayConfig
from block.gateway.groups import Plan
from block.lengths import Lengths, Oracle
from block.vllm_plugin import state_buffer as b
from block.vllm_plugin.frames import Pushing
from block.vllm_plugin.state_buffer import StateBuffer

ANSWER = b'{"id": "cmpl-1",  "choices": [{"text": "\\u00e9 \xc3\xa9"}], "usage": {"completion_tokens": 7}}\n'
EVENTS = [b'data: {"choices":[{"text":" %d"}]}\n\n' % i for i in range(5)]
USAGE = b'data: {"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":5}}\n\n'
DONE = b"data: [DONE]\n\n"
ASKED = b'{"model": "m",  "prompt": "hello", "max_tokens": 5}'
STREAMED = b'{"model":"m","prompt":[1,2,3],"stream":true,"stream_options":{"include_usage":true}}'
SSE = {"Content-Type": "text/event-stream; charset=utf-8"}
LIMITS = EngineSettings(
    True, 8, 512, 2048, block_size=16, total_blocks=1000, watermark_blocks=0, scheduler_reserve_full_isl=False
)

Answer = Callable[["Mock", web.Request], Awaitable[web.StreamResponse]]


async def whole(mock: Mock, http: web.Request) -> web.StreamResponse:
    return web.Response(body=ANSWER, headers={"Content-Type": "application/json", "X-Own": "1"})


async def stream(mock: Mock, http: web.Request) -> web.StreamResponse:
    """A stream that pauses after its first event until `mock.go`."""
    response = web.StreamResponse(headers=SSE)
    await response.prepare(http)
    for i, event in enumerate([*EVENTS, USAGE, DONE]):
        await response.write(event)
        if i == 0:
            await mock.go.wait()
    return response


async def hang(mock: Mock, http: web.Request) -> web.StreamResponse:
    await mock.never.wait()
    raise AssertionError


def says(status: int, body: bytes = b'{"error": {"message": "no"}}', **headers: str) -> Answer:
    async def answer(mock: Mock, http: web.Request) -> web.StreamResponse:
        return web.Response(status=status, body=body, headers={"Content-Type": "application/json", **headers})

    return answer


def cut(*events: bytes, sse: bool = True) -> Answer:
    """Headers and `events`, and then the connection is gone."""

    async def answer(mock: Mock, http: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers=SSE if sse else {"Content-Type": "application/json"})
        await response.prepare(http)
        response._payload_writer.send_headers()  # type: ignore[union-attr]
        for event in events:
            await response.write(event)
        await asyncio.sleep(0.02)
        assert http.transport is not None
        http.transport.abort()
        return response

    return answer


def pushed(buffer: StateBuffer) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
    """The plugin's own GET /block/frames, of what is on `buffer`, behind aiohttp."""
    pushing = Pushing(buffer)

    async def answer(http: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(http)

        async def send(part: dict[str, Any]) -> None:
            await response.write(part["body"])

        async def receive() -> dict[str, Any]:
            await asyncio.Event().wait()  # who leaves has the handler cancelled
            raise AssertionError

        since = http.query.get("since") if http.query.get("nonce") == str(int(buffer.header[b.NONCE])) else None
        await pushing.push(None if since is None else int(since), receive, send, lambda: False)
        return response

    return answer


@dataclass
class Mock:
    """A model server that answers as `answer` says."""

    answer: Answer = whole
    well: bool = True
    seen: list[tuple[str, CIMultiDictProxy[str], bytes]] = field(default_factory=list)
    cancelled: int = 0
    port: int = 0
    host: str = "127.0.0.1"
    prefix: str = ""
    models: Sequence[str] = ("tiny", "m")  # all but the first are adapters

    def __post_init__(self) -> None:
        self.go, self.never = asyncio.Event(), asyncio.Event()
        self.go.set()

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}{self.prefix}"

    async def _complete(self, http: web.Request) -> web.StreamResponse:
        self.seen.append((http.path_qs, http.headers, await http.read()))
        try:
            return await self.answer(self, http)
        except (asyncio.CancelledError, ConnectionError):
            self.cancelled += 1
            raise

    async def _health(self, http: web.Request) -> web.Response:
        return web.Response(status=200 if self.well else 503)

    async def _models(self, http: web.Request) -> web.Response:
        cards = [{"id": name, "parent": self.models[0] if i else None} for i, name in enumerate(self.models)]
        return web.json_response({"object": "list", "data": [{**card, "by": self.port} for card in cards]})

    def routes(self, app: web.Application) -> None:
        app.router.add_post(f"{self.prefix}/v1/completions", self._complete)
        app.router.add_post(f"{self.prefix}/v1/chat/completions", self._complete)
        app.router.add_get(f"{self.prefix}/v1/models", self._models)
        app.router.add_get(f"{self.prefix}/health", self._health)
        app.router.add_route("*", "/{any:(?!block/).*}", self._complete)

    async def start(self) -> None:
        app = web.Application(client_max_size=2**30)
        self.routes(app)
        self.runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.01, access_log=None)
        await self.runner.setup()
        await web.TCPSite(self.runner, self.host, self.port).start()
        self.port = self.runner.addresses[0][1]

    async def kill(self) -> None:
        """As a process that is gone: nobody listens, and all connections are reset."""
        for site in list(self.runner.sites):
            await site.stop()
        assert self.runner.server is not None
        for connection in self.runner.server.connections:
            if connection.transport is not None:
                connection.transport.abort()
        await self.runner.cleanup()


class PluginMock(Mock):
    """A server with the plugin; `place` shows a running sequence on its state buffer.

    local: whether that can be mapped, as on one host.
    """

    def __init__(self, answer: Answer = whole, settings: EngineSettings = LIMITS, local: bool = True) -> None:
        super().__init__(answer)
        self.local = local
        self.settings = settings
        self.renew()

    def renew(self) -> None:
        self.buffer, self.path = StateBuffer.create()
        self.buffer.header[b.SETTINGS : b.SETTINGS + len(self.settings)] = self.settings
        self.buffer.header[b.FREE] = self.settings.total_blocks

    def place(self, number: int, prompt: int, expected: int) -> None:
        self.buffer.begin()
        self.buffer.header[b.COLUMNS] = self.buffer.header[b.RUNNING] = 1
        self.buffer.seqs[:, 0] = 0
        self.buffer.seqs[[ID, NUM_PROMPT_TOKENS], 0] = number, prompt
        self.buffer.seqs[[TARGET, MAX_TOKENS, EXPECTED], 0] = expected
        self.buffer.header[b.FREE] = self.settings.total_blocks - prompt // 16
        self.buffer.end()

    def routes(self, app: web.Application) -> None:
        super().routes(app)
        app.router.add_get("/block/info", self._info)
        app.router.add_get("/block/frames", self._frames)

    async def _info(self, http: web.Request) -> web.Response:
        path = self.path if self.local else "/proc/0/fd/0"
        return web.json_response({"vllm": "0", "buffer": path, "nonce": int(self.buffer.header[b.NONCE])})

    async def _frames(self, http: web.Request) -> web.StreamResponse:
        return await pushed(self.buffer)(http)


@dataclass
class RunningGateway:
    """A gateway with its mock servers, and a client."""

    gateway: Gateway
    mocks: Sequence[Mock]
    url: str
    client: aiohttp.ClientSession
    stop: Callable[[], Awaitable[None]]

    @property
    def dispatcher(self) -> Dispatcher:
        return self.gateway.groups.all[0].dispatcher

    async def ask(
        self, body: bytes = ASKED, path: str = "/v1/completions", **options: Any
    ) -> tuple[int, bytes, CIMultiDictProxy[str]]:
        async with self.client.post(self.url + path, data=io.BytesIO(body), **options) as answer:
            return answer.status, await answer.read(), answer.headers

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A bare connection."""
        return await asyncio.open_connection(*self.url[7:].split(":"))

    async def metrics(self) -> dict[str, float]:
        """Those that are not 0; the mocks' addresses are their numbers."""
        async with self.client.get(self.url + "/metrics") as answer:
            text = await answer.text()
        for i, mock in enumerate(self.mocks):
            text = text.replace(mock.url, str(i))
        lines = [line.rpartition(" ") for line in text.splitlines() if not line.startswith("#")]
        return {name: float(value) for name, _, value in lines if float(value)}

    def in_flight(self) -> int:
        return sum(self.gateway.groups.outstanding(i) for i in self.gateway.servers)

    def urls(self) -> list[str]:
        """Of the servers that requests may go to."""
        return [self.gateway.servers[i].url for i in self.dispatcher.active]


async def eventually(true: Callable[[], bool]) -> None:
    for _ in range(500):
        if true():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it did not come to that")


@asynccontextmanager
async def running_gateway(
    mocks: Sequence[Mock],
    policy: policies.Policy | None = None,
    started: Sequence[int] | None = None,
    lengths: Lengths | None = None,
    tokenizer: Any = None,
    prefixes: str = "told",
    plans: Mapping[str, Plan] | None = None,
    **keys: Any,
) -> AsyncIterator[RunningGateway]:
    """Whatever happens in it, no request stays with the dispatcher and no connection is leaked."""
    for i, mock in enumerate(mocks):
        if started is None or i in started:
            await mock.start()
        elif not mock.port:
            (mock.port,) = free_ports(1)
    if tokenizer is not None:
        keys["tokenizer"] = "of the test"
    keys = {"probe_interval_s": 0.05, "models_interval_s": 0.05, "grace_s": 2.0, **keys}
    config = GatewayConfig(**{"urls": tuple(mock.url for mock in mocks), **keys})
    plan = Plan(
        policy or policies.RoundRobin(),
        DispatchConfig(prefixes=prefixes),
        random.Random(0),
        constant_latency(),
        lengths if lengths is not None else Oracle(),
        tokenizer,
    )
    gateway = Gateway(config, plan, plans)
    _, port = await gateway.start("127.0.0.1", 0)
    try:
        async with aiohttp.ClientSession(auto_decompress=False) as client:
            running = RunningGateway(gateway, mocks, f"http://127.0.0.1:{port}", client, gateway.stop)
            yield running
            await eventually(lambda: running.in_flight() == 0)
    finally:
        await gateway.stop()
        for mock in mocks:
            if hasattr(mock, "runner"):
                await mock.runner.cleanup()


def run(main: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(main, 20))
