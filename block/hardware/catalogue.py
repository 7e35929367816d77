"""GPUs and models by their published numbers, and what follows from them alone: step times by roofline, KV blocks.

A pair of GPU and model that was profiled has a tracked fit under ``artifacts/latency``; `latency_model` prefers it. For
any other pair `roofline` puts data sheet and Hugging Face config together (docs/latency.md says how well that does).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import yaml  # type: ignore[import-untyped]

from block.core.arrays import Floats
from block.core.choices import choose
from block.core.paths import shipped
from block.engine.latency import LatencyModel, table

TRACKED = shipped("artifacts", "latency")
MODELS = shipped("conf", "model")

# Roofline: what a kernel reaches of the data sheet, rounded from the profiles of A30 and A100 (docs/latency.md).
BANDWIDTH_EFFICIENCY = 0.80  # weights and activations
COMPUTE_EFFICIENCY = 0.80  # dense matrix products, on top of (not overlapped with) reading the weights
DECODE_EFFICIENCY = 0.90  # KV reads of decode attention: measured on the A30
ATTENTION_EFFICIENCY = 0.42  # prefill attention, counting the masked half too: measured on the A30
LINK_EFFICIENCY = 0.55  # ring all-reduce, of the link's one-way bandwidth: measured on the A100
LINK_LATENCY = 20e-6  # one all-reduce of a few tokens: measured on the A100
KERNEL = 7e-6  # the least a memory-bound kernel takes: 3 to 14 µs in the profiles
EXPERT_KERNELS = 4  # more in a layer with experts: router, top-k, sorting by expert, sum of the experts' outputs
KERNELS = 6  # such kernels a layer: two norms, rotary embedding, KV save, activation, residual add

# Memory that vLLM gives neither to weights nor to KV (activations, driver; communication buffers), so that the three
# published block counts are met within an eighth.
RESERVED_GIB = 1.0
RESERVED_PARALLEL_GIB = 2.0
PUBLISHED_UTILIZATION = 0.9  # vLLM's default, at which the published block counts were measured


@dataclass(frozen=True)
class GPU:
    """One accelerator as its data sheet describes it.

    memory_gib: GiB; bandwidth: GB/s; tflops: dense fp16 tensor-core TFLOP/s; link: GB/s one way to its peers.
    """

    name: str
    memory_gib: float
    bandwidth: float
    tflops: float
    link: float
    source: str


def _nvidia(name: str, memory: float, bandwidth: float, tflops: float, link: float, sheet: str) -> GPU:
    """As `GPU` has them: GiB, GB/s, dense FP16 TFLOP/s, GB/s of the link; and the data sheet that says so."""
    return GPU(name, memory, bandwidth, tflops, link, f"NVIDIA {sheet} data sheet")


# Tensor-core TFLOP/s that a sheet gives with sparsity are halved, and so is a link's bandwidth counted both ways.
GPUS: dict[str, GPU] = {
    gpu.name: gpu
    for gpu in (
        _nvidia("t4", 16, 320, 65, 16, "T4 (PCIe gen 3)"),
        _nvidia("v100", 32, 900, 125, 150, "V100 SXM2 32 GB (NVLink 2)"),
        _nvidia("a10", 24, 600, 125, 32, "A10 (PCIe gen 4)"),
        _nvidia("a30", 24, 933, 165, 100, "A30 (NVLink bridge)"),
        _nvidia("a40", 48, 696, 149.7, 56.25, "A40 (NVLink bridge)"),
        _nvidia("a100-40gb", 40, 1555, 312, 300, "A100 SXM4 40 GB (NVLink 3)"),
        _nvidia("a100-80gb", 80, 2039, 312, 300, "A100 SXM4 80 GB (NVLink 3)"),
        _nvidia("l4", 24, 300, 121, 32, "L4 (PCIe gen 4)"),
        _nvidia("a10g", 24, 600, 70, 32, "A10G, as in Amazon's G5 instances (PCIe gen 4)"),
        _nvidia("rtx-4090", 24, 1008, 165.2, 32, "GeForce RTX 4090 (PCIe gen 4)"),
        _nvidia("rtx-5090", 32, 1792, 209.5, 64, "GeForce RTX 5090 (PCIe gen 5)"),
        _nvidia("rtx-6000-ada", 48, 960, 364.2, 32, "RTX 6000 Ada (PCIe gen 4)"),
        _nvidia("l40s", 48, 864, 362, 32, "L40S (PCIe gen 4)"),
        _nvidia("h100", 80, 3350, 989, 450, "H100 SXM5 (NVLink 4)"),
        _nvidia("h100-pcie", 80, 2000, 756, 300, "H100 PCIe (NVLink bridge)"),
        _nvidia("h100-nvl", 94, 3900, 835.5, 300, "H100 NVL (NVLink bridge)"),
        _nvidia("gh200", 96, 4000, 989, 450, "GH200 96 GB HBM3 (NVLink 4)"),
        _nvidia("h20", 96, 4000, 148, 450, "H20 (NVLink 4)"),
        _nvidia("h200", 141, 4800, 989, 450, "H200 SXM (NVLink 4)"),
        _nvidia("b200", 180, 8000, 2250, 900, "DGX B200, an eighth of the system (NVLink 5)"),
        GPU("mi300x", 192, 5300, 1307, 448, "AMD Instinct MI300X data sheet (Infinity Fabric, 7 links)"),
        GPU("mi325x", 256, 6000, 1307, 448, "AMD Instinct MI325X data sheet (Infinity Fabric, 7 links)"),
        GPU("cpu", 32, 40, 0.5, 10, "two cores of a server, roughly: for backend=vllm_cpu, which measures its own"),
    )
}


def gpu_named(name: str, key: str = "cluster.gpu") -> GPU:
    """The catalogue's GPU of that name; for ``FILE.yaml``, the one whose data sheet the file holds.

    ValueError names the config's `key` and lists the choices, or what a data sheet must hold.
    """
    if name.endswith(".yaml"):
        return _data_sheet(name, key)
    if name not in GPUS:
        raise ValueError(f"{key}={name}: {choose(name, list(GPUS))}, or give a data sheet, FILE.yaml")
    return GPUS[name]


def _data_sheet(path: str, key: str) -> GPU:
    wanted = ("memory_gib", "bandwidth", "tflops", "link")
    if not Path(path).is_file():
        raise ValueError(f"{key}={path}: no such file")
    try:
        sheet = yaml.safe_load(Path(path).read_text())
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{key}={path}: is not to be read as YAML: {' '.join(str(error).split())}") from error
    if not isinstance(sheet, dict) or set(sheet) != set(wanted):
        raise ValueError(f"{key}={path}: must hold {', '.join(wanted)}, and no other key")
    for name, value in sheet.items():
        if type(value) not in (int, float) or not 0 < value < math.inf:
            raise ValueError(f"{key}={path}: {name}={value}: must be a number greater than 0")
    return GPU(path, **sheet, source=path)


_MIXTURE = ("experts", "experts_per_token", "expert_size")  # given together or not at all
_LATENT = ("kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim")  # likewise


@dataclass(frozen=True)
class Model:
    """A decoder-only transformer by the numbers of its Hugging Face config, and how an instance holds it.

    The `layers` (num_hidden_layers) have attention with `heads` (num_attention_heads) and `kv_heads`
    (num_key_value_heads) of `head_dim`, and an MLP of `intermediate_size`, `gated_mlp` if it has a gate projection.
    `tied_embeddings` is tie_word_embeddings. `tensor_parallel` GPUs share a copy, `dtype_bytes` a weight or KV element;
    `kv_dtype_bytes` a KV element if that is another.

    Mixture of experts, if `experts` > 0: all layers but the first `dense_layers` (first_k_dense_replace) have a router,
    `experts` gated MLPs of `expert_size` (moe_intermediate_size), `experts_per_token` of which a token goes through,
    and one of `shared_size` (n_shared_experts × moe_intermediate_size) that each does.

    Multi-head latent attention (DeepSeek), if `kv_lora_rank` > 0: with `q_lora_rank` (0: queries are not compressed),
    `qk_rope_head_dim`, `qk_nope_head_dim`, `v_head_dim` as in the config; `head_dim` is the sum of the two of a key.
    ValueError in one line for numbers that do not fit together, or of which a part is missing.
    """

    name: str
    hf_id: str
    layers: int
    hidden_size: int
    intermediate_size: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab_size: int
    gated_mlp: bool = True
    tied_embeddings: bool = False
    tensor_parallel: int = 1
    dtype_bytes: int = 2
    kv_dtype_bytes: int | None = None
    experts: int = 0
    experts_per_token: int = 0
    expert_size: int = 0
    shared_size: int = 0
    dense_layers: int = 0
    kv_lora_rank: int = 0
    q_lora_rank: int = 0
    qk_rope_head_dim: int = 0
    qk_nope_head_dim: int = 0
    v_head_dim: int = 0

    def __post_init__(self) -> None:
        for key in ("layers", "hidden_size", "intermediate_size", "heads", "kv_heads", "head_dim", "vocab_size"):
            if getattr(self, key) < 1:
                raise ValueError(f"model.{key}={getattr(self, key)}: want a positive integer")
        if self.heads % self.kv_heads:
            raise ValueError(f"model.kv_heads={self.kv_heads}: choose a divisor of heads={self.heads}")
        degrees = [n for n in range(1, self.heads + 1) if self._splits_over(n)]
        if self.tensor_parallel not in degrees:
            choices = ", ".join(map(str, degrees))
            raise ValueError(f"model.tensor_parallel={self.tensor_parallel}: choose from {choices} for {self.name}")
        if self.dtype_bytes not in (1, 2, 4):
            raise ValueError(f"model.dtype_bytes={self.dtype_bytes}: choose from 1, 2, 4")
        if self.kv_dtype_bytes not in (None, 1, 2, 4):
            raise ValueError(f"model.kv_dtype_bytes={self.kv_dtype_bytes}: choose from 1, 2, 4")
        self._whole(_MIXTURE, ("shared_size", "dense_layers"), "a mixture of experts")
        self._whole(_LATENT, ("q_lora_rank",), "multi-head latent attention")
        if self.experts_per_token > self.experts:
            raise ValueError(f"model.experts_per_token={self.experts_per_token}: more than experts={self.experts}")
        if self.experts and self.dense_layers >= self.layers:
            raise ValueError(f"model.dense_layers={self.dense_layers}: leaves no layer of {self.layers} to the experts")
        if self.kv_lora_rank and self.head_dim != self.qk_nope_head_dim + self.qk_rope_head_dim:
            raise ValueError(f"model.head_dim={self.head_dim}: want qk_nope_head_dim + qk_rope_head_dim")

    def _whole(self, needed: tuple[str, ...], more: tuple[str, ...], what: str) -> None:
        """ValueError unless all of `needed` are given, or none of them and none of `more`."""
        given = [key for key in (*needed, *more) if getattr(self, key) != 0]
        for key in given:
            if getattr(self, key) < 0:
                raise ValueError(f"model.{key}={getattr(self, key)}: want an integer of at least 0")
        missing = [key for key in needed if key not in given]
        if given and missing:
            first = f"model.{given[0]}={getattr(self, given[0])}"
            raise ValueError(f"{first}: {what} also needs {', '.join(missing)}")

    def _splits_over(self, gpus: int) -> bool:
        """Whether every GPU gets as many heads as any other, and as many KV heads (or copies of one)."""
        return self.heads % gpus == 0 and (self.kv_heads % gpus == 0 or gpus % self.kv_heads == 0)

    @property
    def projections(self) -> dict[str, float]:
        """Weights (elements) per dense layer and GPU of each matrix product, by the profiler's operator names."""
        query, kv = self.heads * self.head_dim, 2 * self.kv_heads * self.head_dim
        mlp = self.hidden_size * self.intermediate_size
        whole = {
            "attn_pre_proj": self.hidden_size * (query + kv),
            "attn_post_proj": query * self.hidden_size,
            "mlp_up_proj": mlp * (2 if self.gated_mlp else 1),
            "mlp_down_proj": mlp,
        }
        split = {operator: weights / self.tensor_parallel for operator, weights in whole.items()}
        return split | self._latent_projections if self.kv_lora_rank else split

    @property
    def _latent_projections(self) -> dict[str, float]:
        """The same of latent attention; what compresses queries and KV is on every GPU, the rest split by heads."""
        rank = self.q_lora_rank or self.hidden_size
        every = self.hidden_size * (self.q_lora_rank + self.kv_lora_rank + self.qk_rope_head_dim)
        query = rank * self.heads * self.head_dim
        keys_values = self.kv_lora_rank * self.heads * (self.qk_nope_head_dim + self.v_head_dim)
        output = self.heads * self.v_head_dim * self.hidden_size
        return {
            "attn_pre_proj": every + (query + keys_values) / self.tensor_parallel,
            "attn_post_proj": output / self.tensor_parallel,
        }

    @property
    def _expert_layers(self) -> int:
        return self.layers - self.dense_layers if self.experts else 0

    @property
    def _expert_weights(self) -> float:
        """Weights (elements) of one expert per layer and GPU: each is split over the GPUs, as vLLM does by default."""
        return 3 * self.hidden_size * self.expert_size / self.tensor_parallel

    @property
    def _always_weights(self) -> float:
        """Weights (elements) per expert layer and GPU that all tokens go through: attention, router, shared expert."""
        attention = self.projections["attn_pre_proj"] + self.projections["attn_post_proj"]
        shared = 3 * self.hidden_size * self.shared_size / self.tensor_parallel
        return attention + self.hidden_size * self.experts + shared

    def experts_hit(self, tokens: Floats) -> Floats:
        """How many distinct experts of a layer the tokens of a step go through, expected under uniform routing."""
        return self.experts * (1 - (1 - self.experts_per_token / self.experts) ** tokens)

    @property
    def head_weights(self) -> float:
        """Weights (elements) per GPU of the output projection over the vocabulary."""
        return self.vocab_size * self.hidden_size / self.tensor_parallel

    @property
    def weight_bytes(self) -> float:
        """Bytes of weights that each GPU holds; biases are left out (less than a thousandth)."""
        return self._weights(self.experts) * self.dtype_bytes

    @property
    def active_weights(self) -> float:
        """Weights (elements) per GPU that one token goes through, embeddings included: all without experts."""
        return self._weights(self.experts_per_token)

    def _weights(self, experts: int) -> float:
        """Weights (elements) per GPU, with `experts` in each layer that has some."""
        embeddings = self.head_weights * (1 if self.tied_embeddings else 2)
        norms = (2 * self.layers + 1) * self.hidden_size
        dense = (self.layers - self._expert_layers) * sum(self.projections.values()) + embeddings + norms
        if not self.experts:
            return dense
        return dense + self._expert_layers * (self._always_weights + experts * self._expert_weights)

    @property
    def kv_bytes(self) -> float:
        """Bytes of KV cache per token and layer on each GPU.

        KV heads fewer than the GPUs are replicated, and so is the latent of latent attention.
        """
        size = self.kv_dtype_bytes or self.dtype_bytes
        if self.kv_lora_rank:
            return float((self.kv_lora_rank + self.qk_rope_head_dim) * size)
        return 2 * max(1.0, self.kv_heads / self.tensor_parallel) * self.head_dim * size


def roofline(gpu: GPU, model: Model, max_tokens: int = 8192) -> LatencyModel:
    """Step times from data sheet and model config, nothing measured: docs/latency.md lists the assumptions."""
    bandwidth = gpu.bandwidth * 1e9 * BANDWIDTH_EFFICIENCY
    flops = gpu.tflops * 1e12 * COMPUTE_EFFICIENCY
    size, shards = model.dtype_bytes, model.tensor_parallel
    heads = model.heads * model.head_dim
    values = model.heads * model.v_head_dim if model.kv_lora_rank else heads
    tokens = np.array([1.0, max_tokens])

    def layer(weights: float, inner: int, copies: int = 0) -> tuple[float, float]:
        """Fixed time and time per token of a layer of `weights` and an MLP of `inner`, `copies` of a token summed."""
        # Elements that memory-bound kernels move per token: two norms and the residual add on every GPU, the rest
        # shared.
        moved = 7 * model.hidden_size + (3 * inner + heads + values) / shards + 2 * model.kv_bytes / size
        moved += 2 * copies * model.hidden_size
        fixed = weights * size / bandwidth + (KERNELS + (EXPERT_KERNELS if copies else 0)) * KERNEL
        per_token = 2 * weights / flops + moved * size / bandwidth
        if shards > 1:  # after the attention and after the MLP
            fixed += 2 * LINK_LATENCY
            sent = 2 * (shards - 1) / shards * model.hidden_size * size
            per_token += 2 * sent / (gpu.link * 1e9 * LINK_EFFICIENCY)
        return fixed, per_token

    head = model.head_weights * size / bandwidth  # logits of the sampled tokens only: the weights' time
    experts, used = model._expert_layers, model.experts_per_token
    if experts:
        tokens = np.arange(1.0, max_tokens + 1)  # the experts hit are a curve
    fixed, per_token = layer(sum(model.projections.values()), model.intermediate_size)
    linear = (model.layers - experts) * (fixed + per_token * tokens) + head
    if experts:
        fixed, per_token = layer(model._always_weights, used * model.expert_size + model.shared_size, used)
        fetched = model.experts_hit(tokens) * model._expert_weights * size / bandwidth
        per_token += 2 * used * model._expert_weights / flops
        linear = linear + experts * (fixed + fetched + per_token * tokens)

    chunks = np.array([1, 32, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192.0])
    contexts = np.array([0, 8192.0])
    attended = contexts + chunks[:, None]
    attention_flops = gpu.tflops * 1e12 * ATTENTION_EFFICIENCY
    kv_read = model.kv_bytes / (gpu.bandwidth * 1e9 * DECODE_EFFICIENCY)
    decode = kv_read
    prefill = 2 * KERNEL + 2 * chunks[:, None] * attended * (heads + values) / shards / attention_flops
    prefill = prefill + attended * kv_read
    if model.kv_lora_rank:
        # A decode step works on the latent itself, every head on the one that is read; a prompt chunk makes keys and
        # values of its context anew.
        latent = 2 * model.kv_lora_rank + model.qk_rope_head_dim
        decode = max(kv_read, 2 * model.heads / shards * latent / flops)
        made = model.kv_lora_rank * model.heads * (model.qk_nope_head_dim + model.v_head_dim) / shards
        prefill = prefill + 2 * contexts * made / flops
    return LatencyModel(
        linear=table(tokens, linear),
        decode_base=model.layers * 2 * KERNEL,
        decode_per_sequence=0.0,
        decode_per_kv=model.layers * decode,
        prefill_chunks=chunks,
        prefill_contexts=contexts,
        prefill=model.layers * prefill,
        source={
            "gpu": gpu.name,
            "model": model.name,
            "tensor_parallel": shards,
            "method": f"roofline: {gpu.source} and the config of {model.hf_id}",
        },
    )


def latency_model(gpu_name: str, model: Model, tracked: Path = TRACKED) -> tuple[LatencyModel, bool]:
    """The step times of `model` on a GPU by its name, and whether they come from a profile (else: roofline).

    ValueError for an unknown GPU and for a tracked file that cannot be read.
    """
    gpu = gpu_named(gpu_name)
    fit = _tracked(gpu, model, tracked)
    return (fit, True) if fit is not None else (roofline(gpu, model), False)


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
    """The tracked fit of this pair at this degree of tensor parallelism, if there is one.

    None, too, for a model of one's own that has the name of one of conf/model, but other numbers. ValueError if there
    are no fits at all: the package has come without them.
    """
    if not directory.is_dir():
        raise ValueError(f"{directory}: no such folder: the package's fitted step times are missing; install it anew")
    path = directory / f"{gpu.name}-{model.name}.json"
    if not path.exists() or not _as_tracked(model):
        return None
    fit = _fit(path, path.stat().st_mtime_ns)
    return fit if fit.source.get("tensor_parallel") == model.tensor_parallel else None


def _as_tracked(model: Model) -> bool:
    """Whether `model` has the numbers of the one of conf/model of that name, if there is one."""
    path = MODELS / f"{model.name}.yaml"
    if not path.exists():
        return True
    known = _known(path, path.stat().st_mtime_ns)
    return replace(known, tensor_parallel=model.tensor_parallel, hf_id=model.hf_id) == model


# A run asks for them some thirty times, and each reading takes 2 ms: they are read once, and again once written.
@cache
def _fit(path: Path, modified_ns: int) -> LatencyModel:
    return LatencyModel.load(path)


@cache
def _known(path: Path, modified_ns: int) -> Model:
    values = yaml.safe_load(path.read_text())
    return Model(**{key: value for key, value in values.items() if key != "defaults"})
