"""Fast forward: many scheduler steps in little time, for forecasts.

A step of V0 or synchronous V1 does the same to every decoding sequence: one token more, and a KV block for those that
stand at a block's end. So a sequence is summed up by two numbers that no step changes, the step in which it will finish
and its context less the number of the step, and a step costs a look at

- the earliest finish,
- a histogram of contexts modulo the block size, which tells how many blocks this step takes,
- the head of the waiting queue.

Only finishes, admissions and preemptions touch single sequences. The decoding sequences are the *group*; beside them
there is at most one in the middle of its prefill, the *partial* one, and the *line* of those that wait. What does not
fit this picture (an asynchronous scheduler, a limit on long prefills, a step whose budget decoding exhausts, prompts
that go first) is left to `block.engine.scheduler`, which remains the one statement of the semantics.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from block.core.arrays import Floats, Int, Ints
from block.core.jit import Index, compiled
from block.core.snapshot import (
    FIELDS,
    ID,
    NUM_BLOCKS,
    NUM_COMPUTED_TOKENS,
    NUM_OUTPUT_PLACEHOLDERS,
    NUM_OUTPUT_TOKENS,
    NUM_PROMPT_TOKENS,
    NUM_SCHEDULED_TOKENS,
    NUM_SHARED_BLOCKS,
    TARGET,
)
from block.engine.kv_cache import (
    believed_prefix,
    blocks_at_admission,
    blocks_for,
    blocks_in_reach,
    can_admit,
    share_no_more_than_found,
    spare_block,
)
from block.engine.latency import decode_time, linear_time, prefill_time, step_duration
from block.engine.state import (
    ASYNC_SCHEDULING,
    BEGIN,
    BLOCK_SIZE,
    ENABLE_CHUNKED_PREFILL,
    END,
    FREE_BLOCKS,
    IS_V1,
    LONG_PREFILL_TOKEN_THRESHOLD,
    MAX_MODEL_LEN,
    MAX_NUM_BATCHED_TOKENS,
    MAX_NUM_SEQS,
    NUM_RUNNING,
    NUM_STALE,
    STEP_ENDS,
    EngineState,
)

# Outcomes of `fast_forward`.
TARGET_FINISHED = 0  # the sequence asked for has finished, at times[STEP_ENDS]
STOPPED = 1  # the step in flight has ended and its output is applied; the next must be begun by the scheduler
UNFIT = 2  # nothing done: the state is not of the kind that can be fast-forwarded

# Entries of `Scratch.n`.
_COUNT = 0  # sequences of the group
_CONTEXT = 1  # their total context
_GROUP_END = 2  # one past the last entry of `group`
_PARTIAL = 3  # the column of the partial sequence; -1: there is none
_PREFILLED = 4  # tokens of it that are computed
_WAITING = 5  # entry of `line` of the first that waits
_END = 6  # one past the last entry of `line`
_FREE = 7  # free KV blocks
_STEP = 8  # number of the step in flight
_EARLIEST = 9  # the least of `finish`
_KNOWN = 10  # no column from here on was ever admitted
_ASKED = 11  # the column of the sequence asked for
_FIRST_DUE = 12  # 1: it yields its first token in this step
_PREEMPTED = 13  # sequences that the step being scheduled has preempted, the first of the line
_BUDGET = 14  # tokens that it may still take
_CHUNK = 15  # tokens that the partial sequence takes in it
_NUMBERS = 16

# Entries of `Scratch.t`.
_NOW = 0  # when the step in flight ends
_FIRST = 1  # when the sequence asked for yielded its first token; NaN before
_TIMES = 2

_SHIFT = 20  # bits for the column in an entry of `finish`
_NEVER = 2**62


class Scratch(NamedTuple):
    """What `fast_forward` works on. A sequence goes by the column in which it came."""

    finish: Ints
    """int64[columns]: of the group's members the step that yields the last token, and in the low bits the column"""
    group: Ints
    """int64[columns]: the members in order of admission; those that have finished are still among them"""
    line: Ints
    """int64[columns]: the waiting sequences in order, from entry n[_WAITING] on"""
    size: Ints
    """int64[columns]: of a member its context less the number of the step, of any other its prompt and output"""
    left: Ints
    """int64[columns]: of those that are not members the tokens that they will yet yield"""
    wanting: Ints
    """int64[block size]: wanting[n % block size] members take a block in step n + 1"""
    n: Ints
    t: Floats


ScratchArrays = tuple[Ints, Ints, Ints, Ints, Ints, Ints, Ints, Floats]
"""A `Scratch` as a plain tuple, as `Arrays` is an `EngineState`."""


def scratch_for(columns: Int, block_size: Int) -> Scratch:
    """Scratch for engines of so many columns. Whole vectors, so that a scan of `finish` leaves no rest."""
    width = _whole(columns)
    return Scratch(
        np.empty(width, dtype=np.int64),
        np.empty(width, dtype=np.int64),
        np.empty(width, dtype=np.int64),
        np.empty(width, dtype=np.int64),
        np.empty(width, dtype=np.int64),
        np.empty(block_size, dtype=np.int64),
        np.empty(_NUMBERS, dtype=np.int64),
        np.empty(_TIMES),
    )


@compiled
def _whole(columns: Int) -> Int:
    return (columns + 15) >> 4 << 4


@compiled
def fast_forward(engine: EngineState, scratch: Scratch, sequence: int) -> int:
    """Complete steps until the one with ID `sequence` has finished, or until the scheduler itself is needed.

    Its first-token time goes to ``first_token_time`` at the column where it stands; those of others are not kept.
    """
    settings = engine.settings
    if (
        settings[ASYNC_SCHEDULING] == 1
        or settings[LONG_PREFILL_TOKEN_THRESHOLD] > 0
        or settings[ENABLE_CHUNKED_PREFILL] == 0
    ):
        return UNFIT
    if not _load(engine, scratch, sequence):
        return UNFIT
    while True:
        if _end_step(engine, scratch):
            return TARGET_FINISHED
        if _decode_run(engine, scratch):
            continue
        if not _schedule(engine, scratch):
            _hand_over(engine, scratch)
            return STOPPED


@compiled
def _first_finish(scratch: Scratch) -> Int:
    least = np.int64(_NEVER)
    for column in range(Index(_whole(scratch.n[_KNOWN]))):
        least = min(least, scratch.finish[column])
    return least


@compiled
def _load(engine: EngineState, scratch: Scratch, sequence: int) -> bool:
    """Sum up the sequences; False if their state does not fit the picture."""
    seqs, counters, settings, n = engine.seqs, engine.counters, engine.settings, scratch.n
    last = settings[BLOCK_SIZE] - 1  # x & last is x modulo the block size
    finish, size, left = scratch.finish, scratch.size, scratch.left
    scratch.wanting[:] = 0
    waiting, end = counters[BEGIN] + counters[NUM_RUNNING], counters[END]
    finish[: _whole(end)] = _NEVER
    asked = end - 1
    while seqs[ID, Index(asked)] != sequence:
        asked -= 1
    first = engine.first_token_time[asked]
    count = np.int64(0)
    context = np.int64(0)
    partial = np.int64(-1)
    n[_PREFILLED] = 0
    n[_FIRST_DUE] = 0
    for column in range(Index(counters[BEGIN]), Index(end)):
        total = seqs[NUM_PROMPT_TOKENS, column] + seqs[NUM_OUTPUT_TOKENS, column]
        more = min(seqs[TARGET, column] - seqs[NUM_OUTPUT_TOKENS, column], settings[MAX_MODEL_LEN] - total)
        size[column] = total
        left[column] = more
        scratch.line[column] = column
        if np.int64(column) >= waiting:
            continue
        if seqs[NUM_SCHEDULED_TOKENS, column] == 0 or partial >= 0:
            return False
        base = seqs[NUM_COMPUTED_TOKENS, column]
        if seqs[NUM_OUTPUT_PLACEHOLDERS, column] == 0:
            partial = np.int64(column)
            n[_PREFILLED] = base
            continue
        finish[column] = more - 1 << _SHIFT | np.int64(column)
        scratch.group[Index(count)] = np.int64(column)
        size[column] = base
        count += 1
        scratch.wanting[Index(-base & last)] += 1
        context += base
        if np.int64(column) == asked and np.isnan(first):
            n[_FIRST_DUE] = 1
    n[_COUNT] = n[_GROUP_END] = count
    n[_CONTEXT] = context
    n[_PARTIAL] = partial
    n[_WAITING] = n[_KNOWN] = waiting
    n[_END] = end
    n[_ASKED] = asked
    n[_FREE] = counters[FREE_BLOCKS]
    n[_STEP] = 0
    n[_EARLIEST] = _first_finish(scratch)
    scratch.t[_NOW] = engine.times[STEP_ENDS]
    scratch.t[_FIRST] = first
    return True


@compiled
def _leave_group(engine: EngineState, scratch: Scratch, column: Int) -> None:
    """A member finishes or is preempted."""
    n, settings = scratch.n, engine.settings
    base = scratch.size[Index(column)]
    n[_FREE] += blocks_for(base + n[_STEP], settings) - engine.seqs[NUM_SHARED_BLOCKS, Index(column)]
    scratch.wanting[Index(-base & (settings[BLOCK_SIZE] - 1))] -= 1
    n[_CONTEXT] -= base + n[_STEP]
    n[_COUNT] -= 1
    scratch.finish[Index(column)] = _NEVER


@compiled
def _end_step(engine: EngineState, scratch: Scratch) -> bool:
    """The step in flight ends: first tokens, finishes. True if the sequence asked for is among these."""
    n, t = scratch.n, scratch.t
    if n[_FIRST_DUE] == 1:
        t[_FIRST] = t[_NOW]
        n[_FIRST_DUE] = 0
    while n[_EARLIEST] >> _SHIFT <= n[_STEP]:
        column = n[_EARLIEST] & ((1 << _SHIFT) - 1)
        if scratch.finish[Index(column)] == n[_EARLIEST]:  # it has not been preempted meanwhile
            if column == n[_ASKED]:
                engine.times[STEP_ENDS] = t[_NOW]
                engine.first_token_time[Index(column)] = t[_FIRST]
                engine.counters[BEGIN] = column
                return True
            _leave_group(engine, scratch, column)
        n[_EARLIEST] = _first_finish(scratch)
    return False


@compiled
def _decode_run(engine: EngineState, scratch: Scratch) -> bool:
    """Nothing but decoding until the next finish, as long as the blocks last and the head of the line does not fit.

    True if it has come to the finish.
    """
    n, t, settings, params = scratch.n, scratch.t, engine.settings, engine.latency_params
    count, step, finish = n[_COUNT], n[_STEP], n[_EARLIEST] >> _SHIFT
    if n[_PARTIAL] >= 0 or count == 0 or finish <= step + 1 or count >= settings[MAX_NUM_BATCHED_TOKENS]:
        return False
    if n[_WAITING] != n[_END] and count != settings[MAX_NUM_SEQS]:
        column = scratch.line[Index(n[_WAITING])]
        total, (cached, shared) = scratch.size[Index(column)], believed_prefix(engine, column)
        chunk = min(total - cached, settings[MAX_NUM_BATCHED_TOKENS] - count)
        if can_admit(total, cached + chunk, shared, n[_FREE], count, settings):
            return False
    last = settings[BLOCK_SIZE] - 1
    fixed = decode_time(params, count, 0)
    slope = decode_time(params, count, 1) - fixed
    fixed += linear_time(params, count)
    tokens_read, each, now = float(n[_CONTEXT]), float(count), t[_NOW]  # whole numbers, exact
    free = n[_FREE] - spare_block(settings)
    left = free - scratch.wanting[Index(step & last)]
    while finish > step and left >= 0:
        step += 1
        free = left
        left -= scratch.wanting[Index(step & last)]
        tokens_read += each
        now += fixed + slope * tokens_read
    n[_FREE] = free + spare_block(settings)
    n[_CONTEXT] += count * (step - n[_STEP])
    n[_STEP] = step
    t[_NOW] = now
    return bool(finish <= step)


@compiled
def _schedule(engine: EngineState, scratch: Scratch) -> bool:
    """Schedule a step and begin it; False, with nothing begun, if the scheduler itself is needed for that."""
    n, params = scratch.n, engine.latency_params
    if not _allocate_or_preempt(engine, scratch):
        return False
    n[_STEP] += 1
    n[_CONTEXT] += n[_COUNT]
    tokens, decodes, decode_context = n[_COUNT], n[_COUNT], n[_CONTEXT]
    prefill = 0.0
    joining, chunk = n[_PARTIAL], n[_CHUNK]
    while True:
        if joining >= 0:
            context = n[_PREFILLED]
            if chunk == 1:
                decodes += 1
                decode_context += context + 1
            else:
                prefill += prefill_time(params, chunk, context)
            n[_PREFILLED] = context + chunk
            tokens += chunk
            n[_BUDGET] -= chunk
            if n[_PREFILLED] < scratch.size[Index(joining)]:
                n[_PARTIAL] = joining
                break
            _join_group(engine, scratch, joining)
        joining, chunk = _admit(engine, scratch)
        if joining < 0:
            break
    if tokens == 0:
        n[_STEP] -= 1
        return False
    scratch.t[_NOW] += step_duration(params, tokens, decodes, decode_context, prefill)
    return True


@compiled
def _allocate_or_preempt(engine: EngineState, scratch: Scratch) -> bool:
    """Running sequences take their blocks; where there are too few, the youngest make room. False if the budget of the
    step does not suffice even so.
    """
    n, settings = scratch.n, engine.settings
    last = settings[BLOCK_SIZE] - 1
    n[_PREEMPTED] = 0
    n[_CHUNK] = 0
    while True:
        n[_BUDGET] = settings[MAX_NUM_BATCHED_TOKENS] - n[_COUNT]
        spare = n[_FREE] - scratch.wanting[Index(n[_STEP] & last)]
        enough = spare >= 0
        if n[_COUNT] > 0:
            while scratch.finish[Index(scratch.group[Index(n[_GROUP_END] - 1)])] == _NEVER:
                n[_GROUP_END] -= 1
            youngest = scratch.size[Index(scratch.group[Index(n[_GROUP_END] - 1)])]
            if (youngest + n[_STEP]) & last != 0:  # else it takes one, and so had it in reach
                enough = spare >= spare_block(settings)
        if n[_PARTIAL] >= 0:
            total, computed = scratch.size[Index(n[_PARTIAL])], n[_PREFILLED]
            n[_CHUNK] = min(total - computed, n[_BUDGET])
            if settings[IS_V1] == 1:
                spare -= blocks_for(computed + n[_CHUNK], settings) - blocks_for(computed, settings)
                enough = spare >= 0
            else:
                enough = enough and spare >= blocks_in_reach(computed, total, 0, settings)
        if enough or (n[_PARTIAL] < 0 and n[_COUNT] == 0):
            break
        _preempt_youngest(engine, scratch)
    if n[_BUDGET] <= 0:
        return False
    n[_FREE] = spare
    return True


@compiled
def _preempt_youngest(engine: EngineState, scratch: Scratch) -> None:
    """The partial sequence, or else the youngest member, becomes the first of the line."""
    n, settings = scratch.n, engine.settings
    n[_WAITING] -= 1
    n[_PREEMPTED] += 1
    column = n[_PARTIAL]
    if column >= 0:
        n[_FREE] += blocks_at_admission(scratch.size[Index(column)], n[_PREFILLED], settings)
        n[_FREE] -= engine.seqs[NUM_SHARED_BLOCKS, Index(column)]
        n[_PARTIAL] = -1
        n[_CHUNK] = 0
    else:
        n[_GROUP_END] -= 1
        column = scratch.group[Index(n[_GROUP_END])]
        scratch.left[Index(column)] = (scratch.finish[Index(column)] >> _SHIFT) - n[_STEP]
        _leave_group(engine, scratch, column)
        scratch.size[Index(column)] += n[_STEP] + 1
    scratch.line[Index(n[_WAITING])] = column
    share_no_more_than_found(engine, column)


@compiled
def _join_group(engine: EngineState, scratch: Scratch, joining: Int) -> None:
    """A sequence whose prefill is complete joins the group, be it the partial one or one that was waiting."""
    n, column, step = scratch.n, Index(joining), scratch.n[_STEP]
    total = scratch.size[column]
    finish = step + scratch.left[column] - 1 << _SHIFT | joining
    scratch.finish[column] = finish
    n[_EARLIEST] = min(n[_EARLIEST], finish)
    scratch.size[column] = total - step
    scratch.group[Index(n[_GROUP_END])] = joining
    n[_GROUP_END] += 1
    n[_COUNT] += 1
    scratch.wanting[Index((step - total) & (engine.settings[BLOCK_SIZE] - 1))] += 1
    n[_CONTEXT] += total
    if joining == n[_ASKED] and np.isnan(scratch.t[_FIRST]):
        n[_FIRST_DUE] = 1
    n[_PARTIAL] = -1


@compiled
def _admit(engine: EngineState, scratch: Scratch) -> tuple[Int, Int]:
    """Admit the first of the line that was not preempted in this step: its column and its chunk; −1 if none may be."""
    n, line, settings = scratch.n, scratch.line, engine.settings
    head = n[_WAITING] + n[_PREEMPTED]
    none = (np.int64(-1), np.int64(0))
    if n[_PREEMPTED] > 0 and settings[IS_V1] == 1:
        return none
    if head == n[_END] or n[_BUDGET] <= 0 or n[_COUNT] == settings[MAX_NUM_SEQS]:
        return none
    column = line[Index(head)]
    total, (cached, shared) = scratch.size[Index(column)], believed_prefix(engine, column)
    chunk = min(total - cached, n[_BUDGET])
    if not can_admit(total, cached + chunk, shared, n[_FREE], n[_COUNT], settings):
        return none
    for i in range(head, n[_WAITING], -1):  # past those preempted in this step
        line[i] = line[i - 1]
    n[_FREE] -= blocks_at_admission(total, cached + chunk, settings) - shared
    n[_PREFILLED] = cached
    n[_WAITING] += 1
    n[_KNOWN] = max(n[_KNOWN], column + 1)
    return column, chunk


@compiled
def _hand_over(engine: EngineState, scratch: Scratch) -> None:
    """Put the columns in order, and every field as the scheduler expects it between two steps."""
    seqs, counters, n, line = engine.seqs, engine.counters, scratch.n, scratch.line
    step, partial, waiting, end = n[_STEP], n[_PARTIAL], n[_WAITING], n[_END]
    running = n[_COUNT] + (1 if partial >= 0 else 0)
    begin = waiting - running
    engine.times[STEP_ENDS] = scratch.t[_NOW]
    counters[BEGIN] = begin
    counters[NUM_RUNNING] = running
    counters[FREE_BLOCKS] = n[_FREE]
    counters[NUM_STALE] = 0
    i = waiting
    if partial >= 0:
        i -= 1
        line[i] = partial
    member = n[_GROUP_END]
    while i > begin:
        member -= 1
        if scratch.finish[scratch.group[member]] != _NEVER:
            i -= 1
            line[i] = scratch.group[member]
    moved = scratch.finish  # needed no more
    for row in range(FIELDS):
        for i in range(begin, end):
            moved[i] = seqs[row, line[i]]
        for i in range(begin, end):
            seqs[row, i] = moved[i]
    for i in range(begin, end):
        column = line[i]
        size = scratch.size[column]  # of the waiting, who have nothing computed
        computed: Int = np.int64(0)
        blocks: Int = np.int64(0)
        if column == partial:
            computed = n[_PREFILLED]
            blocks = blocks_at_admission(size, computed, engine.settings)
        elif i < waiting:
            computed = size + step
            blocks = blocks_for(computed, engine.settings)
            size = computed + 1
        seqs[NUM_OUTPUT_TOKENS, i] = size - seqs[NUM_PROMPT_TOKENS, i]
        seqs[NUM_COMPUTED_TOKENS, i] = computed
        seqs[NUM_BLOCKS, i] = blocks
        seqs[NUM_SCHEDULED_TOKENS, i] = 0
        seqs[NUM_OUTPUT_PLACEHOLDERS, i] = 0
        if column == n[_ASKED]:
            engine.first_token_time[i] = scratch.t[_FIRST]
