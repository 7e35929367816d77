"""The gateway itself: its routes, the probes that readmit servers, start and stop."""

from __future__ import annotations

import asyncio
import gc
import itertools
import json
import logging
import random
import resource
import secrets
import signal
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AsyncExitStack
from typing import Any, NamedTuple
from urllib.parse import unquote_to_bytes

import aiohttp
import numpy as np
from prometheus_client import CONTENT_TYPE_LATEST

from block.cluster.instance import one_by_one
from block.core.clock import Clock
from block.core.hashing import hash_tokens
from block.core.types import Request
from block.dispatch.config import DispatchConfig
from block.dispatch.core import Dispatcher, History, Observer
from block.dispatch.correction import CorrectedForecaster
from block.dispatch.policies import LeastRequests, Needs, Policy
from block.engine.latency import LatencyModel
from block.gateway.access_log import STDOUT, AccessLog
from block.gateway.account import Accounts, open_tracing
from block.gateway.admission import Objectives, Queue
from block.gateway.client_connections import ClientConnection
from block.gateway.config import GatewayConfig
from block.gateway.estimates import Estimator
from block.gateway.exchange import Exchange, Surroundings
from block.gateway.fleet import make_upstreams
from block.gateway.http1 import HTTPRequest, TooLong, passed_on, unpacked
from block.gateway.metrics import REFUSED, Metrics, outcome_of
from block.gateway.modelled import Going, ModelledInstance
from block.gateway.models import Models
from block.gateway.openai import (
    JSON,
    Asked,
    BytesPerToken,
    PromptUsage,
    error_json,
    model_of,
    prompt_text,
    read,
    tagged,
)
from block.gateway.prefixes import UpstreamPrefixes
from block.gateway.prompts import UNKNOWN, Prompt, Prompts, TextPieces, TokenizedPrompts
from block.gateway.routes import GENERATES, OWN_VIEWS, changes_servers
from block.gateway.server_connections import ServerPool
from block.gateway.upstreams import SeenInstance, Upstream, open_session
from block.gateway.watch import Watch
from block.lengths import Lengths, Oracle, Reader

log = logging.getLogger(__name__)

HISTORY = 1000
"""Requests that the dispatcher remembers; nothing here needs more than the latest."""
DRAIN_POLL_S = 0.02
LAST_REQUESTS_S = 0.1
"""For requests to come that were sent before their clients could know."""
LAST_BYTES_S = 0.5
"""For answers to be written out after the grace period."""
BACKLOG = 2048
SWEEP_S = 1.0
"""From one search for idle connections to the next."""
OTHER_FILES = 64
"""Open files that are not for requests: code, logs, probes."""
IDLE_S = 75.0
"""A client's connection may be without a request, or in the midst of one, so long."""
TOKENIZE_S = 0.2
"""That a request waits for its tokens, if `gateway.tokenize_timeout_s` does not say."""


class Gateway:
    """A gateway to `config.urls`, by `policy`: `start` it, and `stop` it at the end.

    latency: the servers' step times; policies that need forecasts need it. lengths: estimates responses, if it reads
    prompts and the policy looks at more than counts; else each is expected to have `config.expected_output_tokens`.
    tokenizer: the model's, as `block.workload.prompts.load_tokenizer` has it; None: prompts are known by their text.

    ValueError if there can be no access log or no traces where the configuration wants them.
    """

    upstreams: Sequence[Upstream]
    dispatcher: Dispatcher

    def __init__(
        self,
        config: GatewayConfig,
        policy: Policy,
        dispatch: DispatchConfig,
        rng: random.Random,
        latency: LatencyModel | None = None,
        lengths: Lengths = Oracle(),  # noqa: B008 — frozen
        tokenizer: Any = None,
    ) -> None:
        self._config = config
        self._policy = policy
        self._dispatch = dispatch
        self._rng = rng
        self._latency = latency
        self._tags = policy.needs is not Needs.COUNTS
        self._forecasts = policy.needs is Needs.FORECAST
        # A policy that only counts, and has blocks, goes by what of prompts it sent itself.
        self._policy_block_size: int | None = getattr(policy, "block_size", None) if not self._tags else None
        self._reader = lengths if self._tags and isinstance(lengths, Reader) else None
        self._outrun_share = float(lengths.outrun_share) if self._reader is not None else 0.0
        self._assumed = None if config.plugin else config.assumed()
        self._estimator: Estimator | None = None
        self._tokenizer = tokenizer
        self._prompts: Prompts | None = None
        self._prefixes: UpstreamPrefixes | None = None
        self.models = Models(len(config.urls))
        """What the servers serve."""
        self._bytes_per_token = BytesPerToken()
        self._least = LeastRequests()  # for what asks for no response
        self._clock = Clock()
        # Requests of several gateways, or of one that was started again, must not share a number on a server.
        self._numbers = itertools.count(secrets.randbits(52))
        self._open = AsyncExitStack()
        self._server: asyncio.Server | None = None
        self.max_body = config.max_body_mib * 2**20
        """As of `block.gateway.client_connections.Owner`, like the next four."""
        self.draining = False
        self.clients: set[ClientConnection] = set()
        self.most_clients = 0
        self._tracing = open_tracing(config.otlp_traces_endpoint) if config.otlp_traces_endpoint is not None else None
        self.access_log = AccessLog(config.access_log) if config.access_log is not None else None
        self.accounts: Accounts | None = None
        if self.access_log is not None or self._tracing is not None:
            self.accounts = Accounts(type(policy).__name__, self._numbers, self.access_log, self._tracing)

    # ---------------------------------------------------------------------------------------------- start and stop

    async def start(self, host: str, port: int) -> tuple[str, int]:
        """Take requests at an address, which is returned: the port may be chosen here. OSError if it cannot be."""
        self.most_clients = most_connections()
        await self._prepare()
        gc.freeze()  # what is there now stays, and need not be searched for garbage while requests wait
        gc.set_threshold(50_000, 20, 100)  # nor what a request leaves: it goes by itself
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(lambda: ClientConnection(self), host, port, backlog=BACKLOG)
        at = self._server.sockets[0].getsockname()
        return str(at[0]), int(at[1])

    async def _prepare(self) -> None:
        """What lives as long as the gateway does."""
        config = self._config
        for told in (self.access_log, self._tracing):
            if told is not None:
                self._open.push_async_callback(told.close)
        self._session = await self._open.enter_async_context(open_session(config.connect_timeout_s))
        pools = [ServerPool(url, config.connect_timeout_s, config.read_timeout_s) for url in config.urls]
        self.upstreams, forecaster = make_upstreams(
            pools, self._session, self._clock, self._policy.needs, self._latency, self._outrun_share, self._assumed
        )
        if forecaster is not None and self._latency is not None and self._dispatch.correction_steps > 0:
            forecaster = CorrectedForecaster(forecaster, self._latency, self._dispatch.correction_steps)
        observers: list[Observer] = []
        seen = [one for one in self.upstreams if isinstance(one, SeenInstance)]
        if seen:
            exact = self._tokenizer is not None and self._dispatch.prefixes == "told"
            self._prefixes = UpstreamPrefixes(seen, exact=exact)
            observers.append(self._prefixes)
        for one in seen:
            self._open.push_async_callback(one.detach)
        if modelled := [one for one in seen if isinstance(one, ModelledInstance)]:
            observers.append(Going(modelled))
        self.dispatcher = Dispatcher(
            len(self.upstreams),
            self._policy,
            forecaster,
            self._dispatch,
            self._rng,
            snapshot_many=one_by_one(self.upstreams),
            prefixes=self._prefixes,
            observers=observers,
            history=History(HISTORY),
        )
        self._metrics = metrics = Metrics(self.upstreams, self.dispatcher, self._prefixes, self._bytes_per_token)
        if (lines := self.access_log) is not None:
            metrics.loses("block_access_log_lines_lost", "Lines that were not written", lambda: lines.lost)
        if (spans := self._tracing) is not None:
            metrics.loses("block_spans_lost", "Spans that no collector has taken", lambda: spans.lost)
        watch = Watch(self.upstreams, self.dispatcher, self._clock, config, self.models)
        queue = Queue()
        self._around = Surroundings(self.upstreams, self.dispatcher, self._clock, metrics, watch, config.slo, queue)
        if self._tokenizer is not None:
            self._prompts = TokenizedPrompts(
                self._tokenizer, config.tokenize_timeout_s or TOKENIZE_S, metrics.not_tokenized
            )
        elif self._prefixes is not None or self._policy_block_size is not None:
            self._prompts = TextPieces()
        if self._prompts is not None:
            hash_tokens(np.zeros(1, dtype=np.int64), 1)  # compiled before a request comes
            self._open.callback(self._prompts.close)
        if self._reader is not None:
            self._estimator = Estimator(
                self._reader, config.estimate_timeout_s, metrics.not_estimated, metrics.estimated
            )
            self._open.callback(self._estimator.close)
        for upstream, well in zip(
            self.upstreams, await asyncio.gather(*(one.healthy() for one in self.upstreams)), strict=True
        ):
            if not well:
                reason = f"{upstream.url} does not answer yet"
                self.dispatcher.instance_down(upstream.instance_id, reason, self._clock.now())
        await asyncio.gather(*(watch.ask_models(self.upstreams[i]) for i in self.dispatcher.active))
        self._open.push_async_callback(
            _cancel, [asyncio.create_task(one) for one in (watch.run(), queue.watch(), self._sweep())]
        )

    async def stop(self) -> None:
        """Take no new connections, let requests finish for `grace_s`, and close what is left."""
        server, self._server = self._server, None
        if server is not None:
            server.close()
            self.draining = True
            deadline = self._clock.now() + self._config.grace_s
            if self.clients:
                await asyncio.sleep(min(LAST_REQUESTS_S, self._config.grace_s))
            while self._clock.now() < deadline and any(one.busy for one in self.clients):
                for client in [one for one in self.clients if not one.busy]:
                    client.close()
                await asyncio.sleep(DRAIN_POLL_S)
            for client in list(self.clients):
                client.abort() if client.busy else client.close()
            deadline = self._clock.now() + LAST_BYTES_S
            while self._clock.now() < deadline and self.clients:
                await asyncio.sleep(DRAIN_POLL_S)
            for upstream in self.upstreams:
                upstream.pool.close_idle(0.0)
            await _cancel(list(self._around.tasks))
        await self._open.aclose()

    async def _sweep(self) -> None:
        """Close connections that nobody has used for long."""
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(SWEEP_S)
            for upstream in self.upstreams:
                upstream.pool.close_idle()
            long_ago = loop.time() - IDLE_S
            for client in [one for one in self.clients if one.stalls(long_ago)]:
                client.abort()

    # ------------------------------------------------------------------------------------------------------- routes

    def serve(self, client: ClientConnection, http: HTTPRequest) -> None:
        """Have a request answered."""
        path = unquote_to_bytes(http.path) if b"%" in http.path else http.path
        if path in GENERATES and http.method == b"POST":
            self._generate(client, http)
        elif path == b"/health" and http.method in (b"GET", b"HEAD"):
            active = len(self.dispatcher.active)
            told = json.dumps({"active": active, "instances": len(self.upstreams)}).encode()
            client.reply(200 if active else 503, JSON, told)
        elif path == b"/metrics" and http.method in (b"GET", b"HEAD"):
            client.reply(200, [(b"Content-Type", CONTENT_TYPE_LATEST.encode())], self._metrics.text())
        elif path == b"/v1/models" and http.method in (b"GET", b"HEAD") and (cards := self.models.cards()):
            client.reply(200, JSON, json.dumps({"object": "list", "data": cards}).encode())
        elif path.startswith(OWN_VIEWS):
            self._refuse(client, 404, f"{path.decode('latin-1')} is of a server, and not of a gateway")
        elif http.method not in (b"GET", b"HEAD", b"OPTIONS") and changes_servers(path):
            self._change_servers(client, http)
        else:
            self._pass(client, http)

    def refused(self, status: int) -> None:
        """What came from a client was no request, or one too many."""
        self._metrics.unplaced(outcome_of(status))

    def _refuse(self, client: ClientConnection, status: int, message: str) -> None:
        self._metrics.unplaced(REFUSED)
        client.reply(status, JSON, error_json(status, message))

    def _pass(self, client: ClientConnection, http: HTTPRequest) -> None:
        """What asks for no response of a model's goes by outstanding work, unread but for its model."""
        try:
            among = model = None
            if self.models.differ or client.account is not None:
                body, _ = self._unpack(http)
                model = model_of(http._replace(body=body))
            if client.account is not None:
                client.account.model = model
            if self.models.differ:
                among = self.models.places(model)
        except KeyError:
            self._refuse_model(client, model)
            return
        except ValueError:  # it is packed in a way that the server may know
            among = None
        request = Request(next(self._numbers), self._clock.now(), 1, 1, 1)
        exchange = Exchange(self._around, client, http, generates=False)
        exchange.place(request, http.body, by=self._least, among=among)

    def _refuse_model(self, client: ClientConnection, model: object) -> None:
        served = ", ".join(self.models.names)
        self._refuse(client, 404, f"The model `{model}` does not exist; there are {served}")

    def _generate(self, client: ClientConnection, http: HTTPRequest) -> None:
        """What asks a model for a response: read it, and have the policy place it."""
        try:
            body, http = self._unpack(http)
            asked = read(body)
            if client.account is not None:
                client.account.model = asked.fields.get("model")
            objectives = self._config.slo.of(http.headers) if self._forecasts else None
        except TooLong:
            self._refuse(client, 413, f"the body exceeds gateway.max_body_mib={self._config.max_body_mib}")
            return
        except ValueError as error:
            self._refuse(client, 400, str(error))
            return
        try:
            among = self.models.places(model := asked.fields.get("model"))
        except KeyError:
            self._refuse_model(client, model)
            return
        one = _Asked(next(self._numbers), self._clock.now(), asked, body, among, objectives)
        streams = asked.fields.get("stream") is True
        exchange = Exchange(self._around, client, http, streams=streams)
        if self._estimator is None and self._prompts is None:
            self._place(exchange, one)
        else:
            exchange.prepare(self._read_and_place(exchange, one))

    def _unpack(self, http: HTTPRequest) -> tuple[bytes, HTTPRequest]:
        """The body without its Content-Encoding, and the request without the header that says so."""
        for name, value in http.headers:
            if name.lower() == b"content-encoding":
                headers = [one for one in http.headers if one[0].lower() != b"content-encoding"]
                return unpacked(http.body, value, self.max_body), http._replace(headers=headers)
        return http.body, http

    async def _read_and_place(self, exchange: Exchange, one: _Asked) -> None:
        fields = one.asked.fields
        estimate = await self._estimator.tokens(prompt_text(fields)) if self._estimator is not None else None
        self._place(exchange, one, estimate, await self._read_prompt(fields))

    def _place(self, exchange: Exchange, one: _Asked, estimate: int | None = None, prompt: Prompt = UNKNOWN) -> None:
        """Send a request to where the policy says. estimate: of its response's tokens, if there is one."""
        asked, body, rates = one.asked, one.body, self._bytes_per_token
        if prompt.tokens is None:
            tokens = asked.prompt_tokens(rates.of(asked.fields.get("model")))
        else:
            tokens = max(prompt.tokens, 1)
        expected = asked.capped(self._config.expected_output_tokens if estimate is None else estimate)
        if self._tags:
            body = tagged(body, asked.fields, one.number, expected)
        request = Request(one.number, one.arrived, tokens, expected, expected, block_hashes=prompt.hashes)

        def learn(usage: PromptUsage) -> None:
            if not prompt.exact:
                rates.learn(asked, usage.tokens)
            elif usage.tokens != prompt.tokens:
                self._metrics.miscounted()

        exchange.place(request, body, among=one.among, objectives=one.objectives, on_usage=learn)

    async def _read_prompt(self, fields: Mapping[str, Any]) -> Prompt:
        """Its tokens and blocks, as far as the policy asks for them and they can be known."""
        size = self._policy_block_size
        if self._prefixes is not None and self._prefixes.known():
            size = self._prefixes.block_size
        if self._prompts is None or size is None:
            return UNKNOWN
        model, known = fields.get("model"), self._served
        adapter = model if isinstance(model, str) and known and model not in known else None
        return await self._prompts.read(fields, size, adapter)

    @property
    def _served(self) -> set[str]:
        """What servers call their models, of those that tell."""
        return {name for one in self.upstreams if isinstance(one, SeenInstance) for name in one.models}

    def _change_servers(self, client: ClientConnection, http: HTTPRequest) -> None:
        """What changes a server goes to every server, if it may."""
        if not self._config.admin:
            path = http.path.decode("latin-1")
            self._refuse(client, 403, f"{path} may change a server, and is passed on with gateway.admin=true only")
            return
        client.serving = everywhere = _Everywhere(client, self._session, self.upstreams, self._around.watch, http)
        everywhere.task = asyncio.get_running_loop().create_task(everywhere.ask())


class _Asked(NamedTuple):
    """A request for a response: its number, when it came, what its `body` asks for, the only servers that may serve it
    (None: all), and its objectives.
    """

    number: int
    arrived: float
    asked: Asked
    body: bytes
    among: Collection[int] | None
    objectives: Objectives | None


class _Everywhere:
    """A request to all servers, whose client gets the answer of the first that refuses, or else of the first."""

    task: asyncio.Task[None]

    def __init__(
        self,
        client: ClientConnection,
        session: aiohttp.ClientSession,
        upstreams: Sequence[Upstream],
        watch: Watch,
        http: HTTPRequest,
    ) -> None:
        self._client = client
        self._session = session
        self._upstreams = upstreams
        self._watch = watch
        self._http = http

    async def ask(self) -> None:
        """Send it, and answer, once it is known what has changed."""
        answers = await asyncio.gather(*(self._ask_one(one.url) for one in self._upstreams))
        await asyncio.gather(*map(self._watch.ask_models, self._upstreams))
        status, headers, body = next((one for one in answers if one[0] >= 300), answers[0])
        self._client.reply(status, headers, body)

    async def _ask_one(self, url: str) -> tuple[int, Sequence[tuple[bytes, bytes]], bytes]:
        http = self._http
        asked = self._session.request(
            http.method.decode(),
            f"{url}{http.target.decode('latin-1')}",
            data=http.body or None,
            headers=[(name.decode("latin-1"), value.decode("latin-1")) for name, value in http.headers],
            allow_redirects=False,
            timeout=aiohttp.ClientTimeout(),
        )
        try:
            async with asked as answer:
                body = await answer.read()
                kept = [one for one in passed_on(answer.raw_headers) if one[0].lower() != b"content-encoding"]
                return answer.status, kept, body
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
            return 502, JSON, error_json(502, f"{url}: {error}")

    def client_left(self) -> None:
        """What servers are told is told to all of them nevertheless."""

    def pause(self) -> None:
        """Answers are short."""

    def resume(self) -> None:
        """Answers are short."""


async def _cancel(tasks: Sequence[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def most_connections() -> int:
    """How many clients there can be, each with a connection to a server, by the open files that this process may have;
    it gets all that it may.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return max((hard - OTHER_FILES) // 2, 1) if hard != resource.RLIM_INFINITY else sys.maxsize


async def listen(gateway: Gateway, host: str, port: int, listening: Callable[[str], None]) -> None:
    """Serve until SIGTERM or SIGINT; a second one does not wait for requests. OSError if it cannot listen.

    listening: told the address once requests may come.
    """
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    access_log = gateway.access_log
    if access_log is not None and access_log.path != STDOUT:
        loop.add_signal_handler(signal.SIGHUP, access_log.reopen)
    try:
        host, port = await gateway.start(host, port)
        listening(f"http://{f'[{host}]' if ':' in host else host}:{port}")
        await stop.wait()
    finally:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            loop.remove_signal_handler(number)
        await gateway.stop()
