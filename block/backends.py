"""Backends of real vLLM servers: on GPUs, with a tiny model on a CPU, or with the GPU emulated by a latency model.

They start unmodified vLLM with the plugin loaded (`block.vllm_plugin`), on the wall clock. What the predictor knows of
the engines comes from the engines themselves: their settings are on their boards.
"""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, final

from block.cluster import Fleet, Testbed, visible_gpus
from block.fleet import attached, launched
from block.hardware import latency_model
from block.instances.base import LaunchFailed
from block.latency import LatencyModel

# What every server is told: no telemetry, no downloads, little logging.
_QUIET = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "VLLM_LOGGING_LEVEL": "WARNING"}
_OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}


@final
@dataclass(frozen=True)
class Emulated:
    """Real servers (API server, engine core, scheduler, KV-cache manager) whose GPU is a latency model.

    step_time_factor, step_overhead_s: as in the simulated testbed. time_dilation: wall-clock seconds for one second of
        the run, so that few cores can carry many servers; records are in seconds of the run.
    stream_interval: tokens between two messages of a stream after its first token; 1 sends each.
    ready_timeout_s: wall-clock seconds for all servers to be up.
    """

    step_time_factor: float = 1.0
    step_overhead_s: float = 0.0
    time_dilation: float = 1.0
    stream_interval: int = 1
    ready_timeout_s: float = 180.0
    virtual: ClassVar[bool] = False
    dispatch_delay_s: ClassVar[float] = 0.0

    def __post_init__(self) -> None:
        _check_latency(self)
        _check_servers(self)
        if not 0 < self.time_dilation < math.inf:
            raise ValueError(f"backend.time_dilation={self.time_dilation}: must be greater than 0")
        if self.stream_interval < 1:
            raise ValueError(f"backend.stream_interval={self.stream_interval}: must be at least 1")

    def latency(self, testbed: Testbed) -> LatencyModel:
        """The profile of the GPU and model (or their roofline), calibrated: the emulated GPU's, and the predictor's."""
        model, _ = latency_model(testbed.gpu, testbed.model)
        return model.scaled(self.step_time_factor, self.step_overhead_s)

    @asynccontextmanager
    async def start(self, testbed: Testbed, logs: Path) -> AsyncIterator[Fleet]:
        """Fork the servers from one process that has imported vLLM."""
        _require("aiohttp", "vllm")
        from block.instances.launch import ServerSpec, Zygote
        from block.instances.model_files import emulated_model

        latency = self.latency(testbed)
        logs.mkdir(parents=True, exist_ok=True)
        latency.save(logs / "latency.json")
        arguments = [
            *_engine_arguments(testbed, testbed.total_blocks + 1),
            f"--model={emulated_model(testbed.model, testbed.engine.max_model_len)}",
            f"--stream-interval={self.stream_interval}",
            "--distributed-executor-backend=block.vllm_plugin.executor.EmulatedExecutor",
            "--enforce-eager",
        ]
        environment = {
            **_QUIET,
            **_OFFLINE,
            "BLOCK_EMULATED": "1",
            "BLOCK_LATENCY": str((logs / "latency.json").resolve()),
            "BLOCK_DILATION": str(self.time_dilation),
            "OMP_NUM_THREADS": "1",
            "VLLM_WORKER_MULTIPROC_METHOD": "fork",  # an engine core needs what its server has imported already
        }
        specs = [ServerSpec(arguments, logs / f"instance-{i}.log") for i in range(testbed.instances)]
        zygote = Zygote(logs / "zygote.log", environment, self.ready_timeout_s)
        async with launched(specs, zygote, latency, testbed, self.ready_timeout_s) as fleet:
            yield fleet


@final
@dataclass(frozen=True)
class VLLMCPU:
    """Real servers with a real, tiny model of random weights on this machine's CPU.

    latency_model: file of step times (scripts/profile_instance.py writes one for the machine at hand).
    arguments: further arguments of `vllm serve`. at_once: servers that start at the same time.
    """

    latency_model: str = "artifacts/latency/cpu-tiny.json"
    arguments: tuple[str, ...] = ()
    ready_timeout_s: float = 600.0
    at_once: int = 2
    virtual: ClassVar[bool] = False
    dispatch_delay_s: ClassVar[float] = 0.0
    time_dilation: ClassVar[float] = 1.0

    def __post_init__(self) -> None:
        _check_servers(self)
        if self.at_once < 1:
            raise ValueError(f"backend.at_once={self.at_once}: must be at least 1")

    def latency(self, testbed: Testbed) -> LatencyModel:
        """The file's."""
        return _loaded(self.latency_model)

    @asynccontextmanager
    async def start(self, testbed: Testbed, logs: Path) -> AsyncIterator[Fleet]:
        """Start the servers, each a process of its own."""
        _require("aiohttp", "vllm")
        from block.instances.launch import ServerSpec, Subprocesses
        from block.instances.model_files import tiny_model

        logs.mkdir(parents=True, exist_ok=True)
        arguments = [
            *_engine_arguments(testbed, testbed.engine.num_gpu_blocks),
            f"--model={tiny_model(testbed.model, testbed.engine.max_model_len)}",
            "--dtype=float32",
            "--enforce-eager",
            # vLLM's default executor polls without pause, which starves the other servers of a small machine.
            "--distributed-executor-backend=vllm.v1.executor.uniproc_executor.UniProcExecutor",
            *self.arguments,
        ]
        environment = {**_QUIET, **_OFFLINE, "OMP_NUM_THREADS": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
        specs = [ServerSpec(arguments, logs / f"instance-{i}.log", environment) for i in range(testbed.instances)]
        latency, patience = self.latency(testbed), self.ready_timeout_s
        async with launched(specs, Subprocesses(), latency, testbed, patience, at_once=self.at_once) as fleet:
            yield fleet


@final
@dataclass(frozen=True)
class VLLM:
    """Real servers on GPUs, or any that run already.

    urls: attach to these servers (started by python -m block.vllm_plugin.serve) instead of launching any.
    latency_model: file of step times; by default the profile of the GPU and model, or their roofline, calibrated by
        step_time_factor and step_overhead_s. arguments: further arguments of `vllm serve`.
    """

    urls: tuple[str, ...] = ()
    latency_model: str | None = None
    step_time_factor: float = 1.0
    step_overhead_s: float = 0.0
    arguments: tuple[str, ...] = ()
    ready_timeout_s: float = 1800.0
    virtual: ClassVar[bool] = False
    dispatch_delay_s: ClassVar[float] = 0.0
    time_dilation: ClassVar[float] = 1.0

    def __post_init__(self) -> None:
        _check_latency(self)
        _check_servers(self)
        for url in self.urls:
            if not url.startswith(("http://", "https://")):
                raise ValueError(f"backend.urls={url}: must begin with http:// or https://")

    def latency(self, testbed: Testbed) -> LatencyModel:
        """The file's, or the GPU's."""
        if self.latency_model is not None:
            return _loaded(self.latency_model)
        model, _ = latency_model(testbed.gpu, testbed.model)
        return model.scaled(self.step_time_factor, self.step_overhead_s)

    @asynccontextmanager
    async def start(self, testbed: Testbed, logs: Path) -> AsyncIterator[Fleet]:
        """Attach to the servers of `urls`, or start one for each instance on GPUs of its own.

        Servers of `urls` run whether they are needed or not: a provisioner decides whether requests go there.
        """
        _require("aiohttp")
        latency = self.latency(testbed)
        if self.urls:
            async with attached(self.urls, latency, testbed) as fleet:
                yield fleet
            return
        _require("vllm")
        from block.instances.launch import ServerSpec, Subprocesses

        devices = _devices(testbed)
        logs.mkdir(parents=True, exist_ok=True)
        arguments = [
            *_engine_arguments(testbed, testbed.engine.num_gpu_blocks),
            f"--model={testbed.model.hf_id}",
            f"--tensor-parallel-size={testbed.model.tensor_parallel}",
            f"--gpu-memory-utilization={testbed.engine.gpu_memory_utilization}",
            *self.arguments,
        ]
        specs = [
            ServerSpec(arguments, logs / f"instance-{i}.log", {**_QUIET, "CUDA_VISIBLE_DEVICES": ",".join(mine)})
            for i, mine in enumerate(devices)
        ]
        async with launched(specs, Subprocesses(), latency, testbed, self.ready_timeout_s) as fleet:
            yield fleet


def _engine_arguments(testbed: Testbed, num_gpu_blocks: int | None) -> list[str]:
    """The engine's settings as arguments of `vllm serve`."""
    engine = testbed.engine
    arguments = [
        f"--max-model-len={engine.max_model_len}",
        f"--max-num-seqs={engine.max_num_seqs}",
        f"--max-num-batched-tokens={engine.max_num_batched_tokens}",
        f"--block-size={engine.block_size}",
        f"--long-prefill-token-threshold={engine.long_prefill_token_threshold}",
        f"--served-model-name={testbed.model.name}",
        "--no-enable-prefix-caching",
        "--disable-log-stats",
        "--disable-uvicorn-access-log",
        "--async-scheduling" if engine.async_scheduling else "--no-async-scheduling",
    ]
    if num_gpu_blocks is not None:
        arguments.append(f"--num-gpu-blocks-override={num_gpu_blocks}")
    if engine.watermark:
        arguments.append(f"--watermark={engine.watermark}")
    return arguments


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


def _require(*modules: str) -> None:
    """LaunchFailed if one of the modules is not installed."""
    for module in modules:
        if importlib.util.find_spec(module) is None:
            raise LaunchFailed(
                f"backend: {module} is not installed: pip install -e '.[gpu]', or '.[cpu]' where there is no GPU"
            )


def _loaded(path: str) -> LatencyModel:
    """The step times in a file of the current directory, or beside the package. ValueError if they are not there."""
    here = Path(path).expanduser()
    found = here if here.exists() or here.is_absolute() else Path(__file__).parents[1] / path
    try:
        return LatencyModel.load(found)
    except ValueError as error:
        why = str(error).removeprefix(f"latency model {found}: ")
        raise ValueError(f"backend.latency_model={path}: {why}; scripts/profile_instance.py makes one") from error


def _check_latency(backend: Any) -> None:
    if not 0 < backend.step_time_factor < math.inf:
        raise ValueError(f"backend.step_time_factor={backend.step_time_factor}: must be greater than 0")
    if not 0 <= backend.step_overhead_s < math.inf:
        raise ValueError(f"backend.step_overhead_s={backend.step_overhead_s}: must be 0 or more seconds")


def _check_servers(backend: Any) -> None:
    if not 0 < backend.ready_timeout_s < math.inf:
        raise ValueError(f"backend.ready_timeout_s={backend.ready_timeout_s}: must be greater than 0")
    if getattr(backend, "latency_model", None) is not None:
        _loaded(backend.latency_model)  # what is wrong with it is told before anything starts
    for key in ("urls", "arguments"):
        if hasattr(backend, key):
            object.__setattr__(backend, key, tuple(getattr(backend, key)))  # Hydra passes a list
