"""The twin of vLLM's scheduler: what each step schedules, admits, preempts and finishes. Compiled, allocation-free.

Two versions of one scheduler with continuous batching:

- **V0** (vLLM 0.7.2, the paper): all blocks of a prompt are allocated at admission, above a watermark; a running
  sequence needs a free block in reach to go on; waiting sequences are admitted even in a step that preempted.
  Without chunked prefill, prompts go first: a step prefills what can be admitted, whole, and decodes nothing; it
  decodes only if nobody can be admitted.
- **V1** (vLLM 0.27–0.33): a chunk's blocks are allocated as it is scheduled; admission asks whether the whole sequence
  would fit; no admission in a step that preempted; optionally *asynchronous*: a step is scheduled while the one before
  it runs, so that two are in flight.

With chunked prefill both serve running sequences first in admission order, then waiting ones in order without
skipping, and both preempt the youngest running sequence by recomputation. Prefix caching is off, as in the paper.

The state of an engine is four arrays:

- ``seqs``  int64[FIELDS, capacity]: columns HEAD … TAIL − 1 are live, the first RUNNING of them run, the rest wait. A
  preempted sequence is the last that runs and becomes the first that waits: only the boundary moves.
- ``firsts`` float64[capacity]: when each sequence yielded its first token; NaN before.
- ``state`` int64[STATE], ``times`` float64[TIMES]: see the constants.
"""

from __future__ import annotations

import numpy as np

from block.core.arrays import Floats, Int, Ints
from block.core.jit import Index, compiled
from block.core.snapshot import (
    BLOCKS,
    CHUNK,
    COMPUTED,
    FIELDS,
    ID,
    MAX_TOKENS,
    NEXT,
    OUTPUT,
    PENDING,
    PREEMPTED,
    PROMPT,
    TARGET,
)
from block.engine.latency import decode_time, linear_time, prefill_time

# Entries of `state`.
HEAD = 0  # first live column
RUNNING = 1  # running sequences
TAIL = 2  # one past the last live column
FREE = 3  # free KV blocks
STALE = 4  # preempted sequences, first of the waiting ones, with a token still in flight
QUEUED = 5  # 1 if row NEXT holds a scheduled step
VISIBLE = 6  # TAIL when `schedule` last ran: later columns are not yet known to the scheduler
STEPS = 7  # steps begun
PREEMPTIONS = 8  # preemptions so far
ABORTED = 9  # live columns whose row TARGET says GONE
RUN = 10  # steps of mere decoding that come next, the one in flight included
HALT = 11  # HALTING: no step is begun when the one in flight ends; HALTED: it has ended
HELD = 12  # blocks that no sequence here has, and that are not free
STATE = 13

HALTING, HALTED = 1, 2

GONE = -1  # as a TARGET: aborted, to be removed when the step in flight ends

# Entries of `times`.
STARTED = 0  # when the step in flight began
ENDS = 1  # when it ends; inf when the engine is idle
QUEUED_FOR = 2  # duration of the queued step
EVENT = 3  # when the first step ends that does more than decode; inf when the engine is idle
EVENT_STARTED = 4  # when it begins
TIMES = 5

IDLE = (np.nan, np.inf, 0.0, np.inf, np.nan)  # the times of an engine that has nothing to do

# Entries of `limits`.
V1 = 0  # 1: V1 semantics, 0: V0
ASYNC = 1  # 1: asynchronous scheduling (V1 only)
MAX_NUM_SEQS = 2
MAX_NUM_BATCHED_TOKENS = 3
MAX_MODEL_LEN = 4
BLOCK_SIZE = 5  # a power of two
WATERMARK = 6  # blocks that admission leaves free
LONG_PREFILL = 7  # most tokens of one prompt in a step while others want the budget; 0: no limit
RESERVE_FULL = 8  # 1: V1 admits a sequence only if all of it would fit
BLOCK_SHIFT = 9  # log2 of the block size
CHUNKED = 10  # 0: V0 without chunked prefill; its token budget holds any prompt
LIMITS = 11

# Rows of `done`: what `complete_step` reports of each finished sequence.
DONE_ID = 0
DONE_FIRST = 1
DONE_AT = 2
DONE_PREEMPTED = 3
DONE_OUTPUT = 4
DONE = 5


@compiled
def blocks(tokens: Int, limits: Ints) -> Int:
    """KV blocks that hold `tokens` tokens."""
    return (tokens + limits[BLOCK_SIZE] - 1) >> limits[BLOCK_SHIFT]


@compiled
def fits(tokens: Int, chunk: Int, free: Int, running: Int, limits: Ints) -> bool | np.bool_:
    """May a waiting sequence of `tokens` tokens, `chunk` of them now, be admitted beside `running` others?"""
    if limits[V1] == 0:
        return free - blocks(tokens, limits) >= limits[WATERMARK]
    watermark = limits[WATERMARK] if running > 0 else 0
    reserved = min(tokens, limits[MAX_MODEL_LEN]) if limits[RESERVE_FULL] == 1 else chunk
    return blocks(reserved, limits) + watermark <= free


@compiled
def chunk_limit(state: Ints, limits: Ints) -> Int:
    """Most tokens that one sequence may take of a step's budget; a lone sequence has nobody to starve."""
    if limits[LONG_PREFILL] > 0 and state[TAIL] - state[HEAD] > 1:
        return limits[LONG_PREFILL]
    return limits[MAX_NUM_BATCHED_TOKENS]


@compiled
def step_time(seqs: Ints, start: Int, stop: Int, row: Int, packed: Floats) -> float:
    """Duration of the step in row NEXT (queued) or CHUNK (in flight) of columns `start` to `stop`; 0 if it is empty."""
    tokens = decodes = decode_kv = 0
    prefill = 0.0
    for column in range(Index(start), Index(stop)):
        chunk = seqs[row, column]
        if chunk == 0:
            continue
        context = seqs[COMPUTED, column] - seqs[NEXT, column]
        if row == CHUNK:
            context -= chunk
            if context < 0:  # preempted meanwhile: known again if it samples, lost in the middle of a prefill
                total = seqs[PROMPT, column] + seqs[OUTPUT, column]
                context = total - chunk if seqs[PENDING, column] > 0 else 0
        tokens += chunk
        if chunk == 1:
            decodes += 1
            decode_kv += context + 1
        else:
            prefill += prefill_time(packed, chunk, context)
    if tokens == 0:
        return 0.0
    return linear_time(packed, tokens) + decode_time(packed, decodes, decode_kv) + prefill


@compiled
def _preempt(seqs: Ints, state: Ints, column: Int) -> Int:
    """Take its blocks from a running sequence; it recomputes prompt and output later. Returns the blocks freed."""
    column = Index(column)
    freed = seqs[BLOCKS, column]
    seqs[BLOCKS, column] = 0
    seqs[COMPUTED, column] = 0
    seqs[PREEMPTED, column] += 1
    state[PREEMPTIONS] += 1
    return freed


@compiled
def move_left(seqs: Ints, firsts: Floats, source: Int, target: Int) -> None:
    """Move column `source` to `target` ≤ source; those between move one to the right."""
    for row in range(FIELDS):
        value = seqs[row, Index(source)]
        for left in range(Index(source - target)):
            column = Index(source) - left
            seqs[row, column] = seqs[row, column - Index(1)]
        seqs[row, Index(target)] = value
    first = firsts[source]
    for column in range(source, target, -1):
        firsts[column] = firsts[column - 1]
    firsts[target] = first


@compiled
def _head_fits(seqs: Ints, state: Ints, limits: Ints) -> bool | np.bool_:
    """Can the first waiting sequence be admitted now?"""
    head = state[HEAD] + state[RUNNING]
    if head == state[TAIL] or state[RUNNING] >= limits[MAX_NUM_SEQS]:
        return False
    total = seqs[PROMPT, head] + seqs[OUTPUT, head]
    return fits(total, total, state[FREE], state[RUNNING], limits)


@compiled
def schedule(seqs: Ints, firsts: Floats, state: Ints, limits: Ints, packed: Floats) -> float:
    """Decide a step: row NEXT receives each sequence's tokens. Returns its duration, 0 if nothing is scheduled."""
    budget = limits[MAX_NUM_BATCHED_TOKENS]
    limit = chunk_limit(state, limits)
    end = state[HEAD] + state[RUNNING]
    waiting = end  # first column that waited before this step
    free = state[FREE]
    admits = limits[CHUNKED] == 1 or _head_fits(seqs, state, limits)

    place = state[HEAD] if limits[CHUNKED] == 1 or not admits else end
    while place < end and budget > 0:
        column = Index(place)
        place += 1
        total = seqs[PROMPT, column] + seqs[OUTPUT, column]
        pending = seqs[PENDING, column]
        computed = seqs[COMPUTED, column]
        if pending > 0 and computed + 2 - pending >= seqs[PROMPT, column] + seqs[MAX_TOKENS, column]:
            continue  # the last token that it may have is in flight already
        chunk = min(total + pending - computed, limit, budget, limits[MAX_MODEL_LEN] - 1 - computed)
        if chunk <= 0:
            continue
        wanted = max(blocks(computed + chunk, limits) - seqs[BLOCKS, column], 0)
        reach = wanted
        if limits[V1] == 0 and not (computed + 1 < total and total % limits[BLOCK_SIZE] == 0):
            # V0 counts the block it writes into; a prefill that ends on a block writes into none.
            reach = max(wanted, 1)
        while reach > free and end >= place:
            end -= 1
            free += _preempt(seqs, state, end)
        if end < place:
            break  # it was the youngest left and has preempted itself
        free -= wanted
        seqs[BLOCKS, column] += wanted
        seqs[COMPUTED, column] = computed + chunk
        seqs[NEXT, column] = chunk
        if computed + chunk == total + pending:
            seqs[PENDING, column] = pending + 1
        budget -= chunk

    state[STALE] = waiting - end
    if admits and (limits[V1] == 0 or waiting == end):
        while waiting < state[TAIL] and budget > 0 and end - state[HEAD] < limits[MAX_NUM_SEQS]:
            total = seqs[PROMPT, waiting] + seqs[OUTPUT, waiting]
            chunk = min(total, limit, budget)
            if not fits(total, chunk, free, end - state[HEAD], limits):
                break
            if chunk < total and limits[CHUNKED] == 0:
                break
            if waiting > end:
                move_left(seqs, firsts, waiting, end)  # V0: past those preempted in this step
            held = blocks(total if limits[V1] == 0 else chunk, limits)
            free -= held
            seqs[BLOCKS, end] = held
            seqs[COMPUTED, end] = chunk
            seqs[NEXT, end] = chunk
            if chunk == total:
                seqs[PENDING, end] = 1
            budget -= chunk
            end += 1
            waiting += 1

    state[RUNNING] = end - state[HEAD]
    state[FREE] = free
    state[VISIBLE] = state[TAIL]
    return step_time(seqs, state[HEAD], end, NEXT, packed)


@compiled
def remove(seqs: Ints, firsts: Floats, state: Ints, column: Int) -> None:
    """A sequence, running or waiting, leaves and returns its blocks. Those to the left of it move to the right."""
    state[FREE] += seqs[BLOCKS, column]
    if column < state[HEAD] + state[RUNNING]:
        state[RUNNING] -= 1
    elif column < state[HEAD] + state[RUNNING] + state[STALE]:
        state[STALE] -= 1
    move_left(seqs, firsts, column, state[HEAD])
    state[HEAD] += 1


@compiled
def _remove_aborted(seqs: Ints, firsts: Floats, state: Ints) -> None:
    """Aborted sequences leave. What the steps in flight compute for them is lost, though it takes its time."""
    for column in range(state[HEAD], state[TAIL]):
        if seqs[TARGET, column] == GONE:
            remove(seqs, firsts, state, column)
    state[ABORTED] = 0


@compiled
def _update(seqs: Ints, firsts: Floats, state: Ints, limits: Ints, now: float, done: Floats, found: Int) -> Int:
    """Apply the output of the step in flight, which ends `now`: tokens, first-token times, finishes."""
    begin = state[HEAD]
    for column in range(Index(begin), Index(begin + state[RUNNING] + state[STALE])):
        if seqs[CHUNK, column] == 0:
            continue
        seqs[CHUNK, column] = 0
        samples = seqs[PENDING, column] > (1 if seqs[NEXT, column] > 0 else 0)
        if not samples:
            continue
        seqs[PENDING, column] -= 1
        seqs[OUTPUT, column] += 1
        if np.isnan(firsts[column]):
            firsts[column] = now
        output = seqs[OUTPUT, column]
        if output >= seqs[TARGET, column] or seqs[PROMPT, column] + output >= limits[MAX_MODEL_LEN]:
            done[DONE_ID, found] = seqs[ID, column]
            done[DONE_FIRST, found] = firsts[column]
            done[DONE_AT, found] = now
            done[DONE_PREEMPTED, found] = seqs[PREEMPTED, column]
            done[DONE_OUTPUT, found] = output
            found += 1
            remove(seqs, firsts, state, np.int64(column))
    state[STALE] = 0
    return found


@compiled
def _promote(seqs: Ints, state: Ints) -> None:
    """The step in row NEXT becomes the step in flight."""
    for column in range(Index(state[HEAD]), Index(state[HEAD] + state[RUNNING])):
        seqs[CHUNK, column] = seqs[NEXT, column]
        seqs[NEXT, column] = 0


@compiled
def begin_step(
    seqs: Ints, firsts: Floats, state: Ints, times: Floats, limits: Ints, packed: Floats, noise: Floats, now: float
) -> None:
    """Start the next step at `now`, or leave the engine idle. `noise[step % len]` multiplies its duration."""
    if state[QUEUED] == 1:
        duration = times[QUEUED_FOR]
    else:
        duration = schedule(seqs, firsts, state, limits, packed)
        if duration == 0.0 and state[TAIL] > state[HEAD]:
            # Everything that ran was preempted and nothing could be admitted beside it: the scheduler just runs again.
            duration = schedule(seqs, firsts, state, limits, packed)
    _promote(seqs, state)
    state[QUEUED] = 0
    if duration == 0.0:
        times[ENDS] = np.inf
        return
    times[STARTED] = now
    times[ENDS] = now + duration * noise[state[STEPS] % noise.shape[0]]
    state[STEPS] += 1
    if limits[ASYNC] == 1:
        times[QUEUED_FOR] = schedule(seqs, firsts, state, limits, packed)
        state[QUEUED] = 1 if times[QUEUED_FOR] > 0.0 else 0


@compiled
def end_step(seqs: Ints, firsts: Floats, state: Ints, times: Floats, limits: Ints, done: Floats, found: Int) -> Int:
    """End the step in flight and begin none; `done` and the value returned are those of `complete_step`."""
    if state[ABORTED] > 0:
        _remove_aborted(seqs, firsts, state)
    return _update(seqs, firsts, state, limits, times[ENDS], done, found)


@compiled
def complete_step(
    seqs: Ints,
    firsts: Floats,
    state: Ints,
    times: Floats,
    limits: Ints,
    packed: Floats,
    noise: Floats,
    done: Floats,
    found: Int,
) -> Int:
    """End the step in flight and begin the next. Finished sequences are written to `done` from column `found` on.

    Returns the new `found`. `done` is float64[DONE, n] with room for every live sequence.
    """
    now = times[ENDS]
    found = end_step(seqs, firsts, state, times, limits, done, found)
    begin_step(seqs, firsts, state, times, limits, packed, noise, now)
    return found
