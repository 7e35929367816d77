"""The cluster: instances of one model on some GPUs, started and stopped as one.

A *backend* makes instances. `Simulated` makes them of engine twins on virtual time; those of real engines are in
`block.backends` and differ in nothing that the dispatcher can see.
"""

from __future__ import annotations

import asyncio
import math
import shutil
import subprocess
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol

from block.bank import Bank
from block.engine import Engine, EngineConfig
from block.hardware import Model, gpu_named, kv_blocks, latency_model
from block.instances.base import Instance, Look
from block.instances.simulated import Looks, SimulatedInstance
from block.latency import LatencyModel
from block.migration import MigrationConfig, Migrator
from block.predictor import Predictor, Predictors
from block.rng import stream
from block.types import Floats

NOISE_STEPS = 4096  # an instance's noise repeats after so many steps


@dataclass(frozen=True)
class ClusterConfig:
    """GPUs of one kind (one Hydra group). `gpu` names an entry of `block.hardware.GPUS`, or a FILE.yaml like one."""

    gpu: str = "a30"
    num_gpus: int = 12

    def __post_init__(self) -> None:
        gpu_named(self.gpu)
        if self.num_gpus < 1:
            raise ValueError(f"cluster.num_gpus={self.num_gpus}: must be at least 1")


@dataclass(frozen=True)
class Pool:
    """GPUs of one kind in a cluster of several, and how many of them share an instance (None: as the model says)."""

    gpu: str
    num_gpus: int
    tensor_parallel: int | None = None

    def __post_init__(self) -> None:
        if self.tensor_parallel is not None and self.tensor_parallel < 1:
            raise ValueError(f"cluster.pools: tensor_parallel={self.tensor_parallel}: must be at least 1")


@dataclass(frozen=True)
class Mixed:
    """GPUs of several kinds: the instances of the first pool, then those of the second, and so on."""

    pools: tuple[Pool, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "pools", tuple(self.pools))  # Hydra passes a list
        if not self.pools:
            raise ValueError("cluster.pools=[]: needs one pool or more, such as [{gpu: a30, num_gpus: 4}]")
        for pool in self.pools:
            ClusterConfig(pool.gpu, pool.num_gpus)

    @property
    def num_gpus(self) -> int:
        """All of them."""
        return sum(pool.num_gpus for pool in self.pools)


@dataclass(frozen=True)
class Testbed:
    """What a backend is asked to bring up. ValueError if the model does not fit on the GPUs."""

    model: Model
    cluster: ClusterConfig | Mixed
    engine: EngineConfig
    seed: int
    migration: MigrationConfig = field(default_factory=MigrationConfig)
    initial: int | None = None  # instances that run from the start; None: all

    def __post_init__(self) -> None:
        for kind in self.kinds:
            if kind.instances < 1:
                raise ValueError(
                    f"cluster.num_gpus={kind.cluster.num_gpus}: one instance of {self.model.name} needs "
                    f"model.tensor_parallel={kind.model.tensor_parallel} GPUs"
                )
            self.engine.limits(kind.total_blocks)
        if self.initial is not None and self.initial > self.instances:
            raise ValueError(f"provisioner.initial={self.initial}: the cluster holds {self.instances} instances")

    @property
    def kinds(self) -> Sequence[Testbed]:
        """Its parts whose instances are alike, in order; itself if all are."""
        return [self] if isinstance(self.cluster, ClusterConfig) else [self._of(pool) for pool in self.cluster.pools]

    def _of(self, pool: Pool) -> Testbed:
        model = replace(self.model, tensor_parallel=pool.tensor_parallel or self.model.tensor_parallel)
        return Testbed(model, ClusterConfig(pool.gpu, pool.num_gpus), self.engine, self.seed)

    @property
    def instances(self) -> int:
        """Instances that the GPUs hold."""
        if isinstance(self.cluster, Mixed):
            return sum(kind.instances for kind in self.kinds)
        return self.cluster.num_gpus // self.model.tensor_parallel

    @property
    def gpu(self) -> str:
        """The GPU of instances that are alike."""
        assert isinstance(self.cluster, ClusterConfig), "of several kinds, each is asked"
        return self.cluster.gpu

    @property
    def total_blocks(self) -> int:
        """Usable KV blocks of each of the instances, which are alike; vLLM V1 keeps one for itself."""
        engine = self.engine
        blocks = engine.num_gpu_blocks
        if blocks is None:
            blocks = kv_blocks(gpu_named(self.gpu), self.model, engine.block_size, engine.gpu_memory_utilization)
        return blocks - (engine.version == "v1")


class Servers(Protocol):
    """The processes behind a fleet's instances."""

    async def start(self, instance_id: int) -> None:
        """Start the server of an instance that has none. LaunchFailed if it does not come up."""
        ...

    async def stop(self, instance_id: int) -> None:
        """Stop it, for certain."""
        ...


class Fleet(NamedTuple):
    """A running cluster, the predictor that knows its engines, and what real engines said of themselves.

    Without a predictor, the instances show no snapshots either, and only policies that count can be used.
    migrator: moves requests between the instances, if any does. servers: starts and stops those of single instances;
    None: all are there already. look: snapshots of many of them, faster than one by one.
    """

    instances: Sequence[Instance]
    predictor: Predictor | Predictors | None
    engines: Mapping[str, Any]
    migrator: Migrator | None = None
    servers: Servers | None = None
    look: Look | None = None


class Backend(Protocol):
    """Brings up a testbed. `virtual` says on which clock it lives, `dispatch_delay_s` what delay is to be modelled."""

    virtual: ClassVar[bool]

    @property
    def time_dilation(self) -> float:
        """Wall-clock seconds for a second of the run; 1 on virtual time."""
        ...

    @property
    def dispatch_delay_s(self) -> float:
        """Modelled seconds from a request's arrival to its arrival at an instance."""
        ...

    def latency(self, testbed: Testbed) -> LatencyModel:
        """The step times of a testbed's engines, which are alike, as the predictor knows them."""
        ...

    def start(self, testbed: Testbed, logs: Path) -> AbstractAsyncContextManager[Fleet]:
        """A context in which the cluster runs; what its servers say goes to the folder `logs`."""
        ...


@dataclass(frozen=True)
class Simulated:
    """Engine twins on virtual time.

    step_time_factor, step_overhead_s: calibration: a step takes its modelled time × factor + overhead.
    step_noise: standard deviation of the factor by which each step's duration differs from that; the predictor does not
        know it. The factors are at least 0.5.
    slowdown: factors on the step times of instances 0, 1, …, as of GPUs that throttle, unknown to the predictor.
    predictor_gpu: what GPUs the predictor takes the instances for; None: what they are.
    dispatch_delay_s: seconds from a request's arrival to its arrival at the instance chosen.
    auto: the backend before the user set anything, if real GPUs are to be taken where there are enough; else None.
    """

    step_time_factor: float = 1.0
    step_overhead_s: float = 0.0
    step_noise: float = 0.05
    slowdown: tuple[float, ...] = ()
    predictor_gpu: str | None = None
    dispatch_delay_s: float = 0.0
    auto: Any = None
    virtual: ClassVar[bool] = True
    time_dilation: ClassVar[float] = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.step_time_factor < math.inf:
            raise ValueError(f"backend.step_time_factor={self.step_time_factor}: must be greater than 0")
        if not 0 <= self.step_noise <= 1:
            raise ValueError(f"backend.step_noise={self.step_noise}: must be between 0 and 1")
        object.__setattr__(self, "slowdown", tuple(self.slowdown))  # Hydra passes a list
        if not all(0 < factor < math.inf for factor in self.slowdown):
            raise ValueError(f"backend.slowdown={list(self.slowdown)}: must be greater than 0")
        if self.predictor_gpu is not None:
            gpu_named(self.predictor_gpu, "backend.predictor_gpu")
        for key in ("step_overhead_s", "dispatch_delay_s"):
            value = getattr(self, key)
            if not 0 <= value < math.inf:
                raise ValueError(f"backend.{key}={value}: must be 0 or more seconds")

    def latency(self, testbed: Testbed) -> LatencyModel:
        """The profile of the GPU and model (or their roofline), calibrated."""
        return self._latency(self.predictor_gpu or testbed.gpu, testbed)

    def _latency(self, gpu: str, testbed: Testbed) -> LatencyModel:
        model, _ = latency_model(gpu, testbed.model)
        return model.scaled(self.step_time_factor, self.step_overhead_s)

    @asynccontextmanager
    async def start(self, testbed: Testbed, logs: Path) -> AsyncIterator[Fleet]:
        """Make the twins; there is nothing to stop but the migration of requests between them."""
        migrator = None
        if testbed.migration.interval_s > 0:
            model, size = testbed.model, testbed.engine.block_size
            block_bytes = model.kv_bytes * model.tensor_parallel * model.layers * size
            migrator = Migrator(testbed.migration, size, block_bytes)
        wake = migrator.wake if migrator else None
        instances: list[SimulatedInstance] = []
        bank = Bank(testbed.instances)
        predictors: list[Predictor] = []  # of each instance; those that are alike share one
        for kind in testbed.kinds:
            latency, blocks = self._latency(kind.gpu, kind), kind.total_blocks
            predictors += [Predictor(testbed.engine, self.latency(kind), blocks)] * kind.instances
            for i in range(len(instances), len(predictors)):
                own = latency.scaled(self.slowdown[i]) if i < len(self.slowdown) else latency
                engine = Engine(testbed.engine, own, blocks, self._noise(testbed.seed, i), bank)
                instances.append(SimulatedInstance(i, engine, wake))
        look = Looks(instances, bank)
        predictor = predictors[0] if len(testbed.kinds) == 1 else Predictors(predictors)
        if migrator is None:
            yield Fleet(instances, predictor, {}, look=look)
            return
        migrating = asyncio.create_task(migrator.run(instances, look))
        try:
            yield Fleet(instances, predictor, {"migrations": migrator.counts}, migrator, look=look)
        finally:
            migrating.cancel()
            with suppress(asyncio.CancelledError):
                await migrating

    def _noise(self, seed: int, instance_id: int) -> Floats | None:
        if self.step_noise == 0:
            return None
        return stream(seed, f"noise/{instance_id}").normal(1.0, self.step_noise, NOISE_STEPS).clip(0.5)


def visible_gpus() -> int:
    """GPUs that this process may use; 0 without a driver."""
    if shutil.which("nvidia-smi") is None:
        return 0
    query = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
    found = subprocess.run(query, capture_output=True, text=True, timeout=20, check=False)
    return len(found.stdout.split()) if found.returncode == 0 else 0
