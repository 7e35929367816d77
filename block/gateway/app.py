"""The gateway itself: its routes, who may take them, start and stop."""

from __future__ import annotations

import asyncio
import gc
import itertools
import json
import logging
import resource
import secrets
import signal
import sys
from collections.abc import Callable, Container, Mapping, Sequence
from contextlib import AsyncExitStack, suppress
from urllib.parse import unquote_to_bytes

from prometheus_client import CONTENT_TYPE_LATEST

from block.core.clock import Clock
from block.core.types import Request
from block.dispatch.policies import LeastRequests
from block.gateway.access_log import STDOUT, AccessLog
from block.gateway.account import Accounts, open_tracing
from block.gateway.admin import Answer, Errand, change_list, tell_everyone
from block.gateway.admission import Queue
from block.gateway.asked import read
from block.gateway.client_connections import ClientConnection
from block.gateway.config import GatewayConfig
from block.gateway.discovery import Discovery, warn_of_many
from block.gateway.exchange import Exchange, Surroundings
from block.gateway.feedback import PromptRates, ResponseLengths
from block.gateway.fleet import Fleet
from block.gateway.groups import Arrived, Groups, ModelGroup, Plan
from block.gateway.http1 import HTTPRequest, TooLong, unpacked
from block.gateway.keys import SHOWN_IN, Keys
from block.gateway.metrics import REFUSED, Metrics, outcome_of
from block.gateway.modelled import ModelledInstance
from block.gateway.models import Models
from block.gateway.openai import JSON, error_json, model_of
from block.gateway.responses import Responses
from block.gateway.routes import (
    GENERATES,
    OPEN,
    OWN_VIEWS,
    READS,
    RESPONSES,
    changes_servers,
    is_odd,
    is_preflight,
    is_servers,
)
from block.gateway.server_connections import ServerPool, secure_context
from block.gateway.upstreams import HTTPInstance, PluginInstance, Upstream, open_session
from block.gateway.watch import Watch
from block.gateway.workers import Seat

log = logging.getLogger(__name__)

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


class Gateway:
    """A gateway to the servers of `config`: `start` it, and `stop` it at the end.

    ValueError if a file that `config` names is of no use.
    plan: how requests are placed. plans: how those for some models are, by their names.
    seat: among other workers at the same port; None: there are none.
    """

    def __init__(
        self, config: GatewayConfig, plan: Plan, plans: Mapping[str, Plan] | None = None, seat: Seat | None = None
    ) -> None:
        self._seat = seat
        self._config = config
        self._assumed = None if config.plugin else config.assumed()
        self.servers: dict[int, Upstream] = {}
        """Those that there are, by id."""
        self.models = Models()
        """What they serve."""
        self._clock = Clock()
        self._rates = PromptRates()
        all_plans = [plan, *(plans or {}).values()]
        # Of responses whose length no policy looks at nothing is learned.
        self._lengths = ResponseLengths() if any(one.learns_lengths for one in all_plans) else None
        self._tags = any(one.tags for one in all_plans)
        default, *others = (ModelGroup(one, config, self._clock, self.models, self._rates) for one in all_plans)
        self.groups = Groups(default, dict(zip(plans or (), others, strict=True)), self.models)
        """What places requests."""
        shared = None if seat is None else seat.admin_file
        self._discovery = Discovery(config.urls, config.urls_file, shared)
        self._client_keys, self._admin_keys, server_keys = (
            None if (file := getattr(config, key)) is None else Keys(file, f"gateway.{key}")
            for key in ("api_key_file", "admin_key_file", "server_key_file")
        )
        self._server_key = None if server_keys is None else server_keys.first
        self._secure = secure_context(config.ca_file)
        self._responses = Responses()
        self._least = LeastRequests()  # for what asks for no response
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
            self.accounts = Accounts(type(plan.policy).__name__, self._numbers, self.access_log, self._tracing)

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
        queue = Queue()
        self._metrics = metrics = Metrics(self.servers, self.groups, self._rates, self._lengths, queue)
        if (lines := self.access_log) is not None:
            metrics.loses("block_access_log_lines_lost", "Lines that were not written", lambda: lines.lost)
        if (spans := self._tracing) is not None:
            metrics.loses("block_spans_lost", "Spans that no collector has taken", lambda: spans.lost)
        self._watch = watch = Watch(self.groups, self._clock, config, self.models)
        self._around = Surroundings(self.servers, self._clock, metrics, watch, config.slo, queue)
        for group in self.groups.all:
            group.begin(metrics, self._lengths)
            self._open.callback(group.close)
        self._fleet = Fleet(self.servers, self._make, self.groups, watch, metrics, self.models, self._clock)
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
            return PluginInstance(instance_id, pool, session, self._clock, lambda: self.groups.of(instance_id).packed)
        return ModelledInstance(instance_id, pool, session, self._clock, self._assumed)

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
            active = self.groups.active
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
            among: Container[int] | None = None
            model = None
            if self.models.differ or len(self.groups.all) > 1 or client.account is not None:
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
        among = self._responses.place(http.path, self.servers) or among
        request = Request(next(self._numbers), self._clock.now(), 1, 1, 1)
        group = self.groups.of_model(model)
        exchange = Exchange(self._around, group.dispatcher, client, http, generates=False)
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
            group = self.groups.of_model(asked.fields.get("model"))
            objectives = self._config.slo.of(http.headers) if group.plan.forecasts else None
        except TooLong:
            self._refuse(client, 413, f"the body exceeds gateway.max_body_mib={self._config.max_body_mib}")
            return
        except ValueError as error:
            self._refuse(client, 400, str(error))
            return
        try:
            named = self.models.places(model := asked.fields.get("model"))
        except KeyError:
            self._refuse_model(client, model)
            return
        if client.account is not None:
            client.account.policy = type(group.plan.policy).__name__
        among = self._responses.place_before(asked, self.servers) or named
        one = Arrived(next(self._numbers), self._clock.now(), asked, body, among, objectives)
        streams = asked.fields.get("stream") is True
        keeps = self._responses.note if http.path == RESPONSES else None
        exchange = Exchange(self._around, group.dispatcher, client, http, streams=streams, on_first=keeps)
        group.send(exchange, one)

    def _unpack(self, http: HTTPRequest) -> tuple[bytes, HTTPRequest]:
        """The body without its Content-Encoding, and the request without the header that says so."""
        for name, value in http.headers:
            if name.lower() == b"content-encoding":
                headers = [one for one in http.headers if one[0].lower() != b"content-encoding"]
                return unpacked(http.body, value, self.max_body), http._replace(headers=headers)
        return http.body, http

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
