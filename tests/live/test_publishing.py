"""The state buffer against the scheduler that publishes to it, at every step of vLLM's own engine loop."""

from __future__ import annotations

import time
from collections import Counter
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest
from test_twin_prefix_cache import CachingPair, sharing
from test_twin_vllm import MODES, MakeReal, Pair, Workload, crowd
from testbed import contents, engine_config, request

from block.backends.cache_events import CacheEvents
from block.core.hashing import hash_tokens
from block.core.snapshot import (
    EXPECTED,
    ID,
    MAX_TOKENS,
    NUM_CACHED_TOKENS,
    NUM_PROMPT_TOKENS,
    NUM_SCHEDULED_TOKENS,
    NUM_SHARED_BLOCKS,
    Snapshot,
)
from block.core.types import Request
from block.vllm_plugin.environment import STATE_BUFFER
from block.vllm_plugin.state_buffer import STARTED, TIMED, StateBuffer


@pytest.fixture
def buffer(vllm: Any, monkeypatch: pytest.MonkeyPatch) -> StateBuffer:
    """A buffer on which the schedulers of this test's engines publish."""
    from block.vllm_plugin import publisher as scheduler

    made, path = StateBuffer.create()
    monkeypatch.setenv(STATE_BUFFER, path)
    monkeypatch.setattr(scheduler, "die_with_parent", lambda: None)
    for name in ("Scheduler", "AsyncScheduler"):
        monkeypatch.setattr(vllm, name, scheduler.publishing)
    return made


class Published(Pair):
    """Compares what is on the state buffer with the twin, which `Pair` compares with vLLM."""

    def __init__(self, make_real: MakeReal, workload: Workload, buffer: StateBuffer) -> None:
        super().__init__(make_real, workload, Counter())
        self.buffer = buffer

    def happen(self) -> None:
        super().happen()
        for id_, one in self.real.known.items():
            one.sampling_params.extra_args = {"block_id": id_, "block_expected": id_ + 7}

    def compare(self, snapshot: Snapshot, batch: Any) -> None:
        super().compare(snapshot, batch)
        if not self.real.scheduler.has_requests():
            return  # nothing is scheduled any more: the state buffer keeps what was published last
        shown = self.buffer.read().snapshot(3, 0.0, 0.0)
        assert shown.instance_id == 3
        assert not shown.seqs[NUM_SCHEDULED_TOKENS, shown.running + shown.stale :].any()
        for name in ("running", "free_blocks", "preemptions"):
            assert getattr(shown, name) == getattr(snapshot, name), name
        expected = snapshot.seqs.copy()
        expected[EXPECTED] = expected[ID] + 7
        ours, theirs = np.delete(shown.seqs, _TARGETS, axis=0), np.delete(expected, _TARGETS, axis=0)
        np.testing.assert_array_equal(ours, theirs)
        assert (shown.seqs[MAX_TOKENS] >= 1).all()


class PublishedCache(CachingPair):
    """Compares the table on the state buffer, and what vLLM's events tell, with what vLLM's block pool has."""

    def __init__(self, make_real: MakeReal, workload: Workload, buffer: StateBuffer) -> None:
        super().__init__(make_real, workload, Counter())
        self.buffer = buffer
        self.block_size = workload.config.block_size
        self.named: dict[Any, int] = {}  # our hash of a block by vLLM's
        self.blocks = self.real.scheduler.kv_cache_manager.block_pool
        self.blocks.enable_kv_cache_events = True
        self.published: list[Any] = []
        publisher = SimpleNamespace(publish=lambda batch: self.published.extend(batch.events))
        self.real.scheduler.kv_event_publisher = publisher
        self.told = CacheEvents(self.block_size)

    def compare(self, snapshot: Snapshot, batch: Any) -> None:
        from vllm.distributed.kv_events import KVEventBatch

        super().compare(snapshot, batch)
        if not self.real.scheduler.has_requests():
            return
        shown = self.buffer.read().snapshot(0, 0.0, 0.0)
        running = slice(shown.running)
        np.testing.assert_array_equal(shown.seqs[NUM_CACHED_TOKENS, running], snapshot.seqs[NUM_CACHED_TOKENS, running])
        assert (shown.seqs[NUM_SHARED_BLOCKS] * self.block_size <= shown.seqs[NUM_CACHED_TOKENS]).all()
        self.seen["hits"] += int((shown.seqs[NUM_CACHED_TOKENS, running] > 0).sum())
        for one in self.real.known.values():
            tokens = np.array(one.all_token_ids, dtype=np.int64)
            ours = hash_tokens(tokens, self.block_size).tolist()
            self.named |= zip(one.block_hashes, ours, strict=False)
        there: dict[int, tuple[int, int]] = {}
        for block in self.blocks.blocks:
            if block.block_hash is not None:
                known = self.named[block.block_hash[:-4]]  # without the number of its group
                copies, used = there.get(known, (0, 0))
                there[known] = copies + 1, used + (block.ref_cnt > 0)
        table = self.buffer.prefix_table
        assert table is not None
        assert contents(table) == there
        self.seen["blocks"] += len(there)
        events = [*self.published, *self.blocks.take_events()]  # before the scheduler would publish the latest
        self.published.clear()
        self.told.heard(self.told.next, msgspec.to_builtins(KVEventBatch(ts=time.time(), events=events)))
        assert contents(self.told.table) == {one: (copies, 0) for one, (copies, _) in there.items()}


_TARGETS = [3, 4]  # rows of what only the engine and the scheduler know


@MODES
@pytest.mark.parametrize("seed", range(12))
def test_the_state_buffer_shows_what_the_scheduler_holds(
    make_real: MakeReal,
    buffer: StateBuffer,
    seed: int,
    asynchronous: bool,
) -> None:
    pair = Published(make_real, crowd(seed, asynchronous), buffer)
    pair.run()
    assert pair.seen["preemptions"] > 0 or pair.seen["steps"] > 20
    assert buffer.read().settings.total_blocks == pair.total_blocks
    assert np.isnan(buffer.read().header.view(np.float64)[STARTED])  # idle at the end
    assert len(buffer.step_times(0)[1]) == min(buffer.header[TIMED], 1023)


@MODES
@pytest.mark.parametrize("seed", range(0, 40, 4))
def test_the_table_on_the_state_buffer_has_what_vllm_has_cached(
    make_real: MakeReal, buffer: StateBuffer, seed: int, asynchronous: bool
) -> None:
    workload, tokens = sharing(seed, asynchronous)
    pair = PublishedCache(make_real, workload, buffer)
    pair.real.tokens = tokens
    pair.run()
    assert pair.seen["blocks"] > 0
    buffer_table = buffer.prefix_table
    assert buffer_table is not None
    if pair.real.scheduler.reset_prefix_cache():
        assert contents(buffer_table) == {}  # at once, though nothing is scheduled any more


@MODES
def test_the_settings_in_the_buffer_are_the_engine_s(
    make_real: MakeReal, buffer: StateBuffer, asynchronous: bool
) -> None:
    config = engine_config("v1", async_scheduling=asynchronous, watermark=0.1, long_prefill_token_threshold=8)
    make_real(config, 300, lambda batch: None)
    settings = buffer.read().settings
    assert settings == config.settings(300)._replace(enable_chunked_prefill=True)


def test_a_request_without_a_tag_is_shown_with_a_number_of_its_own(make_real: MakeReal, buffer: StateBuffer) -> None:
    requests = [request(0, 30, 8), request(1, 40, 9)]
    seen: list[Any] = []

    def elapse(batch: Any) -> None:
        seen.append(buffer.read().seqs)
        engine.now += 1.0

    engine = make_real(engine_config("v1"), 300, elapse)
    for one in requests:
        engine.receive(one)
    while engine.busy:
        engine.turn()
    first = seen[0]
    assert first[ID].tolist() == [-1, -2]
    assert first[NUM_PROMPT_TOKENS].tolist() == [30, 40]
    assert first[EXPECTED].tolist() == [8, 9]


def test_publishing_takes_little(make_real: MakeReal, buffer: StateBuffer) -> None:
    """48 running and 100 waiting requests: some 0.1 ms a step, a fraction of what vLLM's own part of the step takes."""
    config = engine_config("v1", max_num_seqs=48, max_num_batched_tokens=512, max_model_len=2048)
    durations: list[float] = []

    def elapse(batch: Any) -> None:
        began = time.perf_counter()
        engine.scheduler._publish()
        durations.append(time.perf_counter() - began)
        engine.now += 1.0

    engine = make_real(config, 4000, elapse)
    for i in range(148):
        engine.receive(Request(i, 0.0, 100, 60, 60))
    turns: list[float] = []
    while engine.busy:
        began = time.perf_counter()
        engine.turn()
        turns.append(time.perf_counter() - began)
    publication, turn = np.min(durations[5:40]), np.min(turns[5:40])  # which publishes twice
    print(f"publication: {publication * 1e6:.0f} µs, vLLM: {(turn - 2 * publication) * 1e6:.0f} µs")
    assert publication < (turn - 2 * publication)


def test_to_keep_the_table_takes_little(
    make_real: MakeReal, buffer: StateBuffer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """48 running requests, prompts of 1,000 tokens of which 600 are shared: some 60 µs a step."""
    from block.vllm_plugin.publisher import Publishing

    keys: dict[str, Any] = {"max_num_seqs": 48, "max_num_batched_tokens": 512, "max_model_len": 2048, "block_size": 16}
    config = engine_config("v1", enable_prefix_caching=True, **keys)
    rng = np.random.default_rng(0)
    prefixes = rng.integers(3, 30_000, (8, 600)).tolist()
    tokens = {i: prefixes[i % 8] + rng.integers(3, 30_000, 500).tolist() for i in range(100)}
    watched = Publishing._watched_cache
    steps: dict[bool, list[float]] = {True: [], False: []}

    def elapse(batch: Any) -> None:
        engine.now += 1.0

    for keeps in (True, False, True, False):
        monkeypatch.setattr(Publishing, "_watched_cache", watched if keeps else lambda self: None)
        engine = make_real(config, 3000, elapse)
        engine.tokens = tokens
        for i in tokens:
            engine.receive(Request(i, 0.0, 1000, 60, 60))
        count, began = 0, time.perf_counter()
        while engine.busy:
            engine.turn()
            count += 1
        steps[keeps].append((time.perf_counter() - began) / count * 1e6)
    without, more = min(steps[False]), min(steps[True]) - min(steps[False])
    print(f"a step without the table: {without:.0f} µs; the table: {more:.0f} µs")
    assert more < 0.5 * without
