"""Live migration of requests between simulated instances: the other half of Llumnix (arXiv 2406.03243).

Every so often the instances with little freeness are paired with those that have much. The source of a pair moves its
shortest decoding request, in stages: while the request decodes on, the KV blocks that are full are copied; when few are
left it stops, the rest is copied, and it goes on at the target. The target keeps blocks and a seat from the first stage
on. A migration ends early, and costs nothing but the copying, if the request finishes or is preempted meanwhile, if the
target has no room, or if decoding is faster than copying.

Copying takes the KV's bytes over the bandwidth and is assumed not to slow the engines down (Llumnix measures 1 %).
"""

from __future__ import annotations

import asyncio
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from block.core import clock
from block.core.arrays import Ints
from block.core.snapshot import BLOCKS, CHUNK, COMPUTED, ID, OUTPUT, PREEMPTED, PROMPT, Snapshot
from block.core.types import RequestRecord
from block.dispatch.instance import Look, one_by_one
from block.dispatch.policies import freeness
from block.engine.simulated_instance import SimulatedInstance

Moved = Callable[[RequestRecord, int, int], None]
"""Is told of a request's record, and the ids of the instances that it moved from and to."""


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
    known = running[PROMPT] + running[OUTPUT]
    decodes = (running[OUTPUT] > 0) & (running[CHUNK] <= 1) & (running[COMPUTED] >= known - 1)
    if not decodes.any():
        return None
    shortest = int((known + (~decodes) * known.max()).argmin())
    return running[:, shortest].copy()


class _Abandoned(Exception):
    """A migration ends early; the message is the reason that is counted."""


class Migrator:
    """Pairs instances and migrates requests while it is `run`. An instance takes part in one migration at a time.

    block_bytes: of a KV block. moved: is told of each request that has moved. counts: migrations by their outcome, KV
    blocks copied, and the seconds that requests stood still.
    """

    def __init__(self, config: MigrationConfig, block_size: int, block_bytes: float) -> None:
        self._config = config
        self._block_size = block_size
        self._block_s = block_bytes / (config.bandwidth * 1e9)
        self._work = asyncio.Event()
        self._busy: set[int] = set()
        self._instances: Sequence[SimulatedInstance] = ()
        self._look: Look = lambda ids: ()
        self.moved: Moved = lambda record, source, target: None
        self.counts: dict[str, float] = defaultdict(float)

    def wake(self) -> None:
        """There is something to serve."""
        self._work.set()

    async def run(self, instances: Sequence[SimulatedInstance], look: Look | None = None) -> None:
        """Pair the instances at every multiple of the interval at which one of them has work, until cancelled.

        look: snapshots of many of them, faster than one by one.
        """
        self._instances = instances
        self._look = look or one_by_one(instances)
        interval = self._config.interval_s
        turn = 0
        async with asyncio.TaskGroup() as migrations:
            while True:
                await self._work.wait()
                turn = max(turn + 1, math.ceil(clock.now() / interval))
                await clock.sleep_until(turn * interval)
                for source, target in self._pairs():
                    self._busy |= {source.instance_id, target.instance_id}
                    migrations.create_task(self._attempt(source, target))
                if not any(instance.serving for instance in instances):
                    self._work.clear()  # nothing wakes anybody until a request arrives, and a stall is seen as one

    def _pairs(self) -> list[tuple[SimulatedInstance, SimulatedInstance]]:
        ready = [instance for instance in self._instances if instance.instance_id not in self._busy]
        if not ready:
            return []
        seen = self._look([instance.instance_id for instance in ready])
        free = freeness(seen, [()] * len(ready), self._block_size)
        return [(ready[source], ready[target]) for source, target in pairs(free, self._config)]

    async def _attempt(self, source: SimulatedInstance, target: SimulatedInstance) -> None:
        try:
            await self._migrate(source, target)
            self.counts["migrated"] += 1
        except _Abandoned as reason:
            self.counts[str(reason)] += 1
        finally:
            self._busy -= {source.instance_id, target.instance_id}

    async def _migrate(self, source: SimulatedInstance, target: SimulatedInstance) -> None:
        """Move the source's shortest request. Raises _Abandoned, with everything as if nothing had been tried."""
        config = self._config
        start = candidate(source.snapshot())
        if start is None:
            raise _Abandoned("nothing_decodes")
        copied = seats = 0

        def hold(blocks: int) -> bool:
            nonlocal copied, seats
            kept = target.hold(blocks, 1 - seats)
            if kept:
                copied, seats = copied + blocks, 1
            return kept

        try:
            for _ in range(config.max_stages):
                column = _still_decoding(source.snapshot(), start)
                if column[BLOCKS] - copied <= config.last_stage_blocks:
                    break
                full = int(column[COMPUTED] - column[CHUNK]) // self._block_size - copied
                if not hold(full):
                    raise _Abandoned("no_room")
                await clock.sleep(full * self._block_s)
                self.counts["copied_blocks"] += full
            else:
                raise _Abandoned("too_many_stages")
            stopped = await source.take(int(start[ID]))
            if stopped is None or stopped.column[PREEMPTED] > start[PREEMPTED]:
                if stopped is not None:
                    source.put(stopped, source)
                raise _Abandoned("preempted_or_finished")
            rest = int(stopped.column[BLOCKS]) - copied
            if not hold(rest):
                source.put(stopped, source)
                raise _Abandoned("no_room")
        except _Abandoned:
            target.release(copied, seats)
            raise
        downtime = config.downtime_s + rest * self._block_s
        await clock.sleep(downtime)
        self.counts["copied_blocks"] += rest
        self.counts["stood_s"] += downtime
        record = target.put(stopped, source)
        source.release(copied, 1)
        self.moved(record, source.instance_id, target.instance_id)


def _still_decoding(snapshot: Snapshot, start: Ints) -> Ints:
    """The column of the sequence that was `start`; _Abandoned if it is not in the batch or was preempted since."""
    running = snapshot.seqs[:, : snapshot.running]
    found = (running[ID] == start[ID]).nonzero()[0]
    if found.size == 0 or running[PREEMPTED, found[0]] > start[PREEMPTED]:
        raise _Abandoned("preempted_or_finished")
    column: Ints = running[:, found[0]]
    return column
