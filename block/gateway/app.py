"""The gateway itself: its routes, the probes that readmit servers, start and stop."""

from __future__ import annotations

import asyncio
import gc
import itertools
import logging
import random
import secrets
import signal
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any

import numpy as np
from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST

from block.cluster.instance import one_by_one
from block.cluster.live import LiveDriver
from block.core.clock import Clock
from block.core.hashing import hash_tokens
from block.core.types import Request
from block.core.user_code import UserFault
from block.dispatch.config import DispatchConfig
from block.dispatch.core import Dispatcher, History
from block.dispatch.correction import CorrectedForecaster
from block.dispatch.policies import Needs, Policy
from block.engine.latency import LatencyModel
from block.gateway.config import GatewayConfig
from block.gateway.estimates import Estimator
from block.gateway.metrics import CANCELLED, FAILED, OK, REFUSED, Metrics
from block.gateway.openai import error_response, prompt_text, read, tagged
from block.gateway.prefixes import UpstreamPrefixes
from block.gateway.prompts import UNKNOWN, Prompt, Prompts, TextPieces, TokenizedPrompts
from block.gateway.proxy import ProxiedRequest, answer_headers, request_headers
from block.gateway.transport import TransportError, transport_errors
from block.gateway.upstreams import PluginInstance, Upstream, make_upstreams, open_session, short_timeout
from block.lengths import Lengths, Oracle, Reader

log = logging.getLogger(__name__)

HISTORY = 1000
"""Requests that the dispatcher remembers; nothing here needs more than the latest."""
DRAIN_POLL_S = 0.02
LAST_BYTES_S = 0.5
"""For answers to be written out after the grace period."""
BACKLOG = 2048
TOKENIZE_S = 0.2
"""That a request waits for its tokens, if `gateway.tokenize_timeout_s` does not say."""


class Gateway:
    """A gateway to `config.urls`, by `policy`; `application` serves it.

    latency: the servers' step times; policies that need forecasts need it. lengths: estimates responses, if it reads
    prompts and the policy looks at more than counts; else each is expected to have `config.expected_output_tokens`.
    tokenizer: the model's, as `block.workload.prompts.load_tokenizer` has it; None: prompts are known by their text.
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
        # A policy that only counts, and has blocks, goes by what of prompts it sent itself.
        self._policy_block_size: int | None = getattr(policy, "block_size", None) if not self._tags else None
        self._reader = lengths if self._tags and isinstance(lengths, Reader) else None
        self._outrun_share = float(lengths.outrun_share) if self._reader is not None else 0.0
        self._estimator: Estimator | None = None
        self._tokenizer = tokenizer
        self._prompts: Prompts | None = None
        self._prefixes: UpstreamPrefixes | None = None
        self._clock = Clock()
        self._driver = LiveDriver(self._clock)
        # Requests of several gateways, or of one that was started again, must not share a number on a server.
        self._numbers = itertools.count(secrets.randbits(52))

    def application(self) -> web.Application:
        """The routes. To be run with `handler_cancellation`: clients that go away cancel their requests."""
        app = web.Application(client_max_size=self._config.max_body_mib * 2**20)
        app.router.add_post("/v1/completions", self._complete)
        app.router.add_post("/v1/chat/completions", self._complete)
        app.router.add_get("/v1/models", self._models)
        app.router.add_get("/health", self._health)
        app.router.add_get("/metrics", self._show_metrics)
        app.router.add_route("*", "/{any:.*}", self._unknown)
        app.cleanup_ctx.append(self._open)
        app.on_shutdown.append(self._drain)
        return app

    async def _open(self, app: web.Application) -> AsyncIterator[None]:
        """What lives as long as the application does."""
        config = self._config
        async with open_session(config.connect_timeout_s, config.read_timeout_s) as self._session:
            self.upstreams, forecaster = make_upstreams(
                config.urls,
                self._session,
                self._clock,
                self._policy.needs,
                self._latency,
                self._outrun_share,
            )
            if forecaster is not None and self._latency is not None and self._dispatch.correction_steps > 0:
                forecaster = CorrectedForecaster(forecaster, self._latency, self._dispatch.correction_steps)
            plugins = [one for one in self.upstreams if isinstance(one, PluginInstance)]
            if plugins:
                exact = self._tokenizer is not None and self._dispatch.prefixes == "told"
                self._prefixes = UpstreamPrefixes(plugins, exact=exact)
            self.dispatcher = Dispatcher(
                len(self.upstreams),
                self._policy,
                forecaster,
                self._dispatch,
                self._rng,
                snapshot_many=one_by_one(self.upstreams),
                prefixes=self._prefixes,
                observers=[] if self._prefixes is None else [self._prefixes],
                history=History(HISTORY),
            )
            self._metrics = metrics = Metrics(self.upstreams, self.dispatcher, self._policy.needs, self._prefixes)
            if self._tokenizer is not None:
                self._prompts = TokenizedPrompts(
                    self._tokenizer, config.tokenize_timeout_s or TOKENIZE_S, metrics.not_tokenized
                )
            elif self._prefixes is not None or self._policy_block_size is not None:
                self._prompts = TextPieces()
            if self._prompts is not None:
                hash_tokens(np.zeros(1, dtype=np.int64), 1)  # compiled before a request comes
            if self._reader is not None:
                self._estimator = Estimator(
                    self._reader, config.estimate_timeout_s, metrics.not_estimated, metrics.estimated
                )
            for upstream, well in zip(
                self.upstreams, await asyncio.gather(*(one.healthy() for one in self.upstreams)), strict=True
            ):
                if not well:
                    reason = f"{upstream.url} does not answer yet"
                    self.dispatcher.instance_down(upstream.instance_id, reason, self._clock.now())
            watches = [asyncio.create_task(self._watch(upstream)) for upstream in self.upstreams]
            yield
            for watch in watches:
                watch.cancel()
            await asyncio.gather(*watches, return_exceptions=True)
            for upstream in self.upstreams:
                if isinstance(upstream, PluginInstance):
                    await upstream.detach()
            if self._estimator is not None:
                self._estimator.close()
            if self._prompts is not None:
                self._prompts.close()

    async def _watch(self, upstream: Upstream) -> None:
        """Readmit an instance that was ejected once it is well."""
        i = upstream.instance_id
        while True:
            await asyncio.sleep(self._config.probe_interval_s)
            if i not in self.dispatcher.active and await upstream.healthy():
                self.dispatcher.instance_up(i, self._clock.now())
                log.warning("instance %d gets requests: %s is well", i, upstream.url)

    async def _drain(self, app: web.Application) -> None:
        """No new connections come in any more; let requests finish."""
        deadline = self._clock.now() + self._config.grace_s
        while self._clock.now() < deadline and any(
            self.dispatcher.outstanding(one.instance_id) for one in self.upstreams
        ):
            await asyncio.sleep(DRAIN_POLL_S)

    # ------------------------------------------------------------------------------------------------------- routes

    async def _complete(self, http: web.Request) -> web.StreamResponse:
        """A completion or chat completion."""
        try:
            body = await http.read()
            asked = read(body)
        except web.HTTPRequestEntityTooLarge:
            self._metrics.refused_unplaced()
            return error_response(413, f"the body exceeds gateway.max_body_mib={self._config.max_body_mib}")
        except (ValueError, web.RequestPayloadError) as error:
            self._metrics.refused_unplaced()
            return error_response(400, str(error))
        number, arrived = next(self._numbers), self._clock.now()
        estimate = await self._estimator.tokens(prompt_text(asked.fields)) if self._estimator is not None else None
        prompt = await self._read_prompt(asked.fields)
        tokens = asked.prompt_tokens if prompt.tokens is None else max(prompt.tokens, 1)
        expected = asked.capped(self._config.expected_output_tokens if estimate is None else estimate)
        if self._tags:
            body = tagged(body, asked.fields, number, expected)
        request = Request(number, arrived, tokens, expected, expected, block_hashes=prompt.hashes)
        proxied = ProxiedRequest(http, self.upstreams, self.dispatcher, self._clock, body, self._metrics.attempted)
        try:
            record = await self._driver.submit(self.dispatcher, request, proxied.deliver)
        except asyncio.CancelledError:
            if proxied.record is not None:
                self._metrics.ended(proxied.record, CANCELLED)
            raise
        except Exception as error:
            if isinstance(error, UserFault):
                log.error("request %d: %s", number, error)  # which says where
            else:
                log.exception("request %d", number)
            if proxied.record is not None:
                self._metrics.ended(proxied.record, FAILED)
            return error_response(500, "the gateway failed; its log says why")
        reply = proxied.reply or error_response(503, record.error or "")
        if record.status == "ok":
            outcome = OK
        elif proxied.client_gone:
            outcome = CANCELLED
        else:
            outcome = REFUSED if 400 <= reply.status < 500 else FAILED
        self._metrics.ended(record, outcome)
        if prompt.exact and proxied.usage is not None and proxied.usage.tokens != prompt.tokens:
            self._metrics.miscounted()
        return reply

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
        return {name for one in self.upstreams if isinstance(one, PluginInstance) for name in one.models}

    async def _models(self, http: web.Request) -> web.Response:
        """The models of the first server that answers; all are taken to serve the same."""
        for i in list(self.dispatcher.active):
            asked = self._session.get(
                f"{self.upstreams[i].url}/v1/models",
                headers=[(name.decode(), value.decode("latin-1")) for name, value in request_headers(http)],
                allow_redirects=False,
                timeout=short_timeout(self._session),
            )
            try:
                with transport_errors():
                    async with asked as answer:
                        body = await answer.read()
            except TransportError:
                continue
            if answer.status < 500:
                return web.Response(status=answer.status, headers=answer_headers(answer.headers), body=body)
        return error_response(503, "no instance answers")

    async def _health(self, http: web.Request) -> web.Response:
        """Whether there is an instance to send requests to."""
        active = len(self.dispatcher.active)
        return web.json_response({"active": active, "instances": len(self.upstreams)}, status=200 if active else 503)

    async def _show_metrics(self, http: web.Request) -> web.Response:
        return web.Response(body=self._metrics.text(), headers={"Content-Type": CONTENT_TYPE_LATEST})

    async def _unknown(self, http: web.Request) -> web.Response:
        return error_response(404, f"no such route: {http.method} {http.path}")


async def listen(gateway: Gateway, host: str, port: int, listening: Callable[[str], None]) -> None:
    """Serve until SIGTERM or SIGINT; a second one does not wait for requests. OSError if it cannot listen.

    listening: told the address once requests may come.
    """
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    runner = web.AppRunner(
        gateway.application(), handler_cancellation=True, access_log=None, shutdown_timeout=LAST_BYTES_S
    )
    try:
        await runner.setup()
        gc.freeze()  # what is there now stays, and need not be searched for garbage while requests wait
        await web.TCPSite(runner, host, port, backlog=BACKLOG).start()
        host, port = runner.addresses[0][:2]
        listening(f"http://{f'[{host}]' if ':' in host else host}:{port}")
        await stop.wait()
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)
        await runner.cleanup()
