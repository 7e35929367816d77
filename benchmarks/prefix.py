"""Prefixes: how long it takes to find what instances have of a prompt of 1,000 KV blocks, against a set for each.

Half of the instances have all of the prompt cached, the others half of it. The sets are asked block by block.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
from testbed import compose_run

from block.backends.simulated import Simulated
from block.core.arrays import Ints
from block.core.types import Request
from block.engine.batch import EngineBatch
from block.engine.prefix_table import PrefixTable, held, note, table_size

BLOCKS, SIZE = 1000, 16  # of the prompt; tokens of one
MEMORY = 3000  # blocks that an instance has
RNG = np.random.default_rng(0)


def best(look_up: Callable[[], object], rounds: int = 200) -> float:
    """The least microseconds that it takes."""
    micros = []
    for _ in range(rounds):
        began = time.perf_counter()
        look_up()
        micros.append((time.perf_counter() - began) * 1e6)
    return min(micros)


def hashes(shared: Ints, blocks: int) -> Ints:
    """Of a prompt that begins with the blocks `shared`."""
    return np.concatenate([shared, RNG.integers(1, 2**62, blocks - len(shared))])


def simulated(instances: int, prompt: Ints) -> EngineBatch:
    """Engines that have served a prompt each."""
    run = compose_run(
        *("model=llama3-8b", "cluster.gpu=h100", f"cluster.num_gpus={instances}", "engine=vllm_v1"),
        *("engine.enable_prefix_caching=true", f"engine.num_gpu_blocks={MEMORY}", "engine.max_model_len=32768"),
    )
    assert isinstance(run.backend, Simulated)
    engines = run.backend.simulate(run.testbed)[0].engines
    for row in range(instances):
        served = hashes(prompt[: BLOCKS // (1 + row % 2)], BLOCKS)
        engines.receive(row, Request(row, 0.0, BLOCKS * SIZE + 1, 1, 1, block_hashes=served), 0.0)
    while engines.next_event < np.inf:
        engines.advance_all(1e9)
    return engines


def tables(instances: int, prompt: Ints) -> list[PrefixTable]:
    """What as many servers tell."""
    made = []
    for row in range(instances):
        served = hashes(prompt[: BLOCKS // (1 + row % 2)], MEMORY)
        made.append(PrefixTable(*np.zeros((2, table_size(MEMORY)), dtype=np.int64)))
        note(made[-1], np.stack([served, np.ones_like(served), np.zeros_like(served)], axis=1))
    return made


def leading(known: set[int], prompt: list[int]) -> int:
    for place, one in enumerate(prompt):
        if one not in known:
            return place
    return len(prompt)


prompt = hashes(np.zeros(0, dtype=np.int64), BLOCKS)
print("µs to find a prompt of 1,000 blocks     simulated engines   servers' tables   sets   ratio to the slower")
for instances in (12, 1000):
    engines, servers = simulated(instances, prompt), tables(instances, prompt)
    sets = [set(table.hashes.tolist()) for table in servers]
    rows, asked = range(instances), prompt.tolist()
    expected = [BLOCKS // (1 + row % 2) for row in rows]
    assert engines.cached_blocks(rows, prompt, BLOCKS, 1e9)[:, 0].tolist() == expected
    assert [held(table, prompt, BLOCKS)[0] for table in servers] == expected
    assert [leading(known, asked) for known in sets] == expected
    mine = best(lambda: engines.cached_blocks(rows, prompt, BLOCKS, 1e9))  # noqa: B023
    theirs = best(lambda: [held(table, prompt, BLOCKS) for table in servers])  # noqa: B023
    peer = best(lambda: [leading(known, asked) for known in sets], 20)  # noqa: B023
    print(
        f"  on {instances:5,} instances   {mine:30,.1f} {theirs:17,.1f} {peer:7,.0f} {peer / max(mine, theirs):10.1f}"
    )
