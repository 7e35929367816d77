"""A simulated instance: the engine twin on the run's clock.

It does not wake for every step. It asks the engine when the next sequence will finish, sets one timer for that, and
asks again when a request arrives. First-token times come out of the engine exact, without waking anybody.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence

import numpy as np

from block.core import clock
from block.core.snapshot import ID, Snapshot, Snapshots
from block.core.types import Request, RequestRecord
from block.engine.batch import Bank
from block.engine.engine import Engine, Finished, Taken


class SimulatedInstance:
    """An `Instance` backed by an `Engine`. Its sequences can move to another one: see `block.cluster.migration`.

    on_work: is called when a request arrives.
    """

    def __init__(self, instance_id: int, engine: Engine, on_work: Callable[[], None] | None = None) -> None:
        self.instance_id = instance_id
        self._on_work = on_work
        self._engine = engine
        self._serving: dict[int, tuple[RequestRecord, clock.Future]] = {}
        self._timer: asyncio.TimerHandle | None = None

    def snapshot(self) -> Snapshot:
        """The engine's state as its scheduler published it at the last step's beginning."""
        now = clock.now()
        self._advance(now)
        return self._engine.snapshot(self.instance_id, now)

    async def generate(self, request: Request, record: RequestRecord) -> None:
        """Serve `request` in simulated time."""
        finished = clock.future()
        self._serving[request.id] = (record, finished)
        self._turn(request)
        if self._on_work is not None:
            self._on_work()
        await finished

    def would_finish(self, arrivals: Sequence[tuple[float, Request]]) -> float:
        """When the last of `arrivals`, (time, request) in order of time, would finish if nothing else came; inf: never.

        The instance itself is left as it is.
        """
        engine = self._engine.copy()
        for at, request in arrivals:
            engine.advance(at)
            engine.add(request, at)
        finished = {done.id: done.finished for done in engine.advance(math.nextafter(math.inf, 0.0))}
        return finished.get(arrivals[-1][1].id, math.inf)

    async def healthy(self) -> bool:
        """Always: a twin does not fail."""
        return True

    @property
    def serving(self) -> int:
        """Requests that are here, or on their way from here to another instance."""
        return len(self._serving)

    def hold(self, blocks: int, seats: int) -> bool:
        """Keep KV blocks and places in the batch for a sequence that is coming; False if there are too few."""
        self._advance(clock.now())
        kept = self._engine.hold(blocks, seats)
        self._turn()
        return kept

    def release(self, blocks: int, seats: int) -> None:
        """Give back what was held."""
        now = clock.now()
        self._advance(now)
        self._engine.release(blocks, seats, now)
        self._turn()

    async def take(self, request_id: int) -> Taken | None:
        """Take a decoding sequence out of the batch at the end of the step in flight; its blocks and seat stay held.

        None if it does not decode at that moment.
        """
        self._advance(clock.now())
        self._engine.take(request_id)
        ended = clock.future()
        clock.call_at(self._engine.step_ends, lambda: ended.set_result(None))
        await ended
        self._turn()
        return self._engine.taken

    def put(self, taken: Taken, source: SimulatedInstance) -> RequestRecord:
        """Let a sequence taken out of `source` go on here, in what is held for it; returns its record."""
        now = clock.now()
        self._advance(now)
        request_id = int(taken.column[ID])
        self._serving[request_id] = source._serving.pop(request_id)
        self._engine.put(taken, now)
        self._turn()
        return self._serving[request_id][0]

    def _advance(self, now: float) -> None:
        self._finish(self._engine.advance(now))

    def _finish(self, sequences: Sequence[Finished]) -> None:
        for done in sequences:
            record, finished = self._serving.pop(done.id)
            record.first_token = done.first_token
            record.finished = done.finished
            record.preemptions = done.preemptions
            record.output_tokens = done.output_tokens
            finished.set_result(None)

    def _turn(self, request: Request | None = None) -> None:
        """Advance the engine, with one request more if it comes now, and set the timer for the next finish."""
        sequences, when = self._engine.turn(clock.now(), request)
        self._finish(sequences)
        if self._timer is not None:
            if self._timer.when() == when:
                return
            self._timer.cancel()
        self._timer = None if when == math.inf else clock.call_at(when, self._turn)


class Looks:
    """Snapshots of many simulated instances at once, whose engines lie in one bank in the same order."""

    def __init__(self, instances: Sequence[SimulatedInstance], bank: Bank) -> None:
        self._instances = instances
        self._bank = bank
        self._rows = np.arange(len(instances))

    def __call__(self, ids: Sequence[int]) -> Snapshots:
        """What `SimulatedInstance.snapshot` shows, of each of these."""
        now = clock.now()
        bank, instances = self._bank, self._instances
        for i in bank.leaving.intersection(ids):
            instances[i]._advance(now)
        rows = self._rows if ids == range(len(self._rows)) else np.array(ids, dtype=np.int64)
        shown = bank.snapshots(rows, now)
        if bank.finished:
            for i in ids:
                if bank.found[i] > 0:
                    instances[i]._finish(instances[i]._engine.finished(bank.found[i]))
        return shown
