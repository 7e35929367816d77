"""Knowledge of prefix caches: what an instance was sent, and is thought to have still, or what it tells itself."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from block.core.arrays import Ints
from block.core.types import Request, RequestRecord, Views
from block.dispatch.core import Dispatcher, Observer, PrefixIndex


class Sent:
    """Blocks that were sent to each instance, the `capacity` of them that were used last: what it may have."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._of: dict[int, OrderedDict[int, int]] = {}  # by hash, in order of use: when it was used last
        self._uses = 0

    def blocks(self, instance_id: int) -> int:
        """How many are remembered of an instance."""
        return len(self._of.get(instance_id, ()))

    def match(self, hashes: Sequence[int], instance_id: int) -> int:
        """How many of a prompt's blocks, from the first on, are remembered of an instance."""
        known = self._of.get(instance_id)
        if known is None:
            return 0
        return bisect_left(range(len(hashes)), True, key=lambda place: hashes[place] not in known)

    def used(self, hashes: Sequence[int], instance_id: int) -> list[int]:
        """When these blocks, which are remembered, were used last: a number that grows."""
        known = self._of.get(instance_id, OrderedDict())
        return [known[one] for one in hashes]

    def add(self, hashes: Sequence[int], instance_id: int) -> None:
        """A prompt is sent to an instance. Its last block is forgotten before its first."""
        known = self._of.setdefault(instance_id, OrderedDict())
        self._uses += 1
        for one in reversed(hashes):
            known[one] = self._uses
            known.move_to_end(one)
        while len(known) > self._capacity:
            known.popitem(last=False)

    def discard(self, hashes: Sequence[int], instance_id: int) -> None:
        """These were not sent to an instance after all."""
        known = self._of.get(instance_id, OrderedDict())
        for one in hashes:
            known.pop(one, None)

    def forget(self, instance_id: int, used: int | None = None) -> None:
        """Remember no more of an instance what was last used at `used` or before; None: nothing of it."""
        known = self._of.get(instance_id)
        while known and (used is None or next(iter(known.values())) <= used):
            known.popitem(last=False)

    def drop(self, instance_id: int) -> None:
        """There is no such instance any more."""
        self._of.pop(instance_id, None)


class BlockUsers:
    """How many requests use each block, by its hash."""

    def __init__(self) -> None:
        self._of: dict[int, int] = {}

    def add(self, hashes: Sequence[int]) -> None:
        """One more uses these."""
        for one in hashes:
            self._of[one] = self._of.get(one, 0) + 1

    def remove(self, hashes: Sequence[int]) -> None:
        """One that used these does so no more."""
        for one in hashes:
            if self._of[one] > 1:
                self._of[one] -= 1
            else:
                del self._of[one]

    def leading(self, hashes: Sequence[int]) -> int:
        """How many of a prompt's blocks, from the first on, somebody uses."""
        return bisect_left(range(len(hashes)), True, key=lambda place: hashes[place] not in self._of)


class _Thought(NamedTuple):
    """What was thought of a request when it was placed: the hashes of its prompt's blocks; of those of them that were
    there, from the first on, when they were used last; and how many of these others were still using.
    """

    instance_id: int
    hashes: list[int]
    used: list[int]
    in_use: int


class SentPrefixes(Observer):
    """A `block.dispatch.core.PrefixIndex` of what a dispatcher has sent itself: for servers that do not tell.

    block_size: tokens of a KV block. capacity: KV blocks of an instance, the least that one has. answers: whether the
    responses are those of the requests' hashes, and not what a real model says. exact: whether hashes are of tokens,
    and not of text, which tells about how many tokens there are.

    Where an answer says that less was cached than was thought (less than half of it, if that is not exact), what was
    used less recently than the block that was missing is thought to be gone, too.
    """

    def __init__(self, block_size: int, capacity: int, *, answers: bool = True, exact: bool = True) -> None:
        self.block_size = block_size
        self._answers = answers
        self._exact = exact
        self._sent = Sent(capacity)
        self._in_use: defaultdict[int, BlockUsers] = defaultdict(BlockUsers)  # by instance
        self._thought: dict[int, _Thought] = {}  # by request

    def hits(self, request: Request, ids: Sequence[int]) -> Ints:
        """What these instances may have of a request that has block hashes."""
        hashes = self._hashes(request, request.prompt_tokens - 1)
        found = np.zeros((len(ids), 2), dtype=np.int64)
        for place, instance_id in enumerate(ids):
            blocks = self._sent.match(hashes, instance_id)
            found[place] = blocks * self.block_size, self._in_use[instance_id].leading(hashes[:blocks])
        return found

    def placed(self, dispatcher: Dispatcher, record: RequestRecord, views: Views, now: float) -> None:
        """Its prompt will be cached there."""
        request, instance_id = record.request, record.instance_id
        if request.block_hashes is None:
            return
        hashes = self._hashes(request, request.prompt_tokens)
        asked = self._hashes(request, request.prompt_tokens - 1)
        matched = asked[: self._sent.match(asked, instance_id)]
        used, in_use = self._sent.used(matched, instance_id), self._in_use[instance_id].leading(matched)
        self._thought[request.id] = _Thought(instance_id, hashes, used, in_use)
        self._sent.add(hashes, instance_id)
        self._in_use[instance_id].add(hashes)

    def left(self, dispatcher: Dispatcher, record: RequestRecord, now: float) -> None:
        """Its response is cached, too; and its answer tells whether what was thought was right."""
        thought = self._thought.pop(record.request.id, None)
        if thought is None:
            return
        instance_id, hashes, used, in_use = thought
        users = self._in_use[instance_id]
        users.remove(hashes)
        if record.status != "ok":  # what it alone brought may never have been computed
            self._sent.discard(hashes[max(len(used), users.leading(hashes)) :], instance_id)
            return
        cached = record.cached_tokens // self.block_size
        expected = len(used) if self._exact else (len(used) + 1) // 2
        if in_use <= cached < expected:  # those in use may not have been computed yet
            self._sent.forget(instance_id, used[cached])
        request = record.request
        tokens = request.prompt_tokens + (request.output_tokens - 1 if self._answers else 0)
        self._sent.add(self._hashes(request, tokens), instance_id)

    def instance_down(self, dispatcher: Dispatcher, instance_id: int, reason: str, now: float) -> None:
        """It begins with an empty cache, if it comes again."""
        self._sent.forget(instance_id)

    def _hashes(self, request: Request, tokens: int) -> list[int]:
        """Of the full blocks of a request's first tokens."""
        assert request.block_hashes is not None
        return request.block_hashes[: tokens // self.block_size].tolist()  # type: ignore[no-any-return]


LookUp = Callable[[int, Ints, int], tuple[int, int] | None]
"""Of an instance, of the first so many of a prompt's blocks by their hashes: how many are cached there, and how many of
these are in use; None if it does not tell.
"""

Kept = Callable[[Ints, int], tuple[int, int] | None]
"""The same of what one instance had when this was made."""


class Telling(PrefixIndex, Protocol):
    """A `PrefixIndex` of instances that tell what they have."""

    def keep(self, instance_id: int) -> Kept:
        """What an instance has now, to be looked up in later."""
        ...


class OldLookUps:
    """A `LookUp` in what instances had at most `interval_s` seconds ago, as snapshots may be as old.

    now: tells the time, in seconds.
    """

    def __init__(self, told: Telling, interval_s: float, now: Callable[[], float]) -> None:
        self._told = told
        self._interval_s = interval_s
        self._now = now
        self._kept: dict[int, tuple[float, Kept]] = {}

    def __call__(self, instance_id: int, hashes: Ints, most: int) -> tuple[int, int] | None:
        """As of `LookUp`."""
        now = self._now()
        made, kept = self._kept.get(instance_id, (-math.inf, None))
        if kept is None or now - made >= self._interval_s:
            kept = self._told.keep(instance_id)
            self._kept[instance_id] = now, kept
        return kept(hashes, most)


class ToldPrefixes(Observer):
    """A `block.dispatch.core.PrefixIndex` of what instances tell by `look_up`; of others, of what `sent` has.

    What was sent to an instance and has not left it will be cached there, whether or not it tells so already, and
    counts as in use, as in simulation.
    """

    def __init__(self, look_up: LookUp, block_size: int, sent: SentPrefixes | None = None) -> None:
        self.block_size = block_size
        self._look_up = look_up
        self._sent = sent
        self._there: defaultdict[int, BlockUsers] = defaultdict(BlockUsers)  # by instance, the requests that are there
        self._hashes: dict[int, tuple[int, list[int]]] = {}  # by request: its instance, and its prompt's full blocks

    def hits(self, request: Request, ids: Sequence[int]) -> Ints:
        """What these instances have of a request that has block hashes."""
        assert request.block_hashes is not None
        most = (request.prompt_tokens - 1) // self.block_size
        asked = request.block_hashes[:most]
        hashes = asked.tolist()
        found = np.zeros((len(ids), 2), dtype=np.int64)
        silent = []
        for place, instance_id in enumerate(ids):
            told = self._look_up(instance_id, asked, most)
            if told is None:
                silent.append(place)
                continue
            blocks, in_use = told
            there = self._there[instance_id].leading(hashes)
            found[place] = max(blocks, there) * self.block_size, max(in_use, there)
        if silent and self._sent is not None:
            found[silent] = self._sent.hits(request, [ids[place] for place in silent])
        return found

    def placed(self, dispatcher: Dispatcher, record: RequestRecord, views: Views, now: float) -> None:
        """It will be there."""
        if (known := record.request.block_hashes) is not None:
            hashes = known[: record.request.prompt_tokens // self.block_size].tolist()
            self._hashes[record.request.id] = record.instance_id, hashes
            self._there[record.instance_id].add(hashes)
            if self._sent is not None and self._look_up(record.instance_id, known, 0) is None:
                self._sent.placed(dispatcher, record, views, now)

    def left(self, dispatcher: Dispatcher, record: RequestRecord, now: float) -> None:
        """It is there no more."""
        if (known := self._hashes.pop(record.request.id, None)) is not None:
            self._there[known[0]].remove(known[1])
        if self._sent is not None:
            self._sent.left(dispatcher, record, now)

    def instance_down(self, dispatcher: Dispatcher, instance_id: int, reason: str, now: float) -> None:
        """What it was sent is lost, if it comes again."""
        if self._sent is not None:
            self._sent.instance_down(dispatcher, instance_id, reason, now)
