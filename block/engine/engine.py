"""One engine of the simulated testbed: the scheduler twin, its arrays, and the passing of time.

The engine is lazy. It knows the step in flight and when it ends; `advance` completes the steps that ended since it was
last looked at, and `next_finish` looks ahead on a copy for the next moment that anyone outside would notice.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from block.core.arrays import Floats, Int, Ints
from block.core.snapshot import BLOCKS, COMPUTED, ID, OUTPUT, PENDING, PROMPT, TARGET, Snapshot
from block.core.types import Request
from block.engine import scheduler as s
from block.engine.batch import Bank, advance, next_finish, receive, turn
from block.engine.config import EngineConfig
from block.engine.latency import LatencyModel

_NOBODY = (0, 0, 0, 0, 0)  # the fields of no request


class Finished(NamedTuple):
    """A sequence that an engine has finished; times on the engine's clock."""

    id: int
    first_token: float
    finished: float
    preemptions: int
    output_tokens: int


class Taken(NamedTuple):
    """A decoding sequence between two engines: its column of `seqs`, and when it yielded its first token."""

    column: Ints
    first_token: float


class Engine:
    """A simulated vLLM engine. Calls must come with times that never go back.

    total_blocks: usable KV blocks (vLLM V1 keeps one of `num_gpu_blocks` for itself).
    noise: float[n], factors on the durations of steps, repeated; defaults to none.
    bank: where its arrays lie; by default in one of its own.
    held_blocks: KV blocks of no sequence that is here: kept for one that is coming, or of one that was `taken`.
    """

    def __init__(
        self,
        config: EngineConfig,
        latency: LatencyModel,
        total_blocks: int,
        noise: Floats | None = None,
        bank: Bank | None = None,
    ) -> None:
        self.total_blocks = total_blocks
        self._max_model_len = config.max_model_len
        self._leaving: int | None = None
        self.held_blocks = 0
        self.taken: Taken | None = None
        self._bank = Bank(1) if bank is None else bank
        noise = np.ones(1) if noise is None else noise
        self.row = self._bank.enter(self, config.limits(total_blocks), latency.pack(), noise)
        self._state[s.FREE] = total_blocks

    def bind(self, row: int) -> None:
        """Take the arrays of a row of the bank."""
        bank = self._bank
        self._seqs, self._firsts, self._done = bank.seqs[row], bank.firsts[row], bank.done[row]
        self._state, self._times, self._limits = bank.state[row], bank.times[row], bank.limits[row]
        self._packed, self._noise = bank.packed[row], bank.noise[row]
        # As compiled functions take them.
        self._arrays = (
            self._seqs,
            self._firsts,
            self._state,
            self._times,
            self._limits,
            self._packed,
            self._noise,
            self._done,
        )
        self._ahead = (*self._arrays, *bank.scratch)

    def copy(self) -> Engine:
        """One like it, in a bank of its own."""
        other = copy.copy(self)
        other._bank = self._bank.alone(self.row)
        other._bank.engines = [other]
        other.row = 0
        other.bind(0)
        return other

    def add(self, request: Request, now: float) -> None:
        """Receive `request` at time `now`, to which the engine must have been advanced.

        ValueError if its prompt leaves no room for a response.
        """
        fields = self._fields(request)  # which may move the arrays
        receive(*self._arrays[:-1], now, *fields)

    def _fields(self, request: Request) -> tuple[int, int, int, int, int]:
        """Id, prompt, target, most and expected tokens of a request that is to be received, for which room is made."""
        prompt, target = request.prompt_tokens, request.output_tokens
        if prompt >= self._max_model_len:
            raise ValueError(
                f"request {request.id}: a prompt of {prompt} tokens leaves no room for a response in "
                f"engine.max_model_len={self._max_model_len}"
            )
        if self._state.item(s.TAIL) == self._seqs.shape[1]:
            self._make_room()
        most = target if request.max_tokens is None else request.max_tokens
        return request.id, prompt, min(target, most), most, request.predicted_output_tokens

    def turn(self, now: float, request: Request | None = None) -> tuple[Sequence[Finished], float]:
        """Complete the steps that end by `now`, and receive `request` if there is one.

        Returns the sequences that finished, in order of time, and when the next one will if nothing more arrives (inf:
        none will). ValueError as of `add`.
        """
        found = self._leave_step() if self._leaving is not None and self.step_ends <= now else 0
        fields = _NOBODY if request is None else self._fields(request)
        found, ahead = turn(*self._ahead, found, now, request is not None, *fields)
        return self.finished(found), ahead

    def _begin_if_idle(self, now: float) -> None:
        if self.step_ends == math.inf:
            self._begin_step(now)

    def _begin_step(self, now: float) -> None:
        s.begin_step(*self._arrays[:-1], now)

    @property
    def step_ends(self) -> float:
        """When the step in flight ends; inf when the engine is idle."""
        return float(self._times.item(s.ENDS))

    def hold(self, blocks: int, seats: int) -> bool:
        """Keep KV blocks and places in the batch for a sequence that is coming; False if there are too few.

        What admission would leave free stays free.
        """
        if self._state[s.FREE] - blocks < self._limits[s.WATERMARK]:
            return False
        if seats > 0 and self._state[s.RUNNING] + seats > self._limits[s.MAX_NUM_SEQS]:
            return False
        self._keep(blocks, seats)
        return True

    def release(self, blocks: int, seats: int, now: float) -> None:
        """Give back what was held, at time `now`, to which the engine must have been advanced."""
        self._keep(-blocks, -seats)
        if self._state[s.TAIL] > self._state[s.HEAD]:
            self._begin_if_idle(now)  # it may be that nobody could run without them

    def _keep(self, blocks: int, seats: int) -> None:
        self._state[s.FREE] -= blocks
        self._limits[s.MAX_NUM_SEQS] -= seats
        self.held_blocks += blocks

    def take(self, request_id: int) -> None:
        """Have a sequence taken out of the batch when the step in flight ends, with what that step yields for it.

        It is then `taken`; its blocks and its seat are held here, for `release` or `put`. `taken` is None if it does
        not decode at that moment: it has finished, was preempted, or has left. Not for asynchronous scheduling, where
        the step behind would have it still.
        """
        self.taken = None
        self._leaving = request_id
        self._bank.leaving.add(self.row)

    def _take(self) -> None:
        state, seqs = self._state, self._seqs
        head = int(state[s.HEAD])
        for column in range(head, head + int(state[s.RUNNING])):
            known = seqs[PROMPT, column] + seqs[OUTPUT, column]
            decodes = seqs[OUTPUT, column] > 0 and seqs[COMPUTED, column] == known - 1
            if seqs[ID, column] == self._leaving and decodes:
                self.taken = Taken(seqs[:, column].copy(), float(self._firsts[column]))
                s.remove(seqs, self._firsts, state, column)
                self._keep(int(self.taken.column[BLOCKS]), 1)
                break
        self._leaving = None
        self._bank.leaving.discard(self.row)

    def put(self, taken: Taken, now: float) -> None:
        """Let a sequence from elsewhere go on here at `now`, to which the engine must have been advanced.

        The blocks and the seat that are held for it become its own. It decodes from the next step on, as the youngest
        that does.
        """
        self._keep(-int(taken.column[BLOCKS]), -1)
        self._state[s.FREE] -= taken.column[BLOCKS]
        if self._state[s.TAIL] == self._seqs.shape[1]:
            self._make_room()
        state, seqs = self._state, self._seqs
        column, tail = int(state[s.HEAD] + state[s.RUNNING]), int(state[s.TAIL])
        while column > state[s.HEAD] and self._prefills(column - 1):
            column -= 1
        seqs[:, column + 1 : tail + 1] = seqs[:, column:tail].copy()
        self._firsts[column + 1 : tail + 1] = self._firsts[column:tail].copy()
        seqs[:, column] = taken.column
        self._firsts[column] = taken.first_token
        state[[s.RUNNING, s.TAIL, s.VISIBLE]] += 1
        self._begin_if_idle(now)

    def _prefills(self, column: int) -> bool:
        """Is a running sequence in the middle of its prompt?"""
        seqs = self._seqs
        return bool(
            seqs[PENDING, column] == 0 and seqs[COMPUTED, column] < seqs[PROMPT, column] + seqs[OUTPUT, column] - 1
        )

    def abort(self, request_id: int, now: float) -> None:
        """Stop serving a request at time `now`, to which the engine must have been advanced; it will not be reported.

        As in vLLM, it leaves when the step in flight ends, before the outputs of that step are seen; until then
        snapshots show it. What is not here, or not any more, is ignored.
        """
        state = self._state
        live = slice(state[s.HEAD], state[s.TAIL])
        found = (self._seqs[ID, live] == request_id) & (self._seqs[TARGET, live] != s.GONE)
        self._seqs[TARGET, live][found] = s.GONE
        state[s.ABORTED] += found.sum()

    def _make_room(self) -> None:
        """Move the live columns to the front of arrays with room for as many again."""
        head, tail = int(self._state[s.HEAD]), int(self._state[s.TAIL])
        if 2 * (tail - head) > self._seqs.shape[1]:
            self._bank.make_room(2 * self._seqs.shape[1])
        for rows in (self._seqs, self._firsts):
            rows[..., : tail - head] = rows[..., head:tail].copy()
        self._state[[s.HEAD, s.TAIL, s.VISIBLE]] -= head

    def advance(self, now: float) -> Sequence[Finished]:
        """Complete the steps that end by `now`; returns the sequences that finished, in order of time."""
        if self.step_ends > now:
            return []
        found = self._leave_step() if self._leaving is not None else 0
        return self.finished(advance(*self._arrays, found, now))

    def _leave_step(self) -> Int:
        """Complete the step in flight and take out what is to leave; returns how many sequences finished."""
        ends = self.step_ends
        found = s.end_step(self._seqs, self._firsts, self._state, self._times, self._limits, self._done, 0)
        self._take()
        self._begin_step(ends)
        return found

    def finished(self, found: Int) -> Sequence[Finished]:
        """The first `found` sequences that `advance`, of the engine or of its bank, has finished."""
        if found == 0:
            return []
        return [
            Finished(int(id_), first, at, int(preempted), int(output))
            for id_, first, at, preempted, output in zip(*self._done[:, :found].tolist(), strict=True)
        ]

    def next_finish(self) -> float:
        """When the next sequence will finish if nothing more arrives; inf if none will."""
        return next_finish(*self._arrays[:-1], *self._bank.scratch)

    def snapshot(self, instance_id: int, now: float) -> Snapshot:
        """What the scheduler published when it last ran; a view, valid until the engine changes."""
        state = self._state.tolist()
        return Snapshot(
            instance_id,
            now,
            math.nan if self.step_ends == math.inf else self._times.item(s.STARTED),
            state[s.RUNNING],
            state[s.STALE],
            state[s.FREE],
            state[s.PREEMPTIONS],
            self._seqs[:, state[s.HEAD] : state[s.VISIBLE]],
        )
