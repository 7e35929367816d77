"""Backend: real vLLM servers with a real, tiny model on this machine's CPU."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, final

from block.backends.servers import launched_fleet, launcher_of
from block.backends.settings import OFFLINE, QUIET, check_servers, engine_arguments, latency_from, require
from block.cluster.fleet import Fleet
from block.cluster.spec import Testbed
from block.core.clock import Clock
from block.engine.latency import LatencyModel
from block.hardware.catalogue import Model

if TYPE_CHECKING:
    from block.backends.launch import HostFiles


@final
@dataclass(frozen=True)
class VLLMCPU:
    """Real servers with a real, tiny model of random weights on this machine's CPU.

    latency_model: file of step times (scripts/profile_instance.py writes one for the machine at hand).
    arguments: further arguments of `vllm serve`. at_once: servers that start at the same time.
    shared_memory: read the servers' state there; false: have it pushed, as from other hosts.
    launcher, placement: as of `VLLM`; on Ray, each has a CPU.
    """

    latency_model: str = "artifacts/latency/cpu-tiny.json"
    arguments: tuple[str, ...] = ()
    ready_timeout_s: float = 600.0
    at_once: int = 2
    shared_memory: bool = True
    launcher: str = "local"
    placement: str = "spread"
    virtual: ClassVar[bool] = False
    dispatch_delay_s: ClassVar[float] = 0.0
    time_dilation: ClassVar[float] = 1.0

    def __post_init__(self) -> None:
        check_servers(self)
        if self.at_once < 1:
            raise ValueError(f"backend.at_once={self.at_once}: must be at least 1")

    def latency(self, testbed: Testbed) -> LatencyModel:
        """The latency model in the file `latency_model`: no GPU says what a step takes here."""
        return latency_from(self.latency_model)

    @asynccontextmanager
    async def start(self, testbed: Testbed, clock: Clock, logs: Path) -> AsyncIterator[Fleet]:
        """Start the servers, each a process of its own."""
        require(self)
        from block.backends.launch import ServerSpec, Subprocesses

        logs.mkdir(parents=True, exist_ok=True)
        arguments = [
            *engine_arguments(testbed, testbed.engine.num_gpu_blocks),
            "--dtype=float32",
            "--enforce-eager",
            # vLLM's default executor polls without pause, which starves the other servers of a small machine.
            "--distributed-executor-backend=vllm.v1.executor.uniproc_executor.UniProcExecutor",
            *self.arguments,
        ]
        environment = {**QUIET, **OFFLINE, "OMP_NUM_THREADS": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
        files = partial(_files, testbed.model, testbed.engine.max_model_len)
        specs = [
            ServerSpec(arguments, logs / f"instance-{i}.log", environment, files) for i in range(testbed.instances)
        ]
        launching = launcher_of(self, Subprocesses(), testbed, {"CPU": 1}, self.at_once)
        latency = self.latency(testbed)
        async with launched_fleet(specs, launching, latency, testbed, clock, self.shared_memory) as fleet:
            yield fleet


def _files(model: Model, max_model_len: int) -> HostFiles:
    from block.backends.launch import HostFiles
    from block.backends.model_files import tiny_model

    return HostFiles([f"--model={tiny_model(model, max_model_len)}"])
