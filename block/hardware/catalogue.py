"""GPUs by their data sheets, models by their Hugging Face configs."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path

import yaml  # type: ignore[import-untyped]

from block.core.arrays import Floats
from block.core.choices import did_you_mean


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
        raise ValueError(f"{key}={name}: {did_you_mean(name, list(GPUS))}, or give a data sheet, FILE.yaml")
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

    @property
    def numbers(self) -> dict[str, int | bool | None]:
        """All fields but its names and how many GPUs share it: a fit holds for a model that has the same."""
        return {key: value for key, value in asdict(self).items() if key not in ("name", "hf_id", "tensor_parallel")}

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
    def expert_layers(self) -> int:
        """Layers that have experts in place of one feed-forward part."""
        return self.layers - self.dense_layers if self.experts else 0

    @property
    def expert_weights(self) -> float:
        """Weights (elements) of one expert per layer and GPU: each is split over the GPUs, as vLLM does by default."""
        return 3 * self.hidden_size * self.expert_size / self.tensor_parallel

    @property
    def always_weights(self) -> float:
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
        dense = (self.layers - self.expert_layers) * sum(self.projections.values()) + embeddings + norms
        if not self.experts:
            return dense
        return dense + self.expert_layers * (self.always_weights + experts * self.expert_weights)

    @property
    def kv_bytes(self) -> float:
        """Bytes of KV cache per token and layer on each GPU.

        KV heads fewer than the GPUs are replicated, and so is the latent of latent attention.
        """
        size = self.kv_dtype_bytes or self.dtype_bytes
        if self.kv_lora_rank:
            return float((self.kv_lora_rank + self.qk_rope_head_dim) * size)
        return 2 * max(1.0, self.kv_heads / self.tensor_parallel) * self.head_dim * size
