"""KV blocks: how many a sequence needs, who gets them, who gives them back. Prefix caching is off, as in the paper.

- V1: ``KVCacheManager.allocate_slots`` and ``.free`` (vllm/v1/core/kv_cache_manager.py, 0.27–0.33).
- V0: ``BlockSpaceManager.can_allocate``, ``.can_append_slots``, ``.allocate`` and ``.free``
  (vllm/core/block_manager.py, 0.7.2).
"""

from __future__ import annotations

from block.core.arrays import Int, Ints
from block.core.jit import Index, compiled
from block.core.snapshot import NUM_BLOCKS, NUM_COMPUTED_TOKENS, NUM_PREEMPTIONS
from block.engine.state import (
    ALL_PREEMPTIONS,
    BLOCK_SIZE,
    BLOCK_SIZE_LOG2,
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
def can_admit(total: Int, chunk: Int, free: Int, running: Int, settings: Ints) -> bool:
    """May a waiting sequence of `total` tokens, `chunk` of them now, be admitted beside `running` others?

    V0: ``can_allocate``, all of its blocks above the watermark. V1: ``allocate_slots`` with ``full_sequence_must_fit``,
    as `Scheduler.schedule` calls it under ``scheduler_reserve_full_isl``; beside nobody the watermark does not hold.
    """
    if settings[IS_V1] == 0:
        return bool(free - blocks_for(total, settings) >= settings[WATERMARK_BLOCKS])
    watermark = settings[WATERMARK_BLOCKS] if running > 0 else 0
    reserved = min(total, settings[MAX_MODEL_LEN]) if settings[SCHEDULER_RESERVE_FULL_ISL] == 1 else chunk
    return bool(blocks_for(reserved, settings) + watermark <= free)


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


@compiled
def allocate(engine: EngineState, column: Int, blocks: Int) -> None:
    """A sequence takes free blocks."""
    engine.counters[FREE_BLOCKS] -= blocks
    engine.seqs[NUM_BLOCKS, Index(column)] += blocks


@compiled
def deallocate(engine: EngineState, column: Int) -> None:
    """A sequence gives all of its blocks back."""
    engine.counters[FREE_BLOCKS] += engine.seqs[NUM_BLOCKS, Index(column)]
    engine.seqs[NUM_BLOCKS, Index(column)] = 0


@compiled
def preempt(engine: EngineState, column: Int) -> None:
    """A running sequence gives its blocks back, and will compute its prompt and its response so far anew.

    V1: ``Scheduler._preempt_request``. V0: ``Scheduler._preempt_by_recompute``.
    """
    deallocate(engine, column)
    engine.seqs[NUM_COMPUTED_TOKENS, Index(column)] = 0
    engine.seqs[NUM_PREEMPTIONS, Index(column)] += 1
    engine.counters[ALL_PREEMPTIONS] += 1
