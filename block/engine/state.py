"""The state of an engine as compiled code takes it: one named tuple of arrays, and what their entries mean.

``seqs`` has a column per sequence (`block.core.snapshot` names its rows). Columns BEGIN … END − 1 are live; the first
NUM_RUNNING of them run, in order of admission, the rest wait, in order of the queue. A preempted sequence is the last
that runs and becomes the first that waits, so that only the boundary moves.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from block.core.arrays import Floats, Int, Ints
from block.core.jit import Index, compiled
from block.core.snapshot import FIELDS

# Entries of `counters`.
BEGIN = 0  # first live column
NUM_RUNNING = 1  # running sequences
END = 2  # one past the last live column
FREE_BLOCKS = 3  # free KV blocks
NUM_STALE = 4  # preempted sequences, first of the waiting ones, with a token still in flight
QUEUED = 5  # 1 if row NUM_SCHEDULED_NEXT holds a scheduled step
VISIBLE = 6  # END when `schedule` last ran: later columns are not yet known to the scheduler
NUM_STEPS = 7  # steps begun
ALL_PREEMPTIONS = 8  # preemptions so far
NUM_ABORTED = 9  # live columns whose row TARGET says GONE
DECODE_RUN = 10  # steps of mere decoding that come next, the one in flight included
HALT = 11  # HALTING: no step is begun when the one in flight ends; HALTED: it has ended
RESERVED_BLOCKS = 12  # blocks that no sequence here has, and that are not free
COUNTERS = 13

HALTING, HALTED = 1, 2

GONE = -1  # as a TARGET, this or less: aborted, to be removed when the step in flight ends; the least of all last

# Entries of `times`.
STEP_STARTED = 0  # when the step in flight began
STEP_ENDS = 1  # when it ends; inf when the engine is idle
QUEUED_DURATION = 2  # of the queued step
EVENT = 3  # when the first step ends that does more than decode; inf when the engine is idle
EVENT_STARTED = 4  # when it begins
NEXT_FINISH = 5  # no sequence finishes before this; inf when the engine is idle
SHORTEST_STEP = 6  # no step takes less
TIMES = 7

# Values of ENABLE_PREFIX_CACHING.
CACHE_OFF = 0
CACHE_BLOCKS = 1  # `EngineState.cache` knows each block
CACHE_COUNTS = 2  # rows NUM_CACHED_TOKENS and NUM_SHARED_BLOCKS are believed, as in forecasts

IDLE = (np.nan, np.inf, 0.0, np.inf, np.nan, np.inf, 0.0)
"""The times of an engine that has nothing to do."""

# Entries of `settings`: the fields of `block.engine.config.EngineSettings` in their order, and one that follows.
IS_V1 = 0
MAX_NUM_SEQS = 1
MAX_NUM_BATCHED_TOKENS = 2
MAX_MODEL_LEN = 3
BLOCK_SIZE = 4
TOTAL_BLOCKS = 5
WATERMARK_BLOCKS = 6
ASYNC_SCHEDULING = 7
LONG_PREFILL_TOKEN_THRESHOLD = 8
SCHEDULER_RESERVE_FULL_ISL = 9
ENABLE_CHUNKED_PREFILL = 10
ENABLE_PREFIX_CACHING = 11
BLOCK_SIZE_LOG2 = 12
SETTINGS = 13

# Rows of `finished`.
FINISHED_ID = 0
FINISHED_FIRST_TOKEN = 1  # when it yielded its first token
FINISHED_AT = 2
FINISHED_PREEMPTIONS = 3
FINISHED_OUTPUT_TOKENS = 4
FINISHED_CACHED_TOKENS = 5
FINISHED = 6


class EngineState(NamedTuple):
    """All of an engine. In a batch each array has an axis more in front, of an engine a row (`engine_in`)."""

    seqs: Ints
    """int64[FIELDS, capacity]"""
    first_token_time: Floats
    """float64[capacity]: when each sequence yielded its first token; NaN before."""
    counters: Ints
    """int64[COUNTERS]"""
    times: Floats
    """float64[TIMES], seconds"""
    settings: Ints
    """int64[SETTINGS]"""
    latency_params: Floats
    """float64[n]: a latency model (`block.engine.latency.LatencyModel.pack`)"""
    noise: Floats
    """float64[n]: factors on the durations of steps, repeated"""
    finished: Floats
    """float64[FINISHED, capacity]: the sequences that the last call has finished, by column"""
    cache: Ints
    """int64[n]: a prefix cache (`block.engine.prefix_cache`); empty if ENABLE_PREFIX_CACHING is 0"""


Arrays = tuple[Ints, Floats, Ints, Floats, Ints, Floats, Floats, Floats, Ints]
"""An `EngineState` as a plain tuple, whose type numba finds out in half the time at a call from Python."""


@compiled
def engine_in(batch: EngineState, row: Int) -> EngineState:
    """The engine in a row of a batch."""
    return EngineState(
        batch.seqs[row],
        batch.first_token_time[row],
        batch.counters[row],
        batch.times[row],
        batch.settings[row],
        batch.latency_params[row],
        batch.noise[row],
        batch.finished[row],
        batch.cache[row],
    )


@compiled
def move_left(engine: EngineState, source: Int, target: Int) -> None:
    """Move column `source` to `target` ≤ source; those between move one to the right."""
    seqs, first_token_time = engine.seqs, engine.first_token_time
    for row in range(FIELDS):
        value = seqs[row, Index(source)]
        for left in range(Index(source - target)):
            column = Index(source) - left
            seqs[row, column] = seqs[row, column - Index(1)]
        seqs[row, Index(target)] = value
    first = first_token_time[source]
    for column in range(source, target, -1):
        first_token_time[column] = first_token_time[column - 1]
    first_token_time[target] = first


@compiled
def compact(engine: EngineState) -> bool:
    """Move the live columns to the front; False, with nothing done, if they take more than half of the row."""
    seqs, first_token_time, counters = engine.seqs, engine.first_token_time, engine.counters
    begin, live = counters[BEGIN], counters[END] - counters[BEGIN]
    if 2 * live > seqs.shape[1]:
        return False
    for row in range(FIELDS):
        for column in range(live):
            seqs[row, column] = seqs[row, begin + column]
    for column in range(live):
        first_token_time[column] = first_token_time[begin + column]
    counters[BEGIN] = 0
    counters[END] -= begin
    counters[VISIBLE] -= begin
    return True
