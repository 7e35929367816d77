"""The arrays of several engines, and what runs over them compiled."""

from __future__ import annotations

import copy
import math
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from block.core.arrays import Floats, Int, Ints
from block.core.jit import Index, compiled
from block.core.snapshot import (
    EXPECTED,
    FIELDS,
    HEAD_BEGIN,
    HEAD_END,
    HEAD_FREE,
    HEAD_ID,
    HEAD_PREEMPTIONS,
    HEAD_ROW,
    HEAD_RUNNING,
    HEAD_STALE,
    HEADS,
    ID,
    MAX_TOKENS,
    PROMPT,
    TARGET,
    Snapshots,
)
from block.engine import scheduler as s
from block.engine.decode_runs import decode, quiet_steps


class Row(Protocol):
    """What has the arrays of a row."""

    def bind(self, row: int) -> None:
        """Take the arrays of this row: they are others now."""
        ...


def _extended(packed: Floats, length: int) -> Floats:
    """A packed latency model made longer, as `linear_time` would have it: its last slope goes on."""
    if len(packed) == 0:
        return np.zeros(length)
    beyond = np.arange(1, length - len(packed) + 1)
    return np.concatenate([packed, packed[-1] + (packed[-1] - packed[-2]) * beyond])


class Bank:
    """The arrays of several engines, a row for each, so that one compiled call can advance many.

    Rows are of one length: `make_room` makes all of them longer.
    """

    def __init__(self, rows: int) -> None:
        self.state: Ints = np.zeros((rows, s.STATE), dtype=np.int64)
        self.times: Floats = np.tile((math.nan, math.inf, 0.0), (rows, 1))
        self.limits: Ints = np.zeros((rows, s.LIMITS), dtype=np.int64)
        self.packed: Floats = np.zeros((rows, 0))
        self.noise: Floats = np.ones((rows, 1))
        self.found: Ints = np.zeros(rows, dtype=np.int64)  # columns of `done` that the last `snapshots` has filled
        self.finished = False  # has it filled any?
        self.seqs: Ints = np.zeros((rows, FIELDS, 0), dtype=np.int64)
        self.firsts: Floats = np.zeros((rows, 0))
        self.done: Floats = np.zeros((rows, s.DONE, 0))
        self.engines: list[Row] = []
        self.leaving: set[int] = set()  # rows of which a sequence is to be taken out when the step in flight ends
        self.make_room(64)

    def make_room(self, columns: int) -> None:
        """Make every row so long, if it is not."""
        if columns > self.seqs.shape[2]:
            self.seqs, self.firsts, self.done = (_wider(rows, columns) for rows in (self.seqs, self.firsts, self.done))
            # Where engines look ahead, one after the other.
            self.scratch = (np.zeros_like(self.seqs[0]), np.zeros_like(self.firsts[0]), np.zeros_like(self.done[0]))
            self._bind()

    def enter(self, engine: Row, limits: Ints, packed: Floats, noise: Floats) -> int:
        """Give an engine the next row; returns it. All engines have noise of one length, or none."""
        row = len(self.engines)
        self.engines.append(engine)
        grows = len(packed) > self.packed.shape[1] or len(noise) > self.noise.shape[1]
        if grows:
            width = max(len(packed), self.packed.shape[1])
            self.packed = np.array([_extended(one, width) for one in self.packed])
            self.noise = np.resize(self.noise, (len(self.noise), max(len(noise), self.noise.shape[1])))
        self.limits[row] = limits
        self.packed[row] = _extended(packed, self.packed.shape[1])
        self.noise[row] = noise
        if grows:
            self._bind()
        else:
            engine.bind(row)
        return row

    def alone(self, row: int) -> Bank:
        """A bank of one row, a copy of one of these; no engine has it yet."""
        other = copy.copy(self)
        rows = slice(row, row + 1)
        for name in ("state", "times", "limits", "found", "seqs", "firsts", "done"):
            setattr(other, name, getattr(self, name)[rows].copy())
        other.packed, other.noise = self.packed[rows], self.noise[rows]  # which no engine changes
        other.leaving = {0} if row in self.leaving else set()
        other.engines = []
        return other

    def _bind(self) -> None:
        for row, engine in enumerate(self.engines):
            engine.bind(row)

    def snapshots(self, rows: Ints, now: float) -> Snapshots:
        """Complete the steps of these rows that end by `now`, and show what each scheduler published when it last ran.

        Snapshots are under the numbers of their rows, and valid until an engine changes. `found` tells how many
        sequences finished.
        """
        heads = np.empty((len(rows), HEADS), dtype=np.int64)
        started = np.empty(len(rows))
        self.finished = bool(
            _show_rows(
                rows,
                now,
                self.seqs,
                self.firsts,
                self.state,
                self.times,
                self.limits,
                self.packed,
                self.noise,
                self.done,
                self.found,
                heads,
                started,
            )
        )
        return Snapshots(now, self.seqs, heads, started)


def _wider(rows: NDArray[Any], columns: int) -> NDArray[Any]:
    """A copy of an array whose last axis has at least so many columns, the new ones 0."""
    more = [(0, 0)] * (rows.ndim - 1) + [(0, max(columns - rows.shape[-1], 0))]
    return np.pad(rows, more)


@compiled
def _show_rows(
    rows: Ints,
    now: float,
    seqs: Ints,
    firsts: Floats,
    state: Ints,
    times: Floats,
    limits: Ints,
    packed: Floats,
    noise: Floats,
    done: Floats,
    found: Ints,
    heads: Ints,
    started: Floats,
) -> bool:
    finished = False
    for i in range(rows.shape[0]):
        row = rows[i]
        found[row] = 0
        if times[row, s.ENDS] <= now:
            found[row] = advance(
                seqs[row],
                firsts[row],
                state[row],
                times[row],
                limits[row],
                packed[row],
                noise[row],
                done[row],
                0,
                now,
            )
            finished |= found[row] > 0
        heads[i, HEAD_ID] = row
        heads[i, HEAD_ROW] = row
        heads[i, HEAD_BEGIN] = state[row, s.HEAD]
        heads[i, HEAD_END] = state[row, s.VISIBLE]
        heads[i, HEAD_RUNNING] = state[row, s.RUNNING]
        heads[i, HEAD_STALE] = state[row, s.STALE]
        heads[i, HEAD_FREE] = state[row, s.FREE]
        heads[i, HEAD_PREEMPTIONS] = state[row, s.PREEMPTIONS]
        started[i] = times[row, s.STARTED] if times[row, s.ENDS] < np.inf else np.nan
    return finished


@compiled
def receive(
    seqs: Ints,
    firsts: Floats,
    state: Ints,
    times: Floats,
    limits: Ints,
    packed: Floats,
    noise: Floats,
    now: float,
    id_: Int,
    prompt: Int,
    target: Int,
    most: Int,
    expected: Int,
) -> None:
    """Let a sequence, for which there is room, wait in an engine; one that is idle begins a step."""
    column = state[s.TAIL]
    for row in range(FIELDS):
        seqs[row, column] = 0
    seqs[ID, column] = id_
    seqs[PROMPT, column] = prompt
    seqs[TARGET, column] = target
    seqs[MAX_TOKENS, column] = most
    seqs[EXPECTED, column] = expected
    firsts[column] = np.nan
    state[s.TAIL] = column + 1
    if times[s.ENDS] == np.inf:
        s.begin_step(seqs, firsts, state, times, limits, packed, noise, now)


@compiled
def turn(
    seqs: Ints,
    firsts: Floats,
    state: Ints,
    times: Floats,
    limits: Ints,
    packed: Floats,
    noise: Floats,
    done: Floats,
    scratch_seqs: Ints,
    scratch_firsts: Floats,
    scratch_done: Floats,
    found: Int,
    now: float,
    arrives: bool,
    id_: Int,
    prompt: Int,
    target: Int,
    most: Int,
    expected: Int,
) -> tuple[Int, float]:
    """Advance an engine to `now`, add a sequence if one arrives, for which there is room, and look ahead: `advance`'s
    value, and `next_finish`'s.
    """
    found = advance(seqs, firsts, state, times, limits, packed, noise, done, found, now)
    if arrives:
        receive(seqs, firsts, state, times, limits, packed, noise, now, id_, prompt, target, most, expected)
    ahead = next_finish(seqs, firsts, state, times, limits, packed, noise, scratch_seqs, scratch_firsts, scratch_done)
    return found, ahead


@compiled
def advance(
    seqs: Ints,
    firsts: Floats,
    state: Ints,
    times: Floats,
    limits: Ints,
    packed: Floats,
    noise: Floats,
    done: Floats,
    found: Int,
    now: float,
) -> Int:
    """Complete the steps of one engine that end by `now`; arguments and value are those of `complete_step`."""
    while times[s.ENDS] <= now:
        steps, started, ends, _ = quiet_steps(seqs, state, times, limits, packed, noise, now)
        decode(seqs, state, limits, steps)
        times[s.STARTED], times[s.ENDS] = started, ends
        if ends <= now:
            found = s.complete_step(seqs, firsts, state, times, limits, packed, noise, done, found)
    return found


@compiled
def next_finish(
    live_seqs: Ints,
    live_firsts: Floats,
    live_state: Ints,
    live_times: Floats,
    limits: Ints,
    packed: Floats,
    noise: Floats,
    seqs: Ints,
    firsts: Floats,
    done: Floats,
) -> float:
    """When the next sequence of an engine will finish if nothing more arrives; inf: never. Works on the arrays after
    `noise`, which are scratch.
    """
    if live_times[s.ENDS] == np.inf:
        return float(np.inf)
    steps, started, ends, finishes = quiet_steps(live_seqs, live_state, live_times, limits, packed, noise, np.inf)
    if finishes:
        return float(ends)
    for row in range(FIELDS):
        for column in range(Index(live_state[s.HEAD]), Index(live_state[s.TAIL])):
            seqs[row, column] = live_seqs[row, column]
    for column in range(Index(live_state[s.HEAD]), Index(live_state[s.TAIL])):
        firsts[column] = live_firsts[column]
    state = live_state.copy()
    times = live_times.copy()
    while ends < np.inf and not finishes:
        decode(seqs, state, limits, steps)
        times[s.STARTED], times[s.ENDS] = started, ends
        if s.complete_step(seqs, firsts, state, times, limits, packed, noise, done, 0) > 0:
            break
        steps, started, ends, finishes = quiet_steps(seqs, state, times, limits, packed, noise, np.inf)
    return float(ends)
