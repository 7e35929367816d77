"""Live migration of requests between simulated instances: the other half of Llumnix (arXiv 2406.03243).

Every so often the instances with little freeness are paired with those that have much. The source of a pair moves its
shortest decoding request, in stages: while the request decodes on, the KV blocks that are full are copied; when few are
left it stops, the rest is copied, and it goes on at the target. The target keeps blocks and a seat from the first stage
on. A migration ends early, and costs nothing but the copying, if the request finishes or is preempted meanwhile, if the
target has no room, or if decoding is faster than copying.

Copying takes the KV's bytes over the bandwidth and is assumed not to slow the engines down (Llumnix measures 1 %).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from block.cluster.simulation import Process, Simulation
from block.core.arrays import Ints
from block.core.snapshot import (
    ID,
    NUM_BLOCKS,
    NUM_COMPUTED_TOKENS,
    NUM_OUTPUT_TOKENS,
    NUM_PREEMPTIONS,
    NUM_PROMPT_TOKENS,
    NUM_SCHEDULED_TOKENS,
    Snapshot,
)
from block.core.types import RequestRecord
from block.dispatch.core import Dispatcher, Observer
from block.dispatch.policies import freeness
from block.engine.engine import Engine


@dataclass(frozen=True)
class MigrationConfig:
    """When and how requests migrate (one Hydra group).

    interval_s: seconds between two pairings; 0 is no migration.
    out_below, in_above: freeness (KV blocks for each running request) below which an instance is a source, and above
        which it is a target.
    last_stage_blocks: so few KV blocks left to copy are copied while the request stands still. max_stages: stages after
        which a migration is given up.
    bandwidth: GB/s from an instance to another. downtime_s: what the last stage takes beside its copying.
    """

    interval_s: float = 0.0
    out_below: float = 3.0
    in_above: float = 3.0
    last_stage_blocks: int = 16
    max_stages: int = 3
    bandwidth: float = 8.0
    downtime_s: float = 0.02

    def __post_init__(self) -> None:
        for key in ("interval_s", "downtime_s"):
            if not 0 <= getattr(self, key) < math.inf:
                raise ValueError(f"migration.{key}={getattr(self, key)}: must be 0 or more seconds")
        if not self.out_below <= self.in_above:
            raise ValueError(
                f"migration.out_below={self.out_below}: must be at most migration.in_above={self.in_above}, or an "
                "instance could be source and target"
            )
        for key in ("last_stage_blocks", "max_stages"):
            if getattr(self, key) < 1:
                raise ValueError(f"migration.{key}={getattr(self, key)}: must be at least 1")
        if not 0 < self.bandwidth < math.inf:
            raise ValueError(f"migration.bandwidth={self.bandwidth}: must be greater than 0 GB/s")


def pairs(free: Sequence[float], config: MigrationConfig) -> list[tuple[int, int]]:
    """Positions of sources and targets: the least free with the freest, the next with the next, and so on."""
    order = sorted(range(len(free)), key=lambda i: (free[i], i))
    sources = [i for i in order if free[i] < config.out_below]
    targets = [i for i in reversed(order) if free[i] > config.in_above]
    return list(zip(sources, targets, strict=False))


def candidate(snapshot: Snapshot) -> Ints | None:
    """The column of the shortest decoding sequence, the first of several; None if none decodes."""
    running = snapshot.seqs[:, : snapshot.running]
    known = running[NUM_PROMPT_TOKENS] + running[NUM_OUTPUT_TOKENS]
    decodes = (
        (running[NUM_OUTPUT_TOKENS] > 0)
        & (running[NUM_SCHEDULED_TOKENS] <= 1)
        & (running[NUM_COMPUTED_TOKENS] >= known - 1)
    )
    if not decodes.any():
        return None
    shortest = int((known + (~decodes) * known.max()).argmin())
    return running[:, shortest].copy()


class _Abandoned(Exception):
    """A migration ends early; the message is the reason that is counted."""


class Migrator(Observer):
    """Pairs the instances of a simulation, at every multiple of the interval at which requests are there, and migrates
    requests between them. An instance takes part in one migration at a time.

    block_bytes: of a KV block. counts: migrations by their outcome, KV blocks copied, and the seconds that requests
    stood still.
    """

    def __init__(self, config: MigrationConfig, block_size: int, block_bytes: float, simulation: Simulation) -> None:
        self._config = config
        self._block_size = block_size
        self._block_s = block_bytes / (config.bandwidth * 1e9)
        self._simulation = simulation
        self._engines = [Engine(simulation.engines, row) for row in range(len(simulation.engines))]
        self._busy: set[int] = set()
        self._pairing = False  # is it to pair them again?
        self._pairings = 0
        self.counts: dict[str, float] = defaultdict(float)

    def delivered(self, dispatcher: Dispatcher, record: RequestRecord, now: float) -> None:
        """There is something to serve, so that pairing begins, or goes on."""
        if not self._pairing:
            self._pairing = True
            self._simulation.start(self._pair(dispatcher))

    def _pair(self, dispatcher: Dispatcher) -> Process:
        interval, simulation = self._config.interval_s, self._simulation
        while simulation.running:
            self._pairings = max(self._pairings + 1, math.ceil(simulation.now / interval))
            yield max(self._pairings * interval, simulation.now)
            for source, target in self._pairs():
                self._busy |= {source, target}
                simulation.start(self._attempt(source, target, dispatcher))
        self._pairing = False

    def _pairs(self) -> list[tuple[int, int]]:
        ready = [i for i in range(len(self._engines)) if i not in self._busy]
        if not ready:
            return []
        seen = self._simulation.snapshot_many(ready, self._simulation.now)
        free = freeness(seen, [()] * len(ready), self._block_size)
        return [(ready[source], ready[target]) for source, target in pairs(free, self._config)]

    def _attempt(self, source: int, target: int, dispatcher: Dispatcher) -> Process:
        try:
            yield from self._migrate(source, target, dispatcher)
            self.counts["migrated"] += 1
        except _Abandoned as reason:
            self.counts[str(reason)] += 1
        finally:
            self._busy -= {source, target}

    def _now(self, instance_id: int) -> Engine:
        """An instance's engine, advanced to this moment."""
        engine = self._engines[instance_id]
        engine.advance(self._simulation.now)
        return engine

    def _shown(self, instance_id: int) -> Snapshot:
        return self._simulation.snapshot_many([instance_id], self._simulation.now)[0]

    def _migrate(self, source: int, target: int, dispatcher: Dispatcher) -> Process:
        """Move the source's shortest request. Raises _Abandoned, with everything as if nothing had been tried."""
        config, simulation = self._config, self._simulation
        start = candidate(self._shown(source))
        if start is None:
            raise _Abandoned("nothing_decodes")
        copied = seats = 0

        def reserve(blocks: int) -> bool:
            nonlocal copied, seats
            reserved = self._now(target).reserve(blocks, 1 - seats)
            if reserved:
                copied, seats = copied + blocks, 1
            return reserved

        try:
            for _ in range(config.max_stages):
                column = _still_decoding(self._shown(source), start)
                if column[NUM_BLOCKS] - copied <= config.last_stage_blocks:
                    break
                full = int(column[NUM_COMPUTED_TOKENS] - column[NUM_SCHEDULED_TOKENS]) // self._block_size - copied
                if not reserve(full):
                    raise _Abandoned("no_room")
                yield simulation.now + full * self._block_s
                self.counts["copied_blocks"] += full
            else:
                raise _Abandoned("too_many_stages")
            yield self._now(source).halt()
            extracted = self._engines[source].extract(int(start[ID]))
            if extracted is None or extracted.column[NUM_PREEMPTIONS] > start[NUM_PREEMPTIONS]:
                if extracted is not None:
                    self._engines[source].insert(extracted, simulation.now)
                raise _Abandoned("preempted_or_finished")
            rest = int(extracted.column[NUM_BLOCKS]) - copied
            if not reserve(rest):
                self._engines[source].insert(extracted, simulation.now)
                raise _Abandoned("no_room")
        except _Abandoned:
            self._now(target).release(copied, seats, simulation.now)
            raise
        downtime = config.downtime_s + rest * self._block_s
        yield simulation.now + downtime
        self.counts["copied_blocks"] += rest
        self.counts["stood_s"] += downtime
        self._now(target).insert(extracted, simulation.now)
        self._now(source).release(copied, 1, simulation.now)
        record, _ = simulation.running[int(start[ID])]
        dispatcher.migrated(record, source, target, simulation.now)


def _still_decoding(snapshot: Snapshot, start: Ints) -> Ints:
    """The column of the sequence that was `start`; _Abandoned if it is not in the batch or was preempted since."""
    running = snapshot.seqs[:, : snapshot.running]
    found = (running[ID] == start[ID]).nonzero()[0]
    if found.size == 0 or running[NUM_PREEMPTIONS, found[0]] > start[NUM_PREEMPTIONS]:
        raise _Abandoned("preempted_or_finished")
    column: Ints = running[:, found[0]]
    return column
