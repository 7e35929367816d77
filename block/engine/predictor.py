"""Predictor: "if this request went to that instance, when would it finish?"

A forecast copies the instance's snapshot, adds the requests that are on their way to it and the candidate, and runs the
scheduler twin forward with the instance's latency model until the candidate's last token. Between two events (a finish,
an admission, a prefill chunk, exhaustion of blocks) nothing but decoding happens, and such runs of steps are skipped in
closed form; ``compressed=False`` steps through them one by one and is the oracle for the tests.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from copy import copy

import numpy as np

from block.core.arrays import Floats, Int, Ints
from block.core.jit import Index, compiled, one_at_a_time
from block.core.snapshot import (
    CHUNK,
    EXPECTED,
    FIELDS,
    HEAD_BEGIN,
    HEAD_END,
    HEAD_FREE,
    HEAD_ID,
    HEAD_ROW,
    HEAD_RUNNING,
    HEAD_STALE,
    ID,
    MAX_TOKENS,
    NEXT,
    OUTPUT,
    PROMPT,
    TARGET,
    Snapshot,
    Snapshots,
)
from block.core.types import Forecasts, Request
from block.engine import scheduler as s
from block.engine.config import EngineConfig
from block.engine.decode_runs import skip_quiet_steps
from block.engine.fast_forward import FINISHED, SCRATCH, STOPPED, fast_forward, scratch_columns
from block.engine.latency import LatencyModel

OUTRUN_MARGIN = 10
"""An estimate that a response has outrun becomes tokens decoded so far plus this many (as in the paper)."""

_CANDIDATE = -1  # ID of the candidate among the sequences of a forecast

_ARRIVAL = 4  # numbers of an arrival: instance, id, prompt, expected


class Predictor:
    """Forecasts for instances that share engine settings, KV blocks and latency model.

    compressed: skip runs of decode steps in closed form; the forecasts are the same up to rounding.
    outrun_share: a response that has outrun its estimate is expected to go on for this share of what it has, if that is
        more than OUTRUN_MARGIN tokens.
    """

    def __init__(
        self,
        config: EngineConfig,
        latency: LatencyModel,
        total_blocks: int,
        *,
        compressed: bool = True,
        outrun_share: float = 0.0,
    ) -> None:
        self._outrun_share = outrun_share
        self._limits = config.limits(total_blocks)
        self._packed = latency.pack()
        self._compressed = compressed
        self._allocate(64)

    def _allocate(self, columns: int) -> None:
        self._seqs: Ints = np.zeros((FIELDS, columns), dtype=np.int64)
        self._firsts: Floats = np.zeros(columns)
        self._done: Floats = np.zeros((s.DONE, columns))

    def going_on(self, outrun_share: float) -> Predictor:
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
        arrivals = [
            n
            for i, requests in enumerate(in_transit)
            if requests
            for r in requests
            for n in (i, r.id, r.prompt_tokens, r.predicted_output_tokens)
        ]
        shown = Snapshots.of(snapshots)
        widest = shown.pool.shape[2] + len(arrivals) // _ARRIVAL + 1
        if widest > self._seqs.shape[1]:
            self._allocate(2 * widest)
        out = np.empty((len(shown), 2))
        _forecasts(
            shown.pool,
            shown.heads,
            shown.started,
            np.array(arrivals, dtype=np.int64),
            request.prompt_tokens,
            request.predicted_output_tokens,
            self._seqs,
            self._firsts,
            self._limits,
            self._packed,
            self._done,
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

    def going_on(self, outrun_share: float) -> Predictors:
        """The same, with another `outrun_share`."""
        others = {predictor: predictor.going_on(outrun_share) for predictor in self._of}
        return Predictors([others[predictor] for predictor in self._of])

    def forecasts(
        self, snapshots: Sequence[Snapshot], in_transit: Sequence[Sequence[Request]], request: Request, now: float
    ) -> Forecasts:
        """One forecast for each snapshot, in a compiled call for each kind of instance."""
        shown = Snapshots.of(snapshots)
        predictors = [self._of[instance_id] for instance_id in shown.heads[:, HEAD_ID].tolist()]
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
    ttft, e2e = [math.nan] * len(shown), [math.nan] * len(shown)
    for predictor, mine in places.items():
        found = predictor.forecasts(shown.some(mine), [in_transit[i] for i in mine], requests[mine[0]], now)
        for i, first, last in zip(mine, found.ttft, found.e2e, strict=True):
            ttft[i], e2e[i] = first, last
    return Forecasts(ttft, e2e)


@compiled
def _append(seqs: Ints, column: Int, id_: Int, prompt: Int, expected: Int) -> None:
    column = Index(column)
    for row in range(FIELDS):
        seqs[row, column] = 0
    seqs[ID, column] = id_
    seqs[PROMPT, column] = prompt
    seqs[EXPECTED, column] = expected


@compiled
def _forecasts(
    pool: Ints,
    heads: Ints,
    started: Floats,
    arrivals: Ints,
    prompt: int,
    expected: int,
    seqs: Ints,
    firsts: Floats,
    limits: Ints,
    packed: Floats,
    done: Floats,
    out: Floats,
    now: float,
    compressed: bool,
    outrun_share: float,
) -> None:
    """`pool`, `heads`, `started`: those of `Snapshots`; `arrivals`: _ARRIVAL numbers each, in order of the instance."""
    state = np.zeros(s.STATE, dtype=np.int64)
    times = np.zeros(s.TIMES)
    noise = np.ones(1)
    group = np.empty((SCRATCH, scratch_columns(firsts.shape[0])), dtype=np.int64)
    wanting = np.empty(limits[s.BLOCK_SIZE], dtype=np.int64)
    arrival = 0
    for i in range(heads.shape[0]):
        begin = heads[i, HEAD_BEGIN]
        columns = heads[i, HEAD_END] - begin
        shown = pool[heads[i, HEAD_ROW]]
        for row in range(FIELDS):
            for column in range(Index(columns)):
                seqs[row, column] = shown[row, Index(begin) + column]
        while arrival < arrivals.shape[0] and arrivals[arrival] == i:
            _append(seqs, columns, arrivals[arrival + 1], arrivals[arrival + 2], arrivals[arrival + 3])
            columns += 1
            arrival += _ARRIVAL
        _append(seqs, columns, _CANDIDATE, prompt, expected)
        _forecast(
            seqs,
            columns + 1,
            heads[i],
            started[i],
            firsts,
            state,
            times,
            limits,
            packed,
            noise,
            done,
            group,
            wanting,
            now,
            compressed,
            outrun_share,
        )
        out[i, 0] = done[s.DONE_FIRST, 0] - now
        out[i, 1] = done[s.DONE_AT, 0] - now


@compiled
def _forecast(
    seqs: Ints,
    columns: Int,
    head: Ints,
    started: float,
    firsts: Floats,
    state: Ints,
    times: Floats,
    limits: Ints,
    packed: Floats,
    noise: Floats,
    done: Floats,
    group: Ints,
    wanting: Ints,
    now: float,
    compressed: bool,
    outrun_share: float,
) -> None:
    """Run the twin from a loaded snapshot, `columns` sequences and its head, until the candidate finishes.

    Its times end up in column 0 of `done`.

    Estimates take the place of TARGET and MAX_TOKENS both: the twin knows when a sequence ends, as a scheduler does
    whose requests ignore the model's end of sequence.
    """
    in_flight = head[HEAD_RUNNING] + head[HEAD_STALE]
    state[:] = 0
    state[s.RUNNING] = head[HEAD_RUNNING]
    state[s.STALE] = head[HEAD_STALE]
    state[s.TAIL] = columns
    state[s.FREE] = head[HEAD_FREE]
    for column in range(Index(columns)):
        output = seqs[OUTPUT, column]
        expected = max(seqs[EXPECTED, column], 1)
        more = max(OUTRUN_MARGIN, int(outrun_share * output))
        seqs[TARGET, column] = expected if expected > output else output + more
        seqs[MAX_TOKENS, column] = seqs[TARGET, column]
        firsts[column] = np.nan if output == 0 else now
    # A step whose modelled end has passed is about to end.
    duration = s.step_time(seqs, 0, in_flight, CHUNK, packed)
    if duration > 0.0:
        times[s.ENDS] = max(started + duration, now)
        times[s.QUEUED_FOR] = s.step_time(seqs, 0, in_flight, NEXT, packed)
        state[s.QUEUED] = 1 if times[s.QUEUED_FOR] > 0.0 else 0
    else:
        s.begin_step(seqs, firsts, state, times, limits, packed, noise, now)
    while times[s.ENDS] < np.inf:
        if compressed:
            outcome = fast_forward(seqs, firsts, state, times, limits, packed, group, wanting, _CANDIDATE)
            if outcome == FINISHED:
                done[s.DONE_FIRST, 0] = firsts[state[s.HEAD]]
                done[s.DONE_AT, 0] = times[s.ENDS]
                return
            if outcome == STOPPED:
                s.begin_step(seqs, firsts, state, times, limits, packed, noise, times[s.ENDS])
                continue
            skip_quiet_steps(seqs, state, times, limits, packed)
        found = s.complete_step(seqs, firsts, state, times, limits, packed, noise, done, 0)
        for column in range(found):
            if done[s.DONE_ID, column] == _CANDIDATE:
                done[s.DONE_FIRST, 0] = done[s.DONE_FIRST, column]
                done[s.DONE_AT, 0] = done[s.DONE_AT, column]
                return
    done[s.DONE_FIRST, 0] = np.nan  # the twin stalled; `EngineConfig.limits` makes this impossible
    done[s.DONE_AT, 0] = np.nan
