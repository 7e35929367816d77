"""A latency model from a live engine: its own step times under a designed load, in about two minutes.

The load visits what a step can be made of: decode batches of every size over growing contexts, prompt chunks over short
and long contexts, and mixtures of both. The engine's buffer says what each step computed and how long it took, from its
start to the start of the next, so that everything a step costs is in it. The fit is non-negative least squares
on relative errors; a fifth of the steps is held out, and reported on.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import numpy as np

from block.backends.instance import VLLMInstance
from block.core.arrays import Floats
from block.core.clock import Clock
from block.core.types import Request, RequestRecord
from block.engine.config import EngineSettings
from block.engine.latency import LatencyModel, table
from block.hardware.profiling.errors import RelativeError, relative_error
from block.vllm_plugin.state_buffer import StepTime

HELD_OUT = 0.2
MIN_STEPS = 200


class TooFewSteps(RuntimeError):
    """The engine made too few steps to fit a model; the message says how many."""


@dataclass(frozen=True)
class StepFit:
    """A latency model and its relative errors on steps that it was not fitted to."""

    model: LatencyModel
    steps: int
    error: RelativeError
    total_error: float  # of the sum of all held-out durations, signed


async def drive(
    instance: VLLMInstance,
    settings: EngineSettings,
    seconds: float,
    progress: Callable[[float], None] = lambda share: None,
) -> Floats:
    """Put the designed load on an engine that has nothing else to do, and return its timed steps, float[n, STEP]."""
    steps: list[Floats] = []
    seen = (await instance.step_times(0))[0]
    rng = np.random.default_rng(0)
    number = 0
    clock = Clock()

    async def ask(prompt: int, output: int) -> None:
        nonlocal number
        number += 1
        request = Request(number, clock.now(), prompt, output, output)
        await instance.generate(RequestRecord(request), lambda record, now: None)

    async def collect() -> None:
        nonlocal seen
        while True:
            await clock.sleep(0.2)
            seen, more = await instance.step_times(seen)
            steps.append(more)
            progress(min(clock.now() / seconds, 1.0))

    collector = asyncio.create_task(collect())
    try:
        for load in (_batches, _chunks, _mixture):
            await load(ask, settings, rng, clock, clock.now() + seconds / 3)
        await clock.sleep(0.5)
    finally:
        collector.cancel()
    return np.concatenate(steps) if steps else np.empty((0, len(StepTime._fields)))


Ask = Callable[[int, int], Awaitable[None]]


async def _batches(ask: Ask, settings: EngineSettings, rng: np.random.Generator, clock: Clock, until: float) -> None:
    """Decode batches of all sizes, from the smallest to the largest and again, over random contexts."""
    sizes = [size for size in (1, 2, 4, 8, 16, 32, 64, 128, 256) if size < settings.max_num_seqs] + [
        settings.max_num_seqs
    ]
    room = settings.total_blocks * settings.block_size
    while clock.now() < until:
        for size in sizes:
            longest = min(settings.max_model_len, room // size) - 50
            prompts = rng.integers(2, max(longest // 2, 3), size)
            await asyncio.gather(*(ask(int(prompt), 40) for prompt in prompts))
            if clock.now() >= until:
                return


async def _chunks(ask: Ask, settings: EngineSettings, rng: np.random.Generator, clock: Clock, until: float) -> None:
    """Prompts of all lengths, one at a time."""
    longest = min(settings.max_model_len, settings.total_blocks * settings.block_size) - 8
    while clock.now() < until:
        length = int(np.exp(rng.uniform(np.log(8), np.log(longest))))
        await ask(length, 2)


async def _mixture(ask: Ask, settings: EngineSettings, rng: np.random.Generator, clock: Clock, until: float) -> None:
    """Requests of all kinds, about half as many at once as the engine serves."""
    longest = min(settings.max_model_len, settings.total_blocks * settings.block_size // 4)
    slots = asyncio.Semaphore(max(settings.max_num_seqs // 2, 1))

    async def one() -> None:
        async with slots:
            await ask(int(np.exp(rng.uniform(np.log(8), np.log(longest // 2)))), int(rng.integers(2, 64)))

    running: set[asyncio.Task[None]] = set()
    while clock.now() < until:
        while len(running) < settings.max_num_seqs:
            task = asyncio.create_task(one())
            running.add(task)
            task.add_done_callback(running.discard)
        await clock.sleep(0.05)
    await asyncio.gather(*running)


def fit_steps(steps: Floats, settings: EngineSettings, source: dict[str, object], seed: int = 0) -> StepFit:
    """Fit a LatencyModel to timed steps, float[n, STEP]. TooFewSteps under MIN_STEPS."""
    if len(steps) < MIN_STEPS:
        raise TooFewSteps(f"{len(steps)} timed steps, at least {MIN_STEPS} are needed: drive the engine for longer")
    rng = np.random.default_rng(seed)
    held_out = rng.random(len(steps)) < HELD_OUT
    knots = _knots(settings.max_num_batched_tokens)
    train = steps[~held_out]
    design, actual = _design(train, knots), train[:, -1]
    weights = 1 / actual
    for _ in range(5):  # relative to what is expected, not to what came: noise must not pull the model down
        coefficients = _non_negative(design * weights[:, None], actual * weights)
        weights = 1 / np.maximum(design @ coefficients, 1e-6)
    predicted = _design(steps[held_out], knots) @ coefficients
    actual = steps[held_out, -1]
    model = _model(coefficients, knots, settings, {**source, "steps": len(steps), "held_out": int(held_out.sum())})
    return StepFit(
        model,
        len(steps),
        relative_error(predicted, actual),
        float(predicted.sum() / actual.sum() - 1),
    )


def _knots(budget: int) -> Floats:
    """Token counts between which the fixed part of a step is linear."""
    return np.array([*(knot for knot in (1, 8, 32, 128, 512, 2048) if knot < budget), budget], dtype=np.float64)


def _design(steps: Floats, knots: Floats) -> Floats:
    """float[n, k]: a column per coefficient: `linear` at each knot; decode per step, sequence, KV token; prefill."""
    tokens, decodes, decode_kv, _, chunk_context, chunk_squared, _ = steps.T
    hats = np.stack([np.interp(tokens, knots, unit) for unit in np.eye(len(knots))], axis=1)
    return np.column_stack([hats, decodes > 0, decodes, decode_kv, chunk_context, chunk_squared])


def _non_negative(design: Floats, target: Floats) -> Floats:
    """Least squares without negative coefficients: the most negative one is dropped until there is none."""
    scale = np.linalg.norm(design, axis=0)
    kept = list(np.flatnonzero(scale > 0))
    while True:
        solution = np.linalg.lstsq(design[:, kept] / scale[kept], target, rcond=None)[0] / scale[kept]
        worst = int(np.argmin(solution))
        if solution[worst] >= 0:
            break
        kept.pop(worst)
    coefficients = np.zeros(design.shape[1])
    coefficients[kept] = solution
    return coefficients


def _model(coefficients: Floats, knots: Floats, settings: EngineSettings, source: dict[str, object]) -> LatencyModel:
    linear = coefficients[: len(knots)]
    base, per_sequence, per_kv, by_context, squared = coefficients[len(knots) :]
    budget = settings.max_num_batched_tokens
    chunks = np.array([*(2**i for i in range(20) if 2**i < budget), budget], dtype=np.float64)
    contexts = np.array([0.0, float(settings.max_model_len)])
    return LatencyModel(
        linear=table(knots, linear),
        decode_base=float(base),
        decode_per_sequence=float(per_sequence),
        decode_per_kv=float(per_kv),
        prefill_chunks=chunks,
        prefill_contexts=contexts,
        prefill=by_context * chunks[:, None] * contexts + squared * chunks[:, None] ** 2,
        source=source,
    )
