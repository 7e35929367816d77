"""The twin of vLLM's scheduler: what each step schedules, admits, preempts and finishes. Compiled, allocation-free.

Two versions of one scheduler with continuous batching:

- **V0** (vLLM 0.7.2, the paper; vllm/core/scheduler.py): all blocks of a prompt are allocated at admission, above a
  watermark; a running sequence needs a free block in reach to go on; waiting sequences are admitted even in a step
  that preempted (``Scheduler._schedule_chunked_prefill``). Without chunked prefill, prompts go first: a step prefills
  what can be admitted, whole, and decodes nothing; it decodes only if nobody can be admitted
  (``Scheduler._schedule_default``).
- **V1** (vLLM 0.27–0.33; vllm/v1/core/sched/scheduler.py, ``Scheduler.schedule``): a chunk's blocks are allocated as
  it is scheduled; admission asks whether the whole sequence would fit; no admission in a step that preempted;
  optionally *asynchronous*: a step is scheduled while the one before it runs, so that two are in flight
  (async_scheduler.py, ``AsyncScheduler``).

With chunked prefill both serve running sequences first in admission order, then waiting ones in order without
skipping, and both preempt the youngest running sequence by recomputation.
"""

from __future__ import annotations

import numpy as np

from block.core.arrays import Floats, Int, Ints
from block.core.jit import Index, compiled
from block.core.snapshot import (
    ID,
    MAX_TOKENS,
    NUM_BLOCKS,
    NUM_CACHED_TOKENS,
    NUM_COMPUTED_TOKENS,
    NUM_OUTPUT_PLACEHOLDERS,
    NUM_OUTPUT_TOKENS,
    NUM_PREEMPTIONS,
    NUM_PROMPT_TOKENS,
    NUM_SCHEDULED_NEXT,
    NUM_SCHEDULED_TOKENS,
    NUM_SHARED_BLOCKS,
    TARGET,
)
from block.engine.kv_cache import (
    adopt,
    allocate,
    blocks_at_admission,
    blocks_for,
    blocks_in_reach,
    cache_blocks,
    cached_prefix,
    can_admit,
    deallocate,
    preempt,
)
from block.engine.latency import prefill_time, step_duration
from block.engine.state import (
    ASYNC_SCHEDULING,
    BEGIN,
    BLOCK_SIZE_LOG2,
    ENABLE_CHUNKED_PREFILL,
    END,
    FINISHED_AT,
    FINISHED_CACHED_TOKENS,
    FINISHED_FIRST_TOKEN,
    FINISHED_ID,
    FINISHED_OUTPUT_TOKENS,
    FINISHED_PREEMPTIONS,
    FREE_BLOCKS,
    GONE,
    IS_V1,
    LONG_PREFILL_TOKEN_THRESHOLD,
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
    move_left,
)


@compiled
def chunk_limit(engine: EngineState) -> Int:
    """Most tokens that one sequence may take of a step's budget; a lone sequence has nobody to starve.

    V1: ``long_prefill_token_threshold`` in ``Scheduler.schedule``.
    """
    threshold = engine.settings[LONG_PREFILL_TOKEN_THRESHOLD]
    if threshold > 0 and engine.counters[END] - engine.counters[BEGIN] > 1:
        return threshold
    return engine.settings[MAX_NUM_BATCHED_TOKENS]


@compiled
def step_time(seqs: Ints, start: Int, stop: Int, row: Int, latency_params: Floats) -> float:
    """Seconds that a step takes, without noise: the one in row NUM_SCHEDULED_NEXT (queued) or NUM_SCHEDULED_TOKENS (in
    flight) of columns `start` to `stop`; 0 if it is empty.
    """
    tokens = decodes = decode_kv = 0
    prefill = 0.0
    for column in range(Index(start), Index(stop)):
        chunk = seqs[row, column]
        if chunk == 0:
            continue
        context = seqs[NUM_COMPUTED_TOKENS, column] - seqs[NUM_SCHEDULED_NEXT, column]
        if row == NUM_SCHEDULED_TOKENS:
            context -= chunk
            if context < 0:  # preempted meanwhile: known again if it samples, lost in the middle of a prefill
                total = seqs[NUM_PROMPT_TOKENS, column] + seqs[NUM_OUTPUT_TOKENS, column]
                context = total - chunk if seqs[NUM_OUTPUT_PLACEHOLDERS, column] > 0 else 0
        tokens += chunk
        if chunk == 1:
            decodes += 1
            decode_kv += context + 1
        else:
            prefill += prefill_time(latency_params, chunk, context)
    return step_duration(latency_params, tokens, decodes, decode_kv, prefill)


@compiled
def schedule(engine: EngineState) -> float:
    """Decide a step: row NUM_SCHEDULED_NEXT receives each sequence's tokens. Returns its duration in seconds, 0 if
    nothing is scheduled.
    """
    counters, settings = engine.counters, engine.settings
    admits = settings[ENABLE_CHUNKED_PREFILL] == 1 or _first_waiting_fits(engine)
    waiting = counters[BEGIN] + counters[NUM_RUNNING]  # first column that waited before this step
    budget = settings[MAX_NUM_BATCHED_TOKENS]
    if settings[ENABLE_CHUNKED_PREFILL] == 1 or not admits:
        budget = _schedule_running(engine, budget)
    counters[NUM_STALE] = waiting - counters[BEGIN] - counters[NUM_RUNNING]
    if admits and (settings[IS_V1] == 0 or counters[NUM_STALE] == 0):
        _schedule_waiting(engine, budget, waiting)
    counters[VISIBLE] = counters[END]
    end = counters[BEGIN] + counters[NUM_RUNNING]
    return step_time(engine.seqs, counters[BEGIN], end, NUM_SCHEDULED_NEXT, engine.latency_params)


@compiled
def _first_waiting_fits(engine: EngineState) -> bool:
    """Can the first waiting sequence be admitted now, as a whole?"""
    counters = engine.counters
    first = counters[BEGIN] + counters[NUM_RUNNING]
    if first == counters[END] or counters[NUM_RUNNING] >= engine.settings[MAX_NUM_SEQS]:
        return False
    total = engine.seqs[NUM_PROMPT_TOKENS, first] + engine.seqs[NUM_OUTPUT_TOKENS, first]
    return can_admit(total, total, 0, counters[FREE_BLOCKS], counters[NUM_RUNNING], engine.settings)


@compiled
def _schedule_running(engine: EngineState, budget: Int) -> Int:
    """The running sequences take their tokens in order, as far as the budget goes; returns what is left of it.

    Where blocks are too few, the youngest are preempted, be it the one itself. V1: the first loop of
    ``Scheduler.schedule``. V0: ``Scheduler._schedule_running``.
    """
    seqs, counters, settings = engine.seqs, engine.counters, engine.settings
    limit = chunk_limit(engine)
    place = counters[BEGIN]
    end = place + counters[NUM_RUNNING]
    while place < end and budget > 0:
        column = Index(place)
        place += 1
        total = seqs[NUM_PROMPT_TOKENS, column] + seqs[NUM_OUTPUT_TOKENS, column]
        placeholders = seqs[NUM_OUTPUT_PLACEHOLDERS, column]
        computed = seqs[NUM_COMPUTED_TOKENS, column]
        most = seqs[NUM_PROMPT_TOKENS, column] + seqs[MAX_TOKENS, column]
        if placeholders > 0 and computed + 2 - placeholders >= most:
            continue  # the last token that it may have is in flight already (V1: "async scheduling", `schedule`)
        chunk = min(total + placeholders - computed, limit, budget, settings[MAX_MODEL_LEN] - 1 - computed)
        if chunk <= 0:
            continue
        wanted = max(blocks_for(computed + chunk, settings) - seqs[NUM_BLOCKS, column], 0)
        reach = blocks_in_reach(computed, total, wanted, settings)
        while reach > counters[FREE_BLOCKS] and end >= place:
            end -= 1
            preempt(engine, end)
        if end < place:
            break  # it was the youngest left and has preempted itself
        allocate(engine, np.int64(column), wanted)
        cache_blocks(engine, np.int64(column), min(computed + chunk, total))
        seqs[NUM_COMPUTED_TOKENS, column] = computed + chunk
        seqs[NUM_SCHEDULED_NEXT, column] = chunk
        if computed + chunk == total + placeholders:
            seqs[NUM_OUTPUT_PLACEHOLDERS, column] = placeholders + 1
        budget -= chunk
    counters[NUM_RUNNING] = end - counters[BEGIN]
    return budget


@compiled
def _schedule_waiting(engine: EngineState, budget: Int, waiting: Int) -> None:
    """The waiting sequences, from column `waiting` on, are admitted in order while budget, seats and blocks last.

    V1: the second loop of ``Scheduler.schedule``. V0: ``Scheduler._schedule_prefills``.
    """
    seqs, counters, settings = engine.seqs, engine.counters, engine.settings
    limit = chunk_limit(engine)
    while waiting < counters[END] and budget > 0 and counters[NUM_RUNNING] < settings[MAX_NUM_SEQS]:
        total = seqs[NUM_PROMPT_TOKENS, waiting] + seqs[NUM_OUTPUT_TOKENS, waiting]
        cached, shared = cached_prefix(engine, waiting)
        chunk = min(total - cached, limit, budget)
        computed = cached + chunk
        if not can_admit(total, computed, shared, counters[FREE_BLOCKS], counters[NUM_RUNNING], settings):
            break
        if computed < total and settings[ENABLE_CHUNKED_PREFILL] == 0:
            break
        column = counters[BEGIN] + counters[NUM_RUNNING]
        if waiting > column:
            move_left(engine, waiting, column)  # V0: past those preempted in this step
        found = cached >> settings[BLOCK_SIZE_LOG2]
        adopt(engine, column, found, shared)
        allocate(engine, column, blocks_at_admission(total, computed, settings) - found)
        cache_blocks(engine, column, computed)
        if seqs[NUM_PREEMPTIONS, column] == 0:
            seqs[NUM_CACHED_TOKENS, column] = cached
        seqs[NUM_SHARED_BLOCKS, column] = shared
        seqs[NUM_COMPUTED_TOKENS, column] = computed
        seqs[NUM_SCHEDULED_NEXT, column] = chunk
        if computed == total:
            seqs[NUM_OUTPUT_PLACEHOLDERS, column] = 1
        budget -= chunk
        counters[NUM_RUNNING] += 1
        waiting += 1


@compiled
def remove(engine: EngineState, column: Int) -> None:
    """A sequence, running or waiting, leaves and returns its blocks. Those to the left of it move to the right."""
    counters = engine.counters
    deallocate(engine, column)
    if column < counters[BEGIN] + counters[NUM_RUNNING]:
        counters[NUM_RUNNING] -= 1
    elif column < counters[BEGIN] + counters[NUM_RUNNING] + counters[NUM_STALE]:
        counters[NUM_STALE] -= 1
    move_left(engine, column, counters[BEGIN])
    counters[BEGIN] += 1


@compiled
def _remove_aborted(engine: EngineState) -> None:
    """Aborted sequences leave. What the steps in flight compute for them is lost, though it takes its time.

    V1: ``Scheduler.finish_requests``, which the engine core calls between two steps. (It frees those of one call in
    the order of a set; here they are freed in the order in which they were aborted.)
    """
    for i in range(engine.counters[NUM_ABORTED]):
        for column in range(engine.counters[BEGIN], engine.counters[END]):
            if engine.seqs[TARGET, column] == GONE - i:
                remove(engine, column)
                break
    engine.counters[NUM_ABORTED] = 0


@compiled
def _update_from_output(engine: EngineState, found: Int) -> Int:
    """Apply the output of the step in flight: tokens, first-token times, finishes. V1: the method of the same name."""
    seqs, counters, finished = engine.seqs, engine.counters, engine.finished
    now = engine.times[STEP_ENDS]
    begin, running = counters[BEGIN], counters[NUM_RUNNING]
    for column in range(Index(begin), Index(begin + running + counters[NUM_STALE])):
        if seqs[NUM_SCHEDULED_TOKENS, column] == 0:
            continue
        seqs[NUM_SCHEDULED_TOKENS, column] = 0
        samples = seqs[NUM_OUTPUT_PLACEHOLDERS, column] > (1 if seqs[NUM_SCHEDULED_NEXT, column] > 0 else 0)
        if not samples:
            continue
        seqs[NUM_OUTPUT_PLACEHOLDERS, column] -= 1
        seqs[NUM_OUTPUT_TOKENS, column] += 1
        if engine.settings[ASYNC_SCHEDULING] == 1 and np.int64(column) < begin + running:
            known = seqs[NUM_COMPUTED_TOKENS, column] - seqs[NUM_OUTPUT_PLACEHOLDERS, column]
            cache_blocks(engine, np.int64(column), known)  # V1: ``AsyncScheduler._update_request_with_output``
        if np.isnan(engine.first_token_time[column]):
            engine.first_token_time[column] = now
        output = seqs[NUM_OUTPUT_TOKENS, column]
        if output >= seqs[TARGET, column] or seqs[NUM_PROMPT_TOKENS, column] + output >= engine.settings[MAX_MODEL_LEN]:
            finished[FINISHED_ID, found] = seqs[ID, column]
            finished[FINISHED_FIRST_TOKEN, found] = engine.first_token_time[column]
            finished[FINISHED_AT, found] = now
            finished[FINISHED_PREEMPTIONS, found] = seqs[NUM_PREEMPTIONS, column]
            finished[FINISHED_OUTPUT_TOKENS, found] = output
            finished[FINISHED_CACHED_TOKENS, found] = seqs[NUM_CACHED_TOKENS, column]
            found += 1
            remove(engine, np.int64(column))
    counters[NUM_STALE] = 0
    return found


@compiled
def _promote_queued(engine: EngineState) -> None:
    """The step in row NUM_SCHEDULED_NEXT becomes the step in flight."""
    seqs, counters = engine.seqs, engine.counters
    for column in range(Index(counters[BEGIN]), Index(counters[BEGIN] + counters[NUM_RUNNING])):
        seqs[NUM_SCHEDULED_TOKENS, column] = seqs[NUM_SCHEDULED_NEXT, column]
        seqs[NUM_SCHEDULED_NEXT, column] = 0
    counters[QUEUED] = 0


@compiled
def begin_step(engine: EngineState, now: float) -> None:
    """Start the next step at `now`, or leave the engine idle."""
    counters, times = engine.counters, engine.times
    if counters[QUEUED] == 1:
        duration = times[QUEUED_DURATION]
    else:
        duration = schedule(engine)
        if duration == 0.0 and counters[END] > counters[BEGIN]:
            # Everything that ran was preempted and nothing could be admitted beside it: the scheduler just runs again.
            duration = schedule(engine)
    _promote_queued(engine)
    if duration == 0.0:
        times[STEP_ENDS] = np.inf
        return
    times[STEP_STARTED] = now
    times[STEP_ENDS] = now + duration * engine.noise[counters[NUM_STEPS] % engine.noise.shape[0]]
    counters[NUM_STEPS] += 1
    if engine.settings[ASYNC_SCHEDULING] == 1:
        times[QUEUED_DURATION] = schedule(engine)
        counters[QUEUED] = 1 if times[QUEUED_DURATION] > 0.0 else 0


@compiled
def end_step(engine: EngineState, found: Int) -> Int:
    """End the step in flight and begin none; `found` and the value returned are those of `complete_step`."""
    if engine.counters[NUM_ABORTED] > 0:
        _remove_aborted(engine)
    return _update_from_output(engine, found)


@compiled
def complete_step(engine: EngineState, found: Int) -> Int:
    """End the step in flight and begin the next.

    Finished sequences are written to `engine.finished` from column `found` on; returns the new `found`.
    """
    now = engine.times[STEP_ENDS]
    found = end_step(engine, found)
    begin_step(engine, now)
    return found
