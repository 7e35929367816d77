"""Runs of decode-only steps: as many as nothing but decoding happens in, completed at once.

No finish, no admission, no prefill, no preemption: each running sequence gets a token, and now and then a KV block.
What such steps may do is what `block.engine.scheduler` would do, which says it.

They are timed in two ways, which agree but for rounding. An engine's steps have noise and end one by one
(`next_decode_run`): exactly what as many `complete_step` would do. A forecast has none, and the sum of its steps has a
closed form (`skip_decode_run`), which costs the same for a step as for a thousand.
"""

from __future__ import annotations

import numpy as np

from block.core.arrays import Int
from block.core.jit import Index, compiled
from block.core.snapshot import (
    NUM_BLOCKS,
    NUM_COMPUTED_TOKENS,
    NUM_OUTPUT_PLACEHOLDERS,
    NUM_OUTPUT_TOKENS,
    NUM_PROMPT_TOKENS,
    NUM_SCHEDULED_TOKENS,
    TARGET,
)
from block.engine.kv_cache import believed_prefix, blocks_for, can_admit, spare_block
from block.engine.latency import decode_run_time, linear_time, step_duration
from block.engine.scheduler import chunk_limit
from block.engine.state import (
    ASYNC_SCHEDULING,
    BEGIN,
    CACHE_BLOCKS,
    ENABLE_PREFIX_CACHING,
    END,
    FREE_BLOCKS,
    MAX_MODEL_LEN,
    MAX_NUM_BATCHED_TOKENS,
    MAX_NUM_SEQS,
    NUM_ABORTED,
    NUM_RUNNING,
    NUM_STALE,
    NUM_STEPS,
    QUEUED,
    QUEUED_DURATION,
    STEP_ENDS,
    STEP_STARTED,
    VISIBLE,
    EngineState,
)


@compiled
def _steps_to_finish(engine: EngineState) -> tuple[Int, Int]:
    """How many steps the running sequences may go on until one finishes at the end of the next, and their context.

    -1 if not all of them, and nobody else, have a token in flight that is neither the first nor of a longer chunk.
    """
    seqs, counters, settings = engine.seqs, engine.counters, engine.settings
    begin = counters[BEGIN]
    end = begin + counters[NUM_RUNNING]
    if (
        begin == end
        or counters[NUM_STALE] > 0
        or counters[NUM_ABORTED] > 0
        or seqs[NUM_SCHEDULED_TOKENS, Index(end - 1)] != 1
    ):
        return np.int64(-1), np.int64(0)
    ahead = settings[ASYNC_SCHEDULING]
    odd = np.int64(0)
    least = np.int64(1)
    left = np.int64(settings[MAX_MODEL_LEN])
    kv = np.int64(0)
    for column in range(Index(begin), Index(end)):
        output = seqs[NUM_OUTPUT_TOKENS, column]
        odd |= (seqs[NUM_SCHEDULED_TOKENS, column] ^ 1) | (seqs[NUM_OUTPUT_PLACEHOLDERS, column] ^ (1 + ahead))
        least = min(least, output)
        room = settings[MAX_MODEL_LEN] - seqs[NUM_PROMPT_TOKENS, column] - output
        left = min(left, seqs[TARGET, column] - output, room)
        kv += seqs[NUM_COMPUTED_TOKENS, column]
    if odd != 0 or least < 1:  # a chunk, or a first token, whose time must be noted
        return np.int64(-1), np.int64(0)
    return left - 1, kv


@compiled
def _may_admit(engine: EngineState) -> bool:
    """Might a step that decodes all running sequences admit the first waiting one?"""
    counters, settings = engine.counters, engine.settings
    running = counters[NUM_RUNNING]
    first = counters[BEGIN] + running
    if first == counters[END] or running >= settings[MAX_NUM_SEQS]:
        return False
    total = engine.seqs[NUM_PROMPT_TOKENS, first] + engine.seqs[NUM_OUTPUT_TOKENS, first]
    cached, shared = believed_prefix(engine, first)
    chunk = min(total - cached, chunk_limit(engine), settings[MAX_NUM_BATCHED_TOKENS] - running)
    return chunk > 0 and can_admit(total, cached + chunk, shared, counters[FREE_BLOCKS], running, settings)


@compiled
def _blocks_last(engine: EngineState, steps: Int) -> bool:
    """Are there blocks enough for the running sequences to decode for so many steps, the last of them included?"""
    seqs, counters, settings = engine.seqs, engine.counters, engine.settings
    wanted = np.int64(0)
    for column in range(Index(counters[BEGIN]), Index(counters[BEGIN] + counters[NUM_RUNNING])):
        held = seqs[NUM_BLOCKS, column]
        wanted += max(blocks_for(seqs[NUM_COMPUTED_TOKENS, column] + steps, settings) - held, 0)
    return bool(wanted <= counters[FREE_BLOCKS] - spare_block(settings))


@compiled
def decode(engine: EngineState, steps: Int) -> None:
    """Complete so many decode-only steps; the engine's times are not touched. Not for an engine that knows its blocks
    (`next_decode_run`).
    """
    if steps == 0:
        return
    seqs, counters = engine.seqs, engine.counters
    for column in range(Index(counters[BEGIN]), Index(counters[BEGIN] + counters[NUM_RUNNING])):
        computed = seqs[NUM_COMPUTED_TOKENS, column] + steps
        seqs[NUM_OUTPUT_TOKENS, column] += steps
        seqs[NUM_COMPUTED_TOKENS, column] = computed
        taken = max(blocks_for(computed, engine.settings) - seqs[NUM_BLOCKS, column], 0)
        seqs[NUM_BLOCKS, column] += taken
        counters[FREE_BLOCKS] -= taken
    counters[NUM_STEPS] += steps
    counters[VISIBLE] = counters[END]


@compiled
def decode_times(engine: EngineState, kv: Int, steps: Int, until: float) -> tuple[Int, float, float]:
    """Of `steps` decode-only steps as many as end by `until`; when the next then began, and when it ends.

    kv: tokens of KV that the step in flight leaves.
    """
    params, noise = engine.latency_params, engine.noise
    running = engine.counters[NUM_RUNNING]
    started, ends = engine.times[STEP_STARTED], engine.times[STEP_ENDS]
    factor = engine.counters[NUM_STEPS] % noise.shape[0]
    done = np.int64(0)
    while done < steps and ends <= until:
        done += 1
        kv += running
        started = ends
        ends = started + step_duration(params, running, running, kv, 0.0) * noise[Index(factor)]
        factor += 1
        if factor == noise.shape[0]:
            factor = 0
    return done, started, ends


@compiled
def next_decode_run(engine: EngineState) -> tuple[Int, float, float]:
    """How many decode-only steps come next; then when the step behind them begins and ends.

    May stop short of the longest such run; is 0 where scheduling is asynchronous, and with a prefix cache, where the
    order matters in which sequences take blocks.
    """
    times = engine.times
    none = (np.int64(0), times[STEP_STARTED], times[STEP_ENDS])
    if engine.settings[ASYNC_SCHEDULING] == 1 or engine.settings[ENABLE_PREFIX_CACHING] == CACHE_BLOCKS:
        return none
    steps, kv = _steps_to_finish(engine)
    if steps < 0 or (steps > 0 and _may_admit(engine)):
        return none
    if linear_time(engine.latency_params, engine.counters[NUM_RUNNING]) <= 0.0:
        return none
    if not _blocks_last(engine, steps):
        low = np.int64(0)
        while low < steps:  # the most for which the blocks last
            middle = (low + steps + 1) // 2
            if _blocks_last(engine, middle):
                low = middle
            else:
                steps = middle - 1
    return decode_times(engine, kv, steps, np.inf)


@compiled
def skip_decode_run(engine: EngineState) -> None:
    """Complete at once as many decode-only steps as come next, without noise; times[STEP_STARTED] is not kept.

    May stop short of the longest such run.
    """
    counters, times, params = engine.counters, engine.times, engine.latency_params
    ahead = engine.settings[ASYNC_SCHEDULING]
    if ahead == 1 and counters[QUEUED] == 0:
        return
    left, kv = _steps_to_finish(engine)
    steps = left - ahead
    if steps < 2 or _may_admit(engine):
        return
    while steps >= 2 and not _blocks_last(engine, steps):
        steps //= 2
    if steps < 2:
        return
    decode(engine, steps)
    running = counters[NUM_RUNNING]
    times[STEP_ENDS] += decode_run_time(params, running, kv + (1 - ahead) * running, steps)
    if ahead == 1:
        times[QUEUED_DURATION] = decode_run_time(params, running, kv + steps * running, 1)
