"""The blocks of the prefix cache against vLLM's own block pool: the same hits, evictions and order, at every step."""

from __future__ import annotations

from dataclasses import dataclass, field
from random import Random
from typing import Any

import numpy as np
import pytest

from block.core.jit import plain
from block.engine import prefix_cache as ours


@dataclass
class Sequence:
    """What both pools know of one sequence: the hashes of its blocks, and the blocks that it uses."""

    hashes: np.ndarray[Any, Any]
    blocks: list[int] = field(default_factory=list)
    cached: int = 0


class Both:
    """A pool of vLLM's and one of ours, to which the same is done."""

    def __init__(self, blocks: int) -> None:
        from vllm.v1.core.block_pool import BlockPool

        self.theirs = BlockPool(blocks, enable_caching=True, hash_block_size=16)
        self.ours = plain(ours.pool_in)(ours.empty_cache(blocks), blocks)

    @staticmethod
    def key(block_hash: int) -> Any:
        return int(block_hash).to_bytes(8, "little", signed=True)

    def hit(self, hashes: np.ndarray[Any, Any]) -> list[int]:
        """The blocks of the longest cached prefix."""
        found = []
        for one in hashes:
            blocks = self.theirs.get_cached_block(self.key(one), [0])
            if blocks is None:
                break
            found.append(blocks[0].block_id)
        mine = [int(ours.cached_block(self.ours, one)) for one in hashes[: len(found) + 1]]
        assert mine == [*found, *[ours.NULL_BLOCK] * (len(mine) - len(found))]
        return found

    def touch(self, blocks: list[int]) -> None:
        self.theirs.touch([self.theirs.blocks[block] for block in blocks])
        for block in blocks:
            ours.touch(self.ours, block)

    def new(self) -> int:
        (block,) = self.theirs.get_new_blocks(1)
        assert ours.new_block(self.ours) == block.block_id
        return int(block.block_id)

    def cache(self, block: int, block_hash: int) -> None:
        from vllm.v1.core.kv_cache_utils import make_block_hash_with_group_id

        key = make_block_hash_with_group_id(self.key(block_hash), 0)
        self.theirs._insert_block_hash(key, self.theirs.blocks[block], num_tokens=16)
        ours.cache_block(self.ours, block, block_hash)

    def free(self, blocks: list[int]) -> None:
        self.theirs.free_blocks(self.theirs.blocks[block] for block in reversed(blocks))
        ours.free_blocks(self.ours, np.array(blocks, dtype=np.int64))

    def check(self) -> None:
        queue = [block.block_id for block in self.theirs.free_block_queue.get_all_free_blocks()]
        mine, block = [], self.ours.free_next[ours.NULL_BLOCK]
        while block != ours.NULL_BLOCK:
            mine.append(int(block))
            block = self.ours.free_next[block]
        assert mine == queue
        assert self.ours.counters[ours.NUM_FREE] == self.theirs.get_num_free_blocks() == len(queue)
        assert self.ours.ref_count[1:].tolist() == [block.ref_cnt for block in self.theirs.blocks[1:]]
        cached = [block.block_hash is not None for block in self.theirs.blocks]
        assert (self.ours.hashes != ours.NO_HASH).tolist() == cached
        assert self.ours.counters[ours.NUM_CACHED] == sum(cached)


@pytest.mark.parametrize("seed", range(60))
def test_the_pool_does_what_vllms_does(vllm: Any, seed: int) -> None:
    """Sequences that share prefixes come, grow and go in a pool that is too small; some hashes fall together."""
    random = Random(seed)
    both = Both(random.choice([5, 12, 40, 130]))
    alphabet = random.choice([2, 3, 1000])
    tree: dict[tuple[int, ...], int] = {}
    spread = random.choice([1, 1 << 40])  # small hashes are neighbours in the table

    def hashes(length: int) -> np.ndarray[Any, Any]:
        prefix: tuple[int, ...] = ()
        found = []
        for _ in range(length):
            prefix = (*prefix, random.randrange(alphabet))
            found.append(tree.setdefault(prefix, (len(tree) + 1) * spread))
        return np.array(found, dtype=np.int64)

    running: list[Sequence] = []
    for _ in range(400):
        free = int(both.ours.counters[ours.NUM_FREE])
        what = random.random()
        if what < 0.35 and free:
            one = Sequence(hashes(random.randint(1, 12)))
            hit = both.hit(one.hashes[: max(len(one.hashes) - 1, 0)])
            if sum(both.ours.ref_count[block] == 0 for block in hit) + 1 <= free:
                both.touch(hit)
                one.blocks, one.cached = hit, len(hit)
                running.append(one)
        elif what < 0.8 and running:
            one = random.choice(running)
            if len(one.blocks) < len(one.hashes) and free:
                one.blocks.append(both.new())
            elif one.cached < len(one.blocks):
                both.cache(one.blocks[one.cached], int(one.hashes[one.cached]))
                one.cached += 1
        elif running:
            both.free(running.pop(random.randrange(len(running))).blocks)
        both.check()
    assert both.ours.counters[ours.NUM_CACHED] <= len(both.ours.hashes)
