"""The servers behind the gateway, as instances: any server for policies that count, servers with the plugin else."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple, Protocol

import aiohttp

from block.backends.instance import VLLMInstance
from block.cluster.instance import Instance
from block.core.arrays import Ints
from block.core.clock import Clock
from block.core.snapshot import Snapshot
from block.core.types import Forecasts, Request
from block.dispatch.core import Forecaster
from block.dispatch.policies import Needs
from block.engine.config import EngineConfig, EngineSettings
from block.engine.latency import LatencyModel
from block.engine.predictor import Predictor, forecast_each
from block.gateway.transport import Transport, TransportError, transport_errors

log = logging.getLogger(__name__)

HEALTH_S = 5.0
"""How long an answer to /health may take."""
PEER_DEAD_S = 20
"""Seconds without a sign of TCP's after which a host counts as lost; a busy server's host still gives one."""

_KEEPALIVE = {
    "TCP_KEEPIDLE": PEER_DEAD_S // 4,
    "TCP_KEEPINTVL": PEER_DEAD_S // 4,
    "TCP_KEEPCNT": 3,
    "TCP_USER_TIMEOUT": PEER_DEAD_S * 1000,
}


class Upstream(Instance, Protocol):
    """An instance that requests are proxied to, over its `transport`."""

    url: str
    transport: Transport

    async def healthy(self) -> bool:
        """Whether it would serve a request now."""
        ...


class Upstreams(NamedTuple):
    """The instances, and what makes forecasts for them if the policy needs any."""

    instances: Sequence[Upstream]
    forecaster: Forecaster | None


def make_upstreams(
    urls: Sequence[str],
    session: aiohttp.ClientSession,
    clock: Clock,
    needs: Needs,
    latency: LatencyModel | None,
    outrun_share: float,
) -> Upstreams:
    """Instances for the servers at `urls` that can show what a policy needs. Nothing is asked of them yet.

    session: of all connections to them. clock: what snapshots are dated by.
    needs: of the policy. latency: the servers' step times, for forecasts. outrun_share: as of `Predictor`.
    """
    if needs is Needs.COUNTS:
        return Upstreams([HTTPInstance(i, url, session) for i, url in enumerate(urls)], None)
    instances = [PluginInstance(i, url, session, clock) for i, url in enumerate(urls)]
    if needs is Needs.SNAPSHOT:
        return Upstreams(instances, None)
    assert latency is not None, "who asks for forecasts has a latency model"
    return Upstreams(instances, FleetForecaster(instances, latency, outrun_share))


class HTTPInstance:
    """A server of which nothing is known but that it answers. It is proxied to."""

    def __init__(self, instance_id: int, url: str, session: aiohttp.ClientSession) -> None:
        self.instance_id = instance_id
        self.url = url
        self.transport = Transport(url, session)
        self._session = session

    def snapshot(self) -> Snapshot:
        """NotImplementedError: only the plugin shows them."""
        raise NotImplementedError(f"{self.url} shows no snapshots")

    async def healthy(self) -> bool:
        """Whether /health says so."""
        try:
            with transport_errors():
                async with self._session.get(f"{self.url}/health", timeout=short_timeout(self._session)) as answer:
                    return answer.status == 200
        except TransportError:
            return False


class PluginInstance(HTTPInstance):
    """A server with this package's plugin. It can be looked at once `healthy`, which attaches to it, was true."""

    def __init__(self, instance_id: int, url: str, session: aiohttp.ClientSession, clock: Clock) -> None:
        super().__init__(instance_id, url, session)
        self.settings: EngineSettings | None = None
        """What it says of itself, once it is attached to."""
        self._clock = clock
        self._view: VLLMInstance | None = None
        self._attaching = asyncio.Lock()
        self._complaint = ""

    def snapshot(self) -> Snapshot:
        """What the scheduler published last."""
        assert self._view is not None, "only servers that are attached to are active"
        return self._view.snapshot()

    async def healthy(self) -> bool:
        """Whether /health says so, and the plugin answers too: a server that comes back publishes elsewhere."""
        async with self._attaching:
            if not await super().healthy():
                return False
            if self._view is not None and await self._view.is_same():
                return True
            return await self._attach()

    async def _attach(self) -> bool:
        view = VLLMInstance(self.instance_id, self.url, self._session, self._clock)
        try:
            async with asyncio.timeout(HEALTH_S):
                settings = await view.attach()
            settings.check()
            view, self._view, self.settings = self._view, view, settings  # type: ignore[assignment]
            return True
        except Exception as error:  # whatever answers there, it is not what can be looked at
            self._complain(f"{self.url}: {error}")
            return False
        finally:  # the one before, or one that is of no use
            if view is not None:
                await view.detach()

    @property
    def models(self) -> Sequence[str]:
        """What the server calls its model."""
        return self._view.models if self._view is not None else ()

    @property
    def tells_prefixes(self) -> str | None:
        """How it tells what its prefix cache has: by a "table" or by "events"; None: it does not."""
        return self._view.tells_prefixes if self._view is not None else None

    def look_up(self, hashes: Ints, most: int) -> tuple[int, int] | None:
        """Of the first `most` blocks with these hashes, how many the server's prefix cache has, and how many of these
        are in use; None if it does not tell.
        """
        return self._view.look_up(hashes, most) if self._view is not None else None

    async def detach(self) -> None:
        """Stop looking."""
        if self._view is not None:
            await self._view.detach()

    def _complain(self, complaint: str) -> None:
        """Log what has not been said already."""
        if complaint != self._complaint:
            log.warning("%s", complaint)
        self._complaint = complaint


class FleetForecaster:
    """Forecasts for servers that may differ in their settings, as they report them, but not in their step times."""

    def __init__(self, instances: Sequence[PluginInstance], latency: LatencyModel, outrun_share: float) -> None:
        self._outrun_share = outrun_share
        self._instances = instances
        self._latency = latency
        self._predictors: dict[EngineSettings, Predictor] = {}
        Predictor(EngineConfig().settings(1000), latency).warm_up()

    def forecasts(
        self, snapshots: Sequence[Snapshot], in_transit: Sequence[Sequence[Request]], request: Request, now: float
    ) -> Forecasts:
        """One forecast for each snapshot, in a compiled call for each kind of server."""
        kinds = [self._settings(snapshot.instance_id) for snapshot in snapshots]
        theirs = [[_fitting(one, settings) for one in some] for some, settings in zip(in_transit, kinds, strict=True)]
        requests = [_fitting(request, settings) for settings in kinds]
        return forecast_each([self._predictor(settings) for settings in kinds], snapshots, theirs, requests, now)

    def _settings(self, instance_id: int) -> EngineSettings:
        settings = self._instances[instance_id].settings
        assert settings is not None, "only servers that are attached to show snapshots"
        return settings

    def _predictor(self, settings: EngineSettings) -> Predictor:
        if settings not in self._predictors:
            self._predictors[settings] = Predictor(settings, self._latency, outrun_share=self._outrun_share)
        return self._predictors[settings]


def _fitting(request: Request, settings: EngineSettings) -> Request:
    """The request, no longer than a server takes: what is estimated too long would bring the twin to a halt."""
    longest = settings.max_model_len - 1
    return request if request.prompt_tokens <= longest else replace(request, prompt_tokens=longest)


def short_timeout(session: aiohttp.ClientSession) -> aiohttp.ClientTimeout:
    """The patience for questions that any server answers at once."""
    return aiohttp.ClientTimeout(total=HEALTH_S, sock_connect=session.timeout.sock_connect)


def open_session(connect_timeout_s: float, read_timeout_s: float) -> aiohttp.ClientSession:
    """Connections to the servers: as many as there are requests, adding and changing nothing."""

    def keepalive_socket(address: Any) -> socket.socket:
        """A socket that finds out when the host at the other end is gone, also while it waits for an answer."""
        one = socket.socket(address[0], address[1], address[2])
        one.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in _KEEPALIVE.items():
            if hasattr(socket, option):  # else not Linux
                one.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
        return one

    # vLLM closes connections that are idle for 5 s; who sends into the closing loses the request.
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=3.0, socket_factory=keepalive_socket)
    return aiohttp.ClientSession(
        connector=connector,
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=connect_timeout_s, sock_read=read_timeout_s),
        cookie_jar=aiohttp.DummyCookieJar(),
        auto_decompress=False,
        skip_auto_headers=("User-Agent", "Accept", "Accept-Encoding", "Content-Type"),
    )
