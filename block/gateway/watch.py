"""Watching the servers: which are well, which hang, and which models they serve.

A server that has requests and has said nothing for `hang_floor_s` is asked for /health; silent there too, it hangs. It
also hangs if the step in flight, as its plugin shows it, has overrun its forecast by a factor and that floor; or if the
first event of a stream is overdue so long against the slowest that the others have taken of late. Then it is set aside,
and what it has not begun to answer begins anew elsewhere. It is back once it is well.

An overdue event is the weakest sign, since a prompt may just be hard: a request is such a sign once, and sets aside one
server at a time, which is tried again later and later. Answers that come whole are no sign at all: nobody knows how
long they will be. The last server is never set aside for hanging.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import deque
from collections.abc import Awaitable, Callable
from contextlib import suppress

from block.core.clock import Clock
from block.gateway.config import GatewayConfig
from block.gateway.groups import Groups
from block.gateway.models import Models
from block.gateway.server_connections import ServerHangs
from block.gateway.upstreams import Upstream

log = logging.getLogger(__name__)

RECENT = 50
"""First events of a server that are remembered."""
OF_LATE_S = 60.0
"""Older ones do not count."""
LATER_S = 60.0
"""The longest that a server is left alone after an event of it was overdue."""


class Watch:
    """Watches servers, from `begin` to `end`."""

    def __init__(self, groups: Groups, clock: Clock, config: GatewayConfig, models: Models) -> None:
        self._groups = groups
        self._clock = clock
        self._config = config
        self._models = models
        self._tasks: dict[int, list[asyncio.Task[None]]] = {}
        self._took: dict[int, deque[tuple[float, float]]] = {}  # when, and how long
        self._asked: dict[int, float] = {}  # when for its models
        self._left_alone: dict[int, tuple[float, float]] = {}  # until when, and how long
        self._troubles: dict[int, str] = {}  # that were told last
        self.leaving: set[int] = set()
        """Servers that get no more requests, well or not."""

    def begin(self, upstream: Upstream) -> None:
        """Watch a server, from now on."""
        i, config = upstream.instance_id, self._config
        self._took[i] = deque(maxlen=RECENT)
        self._models.tell(i, None)  # it may serve any, until it says
        self._tasks[i] = [
            asyncio.create_task(self._again_and_again(self._look_after, upstream, config.probe_interval_s)),
            asyncio.create_task(self._again_and_again(self._set_aside, upstream, config.hang_floor_s / 4)),
        ]

    def end(self, instance_id: int) -> None:
        """Watch it no more; nothing is known of it."""
        for task in self._tasks.pop(instance_id, []):
            task.cancel()
        self._took.pop(instance_id, None)
        self._asked.pop(instance_id, None)
        self._left_alone.pop(instance_id, None)
        self._troubles.pop(instance_id, None)

    async def _again_and_again(
        self, look: Callable[[Upstream], Awaitable[None]], upstream: Upstream, interval_s: float
    ) -> None:
        while True:
            await asyncio.sleep(interval_s)
            try:
                await look(upstream)
            except Exception:  # whatever a server says: the next look may fare better
                log.exception("%s is not looked at", upstream.url)

    async def ask_models(self, upstream: Upstream) -> None:
        """What a server serves; what it told before holds while it does not answer."""
        i = upstream.instance_id
        cards = self._models.told(i)
        with suppress(OSError):
            cards = await upstream.cards()
        if i in self._tasks:  # it has not left meanwhile
            self._models.tell(i, cards)
            self._groups.settle(i, self._clock.now())
            self._asked[i] = self._clock.now()

    def began(self, instance_id: int, seconds: float) -> None:
        """The first event of a stream came, so long after the request was sent."""
        self._took[instance_id].append((self._clock.now(), seconds))
        if self._left_alone:
            self._left_alone.pop(instance_id, None)

    def lost(self, instance_id: int, reason: str) -> None:
        """A server is."""
        self._groups.instance_down(instance_id, reason, self._clock.now())

    async def _look_after(self, upstream: Upstream) -> None:
        """Readmit a server that was ejected if it is well, and ask one that is well for its models."""
        i, now = upstream.instance_id, self._clock.now()
        if self._groups.is_active(i):
            if now - self._asked.get(i, -math.inf) >= self._config.models_interval_s:
                await self.ask_models(upstream)
        elif i not in self.leaving and now >= self._left_alone.get(i, (now, 0.0))[0]:
            await self.readmit(upstream)

    async def readmit(self, upstream: Upstream) -> None:
        """Have a server get requests, again or for the first time, if it is well."""
        i = upstream.instance_id
        if not await upstream.healthy():
            self._tell_trouble(upstream)
            return
        await self.ask_models(upstream)
        if i not in self._tasks or i in self.leaving or self._groups.is_active(i):  # by now
            return
        self._groups.instance_up(i, self._clock.now())
        if i in self._troubles or self._groups.ejected(i):
            log.warning("instance %d gets requests: %s is well", i, upstream.url)
        self._troubles.pop(i, None)

    def _tell_trouble(self, upstream: Upstream) -> None:
        """Log why a server is not well, once."""
        i, trouble = upstream.instance_id, upstream.trouble
        if trouble != self._troubles.get(i):
            log.warning("%s is not well: %s", upstream.url, trouble)
        self._troubles[i] = trouble

    async def _set_aside(self, upstream: Upstream) -> None:
        """Set a server aside if it hangs, and is not the last."""
        i, pool = upstream.instance_id, upstream.pool
        if not pool.under_way or not self._is_one_of_several(i):
            return
        floor_s = self._config.hang_floor_s
        why = upstream.overrun(floor_s, self._config.hang_factor) or self._overdue(upstream)
        if why is None and pool.quiet_s() > floor_s:
            began = time.monotonic()
            silent = await upstream.hangs(floor_s)
            late = time.monotonic() - began > 1.5 * floor_s  # it was this process that did not listen
            if silent and not late and pool.quiet_s() > floor_s:
                why = f"silent for {pool.quiet_s():.1f} s, and so is /health"
        if why is not None and self._is_one_of_several(i):
            self._groups.instance_down(i, f"{upstream.url} hangs: {why}", self._clock.now())
            pool.give_up(ServerHangs(f"hangs: {why}"))

    def _is_one_of_several(self, instance_id: int) -> bool:
        return self._groups.is_active(instance_id) and not self._groups.is_last(instance_id)

    def _overdue(self, upstream: Upstream) -> str | None:
        """Why a server counts as hanging by streams that have not begun; None if it does not."""
        config, i, now = self._config, upstream.instance_id, self._clock.now()
        of_late = [seconds for j, took in self._took.items() if j != i for at, seconds in took if now - at < OF_LATE_S]
        waited = upstream.pool.longest_wait_s()
        if (
            not of_late
            or upstream.pool.quiet_s() <= config.hang_floor_s
            or waited <= config.hang_floor_s + config.hang_factor * max(of_late)
            or any(now < until for until, _ in self._left_alone.values())
        ):
            return None
        left_alone = min(2 * self._left_alone.get(i, (0.0, config.probe_interval_s))[1], LATER_S)
        self._left_alone[i] = now + left_alone, left_alone
        return f"no event of a stream for {waited:.1f} s, where others took {max(of_late):.2g} s at most"
