"""Many engines, advanced together by compiled code: the simulated testbed's instances.

An engine is a row of arrays. Between two events (a finish, an admission, a prefill, a preemption) it does nothing but
decode, which nobody outside can notice; how many such steps there are, and when the step behind them ends, is computed
once. So the batch knows when a sequence may finish next (`next_event`), and `advance_all` takes those engines along in
which one may, up to the first at which one does. The others are advanced when they are looked at, or get a request.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from block.core.arrays import Floats, Int, Ints
from block.core.jit import Index, compiled, one_at_a_time
from block.core.snapshot import (
    CACHE_RECORD,
    EXPECTED,
    FIELDS,
    ID,
    MAX_TOKENS,
    META,
    META_BEGIN,
    META_END,
    META_FREE,
    META_ID,
    META_PREEMPTIONS,
    META_ROW,
    META_RUNNING,
    META_STALE,
    NUM_CACHED_TOKENS,
    NUM_COMPUTED_TOKENS,
    NUM_OUTPUT_TOKENS,
    NUM_PROMPT_TOKENS,
    NUM_SHARED_BLOCKS,
    TARGET,
    Snapshots,
)
from block.core.types import Request
from block.engine.block_tables import HASHES, NO_HASHES, NUM_HASHES, add_record, compact_records
from block.engine.config import EngineSettings
from block.engine.decode_runs import decode, decode_times, next_decode_run
from block.engine.kv_cache import held_prefix
from block.engine.latency import LatencyModel
from block.engine.prefix_cache import RECORDS_END, empty_cache
from block.engine.scheduler import begin_step, complete_step, end_step
from block.engine.state import (
    ALL_PREEMPTIONS,
    BEGIN,
    BLOCK_SIZE,
    BLOCK_SIZE_LOG2,
    CACHE_BLOCKS,
    COUNTERS,
    DECODE_RUN,
    ENABLE_PREFIX_CACHING,
    END,
    EVENT,
    EVENT_STARTED,
    FINISHED,
    FREE_BLOCKS,
    HALT,
    HALTED,
    HALTING,
    IDLE,
    MAX_MODEL_LEN,
    NEXT_FINISH,
    NUM_RUNNING,
    NUM_STALE,
    SHORTEST_STEP,
    STEP_ENDS,
    STEP_STARTED,
    VISIBLE,
    Arrays,
    EngineState,
    compact,
    engine_in,
)

CAPACITY = 64  # columns of a row at first
TOKENS_AHEAD = 2  # a sequence may have blocks for so many tokens more than it comes to have (asynchronous scheduling)
MARGIN = 0.99  # of the shortest step: sums of steps are rounded, and a bound on them must not be above
LATEST = math.nextafter(math.inf, 0.0)  # any time but inf, at which an engine is idle


class EngineSpec(NamedTuple):
    """What an engine is made of.

    noise: float[n], factors on the durations of its steps, repeated; None: its steps take what the latency model says.
    """

    settings: EngineSettings
    latency: LatencyModel
    noise: Floats | None = None


class Finished(NamedTuple):
    """A sequence that an engine has finished; times in seconds."""

    id: int
    first_token: float
    finished: float
    preemptions: int
    output_tokens: int
    cached_tokens: int = 0


class EngineBatch:
    """Engines, a row each. Calls come with times that never go back.

    next_event: no sequence finishes before this time if nothing arrives; inf: none will.
    """

    def __init__(self, specs: Sequence[EngineSpec]) -> None:
        rows = len(specs)
        params = [spec.latency.pack() for spec in specs]
        noise = [np.ones(1) if spec.noise is None else spec.noise for spec in specs]
        self.arrays = EngineState(
            seqs=np.zeros((rows, FIELDS, CAPACITY), dtype=np.int64),
            first_token_time=np.zeros((rows, CAPACITY)),
            counters=np.zeros((rows, COUNTERS), dtype=np.int64),
            times=np.tile(IDLE, (rows, 1)),
            settings=np.array([spec.settings.to_array() for spec in specs]),
            latency_params=np.array([_extended(one, max(map(len, params))) for one in params]),
            noise=np.array([np.resize(one, max(map(len, noise))) for one in noise]),
            finished=np.zeros((rows, FINISHED, CAPACITY)),
            cache=_caches([spec.settings for spec in specs]),
        )
        self.arrays.times[:, SHORTEST_STEP] = [
            MARGIN * np.min(spec.latency.linear[1:]) * np.min(factors)
            for spec, factors in zip(specs, noise, strict=True)
        ]
        self.arrays.counters[:, FREE_BLOCKS] = [spec.settings.total_blocks for spec in specs]
        self._plain: Arrays = self.arrays[:]
        self.block_size = specs[0].settings.block_size
        self.max_model_len = [spec.settings.max_model_len for spec in specs]
        self.next_event = math.inf
        self._rows = np.arange(rows)
        self._out = np.zeros(2, dtype=np.int64)  # the row of which sequences have finished, and how many

    def __len__(self) -> int:
        return len(self.max_model_len)

    def receive(self, row: int, request: Request, now: float) -> None:
        """A request gets to an engine at `now`, to which all have been advanced.

        ValueError if its prompt leaves no room for a response.
        """
        prompt, target = request.prompt_tokens, request.output_tokens
        if prompt >= self.max_model_len[row]:
            raise ValueError(
                f"request {request.id}: a prompt of {prompt} tokens leaves no room for a response in "
                f"engine.max_model_len={self.max_model_len[row]}"
            )
        most = target if request.max_tokens is None else request.max_tokens
        record = self._add_record(row, request) if self.arrays.cache.shape[1] else 0
        while True:
            self.next_event = _receive(
                self._plain,
                row,
                now,
                request.id,
                prompt,
                min(target, most),
                most,
                request.predicted_output_tokens,
                record,
            )
            if self.next_event >= 0.0:
                return
            self._grow()  # there was no room

    def _add_record(self, row: int, request: Request) -> int:
        """Have a record of a sequence that comes to an engine with a prefix cache; returns its place."""
        settings = self.arrays.settings[row]
        if settings[ENABLE_PREFIX_CACHING] == 0:
            return 0
        tokens = min(request.prompt_tokens + request.output_tokens, self.max_model_len[row]) + TOKENS_AHEAD
        most_blocks = -(-tokens // int(settings[BLOCK_SIZE]))
        hashes = NO_HASHES if request.block_hashes is None else request.block_hashes[:most_blocks]
        while (place := add_record(self.arrays.cache[row], hashes, most_blocks)) < 0:
            compact_records(self.engine(row))
            width = self.arrays.cache.shape[1]
            needed = HASHES + len(hashes) + most_blocks
            if 2 * (int(self.arrays.cache[row, RECORDS_END]) + needed) > width:  # else it would be full again soon
                self.arrays = self.arrays._replace(cache=_wider(self.arrays.cache, 2 * width))
                self._plain = self.arrays[:]
        return place

    def advance_all(self, until: float) -> Sequence[Finished]:
        """Complete the steps that end by `until`, or by the first end at which sequences finish; returns these.

        inf: as long as there is anything to do. Steps at which none can finish, which nobody can notice, may be left
        for later.
        """
        self.next_event = _advance_all(self._plain, until, self._out)
        row, found = self._out.tolist()
        return self.finished(row, found) if found else ()

    def advance(self, row: int, now: float) -> Sequence[Finished]:
        """Complete the steps of one engine that end by `now`; returns the sequences that finished, in order of time."""
        found = _advance(self.engine(row), 0, now)
        self.next_event = float(self.arrays.times[:, NEXT_FINISH].min())
        return self.finished(row, found)

    def finished(self, row: int, found: Int) -> Sequence[Finished]:
        """The first `found` sequences that the last advance of an engine has finished."""
        return [
            Finished(int(id_), first, at, int(preempted), int(output), int(cached))
            for id_, first, at, preempted, output, cached in self.arrays.finished[row, :, :found].T.tolist()
        ]

    def snapshots(self, rows: Sequence[int], now: float) -> Snapshots:
        """What the schedulers of these engines published when they last ran, at `now`, to which all have been advanced.

        Snapshots are under the numbers of their rows, and valid until an engine changes.
        """
        chosen = self._rows if rows == range(len(self._rows)) else np.array(rows, dtype=np.int64)
        meta = np.empty((len(chosen), META), dtype=np.int64)
        started = np.empty(len(chosen))
        _show(self._plain, chosen, now, meta, started)
        return Snapshots(now, self.arrays.seqs, meta, started)

    def cached_blocks(self, rows: Sequence[int], hashes: Ints, most: int, now: float) -> Ints:
        """int64[rows, 2]: of a prompt's first `most` blocks, by their hashes, how many these engines have at `now`, to
        which all have been advanced; and how many of these are in use.

        Those that a sequence which is there will fill count as if they were cached, and in use.
        """
        found = np.zeros((len(rows), 2), dtype=np.int64)
        _cached_blocks(self._plain, np.array(rows, dtype=np.int64), hashes, min(most, len(hashes)), now, found)
        return found

    def look_ahead(self, row: int) -> None:
        """An engine was changed from outside: find anew when anything may happen next."""
        look_ahead(self.engine(row))
        self.next_event = float(self.arrays.times[:, NEXT_FINISH].min())

    def engine(self, row: int) -> EngineState:
        """The arrays of one engine: views, valid until `make_room` or `receive` is called."""
        return EngineState(*(array[row] for array in self.arrays))

    def make_room(self, row: int) -> None:
        """Have room for one more sequence in an engine."""
        if self.arrays.counters[row, END] == self.arrays.seqs.shape[2] and not compact(self.engine(row)):
            self._grow()

    def _grow(self) -> None:
        arrays = self.arrays
        columns = 2 * arrays.seqs.shape[2]
        self.arrays = arrays._replace(
            seqs=_wider(arrays.seqs, columns),
            first_token_time=_wider(arrays.first_token_time, columns),
            finished=_wider(arrays.finished, columns),
        )
        self._plain = self.arrays[:]

    def copy(self, row: int) -> EngineBatch:
        """A batch of one engine, a copy of one of these."""
        other = EngineBatch.__new__(EngineBatch)
        only = slice(row, row + 1)
        other.arrays = EngineState(*(array[only].copy() for array in self.arrays))  # type: ignore[arg-type]
        other._plain = other.arrays[:]
        other.block_size = self.block_size
        other.max_model_len = self.max_model_len[only]
        other.next_event = float(other.arrays.times[0, NEXT_FINISH])
        other._rows, other._out = self._rows[:1], np.zeros(2, dtype=np.int64)
        return other


def warm_up(spec: EngineSpec) -> None:
    """Load the compiled code of a batch, or compile it, before a run's time is taken."""
    with one_at_a_time():
        batch = EngineBatch([spec])
        batch.receive(0, Request(0, 0.0, 1, 1, 1), 0.0)
        batch.snapshots([0], 0.0)
        batch.advance_all(math.inf)
        if spec.settings.enable_prefix_caching:
            batch.cached_blocks([0], NO_HASHES, 0, 0.0)


def _extended(packed: Floats, length: int) -> Floats:
    """A packed latency model made longer, as `linear_time` would have it: its last slope goes on."""
    beyond = np.arange(1, length - len(packed) + 1)
    return np.concatenate([packed, packed[-1] + (packed[-1] - packed[-2]) * beyond])


def _caches(settings: Sequence[EngineSettings]) -> Ints:
    """The prefix caches of engines, a row each; those of engines that have none are empty."""
    caches = [empty_cache(one.total_blocks + 1) if one.enable_prefix_caching else NO_HASHES for one in settings]
    width = max(map(len, caches))
    return np.array([np.pad(cache, (0, width - len(cache))) for cache in caches])


def _wider(rows: NDArray[Any], columns: int) -> NDArray[Any]:
    """A copy of an array whose last axis has so many columns, the new ones 0."""
    return np.pad(rows, [(0, 0)] * (rows.ndim - 1) + [(0, columns - rows.shape[-1])])


@compiled
def look_ahead(engine: EngineState) -> None:
    """Find the decode-only steps that come next, and when the step behind them begins and ends."""
    counters, times = engine.counters, engine.times
    if counters[HALT] == HALTED:
        counters[DECODE_RUN], times[EVENT] = 0, np.inf
    elif counters[HALT] == HALTING:
        counters[DECODE_RUN], times[EVENT_STARTED], times[EVENT] = 0, times[STEP_STARTED], times[STEP_ENDS]
    else:
        counters[DECODE_RUN], times[EVENT_STARTED], times[EVENT] = next_decode_run(engine)
    if counters[HALT] == HALTING:
        times[NEXT_FINISH] = times[EVENT]
    else:
        times[NEXT_FINISH] = times[EVENT] + _steps_beyond_event(engine) * times[SHORTEST_STEP]


@compiled
def _steps_beyond_event(engine: EngineState) -> Int:
    """How many steps, at least, after the first one that does more than decode, end before that of which a sequence
    finishes; 0: one may finish at its end.
    """
    seqs, counters, longest = engine.seqs, engine.counters, engine.settings[MAX_MODEL_LEN]
    least = np.int64(longest)
    in_flight = counters[BEGIN] + counters[NUM_RUNNING] + counters[NUM_STALE]
    for column in range(Index(counters[BEGIN]), Index(counters[END])):
        prompt, output = seqs[NUM_PROMPT_TOKENS, column], seqs[NUM_OUTPUT_TOKENS, column]
        left = min(seqs[TARGET, column], longest - prompt) - output
        if np.int64(column) < in_flight:
            left -= counters[DECODE_RUN] + 1
        least = min(least, left)
    return max(least, np.int64(0))


@compiled
def _complete_event(engine: EngineState, found: Int) -> Int:
    """Complete the decode-only steps and the step behind them; `found` and the value are `complete_step`'s."""
    counters, times = engine.counters, engine.times
    decode(engine, counters[DECODE_RUN])
    times[STEP_STARTED], times[STEP_ENDS] = times[EVENT_STARTED], times[EVENT]
    if counters[HALT] == HALTING:
        found = end_step(engine, found)
        counters[HALT] = HALTED
    else:
        found = complete_step(engine, found)
    look_ahead(engine)
    return found


@compiled
def _advance(engine: EngineState, found: Int, now: float) -> Int:
    """Complete the steps of one engine that end by `now`; `found` and the value are those of `complete_step`."""
    counters, times = engine.counters, engine.times
    now = min(now, LATEST)
    while times[EVENT] <= now:
        found = _complete_event(engine, found)
    if times[STEP_ENDS] <= now and counters[HALT] != HALTED:  # decode-only steps, but not all of the run
        kv = np.int64(0)
        for column in range(Index(counters[BEGIN]), Index(counters[BEGIN] + counters[NUM_RUNNING])):
            kv += engine.seqs[NUM_COMPUTED_TOKENS, column]
        steps, started, ends = decode_times(engine, kv, counters[DECODE_RUN], now)
        decode(engine, steps)
        times[STEP_STARTED], times[STEP_ENDS] = started, ends
        counters[DECODE_RUN] -= steps
    return found


@compiled
def _soonest(engines: EngineState) -> int:
    """The row of the engine in which a sequence may finish next."""
    soonest = 0
    for row in range(engines.times.shape[0]):
        if engines.times[row, NEXT_FINISH] < engines.times[soonest, NEXT_FINISH]:
            soonest = row
    return soonest


@compiled
def _advance_all(arrays: Arrays, until: float, out: Ints) -> float:
    """Complete steps up to the first finish; `out` becomes the row of which sequences finished, and how many. Returns
    when the next may finish.
    """
    engines = EngineState(*arrays)
    out[0] = out[1] = 0
    until = min(until, LATEST)
    while True:
        row = _soonest(engines)
        if engines.times[row, NEXT_FINISH] > until or out[1] > 0:
            return float(engines.times[row, NEXT_FINISH])
        out[0] = row
        out[1] = _complete_event(engine_in(engines, row), np.int64(0))


@compiled
def _show(arrays: Arrays, rows: Ints, now: float, meta: Ints, started: Floats) -> None:
    """Advance engines to `now`, and fill in what a `Snapshots` has of each: meta[i], started[i] of rows[i]."""
    engines = EngineState(*arrays)
    for i in range(rows.shape[0]):
        engine = engine_in(engines, rows[i])
        _advance(engine, np.int64(0), now)
        counters, times = engine.counters, engine.times
        meta[i, META_ID] = rows[i]
        meta[i, META_ROW] = rows[i]
        meta[i, META_BEGIN] = counters[BEGIN]
        meta[i, META_END] = counters[VISIBLE]
        meta[i, META_RUNNING] = counters[NUM_RUNNING]
        meta[i, META_STALE] = counters[NUM_STALE]
        meta[i, META_FREE] = counters[FREE_BLOCKS]
        meta[i, META_PREEMPTIONS] = counters[ALL_PREEMPTIONS]
        started[i] = times[STEP_STARTED] if times[STEP_ENDS] < np.inf else np.nan


@compiled
def _cached_blocks(
    arrays: Arrays,
    rows: Ints,
    hashes: Ints,
    most: int,
    now: float,
    found: Ints,
) -> None:
    """Fill in what `EngineBatch.cached_blocks` returns."""
    engines = EngineState(*arrays)
    for i in range(rows.shape[0]):
        engine = engine_in(engines, rows[i])
        if engine.settings[ENABLE_PREFIX_CACHING] == CACHE_BLOCKS:
            _advance(engine, np.int64(0), now)
            found[i, 0], found[i, 1] = held_prefix(engine, hashes, most)


@compiled
def _receive(
    arrays: Arrays,
    row: int,
    now: float,
    id_: Int,
    prompt: Int,
    target: Int,
    most: Int,
    expected: Int,
    record: Int,
) -> float:
    """Let a sequence wait in an engine; one that is idle begins a step.

    prompt, target, most, expected: tokens, as rows NUM_PROMPT_TOKENS, TARGET, MAX_TOKENS and EXPECTED have them.
    record: as row CACHE_RECORD has it.
    Returns when a sequence of any engine may finish next; -1, with nothing done, if there is no room for it.
    """
    engines = EngineState(*arrays)
    engine = engine_in(engines, row)
    seqs, counters = engine.seqs, engine.counters
    if counters[END] == seqs.shape[1] and not compact(engine):
        return -1.0
    _advance(engine, np.int64(0), now)
    column = counters[END]
    for field in range(FIELDS):
        seqs[field, column] = 0
    seqs[ID, column] = id_
    seqs[NUM_PROMPT_TOKENS, column] = prompt
    seqs[TARGET, column] = target
    seqs[MAX_TOKENS, column] = most
    seqs[EXPECTED, column] = expected
    seqs[CACHE_RECORD, column] = record
    if record > 0:
        hashes = engine.cache[record + HASHES : record + HASHES + engine.cache[record + NUM_HASHES]]
        blocks = min(hashes.shape[0], (prompt - 1) >> engine.settings[BLOCK_SIZE_LOG2])
        cached, seqs[NUM_SHARED_BLOCKS, column] = held_prefix(engine, hashes, blocks)
        seqs[NUM_CACHED_TOKENS, column] = cached << engine.settings[BLOCK_SIZE_LOG2]
    engine.first_token_time[column] = np.nan
    counters[END] = column + 1
    if engine.times[STEP_ENDS] == np.inf:
        begin_step(engine, now)
    look_ahead(engine)
    return float(engines.times[_soonest(engines), NEXT_FINISH])
