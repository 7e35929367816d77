"""The twin with a prefix cache against vLLM's: the same hits, blocks, evictions and queue of free blocks at every step.

Every step takes a second. Skipped where vLLM is not installed.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from random import Random
from typing import Any

import numpy as np
import pytest
from test_twin_vllm import MODES, MakeReal, Pair, Workload
from testbed import engine_config, request

from block.core.arrays import Ints
from block.core.jit import plain
from block.core.snapshot import (
    ID,
    NUM_BLOCKS,
    NUM_CACHED_TOKENS,
    NUM_COMPUTED_TOKENS,
    NUM_PREEMPTIONS,
    NUM_SCHEDULED_TOKENS,
    Snapshot,
)
from block.core.types import Request
from block.engine.block_tables import block_table
from block.engine.prefix_cache import NO_HASH, NULL_BLOCK, NUM_EVICTED, pool_in
from block.engine.state import BEGIN


class Texts:
    """Token ids of prompts and responses, of which many begin alike; and what blocks of them hash to."""

    def __init__(self, random: Random, block_size: int) -> None:
        self._random = random
        self._block_size = block_size
        self._hashes: dict[tuple[int, ...], int] = {}
        self.said: list[list[int]] = [[]]  # all that was ever said, to be gone on from

    def continued(self, prompt: int, output: int) -> list[int]:
        """Tokens of a prompt that begins as something said before, and of a response to it, none of which ends it."""
        begin = self._random.choice(self.said)
        kept = begin[: self._random.choice([len(begin), self._random.randint(0, len(begin))])][:prompt]
        new = [self._random.randrange(3, 6) for _ in range(prompt + output - len(kept))]
        self.said.append(kept + new)
        return kept + new

    def hashes(self, tokens: list[int]) -> Ints:
        size = self._block_size
        places = range(size, len(tokens) + 1, size)
        return np.array([self._hashes.setdefault(tuple(tokens[:end]), len(self._hashes) + 1) for end in places])


class CachingPair(Pair):
    """Both on requests whose tokens matter. Compares what is cached, too."""

    def __init__(self, make_real: MakeReal, workload: Workload, seen: Counter[str]) -> None:
        super().__init__(make_real, workload, seen)
        self.waited: set[int] = set()

    def compare(self, snapshot: Snapshot, batch: Any) -> None:
        super().compare(snapshot, batch)
        memory, pool = (
            self.real.scheduler.kv_cache_manager,
            plain(pool_in)(self.twin.state.cache, self.total_blocks + 1),
        )
        theirs = memory.block_pool
        queue, block = [], pool.free_next[NULL_BLOCK]
        while block != NULL_BLOCK:
            queue.append(int(block))
            block = pool.free_next[block]
        assert queue == [block.block_id for block in theirs.free_block_queue.get_all_free_blocks()]
        assert pool.ref_count[1:].tolist() == [block.ref_cnt for block in theirs.blocks[1:]]
        cached = [block.block_hash is not None for block in theirs.blocks]
        assert (pool.hashes != NO_HASH).tolist() == cached
        for column, id_ in enumerate(snapshot.seqs[ID].tolist()):
            held = int(snapshot.seqs[NUM_BLOCKS, column])
            if held:
                at = int(self.twin.state.counters[BEGIN]) + column
                blocks = memory.get_block_ids(str(id_))[0]
                table = int(block_table(self.twin.state, at))
                assert self.twin.state.cache[table : table + held].tolist() == blocks, f"blocks of {id_}"
            if column >= snapshot.running:
                self.waited.add(id_)
            elif id_ in self.waited and snapshot.seqs[NUM_PREEMPTIONS, column] > 0:
                self.waited.remove(id_)
                computed, now = snapshot.seqs[[NUM_COMPUTED_TOKENS, NUM_SCHEDULED_TOKENS], column].tolist()
                self.seen["found again"] += computed > now > 0
            stats = self.real.known[id_].prefill_stats
            if column < snapshot.running and stats is not None:
                assert snapshot.seqs[NUM_CACHED_TOKENS, column] == stats.num_local_cached_tokens
                self.seen["hits"] += stats.num_local_cached_tokens > 0
        self.seen["shared"] += int((pool.ref_count > 1).sum())


def sharing(seed: int, asynchronous: bool) -> tuple[Workload, dict[int, list[int]]]:
    """Requests that go on from what was said before, in little memory; and the tokens of each."""
    random = Random(seed)
    block_size = random.choice([1, 4, 16])
    max_model_len = random.choice([12, 40, 120, 300])
    config = engine_config(
        "v1",
        enable_prefix_caching=True,
        async_scheduling=asynchronous,
        block_size=block_size,
        max_model_len=max_model_len,
        max_num_seqs=random.choice([1, 3, 8, 16]),
        max_num_batched_tokens=random.choice([4, 16, 64, 200]),
        watermark=random.choice([0.0, 0.0, 0.03, 0.2]),
        long_prefill_token_threshold=random.choice([0, 0, 4, 30]),
        scheduler_reserve_full_isl=random.random() < 0.5,
    )
    texts = Texts(random, block_size)
    requests: list[Request] = []
    tokens = {}
    arrival = 0.0
    for i in range(random.choice([6, 12, 18])):
        arrival += random.choice([0.0, 0.0, 0.25, 1.0, 3.5, 20.0])
        prompt = random.randint(1, max_model_len - 1)
        output = random.randint(1, max(2, max_model_len // 3))
        tokens[i] = texts.continued(prompt, output)
        most = random.choice([None, None, output + random.randint(0, 6)])
        made = request(i, prompt, output, arrival, max_tokens=most)
        requests.append(replace(made, block_hashes=texts.hashes(tokens[i])))
    aborts = [
        (random.uniform(0.0, arrival + 60.0), random.randrange(len(requests))) for _ in range(random.randint(0, 4))
    ]
    least = -(-max_model_len // block_size)
    return Workload(config, random.randint(least, 3 * least + 4), requests, aborts), tokens


@MODES
@pytest.mark.parametrize("part", range(5))
def test_the_twin_caches_what_vllm_does(make_real: MakeReal, asynchronous: bool, part: int) -> None:
    """Sixty workloads; among them is all that makes it hard."""
    seen: Counter[str] = Counter()
    for seed in range(60 * part, 60 * part + 60):
        workload, tokens = sharing(seed, asynchronous)
        pair = CachingPair(make_real, workload, seen)
        pair.real.tokens = tokens
        pair.run()
        seen["evictions"] += int(pair.twin.state.cache[NUM_EVICTED])
    assert seen["workloads"] == 60
    assert min(seen["hits"], seen["evictions"], seen["shared"], seen["preemptions"], 10 * seen["found again"]) > 20, (
        seen
    )
