"""Serving a workload: requests replayed, open loop, on a testbed that is brought up for it."""

from __future__ import annotations

import asyncio
import gc
import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from block.backends.emulated import Emulated
from block.backends.simulated import Simulated
from block.cluster.fleet import RealBackend
from block.cluster.instance import LaunchFailed, one_by_one
from block.cluster.live import LiveDriver, generating
from block.cluster.provisioner import Elastic
from block.cluster.scaler import Scaler
from block.core import jit
from block.core.clock import Clock
from block.core.rng import generator
from block.core.types import Request, RequestRecord
from block.core.user_code import user_errors
from block.dispatch.core import Dispatcher, Forecaster, History, Observer, PrefixIndex, SnapshotMany
from block.dispatch.correction import CorrectedForecaster
from block.dispatch.counterfactual import Counterfactuals, sample
from block.dispatch.monitor import Monitor
from block.dispatch.noise import NoisyForecaster
from block.dispatch.policies import Needs
from block.dispatch.prefixes import OldLookUps, SentPrefixes, Telling, ToldPrefixes
from block.engine.predictor import Predictor, Predictors
from block.lengths import tag
from block.run.config import RunConfig
from block.run.config_errors import ConfigError, explain
from block.workload import spec as workload
from block.workload.content import with_hashes, with_token_hashes
from block.workload.sessions import followers

PROGRESS_EVERY = 100  # simulated requests between two calls of `advance`


@dataclass
class Outcome:
    """What a run has done so far, in memory; also of one that was interrupted.

    ended_at: what the run's clock read at its end.
    """

    history: History | None = None
    monitor: Monitor | None = None
    counterfactuals: Counterfactuals | None = None
    scaler: Scaler | None = None
    wall_time_s: float = 0.0  # without compiling
    compile_s: float = 0.0  # before it, too
    ended_at: float = math.nan
    engines: Mapping[str, Any] = field(default_factory=dict)
    snapshots: Sequence[Mapping[str, Any]] = ()  # how those of real engines came


def requests_of(run: RunConfig) -> tuple[list[Request], workload.Facts]:
    """The run's requests, tagged with their predicted lengths, and what was done to their workload.

    ConfigError if there is no such trace or estimator, or it is not sound.
    """
    try:
        with user_errors():
            requests, facts = workload.make(run.workload, run.seed)
            if run.engine.enable_prefix_caching:
                size, vocabulary = run.engine.block_size, run.testbed.model.vocab_size
                virtual = isinstance(run.backend, Simulated)
                requests = with_hashes(requests, size) if virtual else with_token_hashes(requests, size, vocabulary)
            return tag(requests, run.lengths, run.seed), facts
    except (ValueError, OSError) as error:
        raise ConfigError(explain(error)) from error


def replay(
    run: RunConfig,
    requests: Sequence[Request],
    outcome: Outcome,
    advance: Callable[[int], None] = lambda count: None,
    note: Callable[[RequestRecord], None] | None = None,
    logs: Path = Path("logs"),
) -> None:
    """Replay `requests` on the run's testbed, filling `outcome`.

    advance: is told of how many more have finished. note: is told of each record as it is complete. logs: folder for
    what real servers say. Raises what the first request to fail raised.
    """
    began, compiling = time.perf_counter(), jit.seconds()
    try:
        if isinstance(run.backend, Simulated):
            _simulate(run, run.backend, requests, outcome, advance)
        else:
            asyncio.run(_replay(run, run.backend, requests, outcome, advance, note, logs))
    except ExceptionGroup as group:  # of servers that start together, the first to fail says what is wrong
        raise group.exceptions[0] from None
    finally:
        spent = jit.seconds() - compiling
        outcome.wall_time_s = time.perf_counter() - began - spent
        outcome.compile_s += spent


def _simulate(
    run: RunConfig,
    backend: Simulated,
    requests: Sequence[Request],
    outcome: Outcome,
    advance: Callable[[int], None],
) -> None:
    """Replay on virtual time."""
    simulation, predictor, migrator = backend.simulate(run.testbed)
    observers: list[Observer] = [] if migrator is None else [migrator]
    if run.replay_share > 0:
        sampled = sample(requests, run.replay_share, generator(run.seed, "replay"))
        outcome.counterfactuals = Counterfactuals(simulation.engines, sampled, backend.dispatch_delay_s)
        observers.append(outcome.counterfactuals)
    if isinstance(run.provisioner, Elastic):
        outcome.scaler = Scaler(run.provisioner, run.testbed.instances, simulation)
        observers.append(outcome.scaler)
    dispatchers = _dispatchers(
        run,
        run.testbed.instances,
        predictor,
        simulation.snapshot_many,
        observers,
        outcome,
        simulation,
        min(kind.total_blocks for kind in run.testbed.kinds) if run.engine.enable_prefix_caching else None,
        lambda: simulation.now,
    )
    monitor = outcome.monitor = Monitor(simulation.snapshot_many, lambda: dispatchers[0].active, run.sample_every_s)
    if migrator is not None:
        outcome.engines = {"migrations": migrator.counts}
    done = 0
    heads, following = _sessions(run, requests)
    placing = list(zip(requests, _chosen(run, requests, dispatchers), strict=True))
    at = {request.id: dispatcher for request, dispatcher in placing} if following else {}

    def next_of(record: RequestRecord) -> tuple[Request, Dispatcher] | None:
        if record.request.id not in following:
            return None
        turn, thinking = following[record.request.id]
        return replace(turn, arrival=simulation.now + thinking), at[turn.id]

    def ended(record: RequestRecord) -> None:
        nonlocal done
        done += 1
        if done % PROGRESS_EVERY == 0:
            advance(PROGRESS_EVERY)

    collecting = gc.isenabled()
    gc.disable()  # which searches all records again and again, and a simulation makes no cycles
    try:
        arriving = [(one, at[one.id]) for one in heads] if following else placing
        simulation.run(arriving, monitor.tick, ended, next_of if following else None)
    finally:
        if collecting:
            gc.enable()
        outcome.ended_at = simulation.now
    advance(done % PROGRESS_EVERY)


async def _replay(
    run: RunConfig,
    backend: RealBackend,
    requests: Sequence[Request],
    outcome: Outcome,
    advance: Callable[[int], None],
    note: Callable[[RequestRecord], None] | None,
    logs: Path,
) -> None:
    """Replay on real servers."""
    clock = Clock(backend.time_dilation)
    async with backend.start(run.testbed, clock, logs) as fleet, LiveDriver(clock, fleet.servers) as driver:
        if fleet.predictor is None and run.policy.needs is not Needs.COUNTS:
            raise LaunchFailed(
                "the servers show no snapshots, which this policy needs: start them by "
                "python -m block.vllm_plugin.serve, or choose one that only counts, such as round_robin"
            )
        observers: list[Observer] = []
        if isinstance(run.provisioner, Elastic):
            outcome.scaler = Scaler(run.provisioner, len(fleet.instances), driver)
            observers.append(outcome.scaler)
        outcome.engines = fleet.engines
        snapshot_many = one_by_one(fleet.instances)
        dispatchers = _dispatchers(
            run,
            len(fleet.instances),
            fleet.predictor,
            snapshot_many,
            observers,
            outcome,
            fleet.prefixes,
            _cache_blocks(run, fleet.engines),
            clock.now,
        )
        if fleet.health is not None:
            for dispatcher in dispatchers:
                driver.watch(dispatcher, fleet.health)
        shown = bool(fleet.predictor)
        monitor = outcome.monitor = Monitor(
            snapshot_many, lambda: dispatchers[0].active if shown else (), run.sample_every_s
        )

        deliver = generating(fleet.instances, dispatchers[0].first_token)

        heads, following = _sessions(run, requests)
        at = dict(zip((one.id for one in requests), _chosen(run, requests, dispatchers), strict=True))

        async def one(request: Request) -> None:
            """A request, and all that follows from its end."""
            while True:
                record = await driver.submit(at[request.id], request, deliver)
                advance(1)
                if note is not None:
                    note(record)
                if request.id not in following:
                    return
                turn, thinking = following[request.id]
                request = replace(turn, arrival=clock.now() + thinking)
                await clock.sleep_until(request.arrival)
                monitor.tick(clock.now(), request.id)

        clock.restart()
        try:
            async with asyncio.TaskGroup() as group:
                for request in heads:  # open loop: nothing delays the next
                    await clock.sleep_until(request.arrival)
                    monitor.tick(clock.now(), request.id)
                    group.create_task(one(request))
        except BaseExceptionGroup as failed:  # the first to fail says what is wrong; it ended the others
            raise failed.exceptions[0] from None
        finally:
            outcome.ended_at = clock.now()
            outcome.snapshots = fleet.snapshots(outcome.ended_at)


def _dispatchers(
    run: RunConfig,
    instances: int,
    predictor: Predictor | Predictors | None,
    snapshot_many: SnapshotMany,
    observers: Sequence[Observer],
    outcome: Outcome,
    told: Telling | None,
    cache_blocks: int | None,
    now: Callable[[], float],
) -> list[Dispatcher]:
    """The run's dispatchers, which know nothing of each other but keep one history.

    told: what the instances tell of their prefix caches, if they do. cache_blocks: KV blocks of an instance, the least
    that one has; None: they have no such caches. now: tells the time.
    """
    interval_s = run.dispatch.snapshot_interval_s
    answers = isinstance(run.backend, Simulated | Emulated)
    forecaster = _forecaster(run, predictor)
    history = outcome.history = History()
    made = []
    for i in range(run.dispatch.dispatchers):
        policy = run.policy if i == 0 else run.peers[i - 1] if i <= len(run.peers) else run.policy
        asks = cache_blocks is not None and policy.needs is not Needs.COUNTS
        prefixes: PrefixIndex | None = told if asks else None
        if prefixes is not None and told is not None and interval_s > 0:
            prefixes = ToldPrefixes(OldLookUps(told, interval_s, now), told.block_size)
        if asks and cache_blocks and (told is None or run.dispatch.prefixes == "sent"):
            prefixes = SentPrefixes(run.engine.block_size, cache_blocks, answers=answers)
        dispatcher = Dispatcher(
            instances,
            policy,
            forecaster,
            run.dispatch,
            _policy_rng(run.seed, "policy" if i == 0 else f"policy/{i}"),
            snapshot_many=snapshot_many,
            prefixes=prefixes,
            delay_s=run.backend.dispatch_delay_s,
            initial=run.testbed.initial,
            observers=[*observers, prefixes] if isinstance(prefixes, Observer) else observers,
            history=history,
        )
        made.append(dispatcher)
    return made


def _cache_blocks(run: RunConfig, engines: Mapping[str, Any]) -> int | None:
    """KV blocks of servers that say this of themselves, if they cache prefixes and requests have the hashes for it."""
    asked = run.engine
    same = engines.get("enable_prefix_caching") and engines["block_size"] == asked.block_size
    return int(engines["total_blocks"]) if same and asked.enable_prefix_caching else None


def _sessions(
    run: RunConfig, requests: Sequence[Request]
) -> tuple[Sequence[Request], dict[int, tuple[Request, float]]]:
    """The requests that come at their times, and those that come when another has ended, by its id, with the seconds
    between.
    """
    if not run.workload.closed_loop:
        return requests, {}
    following = followers(requests)
    later = {turn.id for turn, _ in following.values()}
    return [one for one in requests if one.id not in later], following


def _chosen(run: RunConfig, requests: Sequence[Request], dispatchers: Sequence[Dispatcher]) -> list[Dispatcher]:
    """For each request the dispatcher that it goes to, at random."""
    drawn = generator(run.seed, "dispatchers").integers(len(dispatchers), size=len(requests)).tolist()
    return [dispatchers[i] for i in drawn]


def _policy_rng(seed: int, name: str) -> random.Random:
    return random.Random(int(generator(seed, name).integers(2**63)))


def _forecaster(run: RunConfig, predictor: Predictor | Predictors | None) -> Forecaster | None:
    """The predictor, with the rule of the run's estimator for what outruns it; corrected by what it observes if the run
    says so, and with the error that it injects.
    """
    if predictor is None:
        return None
    forecaster: Forecaster = predictor.with_outrun_share(run.lengths.outrun_share)
    if run.dispatch.correction_steps > 0:
        forecaster = CorrectedForecaster(forecaster, run.backend.latency(run.testbed), run.dispatch.correction_steps)
    if run.dispatch.forecast_noise > 0:
        forecaster = NoisyForecaster(forecaster, run.dispatch.forecast_noise, generator(run.seed, "forecast_noise"))
    return forecaster
