"""What requests consist of, as far as it matters who shares what: texts by number, cut into KV blocks with hashes.

The content of a request is int64[n, 2]: a text's number, and how many of its tokens from its beginning on; the prompt
first, then the response. Where contents begin with the same texts, requests share a prefix. What the texts say, nobody
needs to know.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from block.core.arrays import Ints
from block.core.hashing import MIX, hash_tokens, mixed
from block.core.jit import compiled
from block.core.types import Request


@compiled
def _hash_blocks(content: Ints, block_size: int, hashes: Ints) -> None:
    """Fill in the hashes of the first blocks; each is chained to the one before it, as in vLLM."""
    chained = np.uint64(block_size)
    text = at = 0
    for block in range(hashes.shape[0]):
        wanted = block_size
        while wanted > 0:
            piece = min(wanted, content[text, 1] - at)
            if piece > 0:
                chained = mixed(mixed(mixed(chained, np.uint64(content[text, 0])), np.uint64(at)), np.uint64(piece))
            wanted -= piece
            at += piece
            if at == content[text, 1]:
                text += 1
                at = 0
        value = np.int64(chained >> np.uint64(1))
        hashes[block] = value if value > 0 else 1


def block_hashes(content: Ints, block_size: int) -> Ints:
    """int64[blocks], above 0: of each full block of `block_size` tokens, with all that stands before it."""
    hashes = np.empty(int(content[:, 1].sum()) // block_size, dtype=np.int64)
    with np.errstate(over="ignore"):  # which only numpy's own numbers tell
        _hash_blocks(content, block_size, hashes)
    return hashes


def with_hashes(requests: Sequence[Request], block_size: int) -> list[Request]:
    """The requests with the hashes of their blocks; those without a content stay as they are."""
    return [
        one if one.content is None else replace(one, block_hashes=block_hashes(one.content, block_size))
        for one in requests
    ]


def with_token_hashes(requests: Sequence[Request], block_size: int, vocabulary: int) -> list[Request]:
    """The same for servers, which know requests by their `token_ids`."""
    return [
        one if one.content is None else replace(one, block_hashes=_of_tokens(one.content, block_size, vocabulary))
        for one in requests
    ]


def _of_tokens(content: Ints, block_size: int, vocabulary: int) -> Ints:
    tokens = token_ids(content, int(content[:, 1].sum()), vocabulary)
    return hash_tokens(np.array(tokens, dtype=np.int64), block_size)


def first_tokens(content: Ints, tokens: int) -> Ints:
    """The content's first `tokens` tokens."""
    before = np.concatenate([[0], np.cumsum(content[:-1, 1])])
    kept = content[before < tokens].copy()
    kept[-1, 1] = min(kept[-1, 1], tokens - before[len(kept) - 1])
    return kept


def token_ids(content: Ints, tokens: int, vocabulary: int) -> list[int]:
    """Ids of the first `tokens` tokens, for a server that wants some: equal where contents are, from 300 up to
    `vocabulary`, so that none is a special one.
    """
    pieces = [
        (np.uint64(number & (2**64 - 1)) << np.uint64(24)) + np.arange(count, dtype=np.uint64)
        for number, count in first_tokens(content, tokens).tolist()
    ]
    x = np.concatenate(pieces)
    for shift, factor in zip((30, 27), MIX[1:], strict=True):
        x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
    return (300 + (x >> np.uint64(11)) % np.uint64(vocabulary - 300)).tolist()  # type: ignore[no-any-return]
