"""Step times from data sheet and Hugging Face config alone, by roofline (docs/latency.md says how well that does)."""

from __future__ import annotations

import numpy as np

from block.engine.latency import LatencyModel, table
from block.hardware.catalogue import GPU, Model

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
    experts, used = model.expert_layers, model.experts_per_token
    if experts:
        tokens = np.arange(1.0, max_tokens + 1)  # the experts hit are a curve
    fixed, per_token = layer(sum(model.projections.values()), model.intermediate_size)
    linear = (model.layers - experts) * (fixed + per_token * tokens) + head
    if experts:
        fixed, per_token = layer(model.always_weights, used * model.expert_size + model.shared_size, used)
        fetched = model.experts_hit(tokens) * model.expert_weights * size / bandwidth
        per_token += 2 * used * model.expert_weights / flops
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
