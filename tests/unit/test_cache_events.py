"""What the events of a prefix cache are taken for, batch by batch; tests/live has them from vLLM itself."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from testbed import contents

from block.backends.cache_events import CacheEvents, EventSource
from block.core.hashing import hash_tokens, root

TOKENS = np.arange(100, 140)
HASHES = hash_tokens(TOKENS, 4).tolist()


def stored(first: int, last: int, **more: Any) -> dict[str, Any]:
    """Blocks `first` to `last` of TOKENS, whose hashes at the server are their places + 1."""
    return {
        "type": "BlockStored",
        "block_hashes": list(range(first + 1, last + 1)),
        "parent_block_hash": first or None,
        "token_ids": TOKENS[4 * first : 4 * last].tolist(),
        "block_size": 4,
        "medium": "GPU",
        **more,
    }


def heard(*batches: Any) -> CacheEvents:
    events = CacheEvents(4)
    for number, batch in enumerate(batches):
        events.heard(number, [float(number), list(batch)])
    return events


def test_a_block_is_there_until_its_last_copy_is_removed() -> None:
    gone = {"type": "BlockRemoved", "block_hashes": [2], "medium": "GPU"}
    events = heard([stored(0, 3)], [stored(1, 2)], [gone])
    assert contents(events.table) == dict.fromkeys(HASHES[:3], (1, 0))
    assert len(events) == 3
    events.heard(3, [3.0, [gone, gone]])
    assert contents(events.table) == {HASHES[0]: (1, 0), HASHES[2]: (1, 0)}


def test_events_come_as_lists_of_older_servers() -> None:
    fields = list(stored(0, 2).values())
    events = heard([[*fields[:5], None, "GPU", None]], [["BlockRemoved", [1], "GPU"]])
    assert contents(events.table) == {HASHES[1]: (1, 0)}
    events.heard(2, [2.0, [["AllBlocksCleared"]]])
    assert contents(events.table) == {}


def test_adapter_and_salt_tell_blocks_of_the_same_tokens_apart() -> None:
    """As whoever has a prompt hashes it; vLLM has the adapter's name with each block, and the salt with the first."""
    adapted = heard([stored(0, 2, lora_name="wolf", extra_keys=[["wolf", "pepper"], ["wolf"]])])
    assert set(contents(adapted.table)) == set(hash_tokens(TOKENS[:8], 4, root("adapter wolf", "salt pepper")).tolist())
    untold = heard([stored(0, 1, lora_name="wolf")])  # by a server that tells no extra keys
    assert list(contents(untold.table)) == [hash_tokens(TOKENS[:4], 4, root("adapter wolf"))[0]]
    pictured = set(contents(heard([stored(0, 4, extra_keys=[None, [["cat", 5]], None, None])]).table))
    assert pictured == {HASHES[0], *hash_tokens(TOKENS[4:16], 4, HASHES[0] ^ root("item cat at 5")).tolist()}


@pytest.mark.parametrize(
    "event",
    [stored(3, 4), stored(0, 2, medium="CPU"), stored(0, 2, block_size=8), {"type": "Later", "block_hashes": [1]}],
    ids=["its parent is unknown", "on another medium", "of other blocks", "of another kind"],
)
def test_what_cannot_be_found_is_left_out(event: dict[str, Any]) -> None:
    events = heard([event])
    assert contents(events.table) == {}
    assert events.readable


def test_several_caches_of_layers_cannot_be_read() -> None:
    assert not heard([stored(0, 1, group_idx=1)]).readable
    assert not heard([stored(0, 1, group_idx=0, kv_cache_spec_sliding_window=128)]).readable
    assert heard([stored(0, 1, group_idx=0)]).readable


def test_a_gap_that_is_not_filled_begins_with_an_empty_table() -> None:
    events = heard([stored(0, 2)])
    events.heard(0, [0.0, [stored(2, 3)]])  # it has been heard
    assert len(events) == 2
    assert events.complete
    events.heard(4, [4.0, [stored(2, 3), stored(0, 1)]])
    assert contents(events.table) == {HASHES[0]: (1, 0)}
    assert (events.lost, events.next, events.complete) == (1, 5, False)
    events.heard(5, [5.0, [{"type": "AllBlocksCleared"}, stored(0, 1)]])
    assert contents(events.table) == {HASHES[0]: (1, 0)}
    assert events.complete  # nothing is left of what was not heard
    events.heard(9, [9.0, []])
    events.heard(0, [10.0, [stored(0, 2)]])  # another process
    assert (len(events), events.complete) == (2, True)


def test_who_hears_nothing_knows_nothing() -> None:
    assert not CacheEvents(4).complete
    late = CacheEvents(4)
    late.heard(7, [7.0, [stored(0, 1)]])
    assert not late.complete


def test_what_is_stored_and_cleared_in_one_batch_is_gone() -> None:
    events = heard([stored(0, 3), {"type": "AllBlocksCleared"}])
    assert contents(events.table) == {}
    assert len(events) == 0


def test_a_table_grows() -> None:
    tokens = np.arange(4000 * 4)
    hashes = hash_tokens(tokens, 4)
    events = CacheEvents(4)
    for first in range(0, 4000, 500):
        event = stored(first, first + 500, token_ids=tokens[4 * first : 4 * first + 2000].tolist())
        events.heard(first // 500, [float(first), [event]])
    assert contents(events.table) == dict.fromkeys(hashes.tolist(), (1, 0))


def test_an_endpoint_is_reached_at_the_server_s_host() -> None:
    source = EventSource("tcp://*:5557", "tcp://*:5558", "kv")
    assert source.seen_from("http://node-7:8000") == EventSource("tcp://node-7:5557", "tcp://node-7:5558", "kv")
    assert source.seen_from("http://[::1]:8000").endpoint == "tcp://[::1]:5557"
    assert EventSource("tcp://[::]:5557").seen_from("http://10.0.0.7:8000").endpoint == "tcp://10.0.0.7:5557"
    assert EventSource("tcp://10.0.0.1:5557").seen_from("http://h:1") == EventSource("tcp://10.0.0.1:5557")
