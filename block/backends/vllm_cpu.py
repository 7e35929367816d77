"""Backend: real vLLM servers with a real, tiny model on this machine's CPU."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, final

from block.backends.servers import launched_fleet
from block.backends.settings import OFFLINE, QUIET, check_servers, engine_arguments, latency_from, require
from block.cluster.fleet import Fleet
from block.cluster.spec import Testbed
from block.core.clock import Clock
from block.engine.latency import LatencyModel


@final
@dataclass(frozen=True)
class VLLMCPU:
    """Real servers with a real, tiny model of random weights on this machine's CPU.

    latency_model: file of step times (scripts/profile_instance.py writes one for the machine at hand).
    arguments: further arguments of `vllm serve`. at_once: servers that start at the same time.
    shared_memory: read the servers' state there; false: have it pushed, as from other hosts.
    """

    latency_model: str = "artifacts/latency/cpu-tiny.json"
    arguments: tuple[str, ...] = ()
    ready_timeout_s: float = 600.0
    at_once: int = 2
    shared_memory: bool = True
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
        require("vllm")
        from block.backends.launch import ServerSpec, Subprocesses
        from block.backends.model_files import tiny_model

        logs.mkdir(parents=True, exist_ok=True)
        arguments = [
            *engine_arguments(testbed, testbed.engine.num_gpu_blocks),
            f"--model={tiny_model(testbed.model, testbed.engine.max_model_len)}",
            "--dtype=float32",
            "--enforce-eager",
            # vLLM's default executor polls without pause, which starves the other servers of a small machine.
            "--distributed-executor-backend=vllm.v1.executor.uniproc_executor.UniProcExecutor",
            *self.arguments,
        ]
        environment = {**QUIET, **OFFLINE, "OMP_NUM_THREADS": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
        specs = [ServerSpec(arguments, logs / f"instance-{i}.log", environment) for i in range(testbed.instances)]
        latency, patience = self.latency(testbed), self.ready_timeout_s
        at_once, shared_memory = self.at_once, self.shared_memory
        async with launched_fleet(
            specs, Subprocesses(), latency, testbed, clock, patience, at_once, shared_memory
        ) as fleet:
            yield fleet
