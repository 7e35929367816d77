"""What vLLM's prefix cache has, told by this package's own hashes: a mix-in for its block pool that notes each change.

The hashes are those of `block.core.hashing`, which whoever knows a prompt's token ids can compute; vLLM's may be random
in each process (`--prefix-caching-hash-algo`). Adapter, salt and images of a request go into its first block's hash.
"""

from __future__ import annotations

from array import array
from typing import Any

import numpy as np

from block.core.hashing import hash_tokens, root
from block.engine.prefix_cache import NO_HASH
from block.engine.prefix_table import PrefixTable, held, note
from block.vllm_plugin.requirements import require


class CachedPrefixes:
    """What the cache has. vLLM's pool tells of each change (`_Telling`); `publish` brings the table up to date."""

    def __init__(self, pool: Any, table: PrefixTable, block_size: int) -> None:
        require(
            pool,
            "cache_full_blocks",
            "_remove_cached_block_hashes",
            "touch",
            "free_blocks",
            "reset_prefix_cache",
            "blocks",
        )
        self._table = table
        self._block_size = block_size
        self._changes = array("q")  # as `note` takes them, one after the other
        self._hash_of = [NO_HASH] * len(pool.blocks)  # by the number of the block
        self._hashes: dict[str, list[int]] = {}  # of the requests' first blocks
        held(table, hash_tokens(np.zeros(block_size, dtype=np.int64), block_size), 1)  # load what is compiled
        note(table, np.zeros((0, 3), dtype=np.int64))
        pool.__class__ = type(f"Telling{type(pool).__name__}", (_Telling, type(pool)), {"prefixes": self})

    def found(self, request: Any) -> tuple[int, int]:
        """Of a request that has just come, the tokens that are cached, and how many blocks of them are in use."""
        if request.request_id in self._hashes or getattr(request, "skip_reading_prefix_cache", False):
            return 0, 0  # a session that goes on, or one that wants log-probabilities of its prompt
        self.publish()
        most = (request.num_prompt_tokens - 1) // self._block_size
        hashes = self._hashes_of(request, request.num_prompt_tokens // self._block_size)
        blocks, in_use = held(self._table, np.array(hashes, dtype=np.int64), most)
        return blocks * self._block_size, in_use

    def forget(self, request_id: str) -> list[int]:
        """A request has gone; returns the hashes of its full blocks, as far as they were needed."""
        return self._hashes.pop(request_id, [])

    def publish(self) -> None:
        """Write what has changed to the table, which readers look up in at any time."""
        if self._changes:
            note(self._table, np.frombuffer(self._changes, dtype=np.int64).reshape(-1, 3))
            self._changes = array("q")

    def _hashes_of(self, request: Any, blocks: int) -> list[int]:
        """Of at least the first `blocks` blocks of a request, which are full; none if its tokens are not known."""
        known = self._hashes.setdefault(request.request_id, [])
        embedded = request.prompt_token_ids is None or getattr(request, "prompt_embeds", None) is not None
        if len(known) < blocks and not embedded:
            size = self._block_size
            tokens = np.array(request.all_token_ids[len(known) * size : blocks * size], dtype=np.int64)
            known += hash_tokens(tokens, size, known[-1] if known else root(*_extra_keys(request))).tolist()
        return known

    def cached(self, request: Any, blocks: list[Any], first: int, end: int) -> None:
        """Blocks `first` to `end` of a request are full, and may be found if they have got a hash."""
        hashes = self._hashes_of(request, end)
        for place in range(first, min(end, len(hashes))):
            block = blocks[place]
            if block.block_hash is not None and not block.is_null and self._hash_of[block.block_id] == NO_HASH:
                self._hash_of[block.block_id] = hashes[place]
                self._changes.extend((hashes[place], 1, 1))

    def lost(self, block: Any) -> None:
        """A block is found no more."""
        if (known := self._hash_of[block.block_id]) != NO_HASH:
            self._hash_of[block.block_id] = NO_HASH
            self._changes.extend((known, -1, -1 if block.ref_cnt > 0 else 0))

    def in_use(self, block: Any, more: int) -> None:
        """A block has come into use (1), or is in use no more (-1)."""
        if (known := self._hash_of[block.block_id]) != NO_HASH:
            self._changes.extend((known, 0, more))

    def cleared(self) -> None:
        """No block is found any more."""
        for known in self._hash_of:
            if known != NO_HASH:
                self._changes.extend((known, -1, 0))
        self._hash_of = [NO_HASH] * len(self._hash_of)
        self.publish()  # no step may come for long


class _Telling:
    """Mixed into vLLM's ``BlockPool``: does what it does, and tells `prefixes`."""

    prefixes: CachedPrefixes

    def cache_full_blocks(
        self, request: Any, blocks: Any, num_cached_blocks: int, num_full_blocks: int, *args: Any, **kwargs: Any
    ) -> None:
        super().cache_full_blocks(request, blocks, num_cached_blocks, num_full_blocks, *args, **kwargs)  # type: ignore[misc]
        if num_cached_blocks < num_full_blocks:
            self.prefixes.cached(request, blocks, num_cached_blocks, num_full_blocks)

    def _remove_cached_block_hashes(self, block: Any) -> Any:
        removed = super()._remove_cached_block_hashes(block)  # type: ignore[misc]
        self.prefixes.lost(block)
        return removed

    def touch(self, blocks: Any) -> None:
        for block in blocks:
            if block.ref_cnt == 0:
                self.prefixes.in_use(block, 1)
        super().touch(blocks)  # type: ignore[misc]

    def free_blocks(self, ordered_blocks: Any) -> None:
        ordered_blocks = list(ordered_blocks)
        super().free_blocks(ordered_blocks)  # type: ignore[misc]
        for block in ordered_blocks:
            if block.ref_cnt == 0:
                self.prefixes.in_use(block, -1)

    def reset_prefix_cache(self) -> Any:
        done = super().reset_prefix_cache()  # type: ignore[misc]
        if done:
            self.prefixes.cleared()
        return done


def _extra_keys(request: Any) -> list[str]:
    """What tells a request's blocks from others of the same tokens, as in vLLM's ``generate_block_hash_extra_keys``."""
    adapter, salt = getattr(request, "lora_request", None), getattr(request, "cache_salt", None)
    keys = [] if adapter is None else [f"adapter {adapter.lora_name}"]
    keys += [f"salt {salt}"] if salt else []
    return keys + [
        f"item {one.identifier} at {one.mm_position.offset}" for one in getattr(request, "mm_features", None) or ()
    ]
