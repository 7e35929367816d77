"""What a server has in its prefix cache, by hash: a table that one process keeps current and others look up in.

It lies in shared memory (`block.vllm_plugin.state_buffer`). Who looks something up at the moment of a change may miss
it, or find what is just going.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from block.core.arrays import Int, Ints
from block.core.jit import compiled

_COPIES = 1 << 32  # of a count: blocks with the hash × this + how many of them are in use
_IN_USE = _COPIES - 1


class PrefixTable(NamedTuple):
    """Open addressing: a hash stands at ``hash & (size − 1)``, or behind it where that place was taken."""

    hashes: Ints
    """int64[power of two]: of a block with all before it; 0: empty"""
    counts: Ints
    """int64[the same]: how many blocks have this hash, and how many of these are in use"""


def table_size(num_gpu_blocks: int) -> int:
    """Places that a table for so many blocks has: 16 bytes each, at least two for a block."""
    return 1 << (2 * num_gpu_blocks - 1).bit_length()


def new_table(num_gpu_blocks: int) -> PrefixTable:
    """An empty table for so many blocks."""
    size = table_size(num_gpu_blocks)
    return PrefixTable(np.zeros(size, dtype=np.int64), np.zeros(size, dtype=np.int64))


@compiled
def _place_of(table: PrefixTable, block_hash: Int) -> Int:
    """Where a hash stands, or would stand."""
    last = table.hashes.shape[0] - 1
    place = block_hash & last
    for _ in range(last):  # and no longer, whoever has written to it
        if table.hashes[place] == 0 or table.hashes[place] == block_hash:
            break
        place = (place + 1) & last
    return place


@compiled
def _take_out(table: PrefixTable, place: Int) -> None:
    """Empty a place; those behind it that had to give way move up."""
    last = table.hashes.shape[0] - 1
    gap = place
    while True:
        place = (place + 1) & last
        block_hash = table.hashes[place]
        if block_hash == 0:
            break
        if (place - (block_hash & last)) & last >= (place - gap) & last:
            table.hashes[gap], table.counts[gap] = block_hash, table.counts[place]
            gap = place
    table.hashes[gap] = table.counts[gap] = 0


@compiled
def _note(hashes: Ints, counts: Ints, changes: Ints) -> None:
    table = PrefixTable(hashes, counts)
    for i in range(changes.shape[0]):
        place = _place_of(table, changes[i, 0])
        table.hashes[place] = changes[i, 0]
        table.counts[place] += changes[i, 1] * _COPIES + changes[i, 2]
        if table.counts[place] < _COPIES:
            _take_out(table, place)


def note(table: PrefixTable, changes: Ints) -> None:
    """Bring a table up to date.

    changes: int64[n, 3]: a hash, how many blocks more have it, and how many more of these are in use.
    """
    _note(table.hashes, table.counts, changes)


@compiled
def _has(table: PrefixTable, block_hash: Int, in_use: bool) -> bool:
    place = _place_of(table, block_hash)
    count = table.counts[place]
    return bool(table.hashes[place] == block_hash and count >= _COPIES and (not in_use or count & _IN_USE > 0))


@compiled
def _leading(table: PrefixTable, hashes: Ints, most: Int, in_use: bool) -> Int:
    """How many of the first `most` blocks are there without a gap; as `block.engine.kv_cache._leading` finds it in the
    pool of an engine, for compiled code takes no functions as arguments if it is to be cached.
    """
    low, high, step = np.int64(0), np.int64(most), np.int64(1)
    while low < high:
        place = min(low + step, high)
        if _has(table, hashes[place - 1], in_use):
            low = place
            step <<= 1
        else:
            high = place - 1
            break
    while low < high:
        place = (low + high + 1) >> 1
        if _has(table, hashes[place - 1], in_use):
            low = place
        else:
            high = place - 1
    return low


@compiled
def _held(table_hashes: Ints, counts: Ints, hashes: Ints, most: Int) -> tuple[Int, Int]:
    table = PrefixTable(table_hashes, counts)
    found = _leading(table, hashes, most, False)
    return found, _leading(table, hashes, found, True)


def held(table: PrefixTable, hashes: Ints, most: int) -> tuple[int, int]:
    """Of a prompt's first `most` blocks, by their hashes, how many are cached, and how many of these are in use."""
    blocks, in_use = _held(table.hashes, table.counts, hashes, min(most, len(hashes)))
    return int(blocks), int(in_use)
