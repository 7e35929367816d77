"""Fast forward: many scheduler steps in little time, for forecasts.

A step of V0 or synchronous V1 does the same to every decoding sequence: one token more, and a KV block for those that
stand at a block's end. So a sequence is summed up by two numbers that no step changes, the step in which it will finish
and its context less the number of the step, and a step costs a look at

- the earliest finish,
- a histogram of contexts modulo the block size, which tells how many blocks this step takes,
- the head of the waiting queue.

Only finishes, admissions and preemptions touch single sequences. What does not fit this picture (an asynchronous
scheduler, a limit on long prefills, a step whose budget decoding exhausts, prompts that go first) is left to
`block.engine.scheduler`, which remains the one statement of the semantics.
"""

from __future__ import annotations

import numpy as np

from block.core.arrays import Floats, Int, Ints
from block.core.jit import Index, compiled
from block.core.snapshot import BLOCKS, CHUNK, COMPUTED, FIELDS, ID, OUTPUT, PENDING, PROMPT, TARGET
from block.engine.latency import decode_time, linear_time, prefill_time
from block.engine.scheduler import (
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
    fits,
)

# Outcomes of `fast_forward`.
FINISHED = 0  # the sequence asked for has finished, at times[ENDS]
STOPPED = 1  # the step in flight has ended and its output is applied; the next must be begun by the scheduler
UNFIT = 2  # nothing done: the state is not of the kind that can be fast-forwarded

# Rows of `scratch`. A sequence goes by the column in which it came.
_FINISH = 0  # by column: of the group's members the step that yields the last token, and in the low bits the column
_GROUP = 1  # the members in order of admission, up to entry `end`; those that have finished are still among them
_LINE = 2  # the waiting sequences in order, from entry `waiting` on
_SIZE = 3  # by column: of a member its context less the number of the step, of any other its prompt and output
_LEFT = 4  # by column: of those that are not members the tokens that they will yet yield
SCRATCH = 5

_SHIFT = 20  # bits for the column in an entry of _FINISH
_NEVER = 2**62


@compiled
def scratch_columns(columns: Int) -> Int:
    """How wide the scratch of `fast_forward` must be: whole vectors, so that a scan of _FINISH leaves no rest."""
    return (columns + 15) >> 4 << 4


@compiled
def _first(finishes: Ints, columns: Int) -> Int:
    """The least of the first `columns` finishes."""
    least = np.int64(_NEVER)
    for column in range(Index(scratch_columns(columns))):
        least = min(least, finishes[column])
    return least


@compiled
def fast_forward(
    seqs: Ints,
    firsts: Floats,
    state: Ints,
    times: Floats,
    limits: Ints,
    packed: Floats,
    scratch: Ints,
    wanting: Ints,
    sequence: int,
) -> int:
    """Complete steps until the one with ID `sequence` has finished, or until the scheduler itself is needed.

    Its first-token time goes to ``firsts`` at the column where it stands; those of others are not kept. `scratch` is
    int64[SCRATCH, scratch_columns(columns)]; `wanting`, int64[block size], the histogram: wanting[n % block size]
    members take a block in step n + 1.
    """
    if limits[ASYNC] == 1 or limits[LONG_PREFILL] > 0 or limits[CHUNKED] == 0:
        return UNFIT
    v1 = limits[V1] == 1
    max_num_seqs, max_tokens = limits[MAX_NUM_SEQS], limits[MAX_NUM_BATCHED_TOKENS]
    last = limits[BLOCK_SIZE] - 1  # x & last is x modulo the block size
    finishes, group, line = scratch[_FINISH], scratch[_GROUP], scratch[_LINE]
    sizes, lefts = scratch[_SIZE], scratch[_LEFT]
    wanting[:] = 0
    count = 0
    context: Int = 0  # total context of the group
    partial = np.int64(-1)  # the sequence in the middle of its prefill; there is one at most, the youngest
    prefilled = np.int64(0)
    waiting = state[HEAD] + state[RUNNING]
    tail = state[TAIL]
    finishes[: scratch_columns(tail)] = _NEVER
    asked = tail - 1
    while seqs[ID, Index(asked)] != sequence:
        asked -= 1
    first = firsts[asked]
    first_due = False  # the sequence asked for yields its first token in this step
    for column in range(Index(state[HEAD]), Index(tail)):
        total = seqs[PROMPT, column] + seqs[OUTPUT, column]
        left = min(seqs[TARGET, column] - seqs[OUTPUT, column], limits[MAX_MODEL_LEN] - total)
        sizes[column] = total
        lefts[column] = left
        line[column] = column
        if np.int64(column) >= waiting:
            continue
        if seqs[CHUNK, column] == 0 or partial >= 0:
            return UNFIT
        base = seqs[COMPUTED, column]
        if seqs[PENDING, column] == 0:
            partial = np.int64(column)
            prefilled = base
            continue
        finishes[column] = left - 1 << _SHIFT | np.int64(column)
        group[Index(count)] = np.int64(column)
        sizes[column] = base
        count += 1
        wanting[Index(-base & last)] += 1
        context += base
        first_due |= np.int64(column) == asked and np.isnan(first)
    free = state[FREE]
    now = times[ENDS]
    step = np.int64(0)  # number of the step in flight
    end = count
    known = waiting  # no column from here on was ever admitted
    earliest = _first(finishes, known)

    while True:
        # The step in flight ends: first tokens, finishes.
        if first_due:
            first = now
            first_due = False
        while earliest >> _SHIFT <= step:
            column = Index(earliest & ((1 << _SHIFT) - 1))
            if finishes[column] == earliest:  # it has not been preempted meanwhile
                if np.int64(column) == asked:
                    times[ENDS] = now
                    firsts[column] = first
                    state[HEAD] = asked
                    return FINISHED
                base = sizes[column]
                free += blocks(base + step, limits)
                wanting[Index(-base & last)] -= 1
                context -= base + step
                count -= 1
                finishes[column] = _NEVER
            earliest = _first(finishes, known)

        # Nothing but decoding until the next finish, as long as the blocks last and the head of the queue does not fit.
        finish = earliest >> _SHIFT
        if partial < 0 and count > 0 and finish > step + 1:
            blocked = waiting == tail or count == max_num_seqs
            if not blocked:
                total = sizes[Index(line[Index(waiting)])]
                blocked = not fits(total, min(total, max_tokens - count), free, count, limits)
            if blocked and count < max_tokens:
                fixed = decode_time(packed, count, 0)
                slope = decode_time(packed, count, 1) - fixed
                fixed += linear_time(packed, count)
                keep = 0 if v1 else 1
                tokens_read, each = float(context), float(count)  # whole numbers, exact
                began = step
                free -= keep
                left = free - wanting[Index(step & last)]
                while finish > step and left >= 0:
                    step += 1
                    free = left
                    left -= wanting[Index(step & last)]
                    tokens_read += each
                    now += fixed + slope * tokens_read
                free += keep
                context += count * (step - began)
                if finish <= step:
                    continue

        # Running sequences take their blocks; where there are too few, the youngest make room.
        preempted = 0
        while True:
            budget = max_tokens - count
            spare = free - wanting[Index(step & last)]
            enough = spare >= 0
            if count > 0:
                while finishes[Index(group[Index(end - 1)])] == _NEVER:
                    end -= 1
                if not v1:  # V0 wants a free block in reach of each, though the last may take it
                    enough = spare >= (0 if (sizes[Index(group[Index(end - 1)])] + step) & last == 0 else 1)
            chunk = np.int64(0)
            if partial >= 0:
                total = sizes[Index(partial)]
                chunk = min(total - prefilled, budget)
                if v1:
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
                line[Index(waiting)] = partial
                free += blocks(prefilled if v1 else total, limits)
                partial = np.int64(-1)
            else:
                count -= 1
                end -= 1
                column = Index(group[Index(end)])
                base = sizes[column]
                line[Index(waiting)] = column
                sizes[column] = base + step + 1
                lefts[column] = (finishes[column] >> _SHIFT) - step
                finishes[column] = _NEVER
                free += blocks(base + step, limits)
                wanting[Index(-base & last)] -= 1
                context -= base + step
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
                column = Index(joining)
                total = sizes[column]
                if prefilled < total:
                    partial = joining
                    break
                finish = step + lefts[column] - 1 << _SHIFT | joining
                finishes[column] = finish
                earliest = min(earliest, finish)
                sizes[column] = total - step
                group[Index(end)] = joining
                end += 1
                count += 1
                wanting[Index((step - total) & last)] += 1
                context += total
                first_due |= joining == asked and np.isnan(first)
                partial = np.int64(-1)
            if preempted > 0 and v1:
                break
            head = waiting + preempted
            if head == tail or budget <= 0 or count == max_num_seqs:
                break
            joining = line[Index(head)]
            total = sizes[Index(joining)]
            chunk = min(total, budget)
            if not fits(total, chunk, free, count, limits):
                break
            for i in range(head, waiting, -1):  # past those preempted in this step
                line[i] = line[i - 1]
            free -= blocks(chunk if v1 else total, limits)
            if chunk == 1:
                decodes += 1
                decode_context += 1
            else:
                prefill += prefill_time(packed, chunk, 0)
            prefilled = chunk
            tokens += chunk
            budget -= chunk
            waiting += 1
            known = max(known, joining + 1)
        if tokens == 0:
            step -= 1
            break
        now += linear_time(packed, tokens) + decode_time(packed, decodes, decode_context) + prefill

    # Hand over: the columns in order, and every field as the scheduler expects it between two steps.
    times[ENDS] = now
    running = count + (1 if partial >= 0 else 0)
    begin = waiting - running
    state[HEAD] = begin
    state[RUNNING] = running
    state[FREE] = free
    state[STALE] = 0
    i = waiting
    if partial >= 0:
        i -= 1
        line[i] = partial
    while i > begin:
        end -= 1
        if finishes[group[end]] != _NEVER:
            i -= 1
            line[i] = group[end]
    moved = finishes  # needed no more
    for row in range(FIELDS):
        for i in range(begin, tail):
            moved[i] = seqs[row, line[i]]
        for i in range(begin, tail):
            seqs[row, i] = moved[i]
    for i in range(begin, tail):
        column = line[i]
        size = sizes[column]  # of the waiting, who have nothing computed
        computed = held = np.int64(0)
        if column == partial:
            computed = prefilled
            held = prefilled if v1 else size
        elif i < waiting:
            computed = held = size + step
            size = computed + 1
        seqs[OUTPUT, i] = size - seqs[PROMPT, i]
        seqs[COMPUTED, i] = computed
        seqs[BLOCKS, i] = blocks(held, limits)
        seqs[CHUNK, i] = 0
        seqs[PENDING, i] = 0
        if column == asked:
            firsts[i] = first
    return STOPPED
