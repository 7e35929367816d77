"""KV blocks with identities, as V1's prefix cache has them: who uses a block, what it holds, which one goes next.

vLLM 0.32, ``vllm/v1/core/block_pool.py``: `BlockPool`, ``FreeKVCacheBlockQueue`` and ``BlockHashToBlockMap`` in one
array, so that an engine's state has one more. It begins with counters, then come the arrays of a `BlockPool`, and then
room for what `block.engine.block_tables` keeps of each sequence.

A block is an index; block 0 is vLLM's null block, in no queue, and here the end of every list.

A block that nobody uses is in the free queue, cached or not. New blocks are taken from its front, and lose what they
held. Blocks that come back without a hash go to the front, the others to the end: so the queue is in order of least
recent use, and a sequence, which returns its last block first, loses its tail before its head.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from block.core.arrays import Int, Ints
from block.core.jit import compiled, plain

NO_HASH = 0
"""The hash of a block that is not cached. No block of a request has it."""

NULL_BLOCK = 0

# Entries of `counters`.
NUM_FREE = 0  # blocks in the free queue
NUM_CACHED = 1  # blocks with a hash, in use or not
NUM_EVICTED = 2  # cached blocks that were handed out anew, so far
RECORDS_END = 3  # where the next record of a sequence goes (`block.engine.block_tables`)
COUNTERS = 4


class BlockPool(NamedTuple):
    """The blocks of an engine. `n` is their number with the null block: vLLM's `num_gpu_blocks`."""

    hashes: Ints
    """int64[n]: the hash of a block's tokens and of all before them; NO_HASH if it is not cached"""
    ref_count: Ints
    """int64[n]: sequences that use it"""
    free_next: Ints
    """int64[n]: the next in the free queue; of the null block the first"""
    free_previous: Ints
    """int64[n]: the one before it; of the null block the last"""
    alike_next: Ints
    """int64[n]: the block with the same hash that was cached next; 0: none"""
    table: Ints
    """int64[power of two, at least 1.5 n]: the first block with a hash, from ``hash & (size − 1)`` on; 0: empty"""
    counters: Ints
    """int64[COUNTERS]"""


@compiled
def _table_size(num_gpu_blocks: Int) -> Int:
    size = np.int64(1)
    while 2 * size < 3 * num_gpu_blocks:
        size <<= 1
    return size


@compiled
def pool_size(num_gpu_blocks: Int) -> Int:
    """Entries that a pool takes of a cache."""
    return COUNTERS + 5 * num_gpu_blocks + _table_size(num_gpu_blocks)


@compiled
def pool_in(cache: Ints, num_gpu_blocks: Int) -> BlockPool:
    """The pool at the front of a cache."""
    n, at = num_gpu_blocks, COUNTERS
    return BlockPool(
        cache[at : at + n],
        cache[at + n : at + 2 * n],
        cache[at + 2 * n : at + 3 * n],
        cache[at + 3 * n : at + 4 * n],
        cache[at + 4 * n : at + 5 * n],
        cache[at + 5 * n : at + 5 * n + _table_size(n)],
        cache[:COUNTERS],
    )


def empty_cache(num_gpu_blocks: int) -> Ints:
    """A cache in which all blocks are free and none is cached, without room for records."""
    cache = np.zeros(int(pool_size(num_gpu_blocks)), dtype=np.int64)
    pool = plain(pool_in)(cache, num_gpu_blocks)
    index = np.arange(num_gpu_blocks, dtype=np.int64)
    pool.free_next[:], pool.free_previous[:] = np.roll(index, -1), np.roll(index, 1)
    pool.counters[NUM_FREE], pool.counters[RECORDS_END] = num_gpu_blocks - 1, len(cache)
    return cache


@compiled
def _slot_of(pool: BlockPool, block_hash: Int) -> Int:
    """Where the table has the first block with a hash, or where it would stand."""
    last = pool.table.shape[0] - 1
    slot = block_hash & last
    while pool.table[slot] != NULL_BLOCK and pool.hashes[pool.table[slot]] != block_hash:
        slot = (slot + 1) & last
    return slot


@compiled
def cached_block(pool: BlockPool, block_hash: Int) -> Int:
    """The block with this hash that was cached first; NULL_BLOCK if there is none. V1: ``get_cached_block``."""
    return pool.table[_slot_of(pool, block_hash)]


@compiled
def _before(pool: BlockPool, first: Int, block: Int) -> Int:
    """Of blocks with the same hash, from the first on, the one before this; before the null block is the last."""
    while pool.alike_next[first] != block:
        first = pool.alike_next[first]
    return first


@compiled
def cache_block(pool: BlockPool, block: Int, block_hash: Int) -> None:
    """A block is full, or scheduled to be: it may be found by its hash. V1: ``cache_full_blocks``, of one block."""
    slot = _slot_of(pool, block_hash)
    first = pool.table[slot]
    pool.hashes[block] = block_hash
    pool.alike_next[block] = NULL_BLOCK
    if first == NULL_BLOCK:
        pool.table[slot] = block
    else:
        pool.alike_next[_before(pool, first, NULL_BLOCK)] = block
    pool.counters[NUM_CACHED] += 1


@compiled
def _uncache(pool: BlockPool, block: Int) -> None:
    """A block is found no more. V1: ``_maybe_evict_cached_block``."""
    slot = _slot_of(pool, pool.hashes[block])
    first = pool.table[slot]
    if first == block:
        second = pool.alike_next[block]
        if second != NULL_BLOCK:
            pool.table[slot] = second
        else:
            _empty(pool, slot)
    else:
        pool.alike_next[_before(pool, first, block)] = pool.alike_next[block]
    pool.hashes[block] = NO_HASH
    pool.counters[NUM_CACHED] -= 1
    pool.counters[NUM_EVICTED] += 1


@compiled
def _empty(pool: BlockPool, slot: Int) -> None:
    """Take an entry out of the table; those behind it that were displaced move up."""
    last = pool.table.shape[0] - 1
    gap = slot
    while True:
        slot = (slot + 1) & last
        block = pool.table[slot]
        if block == NULL_BLOCK:
            break
        home = pool.hashes[block] & last
        if (slot - home) & last >= (slot - gap) & last:
            pool.table[gap] = block
            gap = slot
    pool.table[gap] = NULL_BLOCK


@compiled
def _leave_queue(pool: BlockPool, block: Int) -> None:
    before, behind = pool.free_previous[block], pool.free_next[block]
    pool.free_next[before] = behind
    pool.free_previous[behind] = before
    pool.counters[NUM_FREE] -= 1


@compiled
def _queue_behind(pool: BlockPool, block: Int, before: Int) -> None:
    """Put a block into the free queue behind another; behind the null block is the front."""
    behind = pool.free_next[before]
    pool.free_next[before] = block
    pool.free_previous[block] = before
    pool.free_next[block] = behind
    pool.free_previous[behind] = block
    pool.counters[NUM_FREE] += 1


@compiled
def new_block(pool: BlockPool) -> Int:
    """The first of the free queue, which there must be, for a sequence. V1: ``get_new_blocks``, of one."""
    block = pool.free_next[NULL_BLOCK]
    _leave_queue(pool, block)
    if pool.hashes[block] != NO_HASH:
        _uncache(pool, block)
    pool.ref_count[block] = 1
    return block


@compiled
def touch(pool: BlockPool, block: Int) -> None:
    """One more sequence uses a cached block. V1: the method of the same name, of one block."""
    if pool.ref_count[block] == 0:
        _leave_queue(pool, block)
    pool.ref_count[block] += 1


@compiled
def free_blocks(pool: BlockPool, blocks: Ints) -> None:
    """A sequence returns its blocks, the last one first. V1: the method of the same name.

    Those that nobody else uses and that are not cached go to the front of the queue, in the order in which they are
    returned; the cached ones to its end.
    """
    front: Int = np.int64(NULL_BLOCK)
    for i in range(blocks.shape[0] - 1, -1, -1):
        block = np.int64(blocks[i])
        pool.ref_count[block] -= 1
        if pool.ref_count[block] > 0:
            continue
        if pool.hashes[block] == NO_HASH:
            _queue_behind(pool, block, front)
            front = block
        else:
            _queue_behind(pool, block, pool.free_previous[NULL_BLOCK])
