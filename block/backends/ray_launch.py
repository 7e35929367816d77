"""Servers on the nodes of a Ray cluster: an actor each (`block.backends.ray_actor`), in one placement group.

Ray finds room, starts an actor again whose process or node is lost, and ends all actors when this process ends. What
is asked of servers goes to them over HTTP, as it does without Ray.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import aiohttp

from block.backends.launch import GRACE_S, Launcher, ServerSpec
from block.backends.ray_actor import Heard, News, ServerActor
from block.cluster.instance import LaunchFailed
from block.core.errors import message

log = logging.getLogger(__name__)

_RETRIES = "RAY_gcs_server_port_wait_time_s"
"""Of Ray's: how often a driver tries to connect to a cluster."""
NEWS_S = 10.0
"""How long an actor waits for news before it says that there are none."""
POLL_S = 0.2
"""From one look whether there is room, or whether an actor is there again, to the next."""
ROOM_S = 3.0
"""It is told what there is no room for after so long."""


@dataclass
class RayServer:
    """A server that an actor keeps, wherever it runs at the moment. bundle: the place that it has in the group.

    restarts: whether it is started again if it ends.
    """

    actor: Any
    bundle: int
    log: Path
    url: str = ""
    status: int | None = None
    losses: int = 0
    restarts: bool = False
    following: asyncio.Task[None] | None = None

    def ended(self) -> int | None:
        """Its exit status; None while it runs, or is to run again."""
        return self.status


class RayLauncher(Launcher[RayServer]):
    """Starts servers as actors in the bundles of a placement group, each of which has room for one."""

    def __init__(
        self,
        ray: Any,
        group: Any,
        bundles: Sequence[Mapping[str, float]],
        session: aiohttp.ClientSession,
        deadline_s: float,
        at_once: int | None = None,
    ) -> None:
        super().__init__(session, deadline_s, at_once)
        self._ray = ray
        self._group = group
        self._bundles = bundles
        self._free = list(range(len(bundles)))

    async def start(self, spec: ServerSpec) -> RayServer:
        """As of `Launcher`; from then on it is started again whenever it ends."""
        server = await super().start(spec)
        server.restarts = True
        return server

    def _begin(self, spec: ServerSpec, port: int) -> RayServer:
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        bundle = self._free.pop(0)
        needs = dict(self._bundles[bundle])
        actor = self._ray.remote(ServerActor).options(
            num_cpus=needs.pop("CPU", 0),
            num_gpus=needs.pop("GPU", 0),
            resources=needs,
            max_restarts=-1,
            max_concurrency=2,  # `stop` is not to wait for `news`
            scheduling_strategy=PlacementGroupSchedulingStrategy(self._group, bundle),
        )
        server = RayServer(actor.remote(spec, port, self._ray.util.get_node_ip_address), bundle, spec.log)
        server.following = asyncio.create_task(self._follow(server))
        return server

    async def _end(self, server: RayServer) -> None:
        server.restarts = False
        with suppress(self._ray.exceptions.RayError, TimeoutError):  # an actor that is lost has no server
            async with asyncio.timeout(3 * GRACE_S):
                await server.actor.stop.remote()
                if server.following is not None:
                    await server.following  # to the last that it has said
        if server.following is not None:
            server.following.cancel()
        self._ray.kill(server.actor)
        self._free = sorted([*self._free, server.bundle])

    async def stop_all(self) -> None:
        """Stop all servers that are left."""
        await asyncio.gather(*[self.stop(server) for server in list(self._servers)])

    async def _follow(self, server: RayServer) -> None:
        """Write down what a server says, note where it is, and have it started again if it ends but is not to."""
        errors, heard, restarted = self._ray.exceptions, Heard(), ""
        with server.log.open("ab", buffering=0) as file:
            while server.status is None:
                try:
                    news: News = await server.actor.news.remote(heard, NEWS_S)
                except errors.ActorDiedError as error:  # for good
                    server.losses += 1
                    _write(file, f"{error}\n".encode())
                    server.status = 1
                except errors.RayActorError as error:
                    server.losses += 1
                    log.info("%s: %s", server.url or "a server", message(error))
                    await asyncio.sleep(POLL_S)
                else:
                    server.url, heard = news.url, news.heard
                    _write(file, news.said)
                    if news.status is None or not server.restarts:
                        server.status = news.status
                    elif restarted == heard.server:  # whose actor has not ended yet
                        await asyncio.sleep(POLL_S)
                    else:
                        server.losses += 1
                        log.warning("%s ended with status %d and is started again", server.url, news.status)
                        self._ray.kill(server.actor, no_restart=False)
                        restarted = heard.server


def _write(log: FileIO, said: bytes) -> None:
    """Write down what a server says; a full disk is no reason to lose the server, too."""
    with suppress(OSError):
        log.write(said)


@asynccontextmanager
async def ray_launcher(
    bundle: Mapping[str, float], instances: int, placement: str, *, deadline_s: float, at_once: int | None = None
) -> AsyncIterator[RayLauncher]:
    """A launcher for so many servers on the nodes of the Ray cluster that this host belongs to, or that RAY_ADDRESS
    names; without one, on a Ray that is started on this host. All its servers are stopped when the context ends.

    bundle: the resources of a server. placement: one of `block.backends.settings.PLACEMENTS`. deadline_s and
    at_once: as of `Launcher`. LaunchFailed if there is no room within `deadline_s`.
    """
    bundles = [bundle] * instances
    with _connected(bundles) as ray:
        from ray.util.placement_group import placement_group, remove_placement_group

        group = placement_group([dict(one) for one in bundles], strategy=placement.upper())
        try:
            await _room(ray, group, bundles, placement, deadline_s)
            async with aiohttp.ClientSession() as session:
                launcher = RayLauncher(ray, group, bundles, session, deadline_s, at_once)
                try:
                    yield launcher
                finally:
                    await launcher.stop_all()
        finally:
            remove_placement_group(group)


@contextmanager
def _connected(bundles: Sequence[Mapping[str, float]]) -> Iterator[Any]:
    """Ray, connected to a cluster; a connection that there was before is used, and left open."""
    import ray

    if ray.is_initialized():
        yield ray
        return
    try:
        _connect(ray, cpus=math.ceil(sum(one.get("CPU", 0) for one in bundles)))
    except Exception as error:  # of many kinds, none of Ray's own
        raise LaunchFailed(f"backend.launcher=ray: no connection to Ray: {message(error)}") from error
    try:
        yield ray
    finally:
        ray.shutdown()


def _connect(ray: Any, cpus: int) -> None:
    """Connect to the cluster that RAY_ADDRESS names or that this host belongs to; if there is none, start one here with
    so many CPUs, or those that there are.
    """
    quiet = {"log_to_driver": False, "logging_level": logging.WARNING}
    named = os.environ.get("RAY_ADDRESS") or "auto"
    if named != "local":
        before = os.environ.get(_RETRIES)
        os.environ[_RETRIES] = before or "1"  # by default, a cluster that is gone is tried for ten minutes
        try:
            ray.init(address="auto", **quiet)
            return
        except ConnectionError:
            if named != "auto":
                raise
        finally:
            if before is None:
                del os.environ[_RETRIES]
    ray.init(address="local", num_cpus=max(os.cpu_count() or 1, cpus), include_dashboard=False, **quiet)


async def _room(
    ray: Any, group: Any, bundles: Sequence[Mapping[str, float]], placement: str, deadline_s: float
) -> None:
    """Wait until there is room for all servers: nodes may be on their way. LaunchFailed if there is none in time."""
    began, told = time.monotonic(), False
    while not group.wait(0.01):
        if not told and time.monotonic() - began > ROOM_S:
            log.warning("waiting for room: %s", _lacking(ray, bundles, placement))
            told = True
        if time.monotonic() - began > deadline_s:
            raise LaunchFailed(f"no room (backend.ready_timeout_s): {_lacking(ray, bundles, placement)}")
        await asyncio.sleep(POLL_S)


def _lacking(ray: Any, bundles: Sequence[Mapping[str, float]], placement: str) -> str:
    """What is asked of the cluster, and what it has."""
    kinds = sorted(bundles[0])

    def said(amounts: Mapping[str, float]) -> str:
        return " and ".join(f"{amounts.get(kind, 0):g} {kind}" for kind in kinds)

    alike = Counter(said(node["Resources"]) for node in ray.nodes() if node["Alive"])
    nodes = ", ".join(f"{count} with {amount}" for amount, count in sorted(alike.items()))
    free = said(ray.available_resources())
    return (
        f"{len(bundles)} servers want {said(bundles[0])} each (backend.placement={placement}); "
        f"the cluster's nodes are {nodes}, of which {free} in all are free"
    )
