"""What a server has in its prefix cache, by the events that vLLM itself publishes over ZMQ (``--kv-events-config``).

For servers whose state buffer is out of reach: on another host, or without this package's plugin. Events carry token
ids, so that blocks get this package's own hashes (`block.core.hashing`), whatever vLLM hashes them with.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import numpy as np

from block.core.errors import one_line
from block.core.hashing import hash_tokens, root
from block.engine.prefix_table import PrefixTable, new_table, note

log = logging.getLogger(__name__)

RETRY_S = 1.0
"""How long who replays events may be silent before they count as lost."""
_END = (-1).to_bytes(8, "big", signed=True)  # of what is replayed, as vLLM's ZmqEventPublisher has it
_FIELDS = {  # of events that come as lists, as vLLM's before 0.32 do, without the tag
    "BlockStored": ("block_hashes", "parent_block_hash", "token_ids", "block_size", "lora_id", "medium", "lora_name"),
    "BlockRemoved": ("block_hashes", "medium"),
    "AllBlocksCleared": (),
}


@dataclass(frozen=True)
class EventSource:
    """Where a server publishes: `endpoint` of events, `replay` of those missed (None: nowhere), `topic` of both."""

    endpoint: str
    replay: str | None = None
    topic: str = ""

    def seen_from(self, url: str) -> EventSource:
        """The same as a client of the server at `url` reaches it: the server may say ``tcp://*:5557``."""
        host = urlsplit(url).hostname or "localhost"

        def reached(endpoint: str) -> str:
            return endpoint.replace("//*:", f"//{f'[{host}]' if ':' in host else host}:")

        return EventSource(reached(self.endpoint), self.replay and reached(self.replay), self.topic)


class _Block(NamedTuple):
    """A block that is cached: its hash, as this package makes it, and how many blocks have it."""

    own: int
    copies: int


class CacheEvents:
    """The prefix cache of one server, as its events tell: `heard` is told each batch in turn, `table` has the outcome.

    Who uses a block is not told; no block of the table is in use. lost: how often batches were missed that nobody
    could replay, each time of which begins anew with an empty table. readable: whether a hit is the longest run of
    blocks, which it is not where layers have several caches.
    """

    def __init__(self, block_size: int) -> None:
        self.table: PrefixTable = new_table(1024)
        self.next = 0
        """The number of the batch to come."""
        self.lost = 0
        self.readable = True
        self._block_size = block_size
        self._blocks: dict[int | bytes, _Block] = {}  # by vLLM's hash
        self._time = 0.0  # when the latest batch was made

    def __len__(self) -> int:
        """How many different blocks are cached."""
        return len(self._blocks)

    def begun_anew(self, number: int, time: float) -> bool:
        """Whether a batch is of another process than those before: it has an old number, but is newer."""
        return number < self.next and time > self._time

    def heard(self, number: int, batch: Sequence[Any]) -> None:
        """A batch has come: when it was made, its events. One with a gap before it begins with an empty table."""
        time, events = float(batch[0]), batch[1]
        if self.begun_anew(number, time):
            self._clear()
            self.next = 0
        if number < self.next:
            return  # it was replayed
        if number > self.next:
            self.lost += 1
            self._clear()
        self.next, self._time = number + 1, time
        changes = [change for event in events for change in self._changes(*_named(event))]
        if changes:
            self._grow(len(changes))
            note(self.table, np.array(changes, dtype=np.int64))

    def _changes(self, kind: str, event: Mapping[str, Any]) -> Iterator[tuple[int, int, int]]:
        """What an event changes, as `note` takes it."""
        if kind == "AllBlocksCleared":
            self._clear()
        elif event.get("medium") not in (None, "GPU"):
            return
        elif event.get("group_idx"):
            self.readable = False
        elif kind == "BlockRemoved":
            for theirs in event["block_hashes"]:
                if (known := self._blocks.get(theirs)) is not None:
                    yield known.own, -1, 0
                    if known.copies > 1:
                        self._blocks[theirs] = known._replace(copies=known.copies - 1)
                    else:
                        del self._blocks[theirs]
        elif kind == "BlockStored" and event["block_size"] == self._block_size:
            yield from self._stored(event)

    def _stored(self, event: Mapping[str, Any]) -> Iterator[tuple[int, int, int]]:
        theirs, before = event["block_hashes"], event["parent_block_hash"]
        if before is None:
            parent = 0
        elif before in self._blocks:
            parent = self._blocks[before].own
        else:
            return  # what it stands behind came before we listened, and nobody knows it
        size = self._block_size
        tokens = np.array(event["token_ids"], dtype=np.int64)
        keys = event.get("extra_keys") or [None] * len(theirs)
        for place, (one, extra) in enumerate(zip(theirs, keys, strict=True)):
            first = before is None and place == 0
            parent ^= root(*_extra_keys(extra or (), event.get("lora_name"), first))
            parent = int(hash_tokens(tokens[place * size : (place + 1) * size], size, parent)[0])
            known = self._blocks.get(one)
            self._blocks[one] = _Block(parent, 1 if known is None else known.copies + 1)
            yield parent, 1, 0

    def _clear(self) -> None:
        self._blocks.clear()
        self.table = new_table(1024)

    def _grow(self, more: int) -> None:
        """Make room for so many blocks more."""
        if 2 * (len(self._blocks) + more) > len(self.table.hashes):
            old, self.table = self.table, new_table(2 * (len(self._blocks) + more))
            kept = np.flatnonzero(old.hashes)
            copies = old.counts[kept] >> 32
            note(self.table, np.stack([old.hashes[kept], copies, np.zeros_like(copies)], axis=1))


def _named(event: Any) -> tuple[str, Mapping[str, Any]]:
    """An event's kind, and its fields by name."""
    if isinstance(event, Mapping):
        return event["type"], event
    kind, *values = event
    return kind, dict(zip(_FIELDS.get(kind, ()), values, strict=False))


def _extra_keys(keys: Sequence[Any], adapter: str | None, first: bool) -> list[str]:
    """What tells a block from others of the same tokens, named as in `block.vllm_plugin.prefixes`: the adapter and the
    salt of a prompt go into its first block.
    """
    others = [key for key in keys if key != adapter]
    named = [f"adapter {adapter}"] if adapter and first else []
    named += [f"salt {key}" for key in others if isinstance(key, str)]
    return named + [f"item {key[0]} at {key[1]}" for key in others if isinstance(key, list)]


async def follow(source: EventSource, events: CacheEvents) -> None:
    """Tell `events` what a server publishes, from its first batch on if that is replayed; until cancelled.

    ModuleNotFoundError without pyzmq and msgspec. What is not as vLLM publishes it is logged, and ends it.
    """
    import msgspec.msgpack
    import zmq.asyncio

    with zmq.asyncio.Context.instance().socket(zmq.SUB) as socket:
        socket.connect(source.endpoint)
        socket.subscribe(source.topic)
        try:
            await _catch_up(source, events, 0)
            while True:
                _, number, payload = await socket.recv_multipart()
                place, batch = int.from_bytes(number, "big"), msgspec.msgpack.decode(payload)
                anew = events.begun_anew(place, batch[0])
                if anew or place > events.next:
                    await _catch_up(source, events, 0 if anew else events.next)
                events.heard(place, batch)
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            events.readable = False
            log.warning("%s: publishes no cache events as vLLM does: %s", source.endpoint, one_line(error))


async def _catch_up(source: EventSource, events: CacheEvents, since: int) -> None:
    """Tell what was published from the batch `since` on, as far as it is still replayed."""
    import msgspec.msgpack

    async for number, payload in _replayed(source, since):
        events.heard(number, msgspec.msgpack.decode(payload))


async def _replayed(source: EventSource, since: int) -> AsyncIterator[tuple[int, bytes]]:
    import zmq.asyncio

    if source.replay is None:
        return
    with zmq.asyncio.Context.instance().socket(zmq.DEALER) as socket:
        socket.linger = 0
        socket.connect(source.replay)
        await socket.send_multipart([b"", since.to_bytes(8, "big")])
        while True:
            try:
                _, _, number, payload = await asyncio.wait_for(socket.recv_multipart(), RETRY_S)
            except TimeoutError:
                log.warning("%s: replays nothing", source.replay)
                return
            if number == _END:
                return
            yield int.from_bytes(number, "big"), payload
