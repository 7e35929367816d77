"""KV blocks: how many a sequence needs, who gets them, who gives them back.

They are counted. With a prefix cache (V1 only; off in the paper) they have identities besides: a sequence adopts blocks
that hold the beginning of it already, and what it has filled stays to be found.

- V1: ``KVCacheManager.get_computed_blocks``, ``.allocate_slots`` and ``.free`` (vllm/v1/core/kv_cache_manager.py,
  0.27–0.33).
- V0: ``BlockSpaceManager.can_allocate``, ``.can_append_slots``, ``.allocate`` and ``.free``
  (vllm/core/block_manager.py, 0.7.2).
"""

from __future__ import annotations

import numpy as np

from block.core.arrays import Int, Ints
from block.core.jit import Index, compiled, inlined
from block.core.snapshot import (
    CACHE_RECORD,
    NUM_BLOCKS,
    NUM_CACHED_TOKENS,
    NUM_COMPUTED_TOKENS,
    NUM_OUTPUT_TOKENS,
    NUM_PREEMPTIONS,
    NUM_PROMPT_TOKENS,
    NUM_SHARED_BLOCKS,
)
from block.engine.block_tables import HASHES, NUM_HASHES, block_hash, block_table, pool_of
from block.engine.prefix_cache import (
    NO_HASH,
    NULL_BLOCK,
    NUM_FREE,
    BlockPool,
    cache_block,
    cached_block,
    free_blocks,
    new_block,
    touch,
)
from block.engine.state import (
    ALL_PREEMPTIONS,
    BEGIN,
    BLOCK_SIZE,
    BLOCK_SIZE_LOG2,
    CACHE_BLOCKS,
    ENABLE_PREFIX_CACHING,
    END,
    FREE_BLOCKS,
    IS_V1,
    MAX_MODEL_LEN,
    SCHEDULER_RESERVE_FULL_ISL,
    WATERMARK_BLOCKS,
    EngineState,
)


@compiled
def blocks_for(tokens: Int, settings: Ints) -> Int:
    """KV blocks that hold `tokens` tokens."""
    return (tokens + settings[BLOCK_SIZE] - 1) >> settings[BLOCK_SIZE_LOG2]


@compiled
def blocks_at_admission(total: Int, chunk: Int, settings: Ints) -> Int:
    """Blocks that a sequence of `total` tokens gets when it is admitted with a chunk: in V0 all, in V1 the chunk's."""
    return blocks_for(chunk if settings[IS_V1] == 1 else total, settings)


@compiled
def can_admit(
    total: Int,
    computed: Int,
    shared: Int,
    free: Int,
    running: Int,
    settings: Ints,
) -> bool:
    """May a waiting sequence be admitted beside `running` others?

    total: its tokens. computed: those of them that would be computed after the step, cached ones among them. shared:
    cached blocks of it that others use, so that it takes no free ones for them. free: blocks.

    V0: ``can_allocate``, all of its blocks above the watermark. V1: ``allocate_slots`` with ``full_sequence_must_fit``,
    as `Scheduler.schedule` calls it under ``scheduler_reserve_full_isl``; beside nobody the watermark does not hold.
    """
    if settings[IS_V1] == 0:
        return bool(free - blocks_for(total, settings) >= settings[WATERMARK_BLOCKS])
    watermark = settings[WATERMARK_BLOCKS] if running > 0 else 0
    reserved = min(total, settings[MAX_MODEL_LEN]) if settings[SCHEDULER_RESERVE_FULL_ISL] == 1 else computed
    return bool(blocks_for(reserved, settings) - shared + watermark <= free)


@compiled
def spare_block(settings: Ints) -> Int:
    """Free blocks that a running sequence must have in reach to go on though it may take none: 1 in V0, none in V1.

    V0: ``can_append_slots`` asks for a slot for each sequence, whether its last block is full or not.
    """
    return 1 - settings[IS_V1]


@compiled
def blocks_in_reach(computed: Int, total: Int, taken: Int, settings: Ints) -> Int:
    """Free blocks without which a running sequence of `total` tokens, that takes `taken` of them now, is preempted."""
    if computed + 1 < total and total & (settings[BLOCK_SIZE] - 1) == 0:
        return taken  # a prefill that ends on a block writes into no other
    return max(taken, spare_block(settings))


@inlined
def _is_cached(pool: BlockPool, block_hash: Int, used: bool) -> bool:
    block = cached_block(pool, block_hash)
    return bool(block != NULL_BLOCK and (not used or pool.ref_count[block] > 0))


@compiled
def _leading(pool: BlockPool, hashes: Ints, most: Int, used: bool) -> Int:
    """How many of the first `most` blocks with these hashes are cached, and `used`, if that is asked, without a gap.

    Found by doubling, then halving: where one is missing, those after it are, too. (Not so where blocks of one hash
    have come and gone in an odd order; then it may be more than vLLM would find.)
    """
    low, high, step = np.int64(0), np.int64(most), np.int64(1)
    while low < high:
        place = min(low + step, high)
        if _is_cached(pool, hashes[place - 1], used):
            low = place
            step <<= 1
        else:
            high = place - 1
            break
    while low < high:
        place = (low + high + 1) >> 1
        if _is_cached(pool, hashes[place - 1], used):
            low = place
        else:
            high = place - 1
    return low


@compiled
def held_prefix(engine: EngineState, hashes: Ints, most: Int) -> tuple[Int, Int]:
    """Of a prompt's first `most` blocks, by their hashes, how many the engine has, and how many of these are in use.

    What a sequence that waits or is in the middle of its prefill will fill counts as both.
    """
    pool, seqs = pool_of(engine), engine.seqs
    cached = _leading(pool, hashes, most, False)
    shared = _leading(pool, hashes, cached, True)
    for column in range(engine.counters[BEGIN], engine.counters[END]):
        prompt = seqs[NUM_PROMPT_TOKENS, column]
        if seqs[NUM_COMPUTED_TOKENS, column] < prompt:
            record = seqs[CACHE_RECORD, column]
            alike = min(most, engine.cache[record + NUM_HASHES], prompt >> engine.settings[BLOCK_SIZE_LOG2])
            low = cached  # a hash says all that stands before its block, too
            while low < alike:
                middle = (low + alike + 1) // 2
                if engine.cache[record + HASHES + middle - 1] == hashes[middle - 1]:
                    low = middle
                else:
                    alike = middle - 1
            if low > cached:
                cached = shared = low
    return cached, shared


@compiled
def _take_blocks(engine: EngineState, column: Int, blocks: Int) -> None:
    pool, table, held = pool_of(engine), block_table(engine, column), engine.seqs[NUM_BLOCKS, Index(column)]
    for place in range(held, held + blocks):
        engine.cache[table + place] = new_block(pool)


@inlined
def allocate(engine: EngineState, column: Int, blocks: Int) -> None:
    """A sequence takes free blocks."""
    if engine.settings[ENABLE_PREFIX_CACHING] == CACHE_BLOCKS:
        _take_blocks(engine, column, blocks)
    engine.counters[FREE_BLOCKS] -= blocks
    engine.seqs[NUM_BLOCKS, Index(column)] += blocks


@compiled
def _return_blocks(engine: EngineState, column: Int, blocks: Int) -> None:
    pool, table = pool_of(engine), block_table(engine, column)
    free_blocks(pool, engine.cache[table : table + blocks])
    engine.counters[FREE_BLOCKS] = pool.counters[NUM_FREE]


@inlined
def deallocate(engine: EngineState, column: Int) -> None:
    """A sequence gives all of its blocks back."""
    blocks = engine.seqs[NUM_BLOCKS, Index(column)]
    if engine.settings[ENABLE_PREFIX_CACHING] == CACHE_BLOCKS:
        _return_blocks(engine, column, blocks)
    elif blocks > 0:
        engine.counters[FREE_BLOCKS] += blocks - engine.seqs[NUM_SHARED_BLOCKS, Index(column)]
    engine.seqs[NUM_BLOCKS, Index(column)] = 0


@inlined
def believed_prefix(engine: EngineState, column: Int) -> tuple[Int, Int]:
    """`cached_prefix` of an engine that does not know its blocks: what the sequence's rows say, 0 without a cache."""
    return engine.seqs[NUM_CACHED_TOKENS, Index(column)], engine.seqs[NUM_SHARED_BLOCKS, Index(column)]


@compiled
def _find_blocks(engine: EngineState, column: Int) -> tuple[Int, Int]:
    blocks = shared = np.int64(0)
    pool = pool_of(engine)
    total = engine.seqs[NUM_PROMPT_TOKENS, column] + engine.seqs[NUM_OUTPUT_TOKENS, column]
    for place in range((total - 1) >> engine.settings[BLOCK_SIZE_LOG2]):
        block = cached_block(pool, block_hash(engine, column, place))
        if block == NULL_BLOCK:
            break
        blocks += 1
        if pool.ref_count[block] > 0:
            shared += 1
    return blocks << engine.settings[BLOCK_SIZE_LOG2], shared


@inlined
def cached_prefix(engine: EngineState, column: Int) -> tuple[Int, Int]:
    """Tokens of the blocks at the beginning of a waiting sequence that are cached, and how many of these others use.

    The last token is always computed. V1: ``get_computed_blocks`` and ``_get_num_evictable_blocks``.
    """
    if engine.settings[ENABLE_PREFIX_CACHING] == CACHE_BLOCKS:
        return _find_blocks(engine, column)
    return believed_prefix(engine, column)


@compiled
def _touch_blocks(engine: EngineState, column: Int, blocks: Int) -> None:
    pool, table = pool_of(engine), block_table(engine, column)
    for place in range(blocks):
        block = cached_block(pool, block_hash(engine, column, place))
        touch(pool, block)
        engine.cache[table + place] = block


@inlined
def adopt(engine: EngineState, column: Int, blocks: Int, shared: Int) -> None:
    """A sequence that is admitted uses the cached blocks of its beginning, `shared` of which others use.

    V1: ``add_local_computed_blocks``.
    """
    if blocks > 0:
        if engine.settings[ENABLE_PREFIX_CACHING] == CACHE_BLOCKS:
            _touch_blocks(engine, column, blocks)
        engine.counters[FREE_BLOCKS] -= blocks - shared
        engine.seqs[NUM_BLOCKS, column] = blocks


@compiled
def _cache_full_blocks(engine: EngineState, column: Int, tokens: Int) -> None:
    pool, table = pool_of(engine), block_table(engine, column)
    full = tokens >> engine.settings[BLOCK_SIZE_LOG2]
    place = full
    while place > 0 and pool.hashes[engine.cache[table + place - 1]] == NO_HASH:
        place -= 1
    while place < full:
        cache_block(pool, engine.cache[table + place], block_hash(engine, column, place))
        place += 1


@inlined
def cache_blocks(engine: EngineState, column: Int, tokens: Int) -> None:
    """Those of a sequence's blocks that its first `tokens` tokens fill may be found. V1: the method of that name."""
    if engine.settings[ENABLE_PREFIX_CACHING] == CACHE_BLOCKS:
        _cache_full_blocks(engine, column, tokens)


@inlined
def share_no_more_than_found(engine: EngineState, column: Int) -> None:
    """A sequence that has lost its blocks may share again those that its admission found, whatever it came to share."""
    found = engine.seqs[NUM_CACHED_TOKENS, Index(column)] >> engine.settings[BLOCK_SIZE_LOG2]
    engine.seqs[NUM_SHARED_BLOCKS, Index(column)] = min(engine.seqs[NUM_SHARED_BLOCKS, Index(column)], found)


@compiled
def preempt(engine: EngineState, column: Int) -> None:
    """A running sequence gives its blocks back, and will compute its prompt and its response so far anew.

    V1: ``Scheduler._preempt_request``. V0: ``Scheduler._preempt_by_recompute``.
    """
    deallocate(engine, column)
    share_no_more_than_found(engine, column)
    engine.seqs[NUM_COMPUTED_TOKENS, Index(column)] = 0
    engine.seqs[NUM_PREEMPTIONS, Index(column)] += 1
    engine.counters[ALL_PREEMPTIONS] += 1
