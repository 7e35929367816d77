"""Many engines, advanced together by compiled code: the simulated testbed's instances.

An engine is a row of arrays. Between two events (a finish, an admission, a prefill, a preemption) it does nothing but
decode, which nobody outside can notice; how many such steps there are, and when the step behind them ends, is computed
once. So the batch knows when anything may happen next (`next_event`), and `advance_all` goes from event to event in
order of time, up to the first at which a sequence finishes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from block.core.arrays import Floats, Int, Ints
from block.core.jit import Index, compiled
from block.core.snapshot import (
    COMPUTED,
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
from block.core.types import Request
from block.engine import scheduler as s
from block.engine.config import EngineConfig
from block.engine.decode_runs import decode, decode_times, quiet_steps
from block.engine.latency import LatencyModel

CAPACITY = 64  # columns of a row at first
LATEST = math.nextafter(math.inf, 0.0)  # any time but inf, at which an engine is idle


class EngineSpec(NamedTuple):
    """What an engine is made of.

    total_blocks: usable KV blocks (vLLM V1 keeps one of `num_gpu_blocks` for itself).
    noise: float[n], factors on the durations of its steps, repeated; None: its steps take what the latency model says.
    """

    config: EngineConfig
    latency: LatencyModel
    total_blocks: int
    noise: Floats | None = None


class Finished(NamedTuple):
    """A sequence that an engine has finished; times in seconds."""

    id: int
    first_token: float
    finished: float
    preemptions: int
    output_tokens: int


class EngineBatch:
    """Engines, a row each. Calls come with times that never go back.

    next_event: no sequence finishes before this time if nothing arrives; inf: none will.
    """

    def __init__(self, specs: Sequence[EngineSpec]) -> None:
        rows = len(specs)
        self.state: Ints = np.zeros((rows, s.STATE), dtype=np.int64)
        self.state[:, s.FREE] = [spec.total_blocks for spec in specs]
        self.times: Floats = np.tile(s.IDLE, (rows, 1))
        self.limits: Ints = np.array([spec.config.limits(spec.total_blocks) for spec in specs])
        packed = [spec.latency.pack() for spec in specs]
        self.packed: Floats = np.array([_extended(one, max(map(len, packed))) for one in packed])
        noise = [np.ones(1) if spec.noise is None else spec.noise for spec in specs]
        self.noise: Floats = np.array([np.resize(one, max(map(len, noise))) for one in noise])
        self.seqs: Ints = np.zeros((rows, FIELDS, CAPACITY), dtype=np.int64)
        self.firsts: Floats = np.zeros((rows, CAPACITY))
        self.done: Floats = np.zeros((rows, s.DONE, CAPACITY))
        self.max_model_len = [spec.config.max_model_len for spec in specs]
        self.next_event = math.inf
        self._rows = np.arange(rows)
        self._out = np.zeros(2, dtype=np.int64)  # the row of which sequences have finished, and how many

    def __len__(self) -> int:
        return len(self.state)

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
        self.next_event = _receive(
            self.seqs,
            self.firsts,
            self.state,
            self.times,
            self.limits,
            self.packed,
            self.noise,
            self.done,
            row,
            now,
            request.id,
            prompt,
            min(target, most),
            most,
            request.predicted_output_tokens,
        )
        if self.next_event < 0.0:  # there was no room
            self._grow()
            self.receive(row, request, now)

    def advance_all(self, until: float) -> Sequence[Finished]:
        """Complete the steps that end by `until`, or by the first end at which sequences finish; returns these.

        inf: as long as there is anything to do.

        Steps that do nothing but decode, which nobody can notice, may be left for later.
        """
        self.next_event = _advance_all(
            self.seqs,
            self.firsts,
            self.state,
            self.times,
            self.limits,
            self.packed,
            self.noise,
            self.done,
            until,
            self._out,
        )
        row, found = self._out.tolist()
        return self.finished(row, found) if found else ()

    def advance(self, row: int, now: float) -> Sequence[Finished]:
        """Complete the steps of one engine that end by `now`; returns the sequences that finished, in order of time."""
        found = _advance(*self.row(row), 0, now)
        self.next_event = float(self.times[:, s.EVENT].min())
        return self.finished(row, found)

    def finished(self, row: int, found: Int) -> Sequence[Finished]:
        """The first `found` sequences that the last advance of an engine has finished."""
        return [
            Finished(int(id_), first, at, int(preempted), int(output))
            for id_, first, at, preempted, output in self.done[row, :, :found].T.tolist()
        ]

    def snapshots(self, rows: Sequence[int], now: float) -> Snapshots:
        """What the schedulers of these engines published when they last ran, at `now`, to which all have been advanced.

        Snapshots are under the numbers of their rows, and valid until an engine changes.
        """
        chosen = self._rows if rows == range(len(self._rows)) else np.array(rows, dtype=np.int64)
        heads = np.empty((len(chosen), HEADS), dtype=np.int64)
        started = np.empty(len(chosen))
        _show(
            self.seqs,
            self.firsts,
            self.state,
            self.times,
            self.limits,
            self.packed,
            self.noise,
            self.done,
            chosen,
            now,
            heads,
            started,
        )
        return Snapshots(now, self.seqs, heads, started)

    def look_ahead(self, row: int) -> None:
        """An engine was changed from outside: find anew when anything may happen next."""
        _look_ahead(*self.row(row)[:-1])
        self.next_event = float(self.times[:, s.EVENT].min())

    def row(self, row: int) -> tuple[Ints, Floats, Ints, Floats, Ints, Floats, Floats, Floats]:
        """The arrays of one engine, as compiled functions take them."""
        return (
            self.seqs[row],
            self.firsts[row],
            self.state[row],
            self.times[row],
            self.limits[row],
            self.packed[row],
            self.noise[row],
            self.done[row],
        )

    def make_room(self, row: int) -> None:
        """Have room for one more sequence in an engine."""
        if self.state[row, s.TAIL] == self.seqs.shape[2] and not _compact(
            self.seqs[row], self.firsts[row], self.state[row]
        ):
            self._grow()

    def _grow(self) -> None:
        columns = 2 * self.seqs.shape[2]
        self.seqs, self.firsts, self.done = (_wider(one, columns) for one in (self.seqs, self.firsts, self.done))

    def copy(self, row: int) -> EngineBatch:
        """A batch of one engine, a copy of one of these."""
        other = EngineBatch.__new__(EngineBatch)
        only = slice(row, row + 1)
        for name in ("state", "times", "limits", "seqs", "firsts", "done"):
            setattr(other, name, getattr(self, name)[only].copy())
        other.packed, other.noise = self.packed[only], self.noise[only]  # which no engine changes
        other.max_model_len = self.max_model_len[only]
        other.next_event = float(other.times[0, s.EVENT])
        other._rows, other._out = self._rows[:1], np.zeros(2, dtype=np.int64)
        return other


def _extended(packed: Floats, length: int) -> Floats:
    """A packed latency model made longer, as `linear_time` would have it: its last slope goes on."""
    beyond = np.arange(1, length - len(packed) + 1)
    return np.concatenate([packed, packed[-1] + (packed[-1] - packed[-2]) * beyond])


def _wider(rows: NDArray[Any], columns: int) -> NDArray[Any]:
    """A copy of an array whose last axis has so many columns, the new ones 0."""
    return np.pad(rows, [(0, 0)] * (rows.ndim - 1) + [(0, columns - rows.shape[-1])])


@compiled
def _look_ahead(
    seqs: Ints, firsts: Floats, state: Ints, times: Floats, limits: Ints, packed: Floats, noise: Floats
) -> None:
    """Find the steps of mere decoding that come next, and when the step behind them begins and ends."""
    if state[s.HALT] == s.HALTED:
        state[s.RUN], times[s.EVENT] = 0, np.inf
    elif state[s.HALT] == s.HALTING:
        state[s.RUN], times[s.EVENT_STARTED], times[s.EVENT] = 0, times[s.STARTED], times[s.ENDS]
    else:
        steps, started, ends, _ = quiet_steps(seqs, state, times, limits, packed, noise, np.inf)
        state[s.RUN], times[s.EVENT_STARTED], times[s.EVENT] = steps, started, ends


@compiled
def _complete_event(
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
    """Complete the steps of mere decoding and the one behind them; `found` and the value are `complete_step`'s."""
    decode(seqs, state, limits, state[s.RUN])
    times[s.STARTED], times[s.ENDS] = times[s.EVENT_STARTED], times[s.EVENT]
    if state[s.HALT] == s.HALTING:
        found = s.end_step(seqs, firsts, state, times, limits, done, found)
        state[s.HALT] = s.HALTED
    else:
        found = s.complete_step(seqs, firsts, state, times, limits, packed, noise, done, found)
    _look_ahead(seqs, firsts, state, times, limits, packed, noise)
    return found


@compiled
def _advance(
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
    """Complete the steps of one engine that end by `now`; `found` and the value are those of `complete_step`."""
    now = min(now, LATEST)
    while times[s.EVENT] <= now:
        found = _complete_event(seqs, firsts, state, times, limits, packed, noise, done, found)
    if times[s.ENDS] <= now and state[s.HALT] != s.HALTED:
        kv = np.int64(0)
        for column in range(Index(state[s.HEAD]), Index(state[s.HEAD] + state[s.RUNNING])):
            kv += seqs[COMPUTED, column]
        steps, started, ends = decode_times(state, times, packed, noise, kv, state[s.RUN], now)
        decode(seqs, state, limits, steps)
        times[s.STARTED], times[s.ENDS] = started, ends
        state[s.RUN] -= steps
    return found


@compiled
def _advance_all(
    seqs: Ints,
    firsts: Floats,
    state: Ints,
    times: Floats,
    limits: Ints,
    packed: Floats,
    noise: Floats,
    done: Floats,
    until: float,
    out: Ints,
) -> float:
    """Complete events in order of time; `out` becomes the row of which sequences finished, and how many. Returns when
    the next event is.
    """
    out[0] = out[1] = 0
    until = min(until, LATEST)
    while True:
        row = times[:, s.EVENT].argmin()
        if times[row, s.EVENT] > until or out[1] > 0:
            return float(times[row, s.EVENT])
        out[0] = row
        out[1] = _complete_event(
            seqs[row], firsts[row], state[row], times[row], limits[row], packed[row], noise[row], done[row], 0
        )


@compiled
def _show(
    seqs: Ints,
    firsts: Floats,
    state: Ints,
    times: Floats,
    limits: Ints,
    packed: Floats,
    noise: Floats,
    done: Floats,
    rows: Ints,
    now: float,
    heads: Ints,
    started: Floats,
) -> None:
    for i in range(rows.shape[0]):
        row = rows[i]
        _advance(
            seqs[row], firsts[row], state[row], times[row], limits[row], packed[row], noise[row], done[row], 0, now
        )
        heads[i, HEAD_ID] = row
        heads[i, HEAD_ROW] = row
        heads[i, HEAD_BEGIN] = state[row, s.HEAD]
        heads[i, HEAD_END] = state[row, s.VISIBLE]
        heads[i, HEAD_RUNNING] = state[row, s.RUNNING]
        heads[i, HEAD_STALE] = state[row, s.STALE]
        heads[i, HEAD_FREE] = state[row, s.FREE]
        heads[i, HEAD_PREEMPTIONS] = state[row, s.PREEMPTIONS]
        started[i] = times[row, s.STARTED] if times[row, s.ENDS] < np.inf else np.nan


@compiled
def _compact(seqs: Ints, firsts: Floats, state: Ints) -> bool:
    """Move the live columns to the front; False, with nothing done, if they take more than half of the row."""
    head, live = state[s.HEAD], state[s.TAIL] - state[s.HEAD]
    if 2 * live > seqs.shape[1]:
        return False
    for row in range(FIELDS):
        for column in range(live):
            seqs[row, column] = seqs[row, head + column]
    for column in range(live):
        firsts[column] = firsts[head + column]
    state[s.HEAD] = 0
    state[s.TAIL] -= head
    state[s.VISIBLE] -= head
    return True


@compiled
def _receive(
    all_seqs: Ints,
    all_firsts: Floats,
    all_state: Ints,
    all_times: Floats,
    all_limits: Ints,
    all_packed: Floats,
    all_noise: Floats,
    all_done: Floats,
    row: int,
    now: float,
    id_: Int,
    prompt: Int,
    target: Int,
    most: Int,
    expected: Int,
) -> float:
    """Let a sequence wait in an engine; one that is idle begins a step. Returns when the next event of all is; -1, with
    nothing done, if there is no room for it.
    """
    seqs, firsts, state, times = all_seqs[row], all_firsts[row], all_state[row], all_times[row]
    limits, packed, noise = all_limits[row], all_packed[row], all_noise[row]
    if state[s.TAIL] == seqs.shape[1] and not _compact(seqs, firsts, state):
        return -1.0
    _advance(seqs, firsts, state, times, limits, packed, noise, all_done[row], 0, now)
    column = state[s.TAIL]
    for field in range(FIELDS):
        seqs[field, column] = 0
    seqs[ID, column] = id_
    seqs[PROMPT, column] = prompt
    seqs[TARGET, column] = target
    seqs[MAX_TOKENS, column] = most
    seqs[EXPECTED, column] = expected
    firsts[column] = np.nan
    state[s.TAIL] = column + 1
    if times[s.ENDS] == np.inf:
        s.begin_step(seqs, firsts, state, times, limits, packed, noise, now)
    _look_ahead(seqs, firsts, state, times, limits, packed, noise)
    return float(all_times[:, s.EVENT].min())
