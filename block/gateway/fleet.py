"""The servers that there are: some join, others leave once their requests have ended."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable
from typing import Any

from block.core.clock import Clock
from block.dispatch.core import Dispatcher
from block.gateway.discovery import Discovery
from block.gateway.metrics import Metrics
from block.gateway.models import Models
from block.gateway.upstreams import Upstream
from block.gateway.watch import Watch

log = logging.getLogger(__name__)

Make = Callable[[int, str], Upstream]
"""Makes the instance with this id for the server at this URL. Nothing is asked of it yet."""


class Fleet:
    """Keeps `servers`, by id, as they join and leave; who else looks at them sees them change. No id is used twice."""

    def __init__(
        self,
        servers: dict[int, Upstream],
        make: Make,
        dispatcher: Dispatcher,
        watch: Watch,
        metrics: Metrics,
        models: Models,
        clock: Clock,
    ) -> None:
        self._servers = servers
        self._make = make
        self._dispatcher = dispatcher
        self._watch = watch
        self._metrics = metrics
        self._models = models
        self._clock = clock
        self._leaving = watch.leaving
        self._following = asyncio.Lock()

    async def follow(self, discovery: Discovery) -> None:
        """Have the servers that it finds, and no others. Those that are new and well get requests when this returns."""
        async with self._following:
            await self._have(await discovery.look())

    async def _have(self, urls: Iterable[str]) -> None:
        wanted = dict.fromkeys(urls)
        there = {one.url: i for i, one in self._servers.items()}
        for url, i in there.items():
            if url not in wanted and i not in self._leaving:
                self._leave(i)
        for url in wanted:
            if there.get(url) in self._leaving:
                self._leaving.discard(there[url])
                log.warning("%s does not leave", url)
        await asyncio.gather(*(self._join(url) for url in wanted if url not in there))

    async def _join(self, url: str) -> None:
        server = self._make(self._dispatcher.add_instance(), url)
        self._servers[server.instance_id] = server
        self._metrics.begin(server)
        await self._watch.begin(server)

    def _leave(self, instance_id: int) -> None:
        self._leaving.add(instance_id)
        self._dispatcher.retire(instance_id)
        left = self._dispatcher.outstanding(instance_id)
        log.warning("%s leaves, with %d requests to finish", self._servers[instance_id].url, left)

    async def let_go(self) -> None:
        """Forget those that leave and have finished their requests."""
        for i in [one for one in self._leaving if self._dispatcher.outstanding(one) == 0]:
            self._leaving.discard(i)
            await self._forget(i)

    async def _forget(self, instance_id: int) -> None:
        server = self._servers.pop(instance_id)
        await self._watch.end(instance_id)
        self._dispatcher.instance_down(instance_id, "it has left", self._clock.now())
        self._metrics.end(server)
        server.pool.close_idle(0.0)
        await server.detach()

    async def close(self) -> None:
        """Look at none any more."""
        for i, server in self._servers.items():
            await self._watch.end(i)
            server.pool.close_idle(0.0)
            await server.detach()

    def told(self, server: Upstream) -> dict[str, Any]:
        """What is known of a server: its url, state ("active", "down" or "leaving"), why it is down, its requests and
        models.
        """
        i = server.instance_id
        active = i in self._dispatcher.active
        return {
            "url": server.url,
            "state": "leaving" if i in self._leaving else "active" if active else "down",
            "reason": server.trouble,
            "requests": self._dispatcher.outstanding(i),
            "models": self._models.of(i),
        }
