"""What the tests of the core are built from: latency models with round numbers, requests, engines and whole runs.

Nothing here computes an expectation; `oracle` does.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numba import config as numba_config

from block.cluster.simulation import Simulation
from block.core.arrays import Floats
from block.core.snapshot import Snapshot
from block.core.types import Request, RequestRecord
from block.dispatch.config import DispatchConfig
from block.dispatch.core import Dispatcher, Observer
from block.dispatch.policies import Policy
from block.engine.batch import EngineBatch, EngineSpec, Finished
from block.engine.config import EngineConfig
from block.engine.engine import Engine
from block.engine.latency import LatencyModel
from block.engine.predictor import Predictor
from block.engine.prefix_table import PrefixTable

COMPILED = not numba_config.DISABLE_JIT

# The numbers of `round_latency`, for oracles to compute with.
FIXED = 0.010
PER_TOKEN = 0.001
DECODE = 0.002
PER_SEQUENCE = 0.0005
PER_KV = 0.00001
PREFILL = 0.0001
PREFILL_BY_CONTEXT = 0.000001


def examples(compiled: int, plain: int) -> int:
    """So many hypothesis examples where the engine is compiled, so many where it is plain Python."""
    return compiled if COMPILED else plain


def constant_latency(step: float = 1.0) -> LatencyModel:
    """Every step takes `step` seconds, whatever is in it."""
    return LatencyModel(
        linear=np.full(4097, step),
        decode_base=0.0,
        decode_per_sequence=0.0,
        decode_per_kv=0.0,
        prefill_chunks=np.array([0.0, 1.0]),
        prefill_contexts=np.array([0.0, 1.0]),
        prefill=np.zeros((2, 2)),
    )


def round_latency() -> LatencyModel:
    """A step takes FIXED + PER_TOKEN tokens + (DECODE + PER_SEQUENCE sequences + PER_KV context) for its decodes
    + Σ chunk (PREFILL + PREFILL_BY_CONTEXT context) for its prompts.
    """
    chunks, contexts = np.array([0.0, 1000.0]), np.array([0.0, 1000.0])
    return LatencyModel(
        linear=FIXED + PER_TOKEN * np.arange(4097).astype(np.float64),
        decode_base=DECODE,
        decode_per_sequence=PER_SEQUENCE,
        decode_per_kv=PER_KV,
        prefill_chunks=chunks,
        prefill_contexts=contexts,
        prefill=chunks[:, None] * (PREFILL + PREFILL_BY_CONTEXT * contexts[None, :]),
    )


def request(
    id_: int,
    prompt: int,
    output: int,
    arrival: float = 0.0,
    predicted: int | None = None,
    max_tokens: int | None = None,
) -> Request:
    return Request(id_, arrival, prompt, output, output if predicted is None else predicted, max_tokens)


def engine_config(version: str, **changes: Any) -> EngineConfig:
    """A small engine: 4 tokens a block, 16 tokens a step, no watermark."""
    settings: dict[str, Any] = {
        "version": version,
        "max_num_seqs": 4,
        "max_num_batched_tokens": 16,
        "max_model_len": 60,
        "block_size": 4,
        "watermark": 0.0,
    }
    return EngineConfig(**(settings | changes))


def lone_engine(config: EngineConfig, latency: LatencyModel, total_blocks: int, noise: Floats | None = None) -> Engine:
    """An engine in a batch of its own, with so many usable KV blocks."""
    return Engine(EngineBatch([EngineSpec(config.settings(total_blocks), latency, noise)]), 0)


def predictor_for(config: EngineConfig, latency: LatencyModel, total_blocks: int, **options: Any) -> Predictor:
    """What forecasts for such an engine."""
    return Predictor(config.settings(total_blocks), latency, **options)


@dataclass
class Replay:
    """An engine fed with requests at their arrivals; `steps` looks at it at every integer time at which it runs."""

    engine: Engine
    requests: Sequence[Request]
    finished: list[Finished]

    def steps(self) -> Iterator[tuple[float, Snapshot]]:
        """(time, snapshot) just after each step's beginning, with a latency of one second a step, until all is done."""
        pending = sorted(self.requests, key=lambda r: r.arrival)
        last = -1.0
        now = 0.0
        while pending or self.engine.step_ends < float("inf"):
            while pending and pending[0].arrival <= now:
                at = pending[0].arrival
                self.finished.extend(self.engine.advance(at))
                self.engine.add(pending.pop(0), at)
            self.finished.extend(self.engine.advance(now))
            seen = self.engine.snapshot(0, now)
            if seen.step_started > last:
                last = seen.step_started
                yield now, seen
            now += 1.0


def next_finish(engine: Engine) -> float:
    """When the next sequence of an engine finishes if nothing more arrives; inf: none does. Found out on a copy."""
    found = engine.copy().batch.advance_all(math.inf)
    return found[0].finished if found else math.inf


def replay(config: EngineConfig, total_blocks: int, requests: Sequence[Request]) -> Replay:
    """Steps of one second, so that step n begins when the clock reads n."""
    return Replay(lone_engine(config, constant_latency(), total_blocks), requests, [])


@dataclass
class Run:
    """A finished run."""

    dispatcher: Dispatcher
    engines: list[Engine]

    @property
    def records(self) -> list[RequestRecord]:
        return sorted(self.dispatcher.history.records, key=lambda record: record.request.id)

    @property
    def chosen(self) -> list[int]:
        return [decision.instance_id for _, decision, _ in self.dispatcher.history.decisions]


def simulate(
    requests: Sequence[Request],
    policy: Policy,
    *,
    config: EngineConfig,
    latency: LatencyModel,
    instances: int,
    total_blocks: int,
    seed: int = 0,
    noise: float = 0.0,
    delay_s: float = 0.0,
    dispatch: DispatchConfig | None = None,
    compressed: bool = True,
    observers: Sequence[Observer] = (),
) -> Run:
    """Replay `requests` on simulated instances in virtual time."""
    rng = np.random.default_rng(seed)
    factors = [rng.normal(1.0, noise, 997).clip(0.5) if noise else None for _ in range(instances)]
    batch = EngineBatch([EngineSpec(config.settings(total_blocks), latency, factor) for factor in factors])
    simulation = Simulation(batch, delay_s)
    dispatcher = Dispatcher(
        instances,
        policy,
        predictor_for(config, latency, total_blocks, compressed=compressed),
        dispatch or DispatchConfig(),
        random.Random(seed),
        snapshot_many=simulation.snapshot_many,
        delay_s=delay_s,
        observers=observers,
    )
    simulation.run((one, dispatcher) for one in requests)
    return Run(dispatcher, [Engine(batch, row) for row in range(instances)])


def poisson(count: int, rate: float, seed: int, *, prompt: int = 200, output: int = 100) -> list[Request]:
    """Requests with exponential gaps and lengths (means `prompt` and `output` tokens)."""
    rng = np.random.default_rng(seed)
    arrivals = np.cumsum(rng.exponential(1 / rate, count)).tolist()
    prompts = (1 + rng.exponential(prompt - 1, count).astype(int).clip(0, 4 * prompt)).tolist()
    outputs = (1 + rng.exponential(output - 1, count).astype(int).clip(0, 4 * output)).tolist()
    return [request(i, p, o, a) for i, (p, o, a) in enumerate(zip(prompts, outputs, arrivals, strict=True))]


def contents(table: PrefixTable) -> dict[int, tuple[int, int]]:
    """Of each hash in a table, how many blocks have it, and how many of these are in use."""
    full = table.hashes != 0
    counts = zip(table.hashes[full].tolist(), table.counts[full].tolist(), strict=True)
    return {block_hash: divmod(count, 1 << 32) for block_hash, count in counts}
