"""What the servers behind the gateway have in their prefix caches, and how that is known of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from block.core.arrays import Ints
from block.core.types import Request, RequestRecord, Views
from block.dispatch.core import Dispatcher, Observer
from block.dispatch.prefixes import SentPrefixes, ToldPrefixes
from block.engine.config import EngineSettings
from block.engine.prefix_table import held, new_table
from block.gateway.upstreams import SeenInstance

SOURCES = ("table", "events", "sent", "none")
"""How it is known: by the table in the server's state buffer, by vLLM's events, by what was sent there, or not."""


class UpstreamPrefixes(Observer):
    """A `block.dispatch.core.PrefixIndex` of servers that may come and go. The first to come has the say, until there
    is none like it any more: a server with other blocks is not known to have any.

    exact: whether requests have the hashes of the servers' own blocks. Else, or if servers do not tell, what was sent
    to each counts.
    """

    def __init__(self, servers: Mapping[int, SeenInstance], *, exact: bool) -> None:
        self._servers = servers
        self._exact = exact
        self._settings: EngineSettings | None = None
        self._index: ToldPrefixes | None = None
        if exact:
            held(new_table(1), np.zeros(1, dtype=np.int64), 1)  # compiled before a request comes

    def known(self) -> bool:
        """Whether any server that caches prefixes has come yet."""
        if not any(map(self._alike, self._servers.values())):
            said = [one.settings for one in self._servers.values() if one.settings is not None]
            caching = [settings for settings in said if settings.enable_prefix_caching]
            if caching:
                self._settings, size = caching[0], caching[0].block_size
                least = min(settings.total_blocks for settings in caching if settings.block_size == size)
                sent = SentPrefixes(size, least, answers=False, exact=self._exact)
                self._index = ToldPrefixes(self._look_up, size, sent)
        return self._index is not None

    @property
    def block_size(self) -> int:
        """Tokens of a KV block, once one is `known`."""
        assert self._settings is not None, "asked for requests with hashes, which need it"
        return self._settings.block_size

    def source(self, server: SeenInstance) -> str:
        """How it is known what this server has: one of SOURCES."""
        if not self.known() or not self._alike(server):
            return "none"
        return (self._exact and server.tells_prefixes) or "sent"

    def _alike(self, server: SeenInstance) -> bool:
        one, like = server.settings, self._settings
        return one is not None and like is not None and one.enable_prefix_caching and one.block_size == like.block_size

    def _look_up(self, instance_id: int, hashes: Ints, most: int) -> tuple[int, int] | None:
        server = self._servers[instance_id]
        if not self._alike(server):
            return 0, 0
        return server.look_up(hashes, most) if self._exact else None

    def hits(self, request: Request, ids: Sequence[int]) -> Ints:
        """What these servers have of a request that has block hashes."""
        if self._index is None:
            return np.zeros((len(ids), 2), dtype=np.int64)
        return self._index.hits(request, ids)

    def placed(self, dispatcher: Dispatcher, record: RequestRecord, views: Views, now: float) -> None:
        """Its prompt will be cached there."""
        if self._index is not None:
            self._index.placed(dispatcher, record, views, now)

    def left(self, dispatcher: Dispatcher, record: RequestRecord, now: float) -> None:
        """It is there no more."""
        if self._index is not None:
            self._index.left(dispatcher, record, now)

    def instance_down(self, dispatcher: Dispatcher, instance_id: int, reason: str, now: float) -> None:
        """What it was sent is lost."""
        if self._index is not None:
            self._index.instance_down(dispatcher, instance_id, reason, now)
