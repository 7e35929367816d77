"""Backend: real vLLM servers whose GPU is a latency model.

They are unmodified vLLM with the plugin loaded (`block.vllm_plugin`), on the wall clock. What the predictor knows of
the engines comes from the engines themselves: their settings are in their state buffers.
"""

from __future__ import annotations

import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, final

from block.backends.servers import launched_fleet, launcher_of
from block.backends.settings import OFFLINE, QUIET, check_latency, check_servers, engine_arguments, require
from block.cluster.fleet import Fleet
from block.cluster.spec import Testbed
from block.core.clock import Clock
from block.engine.config import blocks_kept
from block.engine.latency import LatencyModel
from block.hardware.catalogue import Model
from block.hardware.tracked import latency_model
from block.vllm_plugin.environment import DILATION, EMULATED, LATENCY

if TYPE_CHECKING:
    from block.backends.launch import HostFiles


@final
@dataclass(frozen=True)
class Emulated:
    """Real servers (API server, engine core, scheduler, KV-cache manager) whose GPU is a latency model.

    step_time_factor, step_overhead_s: as in the simulated testbed. time_dilation: wall-clock seconds for one second of
        the run, so that few cores can carry many servers; records are in seconds of the run.
    stream_interval: tokens between two messages of a stream after its first token; 1 sends each.
    ready_timeout_s: wall-clock seconds for all servers to be up. launcher, placement: as of `VLLM`; on Ray, each server
        has a CPU.
    shared_memory: read the servers' state there; false: have it pushed, as from other hosts.
    """

    step_time_factor: float = 1.0
    step_overhead_s: float = 0.0
    time_dilation: float = 1.0
    stream_interval: int = 1
    ready_timeout_s: float = 180.0
    shared_memory: bool = True
    launcher: str = "local"
    placement: str = "spread"
    virtual: ClassVar[bool] = False
    dispatch_delay_s: ClassVar[float] = 0.0

    def __post_init__(self) -> None:
        check_latency(self)
        check_servers(self)
        if not 0 < self.time_dilation < math.inf:
            raise ValueError(f"backend.time_dilation={self.time_dilation}: must be greater than 0")
        if self.stream_interval < 1:
            raise ValueError(f"backend.stream_interval={self.stream_interval}: must be at least 1")

    def latency(self, testbed: Testbed) -> LatencyModel:
        """The profile of the GPU and model (or their roofline), calibrated: the emulated GPU's, and the predictor's."""
        return latency_model(testbed.gpu, testbed.model).scaled(self.step_time_factor, self.step_overhead_s)

    @asynccontextmanager
    async def start(self, testbed: Testbed, clock: Clock, logs: Path) -> AsyncIterator[Fleet]:
        """Start the servers: on this host, forked from one process that has imported vLLM."""
        require(self)
        from block.backends.launch import ServerSpec, Zygote

        latency = self.latency(testbed)
        logs.mkdir(parents=True, exist_ok=True)
        arguments = [
            *engine_arguments(testbed, testbed.total_blocks + blocks_kept(is_v1=True)),
            f"--stream-interval={self.stream_interval}",
            "--distributed-executor-backend=block.vllm_plugin.executor.EmulatedExecutor",
            "--enforce-eager",
        ]
        environment = {
            **QUIET,
            **OFFLINE,
            EMULATED: "1",
            DILATION: str(self.time_dilation),
            "OMP_NUM_THREADS": "1",
            "VLLM_WORKER_MULTIPROC_METHOD": "fork",  # an engine core needs what its server has imported already
        }
        files = partial(_files, testbed.model, testbed.engine.max_model_len, latency)
        zygote = Zygote(logs / "zygote.log", {**environment, **files().environment}, self.ready_timeout_s)
        specs = [
            ServerSpec(arguments, logs / f"instance-{i}.log", environment, files) for i in range(testbed.instances)
        ]
        launching = launcher_of(self, zygote, testbed, {"CPU": 1})
        async with launched_fleet(specs, launching, latency, testbed, clock, self.shared_memory) as fleet:
            yield fleet


def _files(model: Model, max_model_len: int, latency: LatencyModel) -> HostFiles:
    from block.backends.launch import HostFiles
    from block.backends.model_files import emulated_model, latency_file

    return HostFiles([f"--model={emulated_model(model, max_model_len)}"], {LATENCY: str(latency_file(latency))})
