"""Predictor: "if this request went to that instance, when would it finish?"

A forecast copies the instance's snapshot, adds the requests that are in transit there and the candidate, and runs the
scheduler twin forward with the instance's latency model until the candidate's last token. Between two events (a
finish, an admission, a prefill chunk, exhaustion of blocks) nothing but decoding happens. Such runs of steps cost an
addition a step (`block.engine.fast_forward`), or have a closed form (`skip_decode_run`). ``compressed=False`` schedules
each of them, and is the oracle for the tests.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from copy import copy
from itertools import chain

import numpy as np

from block.core.arrays import Floats, Int, Ints
from block.core.jit import Index, compiled, one_at_a_time
from block.core.snapshot import (
    CACHE_RECORD,
    EXPECTED,
    FIELDS,
    ID,
    MAX_TOKENS,
    META_BEGIN,
    META_END,
    META_FREE,
    META_ID,
    META_ROW,
    META_RUNNING,
    META_STALE,
    NUM_BLOCKS,
    NUM_CACHED_TOKENS,
    NUM_OUTPUT_TOKENS,
    NUM_PROMPT_TOKENS,
    NUM_SCHEDULED_NEXT,
    NUM_SCHEDULED_TOKENS,
    NUM_SHARED_BLOCKS,
    TARGET,
    Snapshot,
    Snapshots,
)
from block.core.types import Forecasts, Request
from block.engine.block_tables import NO_HASHES
from block.engine.config import EngineSettings
from block.engine.decode_runs import skip_decode_run
from block.engine.fast_forward import STOPPED, TARGET_FINISHED, Scratch, ScratchArrays, fast_forward, scratch_for
from block.engine.latency import LatencyModel, linear_time, prefill_time
from block.engine.scheduler import begin_step, complete_step, step_time
from block.engine.state import (
    ASYNC_SCHEDULING,
    BEGIN,
    BLOCK_SIZE,
    CACHE_COUNTS,
    COUNTERS,
    ENABLE_PREFIX_CACHING,
    END,
    FINISHED,
    FINISHED_AT,
    FINISHED_FIRST_TOKEN,
    FINISHED_ID,
    FREE_BLOCKS,
    MAX_NUM_BATCHED_TOKENS,
    NUM_RUNNING,
    NUM_STALE,
    QUEUED,
    QUEUED_DURATION,
    STEP_ENDS,
    TIMES,
    TOTAL_BLOCKS,
    Arrays,
    EngineState,
)

OUTRUN_MARGIN = 10
"""An estimate that a response has outrun becomes tokens decoded so far plus this many (as in the paper)."""

_CANDIDATE = -1  # ID of the candidate among the sequences of a forecast

_ARRIVAL = 4  # numbers of an arrival: instance, id, prompt, expected

NOTHING = np.empty((0, 2), dtype=np.int64)


class Predictor:
    """Forecasts for instances that share engine settings and latency model.

    compressed: pass runs of decode-only steps without scheduling each; the forecasts are the same up to rounding.
    outrun_share: a response that has outrun its estimate is expected to go on for this share of what it has, if that is
        more than OUTRUN_MARGIN tokens.
    """

    def __init__(
        self,
        settings: EngineSettings,
        latency: LatencyModel,
        *,
        compressed: bool = True,
        outrun_share: float = 0.0,
    ) -> None:
        self._outrun_share = outrun_share
        self._settings = settings.to_array()
        self._caches = settings.enable_prefix_caching
        if self._caches:
            self._settings[ENABLE_PREFIX_CACHING] = CACHE_COUNTS  # it knows no block from another
        self._latency_params = latency.pack()
        self._compressed = compressed
        self._allocate(64)

    def _allocate(self, columns: int) -> None:
        self._engine = EngineState(
            seqs=np.zeros((FIELDS, columns), dtype=np.int64),
            first_token_time=np.zeros(columns),
            counters=np.zeros(COUNTERS, dtype=np.int64),
            times=np.zeros(TIMES),
            settings=self._settings,
            latency_params=self._latency_params,
            noise=np.ones(1),
            finished=np.zeros((FINISHED, columns)),
            cache=NO_HASHES,
        )
        self._plain: Arrays = self._engine[:]
        self._scratch = scratch_for(columns, int(self._settings[BLOCK_SIZE]))[:]

    def with_outrun_share(self, outrun_share: float) -> Predictor:
        """The same, with another `outrun_share`."""
        other = copy(self)
        other._outrun_share = float(outrun_share)
        return other

    def warm_up(self) -> None:
        """Load the compiled forecast, so that the first request neither waits for that nor measures it."""
        idle = Snapshot(0, 0.0, math.nan, 0, 0, 0, 0, np.zeros((FIELDS, 0), dtype=np.int64))
        with one_at_a_time():
            self.forecasts([idle], [[]], Request(0, 0.0, 1, 1, 1), 0.0)

    def forecasts(
        self, snapshots: Sequence[Snapshot], in_transit: Sequence[Sequence[Request]], request: Request, now: float
    ) -> Forecasts:
        """One forecast for each snapshot, in one compiled call.

        in_transit[i]: requests on their way to instance i that its snapshot does not show, in order.
        """
        shown = Snapshots.of(snapshots)
        arrivals = [
            n
            for i, requests in enumerate(in_transit)
            if requests
            for r in requests
            for n in (i, r.id, r.prompt_tokens, r.predicted_output_tokens)
        ]
        found, cached = NOTHING, NOTHING
        if shown.hits is not None:
            found, known = shown.hits
            cached = np.array([known.get(r.id, (0, 0)) for r in chain(*in_transit)], dtype=np.int64).reshape(-1, 2)
        widest = shown.pool.shape[2] + len(arrivals) // _ARRIVAL + 1
        if widest > self._engine.seqs.shape[1]:
            self._allocate(2 * widest)
        out = np.empty((len(shown), 3 if self._caches else 2))
        _forecasts(
            shown.pool,
            shown.meta,
            shown.started,
            np.array(arrivals, dtype=np.int64),
            cached,
            request.prompt_tokens,
            request.predicted_output_tokens,
            found,
            self._plain,
            self._scratch,
            out,
            now,
            self._compressed,
            self._outrun_share,
        )
        return Forecasts(*out.T.tolist())


class Predictors:
    """Forecasts for instances that differ, by the predictor of each; those that are alike share one."""

    def __init__(self, of: Sequence[Predictor]) -> None:
        self._of = of

    def with_outrun_share(self, outrun_share: float) -> Predictors:
        """The same, with another `outrun_share`."""
        others = {predictor: predictor.with_outrun_share(outrun_share) for predictor in self._of}
        return Predictors([others[predictor] for predictor in self._of])

    def forecasts(
        self, snapshots: Sequence[Snapshot], in_transit: Sequence[Sequence[Request]], request: Request, now: float
    ) -> Forecasts:
        """One forecast for each snapshot, in a compiled call for each kind of instance."""
        shown = Snapshots.of(snapshots)
        predictors = [self._of[instance_id] for instance_id in shown.meta[:, META_ID].tolist()]
        return forecast_each(predictors, shown, in_transit, [request] * len(shown), now)


def forecast_each(
    predictors: Sequence[Predictor],
    snapshots: Sequence[Snapshot],
    in_transit: Sequence[Sequence[Request]],
    requests: Sequence[Request],
    now: float,
) -> Forecasts:
    """For each i the forecast of requests[i] at snapshots[i] by predictors[i]; a predictor has one request only."""
    places: dict[Predictor, list[int]] = {}
    for place, predictor in enumerate(predictors):
        places.setdefault(predictor, []).append(place)
    shown = Snapshots.of(snapshots)
    ttft, e2e, work = ([math.nan] * len(shown) for _ in range(3))
    for predictor, mine in places.items():
        found = predictor.forecasts(shown.some(mine), [in_transit[i] for i in mine], requests[mine[0]], now)
        for i, first, last, own in zip(mine, found.ttft, found.e2e, found.work, strict=True):
            ttft[i], e2e[i], work[i] = first, last, own
    return Forecasts(ttft, e2e, work)


@compiled
def _append(
    seqs: Ints,
    column: Int,
    id_: Int,
    prompt: Int,
    expected: Int,
) -> None:
    """Let a sequence wait. prompt, expected: tokens."""
    column = Index(column)
    for row in range(FIELDS):
        seqs[row, column] = 0
    seqs[ID, column] = id_
    seqs[NUM_PROMPT_TOKENS, column] = prompt
    seqs[EXPECTED, column] = expected


@compiled
def _work(engine: EngineState, prompt: Int, cached: Int) -> float:
    """Seconds of compute that the tokens of a prompt take which are not cached, in steps that they fill."""
    params, budget = engine.latency_params, engine.settings[MAX_NUM_BATCHED_TOKENS]
    whole, work = linear_time(params, budget), 0.0
    while cached < prompt:
        chunk = min(budget, prompt - cached)
        work += whole * chunk / budget + prefill_time(params, chunk, cached)
        cached += chunk
    return work


@compiled
def _forecasts(
    pool: Ints,
    meta: Ints,
    started: Floats,
    arrivals: Ints,
    cached: Ints,
    prompt: int,
    expected: int,
    found: Ints,
    arrays: Arrays,
    numbers: ScratchArrays,
    out: Floats,
    now: float,
    compressed: bool,
    outrun_share: float,
) -> None:
    """Forecast one request at several instances.

    pool, meta, started: those of `Snapshots`. arrivals: _ARRIVAL numbers for each request in transit, in order of the
    instance. prompt, expected: tokens of the candidate. cached: int64[arrivals, 2], found: int64[instances, 2], both as
    in `Hits`, of each arrival and of the candidate; or empty. arrays: of an engine with the settings and the latency
    model of the instances, to work on. numbers: a `Scratch` for it.
    out: float64[instances, 2 or 3], receives the seconds from `now` to the candidate's first token and to its last, and
    with a prefix cache those of compute that its prompt takes there.
    """
    engine, scratch = EngineState(*arrays), Scratch(*numbers)
    seqs = engine.seqs
    caches = engine.settings[ENABLE_PREFIX_CACHING] == CACHE_COUNTS
    arrival = 0
    for i in range(meta.shape[0]):
        begin = meta[i, META_BEGIN]
        columns = meta[i, META_END] - begin
        shown = pool[meta[i, META_ROW]]
        for row in range(CACHE_RECORD if caches else NUM_CACHED_TOKENS):  # the others stay 0
            for column in range(Index(columns)):
                seqs[row, column] = shown[row, Index(begin) + column]
        while arrival < arrivals.shape[0] and arrivals[arrival] == i:
            _append(seqs, columns, arrivals[arrival + 1], arrivals[arrival + 2], arrivals[arrival + 3])
            if cached.shape[0] > 0:
                seqs[NUM_CACHED_TOKENS, columns] = cached[arrival // _ARRIVAL, 0]
                seqs[NUM_SHARED_BLOCKS, columns] = cached[arrival // _ARRIVAL, 1]
            columns += 1
            arrival += _ARRIVAL
        _append(seqs, columns, _CANDIDATE, prompt, expected)
        if found.shape[0] > 0:
            seqs[NUM_CACHED_TOKENS, columns] = found[i, 0]
            seqs[NUM_SHARED_BLOCKS, columns] = found[i, 1]
        _load(engine, columns + 1, meta[i], started[i], now, outrun_share)
        first, last = _run(engine, scratch, compressed)
        out[i, 0] = first - now
        out[i, 1] = last - now
        if caches:
            out[i, 2] = _work(engine, prompt, found[i, 0] if found.shape[0] > 0 else np.int64(0))


@compiled
def _load(engine: EngineState, columns: Int, meta: Ints, started: float, now: float, outrun_share: float) -> None:
    """Make an engine of `columns` sequences of a snapshot, with this meta row, the step in flight of which began at
    `started`.

    Estimates take the place of TARGET and MAX_TOKENS both: the twin knows when a sequence ends, as a scheduler does
    whose requests ignore the model's end of sequence.
    """
    seqs, counters, times = engine.seqs, engine.counters, engine.times
    counters[:] = 0
    counters[NUM_RUNNING] = meta[META_RUNNING]
    counters[NUM_STALE] = meta[META_STALE]
    counters[END] = columns
    counters[FREE_BLOCKS] = meta[META_FREE]
    for column in range(Index(columns)):
        output = seqs[NUM_OUTPUT_TOKENS, column]
        expected = max(seqs[EXPECTED, column], 1)
        more = max(OUTRUN_MARGIN, int(outrun_share * output))
        seqs[TARGET, column] = expected if expected > output else output + more
        seqs[MAX_TOKENS, column] = seqs[TARGET, column]
        engine.first_token_time[column] = np.nan if output == 0 else now
    if engine.settings[ENABLE_PREFIX_CACHING] == CACHE_COUNTS:
        _conserve_blocks(engine)
    in_flight = meta[META_RUNNING] + meta[META_STALE]
    duration = step_time(seqs, 0, in_flight, NUM_SCHEDULED_TOKENS, engine.latency_params)
    if duration > 0.0:
        times[STEP_ENDS] = max(started + duration, now)  # a step whose modelled end has passed is about to end
        if engine.settings[ASYNC_SCHEDULING] == 1:
            times[QUEUED_DURATION] = step_time(seqs, 0, in_flight, NUM_SCHEDULED_NEXT, engine.latency_params)
            counters[QUEUED] = 1 if times[QUEUED_DURATION] > 0.0 else 0
    else:
        begin_step(engine, now)


@compiled
def _conserve_blocks(engine: EngineState) -> None:
    """Have the running sequences free, as they end, all the blocks that are not free, and no more.

    NUM_SHARED_BLOCKS says what was shared when a sequence was admitted. Who shared it may have left since.
    """
    seqs, counters = engine.seqs, engine.counters
    lost = engine.settings[TOTAL_BLOCKS] - counters[FREE_BLOCKS]
    for column in range(counters[NUM_RUNNING]):
        lost -= seqs[NUM_BLOCKS, column] - seqs[NUM_SHARED_BLOCKS, column]
    for i in range(counters[NUM_RUNNING]):
        column = i if lost > 0 else counters[NUM_RUNNING] - 1 - i  # the oldest have, the youngest share
        shared = seqs[NUM_SHARED_BLOCKS, column]
        seqs[NUM_SHARED_BLOCKS, column] = min(max(shared - lost, 0), seqs[NUM_BLOCKS, column])
        lost -= shared - seqs[NUM_SHARED_BLOCKS, column]


@compiled
def _run(engine: EngineState, scratch: Scratch, compressed: bool) -> tuple[float, float]:
    """When the candidate yields its first token and its last, if nothing more comes."""
    times, finished = engine.times, engine.finished
    while times[STEP_ENDS] < np.inf:
        if compressed:
            outcome = fast_forward(engine, scratch, _CANDIDATE)
            if outcome == TARGET_FINISHED:
                return float(engine.first_token_time[engine.counters[BEGIN]]), float(times[STEP_ENDS])
            if outcome == STOPPED:
                begin_step(engine, times[STEP_ENDS])
                continue
            skip_decode_run(engine)
        for column in range(complete_step(engine, np.int64(0))):
            if finished[FINISHED_ID, column] == _CANDIDATE:
                return float(finished[FINISHED_FIRST_TOKEN, column]), float(finished[FINISHED_AT, column])
    return np.nan, np.nan  # the twin stalled; `EngineSettings.check` makes this impossible
