"""The servers behind the gateway, as instances: any server for policies that count, and servers with the plugin."""

from __future__ import annotations

import asyncio
import json
import math
import ssl
from collections.abc import Callable, Sequence
from typing import Protocol

import aiohttp

from block.backends.instance import VLLMInstance
from block.cluster.instance import Instance
from block.core.arrays import Floats, Ints
from block.core.clock import Clock
from block.core.errors import message
from block.core.snapshot import NUM_SCHEDULED_TOKENS, Snapshot
from block.engine.config import EngineSettings
from block.engine.scheduler import step_time
from block.gateway.models import Card
from block.gateway.server_connections import ServerPool

HEALTH_S = 5.0
"""How long an answer to /health may take."""


class Upstream(Instance, Protocol):
    """An instance that requests are proxied to, over the connections of its `pool`."""

    url: str
    pool: ServerPool
    trouble: str
    """Why it was not well when it was asked last; empty if it was."""

    async def healthy(self) -> bool:
        """Whether it would serve a request now."""
        ...

    async def cards(self) -> Sequence[Card] | None:
        """The models that it serves; None if it does not tell. OSError if it does not answer."""
        ...

    async def hangs(self, patience_s: float) -> bool:
        """Whether it does not say within so long that it is well."""
        ...

    def overrun(self, floor_s: float, factor: float) -> str | None:
        """Why its step in flight shows that it hangs; None if it does not, or shows none."""
        ...

    async def detach(self) -> None:
        """Stop looking at it."""
        ...


class HTTPInstance:
    """A server of which nothing is known but that it answers. It is proxied to."""

    def __init__(self, instance_id: int, pool: ServerPool, session: aiohttp.ClientSession) -> None:
        self.instance_id = instance_id
        self.url = pool.url
        self.pool = pool
        self.trouble = ""
        self._session = session
        self._check: asyncio.Task[bool] | None = None
        self._left = False

    def snapshot(self) -> Snapshot:
        """NotImplementedError: only the plugin shows them."""
        raise NotImplementedError(f"{self.url} shows no snapshots")

    async def healthy(self) -> bool:
        """Whether it says so. Who asks while it is being asked gets the same answer."""
        if self._left:
            return False
        if self._check is None or self._check.done():
            self._check = asyncio.get_running_loop().create_task(self._is_well())
        return await asyncio.shield(self._check)

    async def _is_well(self) -> bool:
        """Whether /health says so."""
        try:
            async with self._session.get(f"{self.url}/health") as answer:
                self.trouble = "" if answer.status == 200 else f"/health answers {answer.status}"
        except TimeoutError:
            self.trouble = f"/health is silent for {HEALTH_S:g} s"
        except (aiohttp.ClientError, OSError, ValueError) as error:
            self.trouble = message(getattr(error, "os_error", error))
        return not self.trouble

    async def hangs(self, patience_s: float) -> bool:
        """Whether /health is silent for so long."""
        try:
            async with self._session.get(f"{self.url}/health", timeout=aiohttp.ClientTimeout(patience_s)):
                return False
        except TimeoutError:
            return True
        except (aiohttp.ClientError, OSError):
            return False  # it is gone, which its requests find out themselves

    def overrun(self, floor_s: float, factor: float) -> str | None:
        """None: it shows no step."""
        return None

    async def cards(self) -> Sequence[Card] | None:
        """The models that it serves, as /v1/models tells; None if it does not. OSError if it does not answer."""
        try:
            async with self._session.get(f"{self.url}/v1/models") as answer:
                if answer.status >= 500:
                    raise ConnectionError(f"{self.url}: answered {answer.status}")
                found = json.loads(await answer.read())["data"]
                return found if found and all(isinstance(card["id"], str) for card in found) else None
        except (aiohttp.ClientError, TimeoutError) as error:
            raise ConnectionError(f"{self.url}: {error}") from error
        except (ValueError, LookupError, TypeError, RecursionError):
            return None

    async def detach(self) -> None:
        """Ask it nothing more."""
        self._left = True  # what it is asked already will be of no use


class SeenInstance(HTTPInstance):
    """A server whose state can be looked at."""

    settings: EngineSettings | None = None
    """Its engine's, once they are known."""

    @property
    def models(self) -> Sequence[str]:
        """What the server calls its model; all other names that it knows are those of adapters."""
        raise NotImplementedError

    @property
    def tells_prefixes(self) -> str | None:
        """How it tells what its prefix cache has: by a "table" or by "events"; None: it does not."""
        raise NotImplementedError

    def look_up(self, hashes: Ints, most: int) -> tuple[int, int] | None:
        """Of the first `most` blocks with these hashes, how many the server's prefix cache has, and how many of these
        are in use; None if it does not tell.
        """
        raise NotImplementedError


class PluginInstance(SeenInstance):
    """A server with this package's plugin. It can be looked at once `healthy`, which attaches to it, was true.

    packed: its step times, as of `LatencyModel.pack`; None if they are not known.
    """

    def __init__(
        self,
        instance_id: int,
        pool: ServerPool,
        session: aiohttp.ClientSession,
        clock: Clock,
        packed: Callable[[], Floats | None],
    ) -> None:
        super().__init__(instance_id, pool, session)
        self._packed = packed
        self._stuck = math.nan  # when the step began that was the last to be overrun
        self._clock = clock
        self._view: VLLMInstance | None = None

    def snapshot(self) -> Snapshot:
        """What the scheduler published last."""
        assert self._view is not None, "only servers that are attached to are active"
        return self._view.snapshot()

    async def _is_well(self) -> bool:
        """Whether the plugin answers too: a server that comes back publishes elsewhere; and whether its steps move."""
        if not await super()._is_well():
            return False
        if self._view is not None and await self._view.is_same():
            moves = self.snapshot().step_started != self._stuck
            self.trouble = "" if moves else "its step does not end"
            return moves
        return await self._attach()

    def overrun(self, floor_s: float, factor: float) -> str | None:
        """By the step's forecast, unless what a server on another host has published does not come."""
        packed = self._packed()
        if packed is None or self._view is None or not self._view.is_current:
            return None
        seen = self.snapshot()
        took = seen.taken_at - seen.step_started
        if not took > floor_s:  # or it is idle: NaN
            return None
        expected = step_time(seen.seqs, 0, seen.running + seen.stale, NUM_SCHEDULED_TOKENS, packed)
        if took <= floor_s + factor * expected:
            return None
        self._stuck = seen.step_started
        return f"a step of {expected:.2g} s has taken {took:.1f} s"

    async def _attach(self) -> bool:
        view = VLLMInstance(self.instance_id, self.url, self._session, self._clock)
        try:
            async with asyncio.timeout(HEALTH_S):
                settings = await view.attach()
            settings.check()
            if not self._left:
                view, self._view, self.settings = self._view, view, settings  # type: ignore[assignment]
            return not self._left
        except Exception as error:  # whatever answers there, it is not what can be looked at
            self.trouble = message(error).removeprefix(f"{self.url}: ")
            return False
        finally:  # the one before, or one that is of no use
            if view is not None:
                await view.detach()

    @property
    def models(self) -> Sequence[str]:
        """As of `SeenInstance`, like the next two."""
        return self._view.models if self._view is not None else ()

    @property
    def tells_prefixes(self) -> str | None:
        """By the plugin's table, or on another host by vLLM's events."""
        return self._view.tells_prefixes if self._view is not None else None

    def look_up(self, hashes: Ints, most: int) -> tuple[int, int] | None:
        """In what `tells_prefixes`."""
        return self._view.look_up(hashes, most) if self._view is not None else None

    async def detach(self) -> None:
        """Stop looking."""
        await super().detach()
        if self._view is not None:
            await self._view.detach()


def open_session(connect_timeout_s: float, secure: ssl.SSLContext, key: str | None) -> aiohttp.ClientSession:
    """For questions that any server answers at once; as many at a time as there are, or one would wait for others.

    secure: for https. key: that servers want; None: they want none.
    """
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, ssl=secure),
        headers=None if key is None else {"Authorization": f"Bearer {key}"},
        timeout=aiohttp.ClientTimeout(total=HEALTH_S, sock_connect=connect_timeout_s),
        cookie_jar=aiohttp.DummyCookieJar(),
    )
