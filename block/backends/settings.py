"""What the backends of real servers share: arguments of `vllm serve`, environments, checks of their settings."""

from __future__ import annotations

import importlib.util
import math
from typing import Any

from block.cluster.instance import LaunchFailed
from block.cluster.spec import Testbed
from block.core.choices import did_you_mean
from block.core.paths import find
from block.engine.latency import LatencyModel

# What every server is told: no telemetry, no downloads, little logging.
QUIET = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "VLLM_LOGGING_LEVEL": "WARNING"}
OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
CACHING = ("--enable-prefix-caching", "--enable-prompt-tokens-details")  # and answers say what was cached


def engine_arguments(testbed: Testbed, num_gpu_blocks: int | None) -> list[str]:
    """The engine's settings as arguments of `vllm serve`."""
    engine = testbed.engine
    arguments = [
        f"--max-model-len={engine.max_model_len}",
        f"--max-num-seqs={engine.max_num_seqs}",
        f"--max-num-batched-tokens={engine.max_num_batched_tokens}",
        f"--block-size={engine.block_size}",
        f"--long-prefill-token-threshold={engine.long_prefill_token_threshold}",
        f"--served-model-name={testbed.model.name}",
        *(CACHING if engine.enable_prefix_caching else ("--no-enable-prefix-caching",)),
        "--disable-log-stats",
        "--disable-uvicorn-access-log",
        "--async-scheduling" if engine.async_scheduling else "--no-async-scheduling",
    ]
    if num_gpu_blocks is not None:
        arguments.append(f"--num-gpu-blocks-override={num_gpu_blocks}")
    if engine.watermark:
        arguments.append(f"--watermark={engine.watermark}")
    return arguments


LAUNCHERS = ("local", "ray")
PLACEMENTS = ("spread", "strict_spread", "pack")
"""Ray's strategies for a placement group, in small letters."""


def require(backend: Any) -> None:
    """LaunchFailed if what a backend that starts servers needs is not installed."""
    if importlib.util.find_spec("vllm") is None:
        raise LaunchFailed("backend: vllm is not installed: pip install -e '.[gpu]', or '.[cpu]' where there is no GPU")
    if backend.launcher == "ray" and importlib.util.find_spec("ray") is None:
        raise LaunchFailed("backend.launcher=ray: ray is not installed: pip install -e '.[ray]'")


def latency_from(path: str) -> LatencyModel:
    """The step times in a file of the current directory, or beside the package. ValueError if they are not there."""
    found = find(path)
    try:
        return LatencyModel.load(found)
    except ValueError as error:
        why = str(error).removeprefix(f"latency model {found}: ")
        raise ValueError(f"backend.latency_model={path}: {why}; scripts/profile_instance.py makes one") from error


def check_latency(backend: Any) -> None:
    """ValueError if the calibration of a backend's step times is out of range."""
    if not 0 < backend.step_time_factor < math.inf:
        raise ValueError(f"backend.step_time_factor={backend.step_time_factor}: must be greater than 0")
    if not 0 <= backend.step_overhead_s < math.inf:
        raise ValueError(f"backend.step_overhead_s={backend.step_overhead_s}: must be 0 or more seconds")


def check_servers(backend: Any) -> None:
    """ValueError if the settings of a backend that starts servers are wrong; its lists become tuples."""
    if not 0 < backend.ready_timeout_s < math.inf:
        raise ValueError(f"backend.ready_timeout_s={backend.ready_timeout_s}: must be greater than 0")
    if getattr(backend, "latency_model", None) is not None:
        latency_from(backend.latency_model)  # what is wrong with it is told before anything starts
    for key, choices in (("launcher", LAUNCHERS), ("placement", PLACEMENTS)):
        if (value := getattr(backend, key)) not in choices:
            raise ValueError(f"backend.{key}={value}: {did_you_mean(value, choices)}")
    for key in ("urls", "arguments"):
        if hasattr(backend, key):
            object.__setattr__(backend, key, tuple(getattr(backend, key)))  # Hydra passes a list
