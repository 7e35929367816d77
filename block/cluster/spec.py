"""What a backend is asked to bring up: a model on some GPUs, and the engines that serve it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from block.cluster.migration import MigrationConfig
from block.engine.config import EngineConfig, EngineSettings, blocks_kept
from block.hardware.catalogue import Model, gpu_named
from block.hardware.tracked import kv_blocks


@dataclass(frozen=True)
class ClusterConfig:
    """GPUs of one kind (one Hydra group). `gpu` names one of `block.hardware.catalogue.GPUS`, or a FILE.yaml."""

    gpu: str = "a30"
    num_gpus: int = 12

    def __post_init__(self) -> None:
        gpu_named(self.gpu)
        if self.num_gpus < 1:
            raise ValueError(f"cluster.num_gpus={self.num_gpus}: must be at least 1")
        if self.num_gpus > 1_000_000:
            raise ValueError(f"cluster.num_gpus={self.num_gpus}: must be at most 1000000")


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
        """GPUs of all pools together."""
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
            kind.settings  # noqa: B018 — raises if the longest sequence does not fit
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
    def settings(self) -> EngineSettings:
        """What the schedulers of the instances, which are alike, work by."""
        return self.engine.settings(self.total_blocks)

    @property
    def total_blocks(self) -> int:
        """Usable KV blocks of each of the instances, which are alike."""
        engine = self.engine
        blocks = engine.num_gpu_blocks
        if blocks is None:
            blocks = kv_blocks(gpu_named(self.gpu), self.model, engine.block_size, engine.gpu_memory_utilization)
        return blocks - blocks_kept(engine.version == "v1")
