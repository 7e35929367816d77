"""Quiet steps: as many as nothing but decoding happens in, completed at once.

No finish, no admission, no prefill, no preemption: each running sequence gets a token, and now and then a KV block.
`quiet_steps` finds them for an engine, one by one in time, with its noise and to the bit; `skip_quiet_steps` for a
forecast, without noise and in closed form. What they may do is what `block.engine.scheduler` would do, which says it.
"""

from __future__ import annotations

import numpy as np

from block.core.arrays import Floats, Int, Ints
from block.core.jit import Index, compiled
from block.core.snapshot import BLOCKS, CHUNK, COMPUTED, OUTPUT, PENDING, PROMPT, TARGET
from block.engine.latency import decode_run_time, decode_time, linear_time
from block.engine.scheduler import (
    ABORTED,
    ASYNC,
    ENDS,
    FREE,
    HEAD,
    MAX_MODEL_LEN,
    MAX_NUM_BATCHED_TOKENS,
    MAX_NUM_SEQS,
    QUEUED,
    QUEUED_FOR,
    RUNNING,
    STALE,
    STARTED,
    STEPS,
    TAIL,
    V1,
    VISIBLE,
    blocks,
    chunk_limit,
    fits,
)


@compiled
def _all_decode(seqs: Ints, state: Ints, limits: Ints) -> tuple[Int, Int]:
    """How many steps the running sequences may go on until one finishes at the end of the next, and their context.

    -1 if not all of them, and nobody else, have a token in flight that is neither the first nor of a longer chunk.
    """
    head = state[HEAD]
    end = head + state[RUNNING]
    if head == end or state[STALE] > 0 or state[ABORTED] > 0 or seqs[CHUNK, Index(end - 1)] != 1:
        return np.int64(-1), np.int64(0)
    ahead = limits[ASYNC]
    odd = np.int64(0)
    least = np.int64(1)
    left = np.int64(limits[MAX_MODEL_LEN])
    kv = np.int64(0)
    for column in range(Index(head), Index(end)):
        output = seqs[OUTPUT, column]
        odd |= (seqs[CHUNK, column] ^ 1) | (seqs[PENDING, column] ^ (1 + ahead))
        least = min(least, output)
        left = min(left, seqs[TARGET, column] - output, limits[MAX_MODEL_LEN] - seqs[PROMPT, column] - output)
        kv += seqs[COMPUTED, column]
    if odd != 0 or least < 1:  # a chunk, or a first token, whose time must be noted
        return np.int64(-1), np.int64(0)
    return left - 1, kv


@compiled
def _may_admit(seqs: Ints, state: Ints, limits: Ints) -> bool | np.bool_:
    """Might a step that decodes all running sequences admit the first waiting one?"""
    running = state[RUNNING]
    end = state[HEAD] + running
    if end == state[TAIL] or running >= limits[MAX_NUM_SEQS]:
        return False
    total = seqs[PROMPT, end] + seqs[OUTPUT, end]
    chunk = min(total, chunk_limit(state, limits), limits[MAX_NUM_BATCHED_TOKENS] - running)
    return chunk > 0 and fits(total, chunk, state[FREE], running, limits)


@compiled
def _wanted(seqs: Ints, state: Ints, limits: Ints, steps: Int) -> Int:
    """KV blocks that the running sequences take in so many steps of decoding."""
    wanted = np.int64(0)
    for column in range(Index(state[HEAD]), Index(state[HEAD] + state[RUNNING])):
        wanted += max(blocks(seqs[COMPUTED, column] + steps, limits) - seqs[BLOCKS, column], 0)
    return wanted


@compiled
def decode(seqs: Ints, state: Ints, limits: Ints, steps: Int) -> None:
    """Complete so many steps in which the running sequences decode and nothing else happens; `times` is not touched."""
    if steps == 0:
        return
    taken = np.int64(0)
    for column in range(Index(state[HEAD]), Index(state[HEAD] + state[RUNNING])):
        computed = seqs[COMPUTED, column] + steps
        held = seqs[BLOCKS, column]
        more = max(blocks(computed, limits) - held, 0)
        seqs[OUTPUT, column] += steps
        seqs[COMPUTED, column] = computed
        seqs[BLOCKS, column] = held + more
        taken += more
    state[FREE] -= taken
    state[STEPS] += steps
    state[VISIBLE] = state[TAIL]


@compiled
def decode_times(
    state: Ints, times: Floats, packed: Floats, noise: Floats, kv: Int, steps: Int, until: float
) -> tuple[Int, float, float]:
    """Of `steps` steps of mere decoding as many as end by `until`; when the next then began, and when it ends."""
    running = state[RUNNING]
    linear = linear_time(packed, running)
    started, ends = times[STARTED], times[ENDS]
    factor = state[STEPS] % noise.shape[0]
    done = np.int64(0)
    while done < steps and ends <= until:
        done += 1
        kv += running
        started = ends
        ends = started + (linear + decode_time(packed, running, kv)) * noise[Index(factor)]
        factor += 1
        if factor == noise.shape[0]:
            factor = 0
    return done, started, ends


@compiled
def quiet_steps(
    seqs: Ints, state: Ints, times: Floats, limits: Ints, packed: Floats, noise: Floats, until: float
) -> tuple[Int, float, float, bool | np.bool_]:
    """How many steps that end by `until` do nothing but decode: no finish, admission, prefill or preemption.

    Then when the step after them begins and ends, and whether a sequence finishes at that end. `decode` completes them:
    exactly what as many `complete_step` would do. May stop short of the longest such run; is 0 where scheduling is
    asynchronous.
    """
    none = (np.int64(0), times[STARTED], times[ENDS], False)
    if limits[ASYNC] == 1:
        return none
    most, kv = _all_decode(seqs, state, limits)
    if most < 0 or (most > 0 and _may_admit(seqs, state, limits)) or linear_time(packed, state[RUNNING]) <= 0.0:
        return none
    spare = state[FREE] - (1 if limits[V1] == 0 else 0)  # V0 wants a free block in reach at every step
    steps, started, ends = decode_times(state, times, packed, noise, kv, most, until)
    if _wanted(seqs, state, limits, steps) > spare:
        low = np.int64(0)
        while low < steps:  # the most for which the blocks suffice
            middle = (low + steps + 1) // 2
            if _wanted(seqs, state, limits, middle) <= spare:
                low = middle
            else:
                steps = middle - 1
        steps, started, ends = decode_times(state, times, packed, noise, kv, steps, until)
    return steps, started, ends, steps == most


@compiled
def skip_quiet_steps(seqs: Ints, state: Ints, times: Floats, limits: Ints, packed: Floats) -> Int:
    """Complete at once as many steps as nothing but decoding happens in, in closed form and without noise.

    May stop short of the longest such run, and does not keep times[STARTED]. Returns the number of steps skipped.
    """
    ahead = limits[ASYNC]
    if ahead == 1 and state[QUEUED] == 0:
        return 0
    left, kv = _all_decode(seqs, state, limits)
    steps = left - ahead
    if steps < 2 or _may_admit(seqs, state, limits):
        return 0
    spare = state[FREE] - (1 if limits[V1] == 0 else 0)  # V0 wants a free block in reach at every step
    while steps >= 2 and _wanted(seqs, state, limits, steps) > spare:
        steps //= 2
    if steps < 2:
        return 0
    decode(seqs, state, limits, steps)
    running = state[RUNNING]
    times[ENDS] += decode_run_time(packed, running, kv + (1 - ahead) * running, steps)
    if ahead == 1:
        times[QUEUED_FOR] = decode_run_time(packed, running, kv + steps * running, 1)
    return int(steps)
