"""Watching the servers: which hang, which are well again, and which models they serve.

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
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress

from block.core.clock import Clock
from block.dispatch.core import Dispatcher
from block.gateway.config import GatewayConfig
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
    """Watches `upstreams`; `run` does it, until it is cancelled."""

    def __init__(
        self,
        upstreams: Sequence[Upstream],
        dispatcher: Dispatcher,
        clock: Clock,
        config: GatewayConfig,
        models: Models,
    ) -> None:
        self._upstreams = upstreams
        self._dispatcher = dispatcher
        self._clock = clock
        self._config = config
        self._models = models
        self._took = [deque[tuple[float, float]](maxlen=RECENT) for _ in upstreams]  # when, and how long
        self._asked = [clock.now()] * len(upstreams)  # when for its models
        self._left_alone: dict[int, tuple[float, float]] = {}  # until when, and how long

    async def run(self) -> None:
        """Watch all of them."""
        async with asyncio.TaskGroup() as group:
            for upstream in self._upstreams:
                group.create_task(self._again_and_again(self._readmit, upstream, self._config.probe_interval_s))
                group.create_task(self._again_and_again(self._set_aside, upstream, self._config.hang_floor_s / 4))

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
        with suppress(OSError):
            self._models.tell(upstream.instance_id, await upstream.cards())
        self._asked[upstream.instance_id] = self._clock.now()

    def began(self, instance_id: int, seconds: float) -> None:
        """The first event of a stream came, so long after the request was sent."""
        self._took[instance_id].append((self._clock.now(), seconds))
        if self._left_alone:
            self._left_alone.pop(instance_id, None)

    async def _readmit(self, upstream: Upstream) -> None:
        """Readmit a server that was ejected if it is well, and ask one that is well for its models."""
        i, now = upstream.instance_id, self._clock.now()
        if i in self._dispatcher.active:
            if now - self._asked[i] >= self._config.models_interval_s:
                await self.ask_models(upstream)
        elif now >= self._left_alone.get(i, (now, 0.0))[0] and await upstream.healthy():
            await self.ask_models(upstream)
            self._dispatcher.instance_up(i, self._clock.now())
            log.warning("instance %d gets requests: %s is well", i, upstream.url)

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
            self._dispatcher.instance_down(i, f"{upstream.url} hangs: {why}", self._clock.now())
            pool.give_up(ServerHangs(f"hangs: {why}"))

    def _is_one_of_several(self, instance_id: int) -> bool:
        return instance_id in self._dispatcher.active and len(self._dispatcher.active) > 1

    def _overdue(self, upstream: Upstream) -> str | None:
        """Why a server counts as hanging by streams that have not begun; None if it does not."""
        config, i, now = self._config, upstream.instance_id, self._clock.now()
        of_late = [
            seconds for j, took in enumerate(self._took) if j != i for at, seconds in took if now - at < OF_LATE_S
        ]
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
