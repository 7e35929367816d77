"""What an instance of a model on a GPU has: step times and KV blocks, from a tracked fit or else from data sheets.

A pair that was profiled has its fit in ``artifacts/latency``; it also says how many KV blocks were published for it.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

from block.core.files import file_state
from block.core.paths import shipped
from block.engine.latency import LatencyModel
from block.hardware.catalogue import GPU, GPUS, Model, gpu_named
from block.hardware.roofline import roofline

TRACKED = shipped("artifacts", "latency")

# Memory that vLLM gives neither to weights nor to KV (activations, driver; communication buffers), so that the three
# published block counts are met within an eighth.
RESERVED_GIB = 1.0
RESERVED_PARALLEL_GIB = 2.0
PUBLISHED_UTILIZATION = 0.9  # vLLM's default, at which the published block counts were measured


def latency_model(gpu_name: str, model: Model, tracked: Path = TRACKED) -> LatencyModel:
    """The step times of `model` on a GPU by its name: the tracked fit, or else the roofline; its `source` says which.

    ValueError for an unknown GPU and for a tracked file that cannot be read.
    """
    gpu = gpu_named(gpu_name)
    fit = _tracked(gpu, model, tracked)
    return roofline(gpu, model) if fit is None else fit


def kv_blocks(
    gpu: GPU,
    model: Model,
    block_size: int = 16,
    gpu_memory_utilization: float = PUBLISHED_UTILIZATION,
    tracked: Path = TRACKED,
) -> int:
    """KV blocks of `block_size` tokens an instance has: published where a tracked file says so, else from the memory.

    gpu_memory_utilization: the share of the GPU's memory that vLLM takes. tracked: the folder of the tracked files.
    A published count was measured at vLLM's default utilization; for another one the memory gained or lost counts.
    ValueError if the weights leave no room.
    """
    blocks = _room(gpu, model, block_size, gpu_memory_utilization)
    fit = _tracked(gpu, model, tracked)
    if fit is not None and "kv_tokens" in fit.source:
        published = int(fit.source["kv_tokens"]) // block_size
        blocks += published - _room(gpu, model, block_size, PUBLISHED_UTILIZATION)
    if blocks < 1:
        usable = gpu.memory_gib * gpu_memory_utilization
        raise ValueError(
            f"model={model.name} does not fit on gpu={gpu.name}: {model.weight_bytes / 2**30:.1f} GiB of weights per "
            f"GPU in {usable:.1f} GiB usable; raise model.tensor_parallel={model.tensor_parallel} or choose from "
            f"{', '.join(GPUS)}"
        )
    return blocks


def _room(gpu: GPU, model: Model, block_size: int, utilization: float) -> int:
    """KV blocks that the memory leaves beside the weights and what vLLM keeps for itself; may be negative."""
    reserved = RESERVED_GIB + (RESERVED_PARALLEL_GIB if model.tensor_parallel > 1 else 0.0)
    free = (gpu.memory_gib * utilization - reserved) * 2**30 - model.weight_bytes
    return int(free // (model.layers * model.kv_bytes * block_size))


def _tracked(gpu: GPU, model: Model, directory: Path) -> LatencyModel | None:
    """The tracked fit of this pair, if there is one for a model of these numbers at this degree of tensor parallelism.

    ValueError if there are no fits at all: the package has come without them.
    """
    if not directory.is_dir():
        raise ValueError(f"{directory}: no such folder: the package's fitted step times are missing; install it anew")
    path = directory / f"{gpu.name}-{model.name}.json"
    if not path.exists():
        return None
    fit = _fit(path, file_state(path))
    if "model" in fit.source and "model_numbers" not in fit.source:
        raise ValueError(f"{path}: does not say of what model it is; make it again by scripts/fit_latency.py")
    # Not by the name alone: a model of one's own, or a changed file of conf/model, may have it too.
    of_it = fit.source.get("model_numbers") == model.numbers
    return fit if of_it and fit.source.get("tensor_parallel") == model.tensor_parallel else None


# A run asks for it some thirty times, and each reading takes 2 ms: it is read once, and again once written.
@cache
def _fit(path: Path, state: tuple[int, ...]) -> LatencyModel:
    return LatencyModel.load(path)
