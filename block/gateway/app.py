"""The gateway itself: its routes, who may take them, start and stop."""

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
from collections.abc import Callable, Container, Mapping, Sequence
from contextlib import AsyncExitStack, suppress
from typing import Any, NamedTuple, cast
from urllib.parse import unquote_to_bytes

import numpy as np
from prometheus_client import CONTENT_TYPE_LATEST

from block.cluster.instance import one_by_one
from block.core.clock import Clock
from block.core.hashing import hash_tokens
from block.core.types import Request
from block.dispatch.config import DispatchConfig
from block.dispatch.core import Dispatcher, Forecaster, History, Observer
from block.dispatch.correction import CorrectedForecaster
from block.dispatch.policies import LeastRequests, Needs, Policy
from block.engine.latency import LatencyModel
from block.gateway.access_log import STDOUT, AccessLog
from block.gateway.account import Accounts, open_tracing
from block.gateway.admin import Answer, Errand, change_list, tell_everyone
from block.gateway.admission import Objectives, Queue
from block.gateway.asked import Asked, prompt_text, read
from block.gateway.client_connections import ClientConnection
from block.gateway.config import GatewayConfig
from block.gateway.discovery import Discovery, warn_of_many
from block.gateway.estimates import Estimator
from block.gateway.exchange import Exchange, Surroundings
from block.gateway.feedback import PromptRates, ResponseLengths
from block.gateway.fleet import Fleet
from block.gateway.forecasts import FleetForecaster
from block.gateway.http1 import HTTPRequest, TooLong, unpacked
from block.gateway.keys import SHOWN_IN, Keys
from block.gateway.metrics import REFUSED, Metrics, outcome_of
from block.gateway.modelled import Going, ModelledInstance
from block.gateway.models import Models
from block.gateway.openai import JSON, PromptUsage, error_json, model_of, tagged
from block.gateway.prefixes import UpstreamPrefixes
from block.gateway.prompts import UNKNOWN, Prompt, Prompts, TextPieces, TokenizedPrompts
from block.gateway.routes import (
    GENERATES,
    OPEN,
    OWN_VIEWS,
    READS,
    changes_servers,
    is_odd,
    is_preflight,
    is_servers,
)
from block.gateway.server_connections import ServerPool, secure_context
from block.gateway.upstreams import HTTPInstance, PluginInstance, SeenInstance, Upstream, open_session
from block.gateway.watch import Watch
from block.gateway.workers import Seat
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
METRICS = [(b"Content-Type", CONTENT_TYPE_LATEST.encode())]
IDLE_S = 75.0
"""A client's connection may be without a request, or in the midst of one, so long."""
DISCOVERY_S = 5.0
"""From one look for servers to the next, if `gateway.discovery_interval_s` does not say."""
TOKENIZE_S = 0.2
"""That a request waits for its tokens, if `gateway.tokenize_timeout_s` does not say."""


class Gateway:
    """A gateway to the servers of `config`, by `policy`: `start` it, and `stop` it at the end. ValueError if a file
    that `config` names is of no use.

    latency: the servers' step times; policies that need forecasts need it. lengths: estimates responses, if it reads
    prompts and the policy looks at more than counts; else each is expected to have `config.expected_output_tokens`.
    tokenizer: the model's, as `block.workload.prompts.load_tokenizer` has it; None: prompts are known by their text.
    seat: among other workers at the same port; None: there are none.
    """

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
        seat: Seat | None = None,
    ) -> None:
        self._seat = seat
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
        self.servers: dict[int, Upstream] = {}
        """Those that there are, by id."""
        self.models = Models()
        """What they serve."""
        shared = None if seat is None else seat.admin_file
        self._discovery = Discovery(config.urls, config.urls_file, shared)
        self._client_keys, self._admin_keys, server_keys = (
            None if (file := getattr(config, key)) is None else Keys(file, f"gateway.{key}")
            for key in ("api_key_file", "admin_key_file", "server_key_file")
        )
        self._server_key = None if server_keys is None else server_keys.first
        self._secure = secure_context(config.ca_file)
        self._rates = PromptRates()
        # Of responses whose length no policy looks at nothing is learned.
        self._lengths = ResponseLengths() if self._tags or self._policy_block_size is not None else None
        self._least = LeastRequests()  # for what asks for no response
        self._clock = Clock()
        # Requests of several gateways, or of one that was started again, must not share a number on a server.
        self._numbers = itertools.count(secrets.randbits(52))
        self._open = AsyncExitStack()
        self._has_keys = bool(self._client_keys or self._admin_keys or self._server_key)
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
        self._server = await loop.create_server(
            lambda: ClientConnection(self), host, port, backlog=BACKLOG, reuse_port=self._seat is not None
        )
        at = self._server.sockets[0].getsockname()
        return str(at[0]), int(at[1])

    async def _prepare(self) -> None:
        """What lives as long as the gateway does."""
        config = self._config
        for told in (self.access_log, self._tracing):
            if told is not None:
                self._open.push_async_callback(told.close)
        session = open_session(config.connect_timeout_s, self._secure, self._server_key)
        self._session = await self._open.enter_async_context(session)
        observers: list[Observer] = []
        if self._tags:
            exact = self._tokenizer is not None and self._dispatch.prefixes == "told"
            self._prefixes = UpstreamPrefixes(cast(dict[int, SeenInstance], self.servers), exact=exact)
            observers.append(self._prefixes)
            if self._assumed is not None:
                observers.append(Going(cast(dict[int, ModelledInstance], self.servers)))
        self.dispatcher = Dispatcher(
            0,
            self._policy,
            self._forecaster(),
            self._dispatch,
            self._rng,
            snapshot_many=one_by_one(self.servers),
            prefixes=self._prefixes,
            observers=observers,
            history=History(HISTORY),
        )
        queue = Queue()
        self._metrics = metrics = Metrics(
            self.servers, self.dispatcher, self._prefixes, self._rates, self._lengths, queue
        )
        if (lines := self.access_log) is not None:
            metrics.loses("block_access_log_lines_lost", "Lines that were not written", lambda: lines.lost)
        if (spans := self._tracing) is not None:
            metrics.loses("block_spans_lost", "Spans that no collector has taken", lambda: spans.lost)
        self._watch = watch = Watch(self.dispatcher, self._clock, config, self.models)
        self._around = Surroundings(self.servers, self.dispatcher, self._clock, metrics, watch, config.slo, queue)
        if self._tokenizer is not None:
            self._prompts = TokenizedPrompts(
                self._tokenizer, config.tokenize_timeout_s or TOKENIZE_S, metrics.not_tokenized
            )
        elif self._prefixes is not None or self._policy_block_size is not None:
            self._prompts = TextPieces(self._rates.steady)
        if self._prompts is not None:
            hash_tokens(np.zeros(1, dtype=np.int64), 1)  # compiled before a request comes
            self._open.callback(self._prompts.close)
        if self._reader is not None:
            self._estimator = Estimator(
                self._reader, config.estimate_timeout_s, metrics.not_estimated, metrics.estimated
            )
            self._open.callback(self._estimator.close)
        self._fleet = Fleet(self.servers, self._make, self.dispatcher, watch, metrics, self.models, self._clock)
        self._open.push_async_callback(self._fleet.close)
        await self._discovery.look()
        await self._fleet.follow(self._discovery.urls())
        running = [asyncio.create_task(one) for one in (queue.watch(), self._sweep(), self._look_around())]
        self._open.push_async_callback(_cancel, running)

    def _make(self, instance_id: int, url: str) -> Upstream:
        """The instance for a server, of a kind that shows what the policy needs."""
        config, session = self._config, self._session
        pool = ServerPool(url, config.connect_timeout_s, config.read_timeout_s, self._secure, self._server_key)
        if not self._tags:
            return HTTPInstance(instance_id, pool, session)
        if self._assumed is None:
            return PluginInstance(instance_id, pool, session, self._clock, self._latency)
        return ModelledInstance(instance_id, pool, session, self._clock, self._assumed)

    def _forecaster(self) -> Forecaster | None:
        """What makes forecasts, if the policy needs any."""
        if not self._forecasts:
            return None
        assert self._latency is not None, "who asks for forecasts has a latency model"
        servers = cast(dict[int, SeenInstance], self.servers)
        forecaster = FleetForecaster(servers, self._latency, self._outrun_share)
        steps = self._dispatch.correction_steps
        return forecaster if steps == 0 else CorrectedForecaster(forecaster, self._latency, steps)

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
            await _cancel(list(self._around.tasks))
        await self._open.aclose()

    async def _sweep(self) -> None:
        """Close connections that nobody has used for long."""
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(SWEEP_S)
            for server in self.servers.values():
                server.pool.close_idle()
            self._fleet.let_go()
            if self._seat is not None:
                with suppress(OSError):  # a full disk: the others know what was told before
                    self._seat.tell_metrics(self._metrics.text())
            long_ago = loop.time() - IDLE_S
            for client in [one for one in self.clients if one.stalls(long_ago)]:
                client.abort()

    async def _look_around(self) -> None:
        """Follow servers and keys as they change."""
        self._fleet.begin(*map(warn_of_many, self._config.urls))
        while True:
            often = SWEEP_S if self._seat is not None else DISCOVERY_S  # what an admin tells one, all are to know
            await asyncio.sleep(self._config.discovery_interval_s or often)
            try:
                for keys in (self._client_keys, self._admin_keys):
                    if keys is not None:
                        await asyncio.to_thread(keys.look)
                if self._discovery.changes:
                    await self._discovery.look()
                    self._fleet.follow(self._discovery.urls())
            except OSError as error:  # the next look may fare better
                log.warning("servers stay as they are: %s", error)

    # ------------------------------------------------------------------------------------------------------- routes

    def serve(self, client: ClientConnection, http: HTTPRequest) -> None:
        """Have a request answered."""
        path = unquote_to_bytes(http.path) if b"%" in http.path else http.path
        if self._has_keys:
            if not self._lets_in(path, http):
                self._metrics.unplaced(REFUSED)
                client.reply(401, [*JSON, (b"WWW-Authenticate", b"Bearer")], error_json(401, "no key, or a wrong one"))
                return
            http = self._without_keys(http)
        if path in GENERATES and http.method == b"POST":
            self._generate(client, http)
        elif path == b"/health" and http.method in (b"GET", b"HEAD"):
            active = len(self.dispatcher.active)
            told = json.dumps({"active": active, "instances": len(self.servers)}).encode()
            client.reply(200 if active else 503, JSON, told)
        elif path == b"/metrics" and http.method in (b"GET", b"HEAD"):
            if self._seat is None:
                client.reply(200, METRICS, self._metrics.text())
            else:
                Errand(client, self._all_metrics(self._seat))
        elif path == b"/v1/models" and http.method in (b"GET", b"HEAD") and (cards := self.models.cards()):
            client.reply(200, JSON, json.dumps({"object": "list", "data": cards}).encode())
        elif path.startswith(OWN_VIEWS):
            self._refuse(client, 404, f"{path.decode('latin-1')} is of a server, and not of a gateway")
        elif is_servers(path):
            self._list_servers(client, http)
        elif http.method not in READS and changes_servers(path):
            self._change_servers(client, http)
        else:
            self._pass(client, http)

    async def _all_metrics(self, seat: Seat) -> Answer:
        seat.tell_metrics(self._metrics.text())
        told = await asyncio.to_thread(seat.all_metrics)
        return Answer(200, METRICS, told)

    def _lets_in(self, path: bytes, http: HTTPRequest) -> bool:
        """Whether a request shows the key that it needs, if it needs any."""
        admin, client = self._admin_keys, self._client_keys
        if admin is not None and admin.shown(http.headers):
            return True
        if admin is not None and (is_servers(path) or (http.method not in READS and changes_servers(path))):
            return False
        if client is None or (path in OPEN and http.method in (b"GET", b"HEAD")) or is_preflight(http):
            return True
        return client.shown(http.headers)

    def _without_keys(self, http: HTTPRequest) -> HTTPRequest:
        """The request without a key that is the gateway's own, or of which servers get another."""
        if self._client_keys is None and self._server_key is None:
            assert self._admin_keys is not None, "there are keys"
            if not self._admin_keys.shown(http.headers):
                return http
        return http._replace(headers=[one for one in http.headers if one[0].lower() not in SHOWN_IN])

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
        asked, body, lengths, model = one.asked, one.body, self._lengths, one.asked.fields.get("model")
        tokens = asked.each_prompt(self._rates.tokens(asked) if prompt.tokens is None else prompt.tokens)
        longest = self.models.longest(model)
        room = None if longest is None else max(longest - tokens, 1)
        believed = self._config.expected_output_tokens if estimate is None else estimate
        thought = believed
        if lengths is not None and self._config.length_feedback:
            thought = lengths.corrected(asked, believed, estimated=estimate is not None)
        expected = asked.capped(thought, room)
        if self._tags:
            body = tagged(body, asked.fields, one.number, expected)
        request = Request(
            one.number, one.arrived, tokens, expected, expected, block_hashes=prompt.hashes, sequences=asked.sequences
        )

        def learn(usage: PromptUsage) -> None:
            if not prompt.exact:
                self._rates.learn(asked, usage.tokens)
            elif usage.tokens != prompt.tokens and asked.complete:
                self._metrics.miscounted()

        def learn_length(response_tokens: int) -> None:
            assert lengths is not None
            most, estimated = asked.most_tokens(room), estimate is not None
            lengths.answered(asked, believed, most, response_tokens, estimated=estimated)
            self._metrics.answered(expected, response_tokens / asked.sequences)

        exchange.place(
            request,
            body,
            among=one.among,
            objectives=one.objectives,
            on_usage=learn,
            on_response=learn_length if lengths is not None else None,
        )

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
        return {name for one in self.servers.values() if isinstance(one, SeenInstance) for name in one.models}

    def _change_servers(self, client: ClientConnection, http: HTTPRequest) -> None:
        """What changes a server goes to every server, if it may."""
        if not self._config.admin:
            path = http.path.decode("latin-1")
            self._refuse(client, 403, f"{path} may change a server, and is passed on with gateway.admin=true only")
            return
        if is_odd(http.path):
            self._refuse(client, 400, f"{http.path.decode('latin-1')} may mean another path to a server")
            return
        servers = list(self.servers.values())
        longest_s = self._config.read_timeout_s
        Errand(client, tell_everyone(self._session, servers, http, longest_s, self._watch.ask_models))

    def _list_servers(self, client: ClientConnection, http: HTTPRequest) -> None:
        """Which servers there are, and that it be others."""
        if self._admin_keys is None:
            self._refuse(client, 403, "/servers is for who has a key of gateway.admin_key_file, and there is none")
            return
        Errand(client, change_list(http, self.servers, self._discovery, self._fleet))


class _Asked(NamedTuple):
    """A request for a response: its number, when it came, what its `body` asks for, the only servers that may serve it
    (None: all), and its objectives.
    """

    number: int
    arrived: float
    asked: Asked
    body: bytes
    among: Container[int] | None
    objectives: Objectives | None


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
