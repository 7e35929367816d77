"""Fast forward: many scheduler steps in little time, for forecasts.

A step of V0 or synchronous V1 does the same to every decoding sequence: one token more, and a KV block for those that
stand at a block's end. So a sequence is summed up by two numbers that no step changes, the step in which it will finish
and its context less the number of the step, and a step costs a look at

- the earliest finish,
- a histogram of contexts modulo the block size, which tells how many blocks this step takes,
- the head of the waiting queue.

Only finishes, admissions and preemptions touch single sequences. What does not fit this picture (an asynchronous
scheduler, a limit on long prefills, a step whose budget decoding exhausts, prompts that go first) is left to
`block.scheduler`, which remains the one statement of the semantics.
"""

from __future__ import annotations

import numpy as np

from block.compiled import compiled
from block.latency import decode_time, linear_time, prefill_time
from block.scheduler import (
    ASYNC,
    BLOCK_SIZE,
    CHUNKED,
    ENDS,
    FREE,
    HEAD,
    LONG_PREFILL,
    MAX_MODEL_LEN,
    MAX_NUM_BATCHED_TOKENS,
    MAX_NUM_SEQS,
    RUNNING,
    STALE,
    TAIL,
    V1,
    blocks,
    copy_column,
    fits,
    move_left,
)
from block.types import (
    BLOCKS,
    CHUNK,
    COMPUTED,
    ID,
    OUTPUT,
    PENDING,
    PROMPT,
    TARGET,
    Floats,
    Int,
    Ints,
)

# Outcomes of `fast_forward`.
FINISHED = 0  # the sequence asked for has finished, at times[ENDS]
STOPPED = 1  # the step in flight has ended and its output is applied; the next must be begun by the scheduler
UNFIT = 2  # nothing done: the state is not of the kind that can be fast-forwarded

# Rows of `group`, a column per sequence that decodes or has just been prefilled, in order of admission.
_FINISH = 0  # number of the step in which it yields its last token
_BASE = 1  # its context in step n is _BASE + n
_COLUMN = 2
GROUP = 3


@compiled
def fast_forward(
    seqs: Ints,
    firsts: Floats,
    state: Ints,
    times: Floats,
    limits: Ints,
    packed: Floats,
    group: Ints,
    wanting: Ints,
    sequence: int,
) -> int:
    """Complete steps until the one with ID `sequence` has finished, or until the scheduler itself is needed.

    Its first-token time goes to ``firsts`` at the column where it stands. `group` is scratch, int64[GROUP, columns];
    `wanting`, int64[block size], the histogram: wanting[n % block size] sequences take a block in step n + 1.
    """
    if limits[ASYNC] == 1 or limits[LONG_PREFILL] > 0 or limits[CHUNKED] == 0:
        return UNFIT
    last = limits[BLOCK_SIZE] - 1  # x & last is x modulo the block size
    wanting[:] = 0
    count = 0
    context: Int = 0  # total context of the group
    partial = np.int64(-1)  # column of the sequence in the middle of its prefill; there is one at most, the youngest
    prefilled = np.int64(0)
    first_due = False  # the sequence asked for yields its first token in this step
    earliest = np.int64(2**62)
    head = state[HEAD]
    waiting = head + state[RUNNING]
    for column in range(head, waiting):
        if seqs[CHUNK, column] == 0 or partial >= 0:
            return UNFIT
        if seqs[PENDING, column] == 0:
            partial = np.int64(column)
            prefilled = seqs[COMPUTED, column]
            continue
        total = seqs[PROMPT, column] + seqs[OUTPUT, column]
        finish = min(seqs[TARGET, column] - seqs[OUTPUT, column], limits[MAX_MODEL_LEN] - total) - 1
        base = seqs[COMPUTED, column]
        group[_FINISH, count] = finish
        group[_BASE, count] = base
        group[_COLUMN, count] = column
        count += 1
        earliest = min(earliest, finish)
        wanting[-base & last] += 1
        context += base
        first_due |= seqs[ID, column] == sequence and seqs[OUTPUT, column] == 0
    tail = state[TAIL]
    free = state[FREE]
    first = np.nan
    now = times[ENDS]
    step = np.int64(0)  # number of the step in flight

    while True:
        # The step in flight ends: first tokens, finishes.
        if first_due:
            first = now
            first_due = False
        if earliest <= step:
            earliest = np.int64(2**62)
            kept = 0
            for member in range(count):
                finish = group[_FINISH, member]
                base = group[_BASE, member]
                column = group[_COLUMN, member]
                if finish <= step:
                    free += blocks(base + step, limits)
                    wanting[-base & last] -= 1
                    context -= base + step
                    if seqs[ID, column] == sequence:
                        times[ENDS] = now
                        if not np.isnan(first):
                            firsts[column] = first
                        state[HEAD] = column
                        return FINISHED
                    continue
                group[_FINISH, kept] = finish
                group[_BASE, kept] = base
                group[_COLUMN, kept] = column
                earliest = min(earliest, finish)
                kept += 1
            count = kept

        # Nothing but decoding until the next finish, as long as the blocks last and the head of the queue does not fit.
        if partial < 0 and count > 0 and earliest > step + 1:
            blocked = waiting == tail or count == limits[MAX_NUM_SEQS]
            if not blocked:
                total = seqs[PROMPT, waiting] + seqs[OUTPUT, waiting]
                chunk = min(total, limits[MAX_NUM_BATCHED_TOKENS] - count)
                blocked = not fits(total, chunk, free, count, limits)
            if blocked and count < limits[MAX_NUM_BATCHED_TOKENS]:
                fixed = decode_time(packed, count, 0)
                slope = decode_time(packed, count, 1) - fixed
                fixed += linear_time(packed, count)
                keep = 1 if limits[V1] == 0 else 0
                while earliest > step and free - wanting[step & last] >= keep:
                    free -= wanting[step & last]
                    step += 1
                    context += count
                    now += fixed + slope * context
                if earliest <= step:
                    continue

        # Running sequences take their blocks; where there are too few, the youngest make room.
        preempted = 0
        while True:
            budget = limits[MAX_NUM_BATCHED_TOKENS] - count
            spare = free - wanting[step & last]
            enough = spare >= 0
            if limits[V1] == 0 and count > 0:  # V0 wants a free block in reach of each, though the last may take it
                enough = spare >= (0 if (group[_BASE, count - 1] + step) & last == 0 else 1)
            chunk = np.int64(0)
            if partial >= 0:
                total = seqs[PROMPT, partial] + seqs[OUTPUT, partial]
                chunk = min(total - prefilled, budget)
                if limits[V1] == 1:
                    spare -= blocks(prefilled + chunk, limits) - blocks(prefilled, limits)
                    enough = spare >= 0
                elif prefilled + 1 == total or total & last != 0:
                    enough = enough and spare >= 1
            elif count == 0:
                break
            if enough:
                break
            waiting -= 1
            preempted += 1
            if partial >= 0:
                copy_column(seqs, firsts, partial, waiting)
                free += blocks(prefilled if limits[V1] == 1 else total, limits)
                partial = np.int64(-1)
            else:
                count -= 1
                base = group[_BASE, count]
                copy_column(seqs, firsts, group[_COLUMN, count], waiting)
                seqs[OUTPUT, waiting] = base + step + 1 - seqs[PROMPT, waiting]
                if seqs[ID, waiting] == sequence and not np.isnan(first):
                    firsts[waiting] = first
                free += blocks(base + step, limits)
                wanting[-base & last] -= 1
                context -= base + step
            seqs[COMPUTED, waiting] = 0
            seqs[BLOCKS, waiting] = 0
            seqs[CHUNK, waiting] = 0
            seqs[PENDING, waiting] = 0
        if budget <= 0:
            break
        free = spare
        step += 1
        context += count
        tokens: Int = count
        decodes = count
        decode_context = context
        prefill = 0.0
        if partial >= 0:
            if chunk == 1:
                decodes += 1
                decode_context += prefilled + 1
            else:
                prefill += prefill_time(packed, chunk, prefilled)
            prefilled += chunk
            tokens += chunk
            budget -= chunk
        # A sequence whose prefill is complete joins the group, be it the partial one or one that was waiting.
        joining = partial
        while True:
            if joining >= 0:
                total = seqs[PROMPT, joining] + seqs[OUTPUT, joining]
                if prefilled < total:
                    partial = joining
                    break
                finish = step + min(seqs[TARGET, joining] - seqs[OUTPUT, joining], limits[MAX_MODEL_LEN] - total) - 1
                group[_FINISH, count] = finish
                group[_BASE, count] = total - step
                group[_COLUMN, count] = joining
                count += 1
                earliest = min(earliest, finish)
                wanting[(step - total) & last] += 1
                context += total
                first_due |= seqs[ID, joining] == sequence and seqs[OUTPUT, joining] == 0
                partial = np.int64(-1)
            if preempted > 0 and limits[V1] == 1:
                break
            head = waiting + preempted
            if head == tail or budget <= 0 or count == limits[MAX_NUM_SEQS]:
                break
            total = seqs[PROMPT, head] + seqs[OUTPUT, head]
            chunk = min(total, budget)
            if not fits(total, chunk, free, count, limits):
                break
            if preempted > 0:
                move_left(seqs, firsts, head, waiting)
            free -= blocks(total if limits[V1] == 0 else chunk, limits)
            if chunk == 1:
                decodes += 1
                decode_context += 1
            else:
                prefill += prefill_time(packed, chunk, 0)
            prefilled = chunk
            tokens += chunk
            budget -= chunk
            joining = np.int64(waiting)
            waiting += 1
        if tokens == 0:
            step -= 1
            break
        now += linear_time(packed, tokens) + decode_time(packed, decodes, decode_context) + prefill

    # Hand over: every field as the scheduler expects it between two steps.
    times[ENDS] = now
    running = count + (1 if partial >= 0 else 0)
    state[HEAD] = waiting - running
    state[RUNNING] = running
    state[FREE] = free
    state[STALE] = 0
    column = waiting
    if partial >= 0:
        column -= 1
        copy_column(seqs, firsts, partial, column)
        seqs[COMPUTED, column] = prefilled
        held = prefilled if limits[V1] == 1 else seqs[PROMPT, column] + seqs[OUTPUT, column]
        seqs[BLOCKS, column] = blocks(held, limits)
        seqs[CHUNK, column] = 0
    for member in range(count - 1, -1, -1):
        column -= 1
        copy_column(seqs, firsts, group[_COLUMN, member], column)
        computed = group[_BASE, member] + step
        seqs[COMPUTED, column] = computed
        seqs[OUTPUT, column] = computed + 1 - seqs[PROMPT, column]
        seqs[BLOCKS, column] = blocks(computed, limits)
        seqs[CHUNK, column] = 0
        seqs[PENDING, column] = 0
        if seqs[ID, column] == sequence and not np.isnan(first):
            firsts[column] = first
    return STOPPED
