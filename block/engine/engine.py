"""One engine of a batch: what migration, counterfactuals and tests do with a single one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from block.core.arrays import Floats, Ints
from block.core.snapshot import BLOCKS, COMPUTED, ID, OUTPUT, PENDING, PROMPT, TARGET, Snapshot
from block.core.types import Request
from block.engine import scheduler as s
from block.engine.batch import EngineBatch, EngineSpec, Finished
from block.engine.config import EngineConfig
from block.engine.latency import LatencyModel


class Extracted(NamedTuple):
    """A decoding sequence between two engines: its column of `seqs`, and when it yielded its first token."""

    column: Ints
    first_token: float


class Engine:
    """The engine in a row of a batch. Calls come with times that never go back."""

    def __init__(self, batch: EngineBatch, row: int) -> None:
        self.batch = batch
        self.row = row

    @staticmethod
    def alone(config: EngineConfig, latency: LatencyModel, total_blocks: int, noise: Floats | None = None) -> Engine:
        """An engine in a batch of its own; arguments as of `EngineSpec`."""
        return Engine(EngineBatch([EngineSpec(config, latency, total_blocks, noise)]), 0)

    def copy(self) -> Engine:
        """One like it, in a batch of its own."""
        return Engine(self.batch.copy(self.row), 0)

    @property
    def _state(self) -> Ints:
        return self.batch.state[self.row]

    @property
    def _times(self) -> Floats:
        return self.batch.times[self.row]

    @property
    def _seqs(self) -> Ints:
        return self.batch.seqs[self.row]

    def add(self, request: Request, now: float) -> None:
        """Receive `request` at time `now`, to which the engine must have been advanced. ValueError as of `receive`."""
        self.batch.receive(self.row, request, now)

    def advance(self, now: float) -> Sequence[Finished]:
        """Complete the steps that end by `now`; returns the sequences that finished, in order of time."""
        return self.batch.advance(self.row, now)

    @property
    def step_ends(self) -> float:
        """When the step in flight ends; inf when the engine is idle."""
        return float(self._times[s.ENDS])

    @property
    def next_event(self) -> float:
        """As `EngineBatch.next_event`, of this engine."""
        return float(self._times[s.EVENT])

    @property
    def held_blocks(self) -> int:
        """KV blocks of no sequence that is here: reserved for one that is coming, or of one that was extracted."""
        return int(self._state[s.HELD])

    def snapshot(self, instance_id: int, now: float) -> Snapshot:
        """What the scheduler published when it last ran; a view, valid until the engine changes."""
        return self.batch.snapshots([self.row], now)[0]._replace(instance_id=instance_id)

    def reserve(self, blocks: int, seats: int) -> bool:
        """Keep KV blocks and places in the batch for a sequence that is coming; False if there are too few.

        What admission would leave free stays free.
        """
        state, limits = self._state, self.batch.limits[self.row]
        if state[s.FREE] - blocks < limits[s.WATERMARK]:
            return False
        if seats > 0 and state[s.RUNNING] + seats > limits[s.MAX_NUM_SEQS]:
            return False
        self._keep(blocks, seats)
        self.batch.look_ahead(self.row)
        return True

    def release(self, blocks: int, seats: int, now: float) -> None:
        """Give back what was reserved, at time `now`, to which the engine must have been advanced."""
        self._keep(-blocks, -seats)
        if self._state[s.TAIL] > self._state[s.HEAD]:
            self._begin_if_idle(now)  # it may be that nobody could run without them
        self.batch.look_ahead(self.row)

    def _keep(self, blocks: int, seats: int) -> None:
        self._state[s.FREE] -= blocks
        self.batch.limits[self.row, s.MAX_NUM_SEQS] -= seats
        self._state[s.HELD] += blocks

    def halt(self) -> float:
        """Begin no other step after the one in flight, until `extract`; returns when that one ends."""
        self._state[s.HALT] = s.HALTING
        self.batch.look_ahead(self.row)
        return self.step_ends

    def extract(self, request_id: int) -> Extracted | None:
        """Take a sequence out of the engine that was halted, at the end of its last step; it then goes on.

        None if the sequence does not decode: it has finished, was preempted, or has left. Else its blocks and its seat
        stay reserved here, for `release` or `insert`. Not for asynchronous scheduling, where the step behind would have
        it still.
        """
        state, seqs, firsts = self._state, self._seqs, self.batch.firsts[self.row]
        assert state[s.HALT] == s.HALTED, "the step in flight has ended"
        begin = int(state[s.HEAD])
        extracted = None
        for column in range(begin, begin + int(state[s.RUNNING])):
            known = seqs[PROMPT, column] + seqs[OUTPUT, column]
            decodes = seqs[OUTPUT, column] > 0 and seqs[COMPUTED, column] == known - 1
            if seqs[ID, column] == request_id and decodes:
                extracted = Extracted(seqs[:, column].copy(), float(firsts[column]))
                s.remove(seqs, firsts, state, column)
                self._keep(int(extracted.column[BLOCKS]), 1)
                break
        state[s.HALT] = 0
        self._begin_step(self.step_ends)
        self.batch.look_ahead(self.row)
        return extracted

    def insert(self, extracted: Extracted, now: float) -> None:
        """Let a sequence from elsewhere go on here at `now`, to which the engine must have been advanced.

        The blocks and the seat that are reserved for it become its own. It decodes from the next step on, as the
        youngest that does.
        """
        self.batch.make_room(self.row)
        self._keep(-int(extracted.column[BLOCKS]), -1)
        state, seqs, firsts = self._state, self._seqs, self.batch.firsts[self.row]
        state[s.FREE] -= extracted.column[BLOCKS]
        column, tail = int(state[s.HEAD] + state[s.RUNNING]), int(state[s.TAIL])
        while column > state[s.HEAD] and _prefills(seqs, column - 1):
            column -= 1
        seqs[:, column + 1 : tail + 1] = seqs[:, column:tail].copy()
        firsts[column + 1 : tail + 1] = firsts[column:tail].copy()
        seqs[:, column] = extracted.column
        firsts[column] = extracted.first_token
        state[[s.RUNNING, s.TAIL, s.VISIBLE]] += 1
        self._begin_if_idle(now)
        self.batch.look_ahead(self.row)

    def abort(self, request_id: int, now: float) -> None:
        """Stop serving a request at time `now`, to which the engine must have been advanced; it will not be reported.

        As in vLLM, it leaves when the step in flight ends, before the outputs of that step are seen; until then
        snapshots show it. What is not here, or not any more, is ignored.
        """
        state, seqs = self._state, self._seqs
        live = slice(state[s.HEAD], state[s.TAIL])
        found = (seqs[ID, live] == request_id) & (seqs[TARGET, live] != s.GONE)
        seqs[TARGET, live][found] = s.GONE
        state[s.ABORTED] += found.sum()
        self.batch.look_ahead(self.row)

    def _begin_if_idle(self, now: float) -> None:
        if self.step_ends == math.inf:
            self._begin_step(now)

    def _begin_step(self, now: float) -> None:
        s.begin_step(*self.batch.row(self.row)[:-1], now)


def _prefills(seqs: Ints, column: int) -> bool:
    """Is a running sequence in the middle of its prompt?"""
    known = seqs[PROMPT, column] + seqs[OUTPUT, column]
    return bool(seqs[PENDING, column] == 0 and seqs[COMPUTED, column] < known - 1)
