"""vLLM's own events of its prefix cache, as its publisher sends them, against what they are taken for."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from testbed import contents

from block.backends.cache_events import CacheEvents, EventSource, follow
from block.core.hashing import hash_tokens

TOKENS = list(range(100, 140))
HASHES = hash_tokens(np.array(TOKENS), 4).tolist()


def stored(first: int, last: int, **more: Any) -> Any:
    """The event of blocks `first` to `last` of TOKENS, 4 tokens each; vLLM's hash of one is its place + 1."""
    from vllm.distributed.kv_events import BlockStored

    return BlockStored(
        block_hashes=list(range(first + 1, last + 1)),
        parent_block_hash=first or None,
        token_ids=TOKENS[4 * first : 4 * last],
        block_size=4,
        **{"lora_id": None, "medium": "GPU", "lora_name": None, **more},
    )


def removed(*places: int) -> Any:
    from vllm.distributed.kv_events import BlockRemoved

    return BlockRemoved(block_hashes=[place + 1 for place in places], medium="GPU")


class Server:
    """The publisher of one, which may begin anew at the same place."""

    def __init__(self, folder: Path) -> None:
        self.source = EventSource(f"ipc://{folder}/events", f"ipc://{folder}/replay", "kv")
        self._time = 0.0
        self.start()

    def start(self) -> None:
        from vllm.distributed.kv_events import ZmqEventPublisher

        self.publisher = ZmqEventPublisher(0, self.source.endpoint, self.source.replay, topic=self.source.topic)

    def publish(self, *events: Any) -> None:
        from vllm.distributed.kv_events import KVEventBatch

        self._time += 1
        self.publisher.publish(KVEventBatch(ts=self._time, events=list(events)))

    def publish_unheard(self, *events: Any) -> None:
        """A batch that is kept for replay, and reaches nobody."""
        send = self.publisher._pub
        self.publisher._pub = type("Deaf", (), {"send_multipart": lambda self, parts: None})()
        self.publish(*events)
        self.publisher._event_queue.join()
        self.publisher._pub = send


@contextlib.asynccontextmanager
async def following(source: EventSource) -> AsyncIterator[CacheEvents]:
    events = CacheEvents(4)
    begun = asyncio.Event()
    task = asyncio.create_task(follow(source, events, begun))
    await asyncio.wait_for(begun.wait(), 10)
    yield events
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not holds():
            await asyncio.sleep(0.01)


def known(events: CacheEvents) -> list[int]:
    """Places of the blocks of TOKENS that the table has."""
    return sorted(HASHES.index(one) for one in contents(events.table))


def test_events_are_followed_from_the_first_on_over_gaps_and_restarts(vllm: Any, tmp_path: Path) -> None:
    async def main() -> None:
        server = Server(tmp_path)
        server.publish(stored(0, 3))
        server.publish(removed(2))
        server.publisher._event_queue.join()
        async with following(server.source) as events:
            assert (events.next, events.complete) == (2, True)  # from before, replayed
            assert known(events) == [0, 1]
            server.publish(stored(2, 4))
            await until(lambda: events.next == 3)
            server.publish_unheard(removed(1))
            server.publish(stored(4, 5))
            await until(lambda: events.next == 5)
            assert known(events) == [0, 2, 3, 4]
            assert events.lost == 0
            server.publisher.shutdown()
            server.start()
            server.publish(stored(0, 1))
            async with asyncio.timeout(10):
                while known(events) != [0]:  # what comes before it is connected again is replayed with what follows
                    server.publish()
                    await asyncio.sleep(0.05)
            assert (events.lost, events.complete) == (0, True)
        server.publisher.shutdown()

    asyncio.run(main())


def test_nothing_published_yet_is_an_empty_cache_and_nobody_there_is_none(vllm: Any, tmp_path: Path) -> None:
    async def main() -> None:
        server = Server(tmp_path)
        async with following(server.source) as events:
            assert (events.next, events.complete) == (0, True)
        async with following(EventSource(server.source.endpoint, None, "kv")) as events:
            assert not events.complete
            await asyncio.sleep(0.5)  # to be connected
            server.publish(stored(0, 2))
            await until(lambda: events.complete)
            assert known(events) == [0, 1]
        server.publisher.shutdown()

    asyncio.run(main())


def test_a_long_replay_of_which_some_is_dropped_is_asked_for_again(vllm: Any, tmp_path: Path) -> None:
    """vLLM's publisher sends more than its socket takes, 1,000 messages, and does not know it."""

    async def main() -> None:
        server = Server(tmp_path)
        for _ in range(5000):
            server.publish(*[stored(0, 10), removed(*range(10))] * 3)
        server.publish(stored(0, 2))
        server.publisher._event_queue.join()
        async with following(server.source) as events:
            assert (events.next, events.lost, events.complete) == (5001, 0, True)
            assert known(events) == [0, 1]
        server.publisher.shutdown()

    asyncio.run(main())


def test_what_no_server_of_vllm_s_publishes_ends_the_following(
    vllm: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        server = Server(tmp_path)
        async with following(server.source) as events:
            server.publish(("BlockStored", 1))
            await until(lambda: not events.readable)
        server.publisher.shutdown()

    asyncio.run(main())
    assert f"{tmp_path}/events: cache events cannot be read" in caplog.text
