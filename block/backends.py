"""Backends of real vLLM servers: on GPUs, with a tiny model on a CPU, or with the GPU emulated by a latency model.

They start unmodified vLLM with the plugin loaded (`block.vllm_plugin`), on the wall clock. What the predictor knows of
the engines comes from the engines themselves: their settings are on their boards.
"""

from __future__ import annotations

import asyncio
import importlib.util
import logging
import math
import os
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, final

from block.cluster import Fleet, Testbed, visible_gpus
from block.engine import EngineConfig
from block.hardware import latency_model
from block.instances.base import InstanceFailed, LaunchFailed
from block.latency import LatencyModel
from block.predictor import Predictor
from block.vllm_plugin.board import EngineLimits

if TYPE_CHECKING:
    from block.instances.launch import Launcher, Server, ServerSpec
    from block.instances.vllm import VLLMInstance

log = logging.getLogger(__name__)

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
        async with _launched(specs, zygote, latency, testbed, self.ready_timeout_s) as fleet:
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
        return LatencyModel.load(_found(self.latency_model))

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
        async with _launched(specs, Subprocesses(), latency, testbed, patience, at_once=self.at_once) as fleet:
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
            return LatencyModel.load(_found(self.latency_model))
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
            async with _fleet(self.urls, latency, testbed) as fleet:
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
        async with _launched(specs, Subprocesses(), latency, testbed, self.ready_timeout_s) as fleet:
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


@asynccontextmanager
async def _launched(
    specs: Sequence[ServerSpec],
    starter: Any,
    latency: LatencyModel,
    testbed: Testbed,
    deadline_s: float,
    at_once: int | None = None,
) -> AsyncIterator[Fleet]:
    """A fleet of the servers that `specs` describe, of which the first `testbed.initial` run from the start."""
    from block.instances.launch import launching

    async with launching(starter, deadline_s=deadline_s, at_once=at_once) as launcher:
        async with asyncio.TaskGroup() as group:
            starting = [group.create_task(launcher.start(spec)) for spec in specs[: testbed.initial]]
        servers = {i: task.result() for i, task in enumerate(starting)}
        urls = [servers[i].url if i in servers else "" for i in range(len(specs))]
        async with _fleet(urls, latency, testbed) as fleet:
            yield fleet._replace(servers=_Servers(launcher, specs, servers, fleet))


class _Servers:
    """The servers of a fleet, by instance id."""

    def __init__(
        self, launcher: Launcher, specs: Sequence[ServerSpec], running: dict[int, Server], fleet: Fleet
    ) -> None:
        self._launcher = launcher
        self._specs = specs
        self._running = running
        self._instances: Sequence[VLLMInstance] = fleet.instances  # type: ignore[assignment]
        self._engines = fleet.engines

    async def start(self, instance_id: int) -> None:
        """Start a server and attach to it. LaunchFailed if it does not come up, or not as the others are."""
        server = self._running[instance_id] = await self._launcher.start(self._specs[instance_id])
        instance = self._instances[instance_id]
        instance.url = server.url
        try:
            limits = await _attached(instance)
            if limits is None or _said(instance, limits) != self._engines:
                raise LaunchFailed(f"{instance.url}: other settings than the first servers: {limits}")
        except LaunchFailed:
            await self.stop(instance_id)
            raise

    async def stop(self, instance_id: int) -> None:
        """Detach from a server and stop it."""
        await self._instances[instance_id].detach()
        await self._launcher.stop(self._running.pop(instance_id))


def _said(instance: VLLMInstance, limits: EngineLimits) -> dict[str, Any]:
    """What a server says of itself."""
    return {"vllm": instance.vllm_version, **limits._asdict()}


@asynccontextmanager
async def _fleet(urls: Sequence[str], latency: LatencyModel, testbed: Testbed) -> AsyncIterator[Fleet]:
    """Instances for running servers ("": one that does not run yet), and a predictor for the settings they report."""
    import aiohttp

    from block.instances.vllm import VLLMInstance

    timeout = aiohttp.ClientTimeout(total=None, sock_connect=30)
    # A connection each: a server may close an idle one just as it is used again, and would seem to have failed.
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
        instances = [VLLMInstance(i, url, session, testbed.model.vocab_size) for i, url in enumerate(urls)]
        try:
            running = [instance for instance in instances if instance.url]
            limits = [await _attached(instance) for instance in running]
            known = [one for one in limits if one is not None]
            if len(known) < len(running):  # or a front door: policies that only count need no more
                log.warning("servers without the plugin show no snapshots: %s", ", ".join(urls))
                yield Fleet(instances, None, {})
                return
            for instance, other in zip(running, known, strict=True):
                if other != known[0]:
                    unlike = _unlike(other, known[0])
                    raise LaunchFailed(f"{instance.url}: other settings than {instances[0].url}: {unlike}")
            if known[0].prefix_caching:
                log.warning("the servers cache prefixes; forecasts do not count hits")
            engine = engine_of(known[0])
            if engine != replace(testbed.engine, num_gpu_blocks=None, watermark=engine.watermark):
                log.warning("the servers run with %s", known[0])
            predictor = Predictor(engine, latency, known[0].total_blocks)
            yield Fleet(instances, predictor, _said(instances[0], known[0]))
        finally:
            for instance in instances:
                await instance.detach()


async def _attached(instance: VLLMInstance) -> EngineLimits | None:
    """The settings of the server that is attached to; None if it has no plugin. LaunchFailed if it does not answer."""
    from block.instances.vllm import WithoutPlugin

    try:
        return await instance.attach()
    except WithoutPlugin:
        return None
    except InstanceFailed as error:
        raise LaunchFailed(str(error)) from error


def engine_of(limits: EngineLimits) -> EngineConfig:
    """The settings that a server reports, as the predictor takes them."""
    return EngineConfig(
        version="v1",
        max_num_seqs=limits.max_num_seqs,
        max_num_batched_tokens=limits.max_num_batched_tokens,
        max_model_len=limits.max_model_len,
        block_size=limits.block_size,
        watermark=(limits.watermark_blocks + 0.5) / (limits.total_blocks + 1) if limits.watermark_blocks else 0.0,
        async_scheduling=limits.async_scheduling,
        long_prefill_token_threshold=limits.long_prefill_token_threshold,
        scheduler_reserve_full_isl=limits.scheduler_reserve_full_isl,
    )


def _unlike(one: EngineLimits, other: EngineLimits) -> str:
    pairs = zip(one._fields, one, other, strict=True)
    return ", ".join(f"{name} {mine} and {theirs}" for name, mine, theirs in pairs if mine != theirs)


def _require(*modules: str) -> None:
    """LaunchFailed if one of the modules is not installed."""
    for module in modules:
        if importlib.util.find_spec(module) is None:
            raise LaunchFailed(
                f"backend: {module} is not installed: pip install -e '.[gpu]', or '.[cpu]' where there is no GPU"
            )


def _found(path: str) -> Path:
    """`path` in the current directory or beside the package."""
    here = Path(path)
    return here if here.exists() or here.is_absolute() else Path(__file__).parents[1] / path


def _check_latency(backend: Any) -> None:
    if not 0 < backend.step_time_factor < math.inf:
        raise ValueError(f"backend.step_time_factor={backend.step_time_factor}: must be greater than 0")
    if not 0 <= backend.step_overhead_s < math.inf:
        raise ValueError(f"backend.step_overhead_s={backend.step_overhead_s}: must be 0 or more seconds")


def _check_servers(backend: Any) -> None:
    if not 0 < backend.ready_timeout_s < math.inf:
        raise ValueError(f"backend.ready_timeout_s={backend.ready_timeout_s}: must be greater than 0")
    for key in ("urls", "arguments"):
        if hasattr(backend, key):
            object.__setattr__(backend, key, tuple(getattr(backend, key)))  # Hydra passes a list
