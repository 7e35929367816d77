"""Real servers as a fleet: attached to, or started and stopped one by one; forecast by what they say of themselves."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from block.cluster.fleet import Fleet
from block.cluster.instance import InstanceFailed, LaunchFailed
from block.cluster.spec import Testbed
from block.core.clock import Clock
from block.dispatch.prefixes import Kept, ToldPrefixes
from block.engine.config import EngineSettings
from block.engine.latency import LatencyModel
from block.engine.predictor import Predictor

if TYPE_CHECKING:
    from block.backends.instance import VLLMInstance
    from block.backends.launch import Launcher, ServerProcess, ServerSpec

log = logging.getLogger(__name__)


@asynccontextmanager
async def launched_fleet(
    specs: Sequence[ServerSpec],
    starter: Any,
    latency: LatencyModel,
    testbed: Testbed,
    clock: Clock,
    deadline_s: float,
    at_once: int | None = None,
    shared_memory: bool = True,
) -> AsyncIterator[Fleet]:
    """A fleet of the servers that `specs` describe, of which the first `testbed.initial` run from the start.

    starter: how a process is started, as of `block.backends.launch.launcher_for`. latency: the servers' step times.
    deadline_s: seconds that a server may take to come up. at_once: servers that start at the same time; None: all.
    shared_memory: as of `VLLMInstance`.
    """
    from block.backends.launch import launcher_for

    async with launcher_for(starter, deadline_s=deadline_s, at_once=at_once) as launcher:
        async with asyncio.TaskGroup() as group:
            starting = [group.create_task(launcher.start(spec)) for spec in specs[: testbed.initial]]
        servers = {i: task.result() for i, task in enumerate(starting)}
        urls = [servers[i].url if i in servers else "" for i in range(len(specs))]
        async with attached_fleet(urls, latency, testbed, clock, shared_memory) as fleet:
            yield fleet._replace(servers=_Servers(launcher, specs, servers, fleet))


class _Servers:
    """The servers of a fleet, by instance id."""

    def __init__(
        self, launcher: Launcher, specs: Sequence[ServerSpec], running: dict[int, ServerProcess], fleet: Fleet
    ) -> None:
        self._launcher = launcher
        self._specs = specs
        self._running = running
        self._instances: Sequence[VLLMInstance] = fleet.instances  # type: ignore[assignment]
        self._engines = fleet.engines

    async def start(self, instance_id: int) -> None:
        """Start a server and attach to it. LaunchFailed if it does not come up, or not as the others are."""
        server = self._running[instance_id] = await self._launcher.start(self._specs[instance_id])
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


def _said(instance: VLLMInstance, settings: EngineSettings) -> dict[str, Any]:
    """What a server says of itself."""
    return {"vllm": instance.vllm_version, **settings._asdict()}


@asynccontextmanager
async def attached_fleet(
    urls: Sequence[str], latency: LatencyModel, testbed: Testbed, clock: Clock, shared_memory: bool = True
) -> AsyncIterator[Fleet]:
    """Instances for running servers ("": one that does not run yet), and a predictor for the settings they report."""
    import aiohttp

    from block.backends.instance import VLLMInstance

    timeout = aiohttp.ClientTimeout(total=None, sock_connect=30)
    # A connection each: a server may close an idle one just as it is used again, and would seem to have failed.
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
        vocabulary, how = testbed.model.vocab_size, {"shared_memory": shared_memory, "measured": True}
        instances = [VLLMInstance(i, url, session, clock, vocabulary, **how) for i, url in enumerate(urls)]
        try:
            running = [instance for instance in instances if instance.url]
            settings = [await _attach(instance) for instance in running]
            known = [one for one in settings if one is not None]
            if len(known) < len(running):  # or a gateway: policies that only count need no more
                log.warning("servers without the plugin show no snapshots: %s", ", ".join(urls))
                yield Fleet(instances, None, {})
                return
            for instance, other in zip(running, known, strict=True):
                if other != known[0]:
                    unlike = _unlike(other, known[0])
                    raise LaunchFailed(f"{instance.url}: other settings than {instances[0].url}: {unlike}")
            prefixes = _prefixes(instances, running, known[0], testbed)
            if known[0] != _asked(testbed, known[0]):
                log.warning("the servers run with %s", known[0])
            predictor = Predictor(known[0], latency)
            said = _said(instances[0], known[0])

            def snapshots(seconds: float) -> list[dict[str, Any]]:
                return [instance.told(seconds) for instance in instances]

            yield Fleet(instances, predictor, said, prefixes=prefixes, snapshots=snapshots)
        finally:
            for instance in instances:
                await instance.detach()


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
