"""The twin against recordings of live vLLM 0.32 engines: the same requests, and every decision the same.

Made with BLOCK_RECORD=FILE, an engine each: 90 requests of mixed lengths under tight memory, so that sequences are
preempted; `emulated-sync` and `emulated-async` with 139 blocks of 16 tokens, `cpu-sync` (a tiny model computed for
real) with 69 of 32. `caching-sync` and `caching-async`: chats with a prefix cache, emulated, 259 blocks of 16. A
recording is the requests as the engine core got them, each `schedule()` and each step's end, and the hashes of each
request's blocks when it has gone, here numbered from 1.
"""

from __future__ import annotations

import gzip
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from testbed import constant_latency, lone_engine, request

from block.core.snapshot import (
    ID,
    NUM_CACHED_TOKENS,
    NUM_PREEMPTIONS,
    NUM_SCHEDULED_NEXT,
    NUM_SCHEDULED_TOKENS,
    Snapshot,
)
from block.engine.config import EngineConfig
from block.engine.scheduler import begin_step
from block.engine.state import HALT, HALTED, QUEUED, STEP_ENDS

RECORDINGS = Path(__file__).parent / "recordings"
BLOCKS = {
    "emulated-sync": (139, 16),
    "emulated-async": (139, 16),
    "cpu-sync": (69, 32),
    "caching-sync": (259, 16),
    "caching-async": (259, 16),
}


class Twin:
    """An engine whose steps end when it is told; `steps` lists what each of its `schedule()` decided."""

    def __init__(self, config: EngineConfig, total_blocks: int) -> None:
        self.engine = lone_engine(config, constant_latency(), total_blocks)
        self.pending: list[Any] = []
        self.steps: list[dict[int, int]] = []
        self.now = 0.0

    def snapshot(self) -> Snapshot:
        return self.engine.snapshot(0, self.now)

    def schedule(self) -> None:
        """End the step in flight, if there is one, let the requests in, and go on."""
        engine = self.engine
        queued = bool(engine.state.counters[QUEUED])
        ends = engine.step_ends
        idle = ends == float("inf")
        self.now = self.now if idle else ends
        if idle:  # halted, or it would begin a step with the first of several
            engine.state.counters[HALT], engine.state.times[STEP_ENDS] = HALTED, self.now
        for one in self.pending:
            engine.add(one, self.now if idle else np.nextafter(ends, 0.0))
        self.pending = []
        if idle:
            engine.state.counters[HALT] = 0
            begin_step(engine.state, self.now)
            engine.batch.look_ahead(0)
        engine.advance(self.now)
        rows = (NUM_SCHEDULED_NEXT,) if queued else (NUM_SCHEDULED_TOKENS, NUM_SCHEDULED_NEXT)
        seqs = self.snapshot().seqs
        for row in rows:
            tokens = {int(id_): int(n) for id_, n in zip(seqs[ID], seqs[row], strict=True) if n}
            if tokens:
                self.steps.append(tokens)


def events(name: str) -> list[tuple[str, Any]]:
    with gzip.open(RECORDINGS / f"{name}.jsonl.gz", "rt") as lines:
        return [tuple(json.loads(line)) for line in lines]


@pytest.mark.parametrize("name", BLOCKS)
def test_every_decision_of_a_live_engine_is_the_twin_s(name: str) -> None:
    total_blocks, block_size = BLOCKS[name]
    config = EngineConfig(
        version="v1",
        max_num_seqs=12,
        max_num_batched_tokens=256,
        max_model_len=2048,
        block_size=block_size,
        watermark=0.0,
        async_scheduling=name.endswith("-async"),
        enable_prefix_caching=name.startswith("caching"),
    )
    twin = Twin(config, total_blocks)
    compared = preempted = alike = 0
    preemptions: dict[int, int] = {}
    found: dict[int, int] = {}  # tokens that a request's first admission found
    recorded = events(name)
    hashes = {what[0]: np.array(what[1], dtype=np.int64) for kind, what in recorded if kind == "gone"}
    for kind, what in recorded:
        if kind == "add":
            id_, prompt, _, most, _ = what
            twin.pending.append(replace(request(id_, prompt, most), block_hashes=hashes.get(id_)))
        if kind != "step" or not what["tokens"]:
            continue
        preempted += len(what["preempted"])
        found |= {int(id_): tokens for id_, tokens in what.get("found", {}).items()}
        while len(twin.steps) <= compared:
            twin.schedule()
        assert twin.steps[compared] == {int(id_): tokens for id_, tokens in what["tokens"].items()}, compared
        compared += 1
        if len(twin.steps) == compared:  # the twin has not gone on to the next step
            snapshot = twin.snapshot()
            ids = snapshot.seqs[ID].tolist()
            assert ids[: snapshot.running] == what["running"]
            assert [id_ for id_ in ids[snapshot.running :] if id_ in what["waiting"]] == what["waiting"]
            assert snapshot.free_blocks == what["free"]
            if config.enable_prefix_caching:
                cached = snapshot.seqs[NUM_CACHED_TOKENS, : snapshot.running].tolist()
                assert cached == [found[id_] for id_ in what["running"]]
            times = dict(zip(ids, snapshot.seqs[NUM_PREEMPTIONS].tolist(), strict=True))
            more = sorted(id_ for id_, n in times.items() if n > preemptions.get(id_, 0))
            assert more == what["preempted"]
            preemptions = times
            alike += 1
    if config.enable_prefix_caching:
        assert sum(tokens > 0 for tokens in found.values()) > 40
    assert compared > 1000
    assert alike > 0.95 * compared
    assert preempted >= 2
