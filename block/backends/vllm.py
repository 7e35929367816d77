"""Backend: real vLLM servers on GPUs, launched here or running already."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, final

from block.backends.servers import attached_fleet, launched_fleet, launcher_of
from block.backends.settings import QUIET, check_latency, check_servers, engine_arguments, latency_from, require
from block.cluster.fleet import Fleet
from block.cluster.instance import LaunchFailed
from block.cluster.spec import Testbed
from block.core.clock import Clock
from block.engine.latency import LatencyModel
from block.hardware.devices import visible_gpus
from block.hardware.tracked import latency_model


@final
@dataclass(frozen=True)
class VLLM:
    """Real servers on GPUs, or any that run already.

    urls: attach to these servers (started by python -m block.vllm_plugin.serve) instead of launching any.
    shared_memory: read the state of servers on this host there; false: have it pushed, as from other hosts.
    latency_model: file of step times; by default the profile of the GPU and model, or their roofline, calibrated by
        step_time_factor and step_overhead_s. arguments: further arguments of `vllm serve`.
    launcher: "local" starts them on this host, "ray" on the nodes of a Ray cluster, which `placement` spreads them over
        as evenly as can be ("spread") or one a node ("strict_spread"), or has them share ("pack").
    """

    urls: tuple[str, ...] = ()
    latency_model: str | None = None
    step_time_factor: float = 1.0
    step_overhead_s: float = 0.0
    arguments: tuple[str, ...] = ()
    ready_timeout_s: float = 1800.0
    shared_memory: bool = True
    launcher: str = "local"
    placement: str = "spread"
    virtual: ClassVar[bool] = False
    dispatch_delay_s: ClassVar[float] = 0.0
    time_dilation: ClassVar[float] = 1.0

    def __post_init__(self) -> None:
        check_latency(self)
        check_servers(self)
        for url in self.urls:
            if not url.startswith(("http://", "https://")):
                raise ValueError(f"backend.urls={url}: must begin with http:// or https://")

    def latency(self, testbed: Testbed) -> LatencyModel:
        """The file's, or the GPU's."""
        if self.latency_model is not None:
            return latency_from(self.latency_model)
        return latency_model(testbed.gpu, testbed.model).scaled(self.step_time_factor, self.step_overhead_s)

    @asynccontextmanager
    async def start(self, testbed: Testbed, clock: Clock, logs: Path) -> AsyncIterator[Fleet]:
        """Attach to the servers of `urls`, or start one for each instance on GPUs of its own.

        Servers of `urls` run whether they are needed or not: a provisioner decides whether requests go there.
        """
        latency = self.latency(testbed)
        if self.urls:
            async with attached_fleet(self.urls, latency, testbed, clock, self.shared_memory) as fleet:
                yield fleet
            return
        require(self)
        from block.backends.launch import ServerSpec, Subprocesses

        logs.mkdir(parents=True, exist_ok=True)
        arguments = [
            *engine_arguments(testbed, testbed.engine.num_gpu_blocks),
            f"--model={testbed.model.hf_id}",
            f"--tensor-parallel-size={testbed.model.tensor_parallel}",
            f"--gpu-memory-utilization={testbed.engine.gpu_memory_utilization}",
            *self.arguments,
        ]
        environments: list[dict[str, str]] = (
            [QUIET] * testbed.instances  # Ray gives each GPUs of its own
            if self.launcher == "ray"
            else [{**QUIET, "CUDA_VISIBLE_DEVICES": ",".join(mine)} for mine in _devices(testbed)]
        )
        specs = [ServerSpec(arguments, logs / f"instance-{i}.log", own) for i, own in enumerate(environments)]
        needs = {"CPU": 1, "GPU": testbed.model.tensor_parallel}
        launching = launcher_of(self, Subprocesses(), testbed, needs)
        async with launched_fleet(specs, launching, latency, testbed, clock, self.shared_memory) as fleet:
            yield fleet


def _devices(testbed: Testbed) -> list[list[str]]:
    """The GPUs of each instance; LaunchFailed if there are too few."""
    wanted = testbed.cluster.num_gpus
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = [gpu for gpu in listed.split(",") if gpu] if listed else [str(i) for i in range(visible_gpus())]
    if len(gpus) < wanted:
        raise LaunchFailed(
            f"cluster.num_gpus={wanted}: {len(gpus)} GPUs are visible; choose fewer, or backend=emulated or simulated"
        )
    each = testbed.model.tensor_parallel
    return [gpus[i * each : (i + 1) * each] for i in range(testbed.instances)]
