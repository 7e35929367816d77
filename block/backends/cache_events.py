"""What a server has in its prefix cache, by the events that vLLM itself publishes over ZMQ (``--kv-events-config``).

For servers whose state buffer is out of reach, on another host. Events carry token ids, so that blocks get this
package's own hashes (`block.core.hashing`), whatever vLLM hashes them with.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import numpy as np

from block.core.errors import one_line
from block.core.hashing import hash_tokens, root
from block.engine.prefix_table import PrefixTable, new_table, note

log = logging.getLogger(__name__)

REPLAY_S = 3.0
"""That what is replayed is waited for at the beginning."""
SILENCE_S = 1.0
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
            reachable = f"//{f'[{host}]' if ':' in host else host}:"
            return endpoint.replace("//*:", reachable).replace("//[::]:", reachable)

        return EventSource(reached(self.endpoint), self.replay and reached(self.replay), self.topic)


class _Block(NamedTuple):
    """A block that is cached: its hash, as this package makes it, and how many blocks have it."""

    own: int
    copies: int


class CacheEvents:
    """The prefix cache of one server, as its events tell: `heard` is told each batch in turn, `table` has the outcome.

    Who uses a block is not told; no block of the table is in use. lost: how often batches were missed that nobody
    could replay.
    """

    def __init__(self, block_size: int) -> None:
        self.table: PrefixTable = new_table(1024)
        self.next = 0
        """The number of the batch to come."""
        self.lost = 0
        self.complete = False
        """Whether all is known that the cache has: all was heard since the server began, or since all was cleared."""
        self.readable = True
        """Whether a hit is the longest run of blocks, which it is not where layers have several caches."""
        self._block_size = block_size
        self._blocks: dict[int | bytes, _Block] = {}  # by vLLM's hash
        self._time = 0.0  # when the latest batch was made

    def __len__(self) -> int:
        """How many different blocks are cached."""
        return len(self._blocks)

    @property
    def told(self) -> PrefixTable | None:
        """What the cache has; None as long as that is not known for certain."""
        return self.table if self.readable and self.complete else None

    def begun_anew(self, number: int, time: float) -> bool:
        """Whether a batch is of another process than those before: it has an old number, but is newer."""
        return number < self.next and time > self._time

    def heard(self, number: int, batch: Sequence[Any]) -> None:
        """A batch has come: when it was made, its events. What came before a gap is not known any more."""
        time, events = float(batch[0]), batch[1]
        if self.begun_anew(number, time):
            self._clear()
            self.next = 0
        if number < self.next:
            return  # it was replayed
        if number > self.next:
            self.lost += 1
            self._clear()
        if number != self.next or number == 0:
            self.complete = number == 0
        self.next, self._time = number + 1, time
        changes: list[tuple[int, int, int]] = []
        for kind, event in map(_named, events):
            if kind == "AllBlocksCleared":
                self._clear()
                self.complete = True
                changes.clear()
            else:
                changes += self._changes(kind, event)
        if changes:
            self._grow(len(changes))
            note(self.table, np.array(changes, dtype=np.int64))

    def _changes(self, kind: str, event: Mapping[str, Any]) -> Iterator[tuple[int, int, int]]:
        """What an event changes, as `note` takes it."""
        if event.get("medium") not in (None, "GPU"):
            return
        if event.get("group_idx") or event.get("kv_cache_spec_sliding_window"):
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
        extra = event.get("extra_keys") or [None] * len(theirs)
        names = [
            _extra_keys(keys or (), event.get("lora_name"), before is None and place == 0)
            for place, keys in enumerate(extra)
        ]
        apart = [place for place, named in enumerate(names) if named or place == 0]  # the others are hashed with them
        hashes: list[int] = []
        for begin, end in pairwise([*apart, len(names)]):
            parent = (hashes[-1] if hashes else parent) ^ root(*names[begin])
            hashes += hash_tokens(tokens[begin * size : end * size], size, parent).tolist()
        for one, own in zip(theirs, hashes, strict=True):
            known = self._blocks.get(one)
            self._blocks[one] = _Block(own, 1 if known is None else known.copies + 1)
            yield own, 1, 0

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


async def begin_to_follow(source: EventSource, block_size: int) -> tuple[CacheEvents, asyncio.Task[None]]:
    """`follow` a server, until the task that is returned is cancelled; waits until what is replayed was heard, or for
    REPLAY_S.
    """
    events, begun = CacheEvents(block_size), asyncio.Event()
    task = asyncio.create_task(follow(source, events, begun))
    try:
        with suppress(TimeoutError):
            await asyncio.wait_for(begun.wait(), REPLAY_S)
    except asyncio.CancelledError:
        task.cancel()
        raise
    return events, task


async def follow(source: EventSource, events: CacheEvents, begun: asyncio.Event) -> None:
    """Tell `events` what a server publishes, from its first batch on if that is replayed; until cancelled.

    begun: set once all is heard that is replayed. Any error is logged and ends it; `events` are not `readable` then.
    ModuleNotFoundError without pyzmq and msgspec is such a one.
    """
    try:
        import msgspec.msgpack

        with _socket("SUB", source.endpoint) as socket:
            socket.subscribe(source.topic)
            await _catch_up(source, events, 0)
            begun.set()
            while True:
                *_, number, payload = await socket.recv_multipart()
                place, batch = int.from_bytes(number, "big"), msgspec.msgpack.decode(payload)
                anew = events.begun_anew(place, batch[0])
                if anew or place > events.next:
                    await _catch_up(source, events, 0 if anew else events.next)
                events.heard(place, batch)
                await asyncio.sleep(0)  # a backlog is no reason to keep others waiting
    except Exception as error:  # whatever another process sends, or a socket says
        events.readable = False
        log.warning("%s: cache events cannot be read: %s: %s", source.endpoint, type(error).__name__, one_line(error))
    finally:
        begun.set()


async def _catch_up(source: EventSource, events: CacheEvents, since: int) -> None:
    """Tell what was published from the batch `since` on, as far as it is still replayed.

    A publisher that replays much drops some of it on the way: it is asked again from there.
    """
    import msgspec.msgpack

    if source.replay is None:
        return
    while True:
        progress, first = events.next, True
        async with aclosing(_replayed(source.replay, since)) as replayed:
            async for number, payload in replayed:
                if number is None:
                    if first and since == 0:
                        events.complete = True  # it has published nothing yet
                    return
                if not first and number > events.next:
                    break
                events.heard(number, msgspec.msgpack.decode(payload))
                first = False
                await asyncio.sleep(0)
        if events.next == progress:
            log.warning("%s: replays nothing", source.replay)
            return
        since = events.next


async def _replayed(endpoint: str, since: int) -> AsyncGenerator[tuple[int | None, bytes], None]:
    """Batches from `since` on, by their numbers; None at the end of them all. It ends early after a silence."""
    with _socket("DEALER", endpoint) as socket:
        await socket.send_multipart([b"", since.to_bytes(8, "big")])
        while True:
            try:
                *_, number, payload = await asyncio.wait_for(socket.recv_multipart(), SILENCE_S)
            except TimeoutError:
                return
            if number == _END:
                yield None, b""
                return
            yield int.from_bytes(number, "big"), payload


def _socket(kind: str, endpoint: str) -> Any:
    """A socket of zmq, connected, which loses nothing on this side."""
    import zmq.asyncio

    socket = zmq.asyncio.Context.instance().socket(getattr(zmq, kind))
    socket.linger, socket.rcvhwm, socket.ipv6 = 0, 0, True
    socket.connect(endpoint)
    return socket
