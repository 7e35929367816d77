"""Hashes of KV blocks: int64s above 0, each of which says the tokens of a block and of all before it, as vLLM's do.

vLLM's own are strings of 32 bytes, made of pickled tuples; these are made a hundred times faster, by whoever has the
token ids: a dispatcher of a prompt, the plugin of what its engine caches.
"""

from __future__ import annotations

import hashlib

import numpy as np

from block.core.arrays import Ints
from block.core.jit import compiled

MIX = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
"""The constants of SplitMix64."""


@compiled
def mixed(chained: np.uint64, value: np.uint64) -> np.uint64:
    """The next link of a chain of hashes: what stands before, and one value more."""
    x = (chained ^ value) + np.uint64(MIX[0])
    x = (x ^ (x >> np.uint64(30))) * np.uint64(MIX[1])
    x = (x ^ (x >> np.uint64(27))) * np.uint64(MIX[2])
    return x ^ (x >> np.uint64(31))


@compiled
def _hash_tokens(tokens: Ints, block_size: int, parent: int, hashes: Ints) -> None:
    """Fill in the hashes of the first blocks."""
    before = np.int64(parent)
    for block in range(hashes.shape[0]):
        chained = np.uint64(before)
        for place in range(block * block_size, (block + 1) * block_size):
            chained = mixed(chained, np.uint64(tokens[place]))
        value = np.int64(chained >> np.uint64(1))
        before = value if value > 0 else np.int64(1)
        hashes[block] = before


def hash_tokens(tokens: Ints, block_size: int, parent: int = 0) -> Ints:
    """int64[blocks], above 0: of each full block of these token ids.

    parent: the hash of the block before them; for the first block of a prompt, what `root` makes of its extra keys.
    """
    hashes = np.empty(len(tokens) // block_size, dtype=np.int64)
    with np.errstate(over="ignore"):  # which only numpy's own numbers tell
        _hash_tokens(tokens, block_size, parent, hashes)
    return hashes


def root(*keys: str) -> int:
    """What the hashes of a prompt begin with: 0, or what tells its extra keys (adapter, salt, images) from others."""
    if not keys:
        return 0
    digest = hashlib.blake2b("\0".join(keys).encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
