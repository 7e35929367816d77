"""Real servers as a fleet: attached to, or started and stopped one by one; forecast by what they say of themselves."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any

from block.cluster.fleet import Fleet
from block.cluster.instance import InstanceFailed, LaunchFailed
from block.cluster.spec import Testbed
from block.core.clock import Clock
from block.core.sockets import notice_lost_peer
from block.dispatch.prefixes import Kept, ToldPrefixes
from block.engine.config import EngineSettings
from block.engine.latency import LatencyModel
from block.engine.predictor import Predictor

if TYPE_CHECKING:
    import aiohttp

    from block.backends.instance import VLLMInstance
    from block.backends.launch import Launcher, Server, ServerSpec

log = logging.getLogger(__name__)

CONNECT_S = 10.0
"""A server that takes no connection for so long is lost."""
SILENT_S = 600.0
"""So is one that says nothing for so long to a request, whose first token may be long in coming."""
HEALTH_S = 5.0
"""A server that was lost is asked for so long whether it is well."""


@asynccontextmanager
async def launched_fleet(
    specs: Sequence[ServerSpec],
    launching: AbstractAsyncContextManager[Launcher[Any]],
    latency: LatencyModel,
    testbed: Testbed,
    clock: Clock,
    shared_memory: bool = True,
) -> AsyncIterator[Fleet]:
    """A fleet of the servers that `specs` describe, of which the first `testbed.initial` run from the start.

    launching: a context with what starts them, at whose end none is left. latency: the servers' step times.
    shared_memory: as of `VLLMInstance`.
    """
    async with launching as launcher:
        async with asyncio.TaskGroup() as group:
            starting = [group.create_task(launcher.start(spec)) for spec in specs[: testbed.initial]]
        servers = {i: task.result() for i, task in enumerate(starting)}
        urls = [servers[i].url if i in servers else "" for i in range(len(specs))]
        async with attached_fleet(urls, latency, testbed, clock, shared_memory) as fleet:
            launched = _Servers(launcher, specs, servers, fleet)
            yield fleet._replace(servers=launched, health=launched)


def launcher_of(
    backend: Any, starter: Any, testbed: Testbed, bundle: Mapping[str, float], at_once: int | None = None
) -> AbstractAsyncContextManager[Launcher[Any]]:
    """What starts the servers of a backend as its key `launcher` says.

    starter: how a process is started on this host, as of `block.backends.launch.launcher_for`. bundle: what a server
    takes of a node of a Ray cluster. at_once: servers that start at the same time; None: all.
    """
    deadline_s = backend.ready_timeout_s
    if backend.launcher == "ray":
        from block.backends.ray_launch import ray_launcher

        return ray_launcher(bundle, testbed.instances, backend.placement, deadline_s=deadline_s, at_once=at_once)
    from block.backends.launch import launcher_for

    return launcher_for(starter, deadline_s=deadline_s, at_once=at_once)


class _Servers:
    """The servers of a fleet, by instance id."""

    def __init__(
        self, launcher: Launcher[Any], specs: Sequence[ServerSpec], running: dict[int, Server], fleet: Fleet
    ) -> None:
        self._launcher = launcher
        self._specs = specs
        self._running = running
        self._instances: Sequence[VLLMInstance] = fleet.instances  # type: ignore[assignment]
        self._engines = fleet.engines
        assert isinstance(fleet.health, _Attached)
        self._attached = fleet.health
        self._losses = {i: server.losses for i, server in running.items()}  # when each was last attached to

    async def start(self, instance_id: int) -> None:
        """Start a server and attach to it. LaunchFailed if it does not come up, or not as the others are."""
        server = self._running[instance_id] = await self._launcher.start(self._specs[instance_id])
        self._losses[instance_id] = server.losses
        instance = self._instances[instance_id]
        instance.url = server.url
        try:
            settings = await _attach(instance)
            if settings is None or _said(instance, settings) != self._engines:
                raise LaunchFailed(f"{instance.url}: other settings than the first servers: {settings}")
        except LaunchFailed:
            await self.stop(instance_id)
            raise

    async def stop(self, instance_id: int) -> None:
        """Detach from a server and stop it."""
        await self._instances[instance_id].detach()
        await self._launcher.stop(self._running.pop(instance_id))

    async def lost(self, instance_id: int) -> str | None:
        """As of `Health`: if the launcher has lost it, and it is not there."""
        losses = self._running[instance_id].losses
        if losses == self._losses[instance_id]:
            return None
        instance = self._instances[instance_id]
        with suppress(TimeoutError):
            async with asyncio.timeout(HEALTH_S):
                if await instance.is_same():
                    self._losses[instance_id] = losses
                    return None
        return f"{instance.url}: the server has ended"

    async def back(self, instance_id: int) -> bool:
        """As of `Health`: where the launcher has it now."""
        server = self._running[instance_id]
        losses = server.losses
        if server.ended() is not None or not await self._attached.again(instance_id, server.url):
            return False
        self._losses[instance_id] = losses
        return True


class _Attached:
    """Servers that somebody else starts again, if they end: `Health` by what they answer.

    engines: what all of them must say of themselves, as of `Fleet`.
    """

    def __init__(
        self,
        instances: list[VLLMInstance],
        engines: Mapping[str, Any],
        session: aiohttp.ClientSession,
        connect: Callable[[int, str], VLLMInstance],
    ) -> None:
        self._instances = instances
        self._engines = engines
        self._session = session
        self._connect = connect
        self._told: set[str] = set()

    async def lost(self, instance_id: int) -> str | None:
        """None: only their requests find out."""
        return None

    async def back(self, instance_id: int) -> bool:
        """Whether the server of an instance is well again."""
        return await self.again(instance_id, self._instances[instance_id].url)

    async def again(self, instance_id: int, url: str) -> bool:
        """Whether there is a server at `url` that can take the place of an instance's, and has taken it."""
        from block.backends.launch import is_healthy

        before = self._instances[instance_id]
        fresh = self._connect(instance_id, url)
        try:
            async with asyncio.timeout(HEALTH_S):
                if not await is_healthy(self._session, url):
                    return False
                if url == before.url and await before.is_same():
                    return True
                settings = await _attach(fresh)
                if (said := _said(fresh, settings)) == self._engines:
                    self._instances[instance_id], fresh = fresh, before
                    return True
        except (LaunchFailed, TimeoutError):
            return False
        finally:
            await fresh.detach()
        if url not in self._told:
            self._told.add(url)
            log.warning("%s: is back with other settings, and gets no requests: %s", url, said)
        return False


def _said(instance: VLLMInstance, settings: EngineSettings | None) -> dict[str, Any]:
    """What a server says of itself; nothing if it has no plugin."""
    return {} if settings is None else {"vllm": instance.vllm_version, **settings._asdict()}


@asynccontextmanager
async def attached_fleet(
    urls: Sequence[str], latency: LatencyModel, testbed: Testbed, clock: Clock, shared_memory: bool = True
) -> AsyncIterator[Fleet]:
    """Instances for running servers ("": one that does not run yet), and a predictor for the settings they report."""
    import aiohttp

    from block.backends.instance import VLLMInstance

    timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S, sock_read=SILENT_S)
    # A connection each: a server may close an idle one just as it is used again, and would seem to have failed.
    connector = aiohttp.TCPConnector(limit=0, force_close=True, socket_factory=_socket)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
        vocabulary = testbed.model.vocab_size

        def connect(i: int, url: str) -> VLLMInstance:
            return VLLMInstance(i, url, session, clock, vocabulary, shared_memory=shared_memory, measured=True)

        instances = [connect(i, url) for i, url in enumerate(urls)]
        try:
            running = [instance for instance in instances if instance.url]
            settings = [await _attach(instance) for instance in running]
            known = [one for one in settings if one is not None]
            if len(known) < len(running):  # or a gateway: policies that only count need no more
                log.warning("servers without the plugin show no snapshots: %s", ", ".join(urls))
                yield Fleet(instances, None, {}, health=_Attached(instances, {}, session, connect))
                return
            for instance, other in zip(running, known, strict=True):
                if other != known[0]:
                    unlike = _unlike(other, known[0])
                    raise LaunchFailed(f"{instance.url}: other settings than {instances[0].url}: {unlike}")
            prefixes = _prefixes(instances, running, known[0], testbed)
            if known[0] != _asked(testbed, known[0]):
                log.warning("the servers run with %s", known[0])
            predictor = Predictor(known[0], latency)
            engines = _said(instances[0], known[0])
            health = _Attached(instances, engines, session, connect)

            def snapshots(seconds: float) -> list[dict[str, Any]]:
                return [instance.told(seconds) for instance in instances]

            yield Fleet(instances, predictor, engines, prefixes=prefixes, snapshots=snapshots, health=health)
        finally:
            for instance in instances:
                await instance.detach()


def _socket(address: Any) -> socket.socket:
    """For a connection to a server, which is answered when there is something to say: that may be long."""
    family, kind, protocol, *_ = address
    opened = socket.socket(family, kind, protocol)
    notice_lost_peer(opened)
    return opened


def _asked(testbed: Testbed, known: EngineSettings) -> EngineSettings | None:
    """What the config would have servers of so many KV blocks be like; None if they are too few for its longest
    sequence. Some settings are the servers' own affair.
    """
    try:
        asked = testbed.engine.settings(known.total_blocks)
    except ValueError:
        return None
    return asked._replace(watermark_blocks=known.watermark_blocks, enable_prefix_caching=known.enable_prefix_caching)


class ServerPrefixes(ToldPrefixes):
    """What servers tell of their prefix caches."""

    def __init__(self, instances: Sequence[VLLMInstance], block_size: int) -> None:
        super().__init__(lambda i, hashes, most: instances[i].look_up(hashes, most), block_size)
        self._instances = instances

    def keep(self, instance_id: int) -> Kept:
        """What a server has now, to be looked up in later."""
        return self._instances[instance_id].keep()


def _prefixes(
    instances: Sequence[VLLMInstance], running: Sequence[VLLMInstance], settings: EngineSettings, testbed: Testbed
) -> ServerPrefixes | None:
    """What servers with these settings tell of their prefix caches; None if they have none, or do not tell."""
    if not settings.enable_prefix_caching:
        return None
    silent = [instance.url for instance in running if not instance.tells_prefixes]
    if not testbed.engine.enable_prefix_caching or settings.block_size != testbed.engine.block_size:
        keys = f"engine.enable_prefix_caching=true engine.block_size={settings.block_size}"
        log.warning("the servers cache prefixes; forecasts count hits only with %s", keys)
    elif silent:
        log.warning("what is cached is judged by what was sent there; not told by %s", ", ".join(silent))
    else:
        return ServerPrefixes(instances, settings.block_size)
    return None


async def _attach(instance: VLLMInstance) -> EngineSettings | None:
    """The settings of the server that is attached to; None if it has no plugin. LaunchFailed if it does not answer."""
    from block.backends.instance import WithoutPlugin

    try:
        return await instance.attach()
    except WithoutPlugin:
        return None
    except InstanceFailed as error:
        raise LaunchFailed(str(error)) from error


def _unlike(one: EngineSettings, other: EngineSettings) -> str:
    pairs = zip(one._fields, one, other, strict=True)
    return ", ".join(f"{name} {mine} and {theirs}" for name, mine, theirs in pairs if mine != theirs)
