"""Serving a workload: requests replayed, open loop, on a testbed that is brought up for it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from random import Random as Stream
from typing import Any

from block.cluster.fleet import Fleet
from block.cluster.provisioner import Elastic
from block.cluster.scaler import Scaler
from block.core import clock
from block.core import jit as compiled
from block.core.rng import stream
from block.core.types import Request, RequestRecord
from block.dispatch.core import Dispatcher, Forecaster
from block.dispatch.correction import Corrected
from block.dispatch.counterfactual import Counterfactuals, sample
from block.dispatch.instance import LaunchFailed, one_by_one
from block.dispatch.monitor import Monitor
from block.dispatch.noise import NoisyForecaster
from block.dispatch.policies import Needs
from block.lengths import tag
from block.run.config import RunConfig
from block.workload import spec as workload

PROGRESS_EVERY = 100  # requests between two calls of `finished`


@dataclass
class Outcome:
    """What a run has done so far, in memory; also of one that was interrupted.

    dispatcher: the first, if there are several; it keeps the history of all.
    """

    dispatcher: Dispatcher | None = None
    monitor: Monitor | None = None
    counterfactuals: Counterfactuals | None = None
    scaler: Scaler | None = None
    wall_time_s: float = 0.0  # without compiling
    compile_s: float = 0.0  # before it, too
    engines: Mapping[str, Any] = field(default_factory=dict)


def requests_of(run: RunConfig) -> list[Request]:
    """The run's requests, tagged with their predicted lengths."""
    return made_of(run)[0]


def made_of(run: RunConfig) -> tuple[list[Request], workload.Facts]:
    """The same, and what was done to their workload."""
    requests, facts = workload.make(run.workload, run.seed)
    return tag(requests, run.lengths, run.seed), facts


def serve(
    run: RunConfig,
    requests: Sequence[Request],
    outcome: Outcome,
    finished: Callable[[int], None] = lambda count: None,
    note: Callable[[RequestRecord], None] | None = None,
    logs: Path = Path("logs"),
) -> None:
    """Replay `requests` on the run's testbed, filling `outcome`; `finished` is told of each batch of finished ones.

    note: is told of each record as it is complete. logs: folder for what real servers say.

    Raises what the first request to fail raised.
    """
    began, compiling = time.perf_counter(), compiled.seconds()
    try:
        backend = run.backend
        main = _serve(run, requests, outcome, finished, note, logs)
        clock.run(main, virtual=backend.virtual, dilation=backend.time_dilation)
    except ExceptionGroup as group:  # of servers that start together, the first to fail says what is wrong
        raise group.exceptions[0] from None
    finally:
        spent = compiled.seconds() - compiling
        outcome.wall_time_s = time.perf_counter() - began - spent
        outcome.compile_s += spent


async def _serve(
    run: RunConfig,
    requests: Sequence[Request],
    outcome: Outcome,
    finished: Callable[[int], None],
    note: Callable[[RequestRecord], None] | None,
    logs: Path,
) -> None:
    every = PROGRESS_EVERY if run.backend.virtual else 1
    async with run.backend.start(run.testbed, logs) as fleet:
        if fleet.predictor is None and run.scheduler.needs is not Needs.COUNTS:
            raise LaunchFailed(
                "the servers show no snapshots, which this scheduler needs: start them by "
                "python -m block.vllm_plugin.serve, or choose one that only counts, such as round_robin"
            )
        if run.replay_share > 0:
            sampled = sample(requests, run.replay_share, stream(run.seed, "replay"))
            simulated: Sequence[Any] = fleet.instances
            outcome.counterfactuals = Counterfactuals(simulated, sampled, run.backend.dispatch_delay_s)
        look = fleet.look or one_by_one(fleet.instances)
        dispatcher = Dispatcher(
            fleet.instances,
            run.scheduler,
            _forecaster(run, fleet),
            run.dispatch,
            _policy_stream(run.seed, "policy"),
            delay_s=run.backend.dispatch_delay_s,
            placed=outcome.counterfactuals.placed if outcome.counterfactuals else None,
            initial=run.testbed.initial,
            look=look,
        )
        dispatchers = [dispatcher]
        for i in range(1, run.dispatch.dispatchers):
            policy = run.peers[i - 1] if i <= len(run.peers) else run.scheduler
            dispatchers.append(dispatcher.replica(policy, _policy_stream(run.seed, f"policy/{i}")))
        chosen = stream(run.seed, "dispatchers").integers(len(dispatchers), size=len(requests)).tolist()
        if fleet.migrator is not None:
            fleet.migrator.moved = dispatcher.moved
        shown = bool(fleet.predictor)
        monitor = Monitor(look, lambda: dispatcher.active if shown else (), run.sample_every_s)
        outcome.dispatcher, outcome.monitor = dispatcher, monitor
        outcome.engines = fleet.engines
        done = 0

        async def one(request: Request, dispatcher: Dispatcher) -> None:
            nonlocal done
            record = await dispatcher.submit(request)
            done += 1
            if done % every == 0:
                finished(every)
            if note is not None:
                note(record)

        async def replay(start: clock.Start) -> None:
            for request, i in zip(requests, chosen, strict=True):  # open loop: nothing that happens delays the next
                await clock.sleep_until(request.arrival)
                monitor.tick(clock.now(), request.id)
                start(one(request, dispatchers[i]))

        clock.restart()

        async with AsyncExitStack() as stack:
            if isinstance(run.provisioner, Elastic):
                outcome.scaler = await stack.enter_async_context(Scaler(run.provisioner, fleet, dispatcher))
            await clock.together(replay)
        finished(done % every)


def _policy_stream(seed: int, name: str) -> Stream:
    return Stream(int(stream(seed, name).integers(2**63)))


def _forecaster(run: RunConfig, fleet: Fleet) -> Forecaster | None:
    """The fleet's predictor, with the rule of the run's estimator for what outruns it; corrected by what it observes if
    the run says so, and with the error that it injects.
    """
    if fleet.predictor is None:
        return None
    forecaster: Forecaster = fleet.predictor.going_on(run.lengths.outrun_share)
    if run.dispatch.correction_steps > 0:
        forecaster = Corrected(forecaster, run.backend.latency(run.testbed), run.dispatch.correction_steps)
    if run.dispatch.forecast_noise > 0:
        forecaster = NoisyForecaster(forecaster, run.dispatch.forecast_noise, stream(run.seed, "forecast_noise"))
    return forecaster
