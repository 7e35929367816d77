"""Serving a workload: requests replayed, open loop, on a testbed that is brought up for it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random as Stream
from typing import Any

from block import clock, workload
from block.config import RunConfig
from block.dispatcher import Dispatcher
from block.lengths import tag
from block.monitor import Monitor
from block.rng import stream
from block.types import Request

PROGRESS_EVERY = 100  # requests between two calls of `finished`


@dataclass
class Outcome:
    """What a run has done so far, in memory; also of one that was interrupted."""

    dispatcher: Dispatcher | None = None
    monitor: Monitor | None = None
    wall_time_s: float = 0.0


def requests_of(run: RunConfig) -> list[Request]:
    """The run's requests, tagged with their predicted lengths."""
    return tag(workload.generate(run.workload, run.seed), run.lengths, run.seed)


def serve(
    run: RunConfig, requests: Sequence[Request], outcome: Outcome, finished: Callable[[int], None] = lambda count: None
) -> None:
    """Replay `requests` on the run's testbed, filling `outcome`; `finished` is told of each batch of finished ones.

    Raises what the first request to fail raised.
    """
    began = time.perf_counter()
    try:
        clock.run(_serve(run, requests, outcome, finished), virtual=run.backend.virtual)
    except ExceptionGroup as group:  # the first task to fail says what is wrong; it ended the others
        raise group.exceptions[0] from None
    finally:
        outcome.wall_time_s = time.perf_counter() - began


async def _serve(
    run: RunConfig, requests: Sequence[Request], outcome: Outcome, finished: Callable[[int], None]
) -> None:
    async with run.backend.start(run.testbed) as fleet:
        policy_stream = Stream(int(stream(run.seed, "policy").integers(2**63)))
        dispatcher = Dispatcher(
            fleet.instances,
            run.scheduler,
            fleet.predictor,
            run.dispatch,
            policy_stream,
            delay_s=run.backend.dispatch_delay_s,
        )
        monitor = Monitor(fleet.instances, run.sample_every_s)
        outcome.dispatcher, outcome.monitor = dispatcher, monitor
        done = 0

        def count(_: asyncio.Task[Any]) -> None:
            nonlocal done
            done += 1
            if done % PROGRESS_EVERY == 0:
                finished(PROGRESS_EVERY)

        async with asyncio.TaskGroup() as group:
            for request in requests:  # open loop: nothing that happens to a request delays the next
                await clock.sleep_until(request.arrival)
                monitor.tick(clock.now(), request.id)
                group.create_task(dispatcher.submit(request)).add_done_callback(count)
        finished(done % PROGRESS_EVERY)
