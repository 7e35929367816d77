"""What an engine with a prefix cache keeps of each sequence: the hashes of its blocks, and the blocks that it holds.

A record lies behind the pool in `EngineState.cache`, at the sequence's CACHE_RECORD: how many hashes are given, how
many blocks it may come to hold, the hashes, the blocks. The number of those that it holds is row NUM_BLOCKS.

A hash stands for a block of tokens and all before it, as vLLM chains them (``hash_request_tokens`` in
vllm/v1/core/kv_cache_utils.py, 0.32). Of a block for which none is given nobody else has the like.
"""

from __future__ import annotations

import numpy as np

from block.core.arrays import Int, Ints
from block.core.jit import compiled
from block.core.snapshot import CACHE_RECORD, ID
from block.engine.prefix_cache import RECORDS_END, BlockPool, pool_in, pool_size
from block.engine.state import BEGIN, END, TOTAL_BLOCKS, EngineState

# Entries of a record.
NUM_HASHES = 0
MOST_BLOCKS = 1
HASHES = 2  # from here on, and behind them the blocks

SPREAD = 0x9E3779B1
"""Odd, so that the hash table's slots of many sequences do not fall together; above any number of a block."""

NO_HASHES = np.empty(0, dtype=np.int64)


@compiled
def pool_of(engine: EngineState) -> BlockPool:
    """The blocks of an engine that has a prefix cache."""
    return pool_in(engine.cache, engine.settings[TOTAL_BLOCKS] + 1)


@compiled
def own_hash(id_: Int, place: Int) -> Int:
    """A hash of block number `place` of a sequence, where none is given: below 0, and no other block's."""
    return -((id_ + 1) * SPREAD + place)


@compiled
def block_hash(engine: EngineState, column: Int, place: Int) -> Int:
    """The hash of a sequence's block number `place`."""
    record = engine.seqs[CACHE_RECORD, column]
    if place < engine.cache[record + NUM_HASHES]:
        return engine.cache[record + HASHES + place]
    return own_hash(engine.seqs[ID, column], place)


@compiled
def block_table(engine: EngineState, column: Int) -> Int:
    """Where in `EngineState.cache` a sequence's blocks stand in order: MOST_BLOCKS, of which it holds NUM_BLOCKS."""
    record = engine.seqs[CACHE_RECORD, column]
    return record + HASHES + engine.cache[record + NUM_HASHES]


def add_record(cache: Ints, hashes: Ints, most_blocks: int) -> int:
    """Write the record of a sequence that comes; where it is, or -1, with nothing done, if there is no room."""
    place = int(cache[RECORDS_END])
    end = place + HASHES + len(hashes) + most_blocks
    if end > len(cache):
        return -1
    cache[place : place + HASHES] = len(hashes), most_blocks
    cache[place + HASHES : place + HASHES + len(hashes)] = hashes
    cache[RECORDS_END] = end
    return place


def compact_records(engine: EngineState) -> None:
    """Move the records of the sequences that are still there to the front."""
    cache, places = engine.cache, engine.seqs[CACHE_RECORD]
    end = int(pool_size(engine.settings[TOTAL_BLOCKS] + 1))
    live = sorted(range(int(engine.counters[BEGIN]), int(engine.counters[END])), key=lambda column: int(places[column]))
    for column in live:
        place = int(places[column])
        size = HASHES + int(cache[place + NUM_HASHES] + cache[place + MOST_BLOCKS])
        cache[end : end + size] = cache[place : place + size].copy()
        places[column] = end
        end += size
    cache[RECORDS_END] = end
