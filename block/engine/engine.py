"""One engine of a batch: what migration, counterfactuals and tests do with a single one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from block.core.arrays import Ints
from block.core.snapshot import (
    ID,
    NUM_BLOCKS,
    NUM_COMPUTED_TOKENS,
    NUM_OUTPUT_PLACEHOLDERS,
    NUM_OUTPUT_TOKENS,
    NUM_PROMPT_TOKENS,
    TARGET,
    Snapshot,
)
from block.core.types import Request
from block.engine.batch import EngineBatch, Finished
from block.engine.scheduler import begin_step, remove
from block.engine.state import (
    BEGIN,
    END,
    EVENT,
    FREE_BLOCKS,
    GONE,
    HALT,
    HALTED,
    HALTING,
    MAX_NUM_SEQS,
    NUM_ABORTED,
    NUM_RUNNING,
    RESERVED_BLOCKS,
    STEP_ENDS,
    VISIBLE,
    WATERMARK_BLOCKS,
    EngineState,
)


class Extracted(NamedTuple):
    """A decoding sequence between two engines: its column of `seqs`, and when it yielded its first token."""

    column: Ints
    first_token: float


class Engine:
    """The engine in a row of a batch. Calls come with times that never go back."""

    def __init__(self, batch: EngineBatch, row: int) -> None:
        self.batch = batch
        self.row = row

    def copy(self) -> Engine:
        """One like it, in a batch of its own."""
        return Engine(self.batch.copy(self.row), 0)

    @property
    def state(self) -> EngineState:
        """Its arrays: views, valid until something is added."""
        return self.batch.engine(self.row)

    def add(self, request: Request, now: float) -> None:
        """Receive `request` at time `now`, to which the engine must have been advanced. ValueError as of `receive`."""
        self.batch.receive(self.row, request, now)

    def advance(self, now: float) -> Sequence[Finished]:
        """Complete the steps that end by `now`; returns the sequences that finished, in order of time."""
        return self.batch.advance(self.row, now)

    @property
    def step_ends(self) -> float:
        """When the step in flight ends; inf when the engine is idle."""
        return float(self.batch.arrays.times[self.row, STEP_ENDS])

    @property
    def next_event(self) -> float:
        """When the next step that does more than decode ends; inf when the engine is idle."""
        return float(self.batch.arrays.times[self.row, EVENT])

    @property
    def reserved_blocks(self) -> int:
        """KV blocks of no sequence that is here: reserved for one that is coming, or of one that was extracted."""
        return int(self.batch.arrays.counters[self.row, RESERVED_BLOCKS])

    def snapshot(self, instance_id: int, now: float) -> Snapshot:
        """What the scheduler published when it last ran; a view, valid until the engine changes."""
        return self.batch.snapshots([self.row], now)[0]._replace(instance_id=instance_id)

    def reserve(self, blocks: int, seats: int) -> bool:
        """Keep KV blocks and places in the batch for a sequence that is coming; False if there are too few.

        What admission would leave free stays free.
        """
        counters, settings = self.state.counters, self.state.settings
        if counters[FREE_BLOCKS] - blocks < settings[WATERMARK_BLOCKS]:
            return False
        if seats > 0 and counters[NUM_RUNNING] + seats > settings[MAX_NUM_SEQS]:
            return False
        self._keep(blocks, seats)
        self.batch.look_ahead(self.row)
        return True

    def release(self, blocks: int, seats: int, now: float) -> None:
        """Give back what was reserved, at time `now`, to which the engine must have been advanced."""
        self._keep(-blocks, -seats)
        if self.state.counters[END] > self.state.counters[BEGIN]:
            self._begin_if_idle(now)  # it may be that nobody could run without them
        self.batch.look_ahead(self.row)

    def _keep(self, blocks: int, seats: int) -> None:
        self.state.counters[FREE_BLOCKS] -= blocks
        self.state.counters[RESERVED_BLOCKS] += blocks
        self.state.settings[MAX_NUM_SEQS] -= seats

    def halt(self) -> float:
        """Begin no other step after the one in flight, until `extract`; returns when that one ends."""
        self.state.counters[HALT] = HALTING
        self.batch.look_ahead(self.row)
        return self.step_ends

    def extract(self, request_id: int) -> Extracted | None:
        """Take a sequence out of the engine that was halted, at the end of its last step; it then goes on.

        None if the sequence does not decode: it has finished, was preempted, or has left. Else its blocks and its seat
        stay reserved here, for `release` or `insert`. Not for asynchronous scheduling, where the step behind would have
        it still.
        """
        state = self.state
        seqs, counters = state.seqs, state.counters
        assert counters[HALT] == HALTED, "the step in flight has ended"
        begin = int(counters[BEGIN])
        extracted = None
        for column in range(begin, begin + int(counters[NUM_RUNNING])):
            known = seqs[NUM_PROMPT_TOKENS, column] + seqs[NUM_OUTPUT_TOKENS, column]
            decodes = seqs[NUM_OUTPUT_TOKENS, column] > 0 and seqs[NUM_COMPUTED_TOKENS, column] == known - 1
            if seqs[ID, column] == request_id and decodes:
                extracted = Extracted(seqs[:, column].copy(), float(state.first_token_time[column]))
                remove(state, column)
                self._keep(int(extracted.column[NUM_BLOCKS]), 1)
                break
        counters[HALT] = 0
        begin_step(state, self.step_ends)
        self.batch.look_ahead(self.row)
        return extracted

    def insert(self, extracted: Extracted, now: float) -> None:
        """Let a sequence from elsewhere go on here at `now`, to which the engine must have been advanced.

        The blocks and the seat that are reserved for it become its own. It decodes from the next step on, as the
        youngest that does.
        """
        self.batch.make_room(self.row)
        self._keep(-int(extracted.column[NUM_BLOCKS]), -1)
        seqs, first_token_time, counters = self.state[:3]
        counters[FREE_BLOCKS] -= extracted.column[NUM_BLOCKS]
        column, end = int(counters[BEGIN] + counters[NUM_RUNNING]), int(counters[END])
        while column > counters[BEGIN] and _prefills(seqs, column - 1):
            column -= 1
        seqs[:, column + 1 : end + 1] = seqs[:, column:end].copy()
        first_token_time[column + 1 : end + 1] = first_token_time[column:end].copy()
        seqs[:, column] = extracted.column
        first_token_time[column] = extracted.first_token
        counters[[NUM_RUNNING, END, VISIBLE]] += 1
        self._begin_if_idle(now)
        self.batch.look_ahead(self.row)

    def abort(self, request_id: int, now: float) -> None:
        """Stop serving a request at time `now`, to which the engine must have been advanced; it will not be reported.

        As in vLLM, it leaves when the step in flight ends, before the outputs of that step are seen; until then
        snapshots show it. What is not here, or not any more, is ignored.
        """
        seqs, counters = self.state.seqs, self.state.counters
        live = slice(counters[BEGIN], counters[END])
        found = (seqs[ID, live] == request_id) & (seqs[TARGET, live] > GONE)
        seqs[TARGET, live][found] = GONE - counters[NUM_ABORTED]
        counters[NUM_ABORTED] += found.sum()
        self.batch.look_ahead(self.row)

    def _begin_if_idle(self, now: float) -> None:
        if self.step_ends == math.inf:
            begin_step(self.state, now)


def _prefills(seqs: Ints, column: int) -> bool:
    """Is a running sequence in the middle of its prompt?"""
    known = seqs[NUM_PROMPT_TOKENS, column] + seqs[NUM_OUTPUT_TOKENS, column]
    return bool(seqs[NUM_OUTPUT_PLACEHOLDERS, column] == 0 and seqs[NUM_COMPUTED_TOKENS, column] < known - 1)
