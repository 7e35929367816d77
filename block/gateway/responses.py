"""Which server keeps which response: who asks for one, cancels it or goes on from it must get to that server."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Collection

from block.gateway.asked import Asked

MOST = 10_000
"""Responses that are remembered."""

_ID = re.compile(rb'"id": *"(resp_[^"\\]+)"')
_PATH = re.compile(rb"/v1/responses/(resp_[^/]+)(?:/|$)")


class Responses:
    """Those that answers to /v1/responses have named, the latest of them."""

    def __init__(self) -> None:
        self._kept: OrderedDict[str, int] = OrderedDict()

    def note(self, answer: bytes, instance_id: int) -> None:
        """What a server begins to answer."""
        found = _ID.search(answer)
        if found is not None:
            self._kept[found[1].decode("latin-1")] = instance_id
            if len(self._kept) > MOST:
                self._kept.popitem(last=False)

    def place(self, path: bytes, servers: Collection[int]) -> frozenset[int] | None:
        """The one of these servers that keeps the response which a path names; None if that is not known."""
        found = _PATH.match(path)
        return None if found is None else self._of(found[1].decode("latin-1"), servers)

    def place_before(self, asked: Asked, servers: Collection[int]) -> frozenset[int] | None:
        """The one that keeps the response which a request goes on from."""
        before = asked.fields.get("previous_response_id")
        return self._of(before, servers) if isinstance(before, str) else None

    def _of(self, name: str, servers: Collection[int]) -> frozenset[int] | None:
        instance_id = self._kept.get(name)
        return frozenset({instance_id}) if instance_id in servers and instance_id is not None else None
