"""The servers that there are: some join, others leave once their requests have ended."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from typing import Any

from block.core.clock import Clock
from block.gateway.groups import Groups
from block.gateway.metrics import Metrics
from block.gateway.models import Models
from block.gateway.upstreams import Upstream
from block.gateway.watch import Watch

log = logging.getLogger(__name__)

Make = Callable[[int, str], Upstream]
"""Makes the instance with this id for the server at this URL. Nothing is asked of it yet."""


class Fleet:
    """Keeps `servers`, by id, as they join and leave; who else looks at them sees them change. No id is used twice.

    Nothing is waited for between what is asked of the servers and what is noted, so that no two changes meet.
    """

    def __init__(
        self,
        servers: dict[int, Upstream],
        make: Make,
        groups: Groups,
        watch: Watch,
        metrics: Metrics,
        models: Models,
        clock: Clock,
    ) -> None:
        self._servers = servers
        self._make = make
        self._groups = groups
        self._watch = watch
        self._metrics = metrics
        self._models = models
        self._clock = clock
        self._leaving = watch.leaving
        self._tasks: set[asyncio.Task[None]] = set()

    def follow(self, urls: Iterable[str]) -> Awaitable[object]:
        """Have the servers at these URLs, and no others. What is returned need not be awaited; once it is done, those
        that are new and well get requests.
        """
        wanted = dict.fromkeys(urls)
        there = {one.url: i for i, one in self._servers.items()}
        for url, i in there.items():
            if url not in wanted and i not in self._leaving:
                self._leave(i)
        new = [self._join(url) for url in wanted if url not in there]
        back = [self._stay(there[url]) for url in wanted if there.get(url) in self._leaving]
        return self.begin(*new, *back)

    def _join(self, url: str) -> Coroutine[Any, Any, None]:
        server = self._make(self._groups.add_instance(), url)
        self._servers[server.instance_id] = server
        self._groups.join(server)
        self._metrics.begin(server)
        self._watch.begin(server)
        return self._watch.readmit(server)

    def _stay(self, instance_id: int) -> Coroutine[Any, Any, None]:
        self._leaving.discard(instance_id)
        server = self._servers[instance_id]
        log.warning("%s does not leave", server.url)
        return self._watch.readmit(server)

    def _leave(self, instance_id: int) -> None:
        self._leaving.add(instance_id)
        self._groups.retire(instance_id)
        left = self._groups.outstanding(instance_id)
        log.warning("%s leaves, with %d requests to finish", self._servers[instance_id].url, left)

    def let_go(self) -> None:
        """Forget those that leave and have finished their requests."""
        for i in [one for one in self._leaving if self._groups.outstanding(one) == 0]:
            self._leaving.discard(i)
            server = self._servers.pop(i)
            self._watch.end(i)
            self._models.forget(i)
            self._metrics.end(server)
            self._groups.remove_instance(i, self._clock.now())
            server.pool.close_idle(0.0)
            self.begin(server.detach())

    def begin(self, *works: Coroutine[Any, Any, None]) -> Awaitable[object]:
        """Have this done, at once, until `close`; what is returned need not be awaited."""
        tasks = [asyncio.get_running_loop().create_task(self._guarded(work)) for work in works]
        self._tasks.update(tasks)
        for task in tasks:
            task.add_done_callback(self._tasks.discard)
        return asyncio.gather(*tasks)

    async def _guarded(self, work: Coroutine[Any, Any, None]) -> None:
        try:
            await work
        except Exception:
            log.exception("the fleet is not followed")

    async def close(self) -> None:
        """Look at none any more."""
        for task in self._tasks:
            task.cancel()
        for i, server in self._servers.items():
            self._watch.end(i)
            server.pool.close_idle(0.0)
        await asyncio.gather(*self._tasks, *(one.detach() for one in self._servers.values()), return_exceptions=True)

    def told(self, server: Upstream) -> dict[str, Any]:
        """What is known of a server: its url, state ("active", "down" or "leaving"), why it is down, its requests and
        models.
        """
        i = server.instance_id
        active = self._groups.is_active(i)
        return {
            "url": server.url,
            "state": "leaving" if i in self._leaving else "active" if active else "down",
            "reason": server.trouble,
            "requests": self._groups.outstanding(i),
            "models": self._models.of(i),
        }
