"""The settings of an engine's scheduler."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from block.core.arrays import Ints
from block.engine import scheduler as s


@dataclass(frozen=True)
class EngineConfig:
    """The scheduler's settings, by vLLM's names. ``version`` "v0" is vLLM 0.7.2 (the paper's), "v1" the current one.

    enable_chunked_prefill: False is vLLM 0.7.2's default (v0 only): prompts first, a step all prefill or all decode.
    watermark: share of the KV blocks that admission leaves free (vLLM: 0.01 in V0, 0.0 in V1).
    num_gpu_blocks: KV blocks of an instance; None takes the published count, or computes one from the GPU's memory.
    ValueError names the key, the value and the choices.
    """

    version: str = "v0"
    max_num_seqs: int = 48
    max_num_batched_tokens: int = 512
    max_model_len: int = 4096
    block_size: int = 16
    watermark: float = 0.01
    num_gpu_blocks: int | None = None
    gpu_memory_utilization: float = 0.9
    async_scheduling: bool = False
    long_prefill_token_threshold: int = 0
    scheduler_reserve_full_isl: bool = True
    enable_chunked_prefill: bool = True

    def __post_init__(self) -> None:
        if self.version not in ("v0", "v1"):
            raise ValueError(f"engine.version={self.version}: choose v0 or v1")
        for key in ("max_num_seqs", "max_num_batched_tokens", "max_model_len", "block_size", "num_gpu_blocks"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise ValueError(f"engine.{key}={value}: must be at least 1")
        if self.block_size & (self.block_size - 1):
            raise ValueError(f"engine.block_size={self.block_size}: must be a power of two, such as 16")
        if self.max_model_len < 2:
            raise ValueError(f"engine.max_model_len={self.max_model_len}: must be at least 2 (prompt and response)")
        if self.long_prefill_token_threshold < 0:
            raise ValueError(
                f"engine.long_prefill_token_threshold={self.long_prefill_token_threshold}: must be 0 or more"
            )
        if not 0 <= self.watermark < 1:
            raise ValueError(f"engine.watermark={self.watermark}: must be at least 0 and less than 1")
        if not 0 < self.gpu_memory_utilization <= 1:
            raise ValueError(f"engine.gpu_memory_utilization={self.gpu_memory_utilization}: must be in (0, 1]")
        if self.async_scheduling and self.version == "v0":
            raise ValueError("engine.async_scheduling=True: only engine.version=v1 schedules asynchronously")
        if not self.enable_chunked_prefill:
            if self.version == "v1":
                raise ValueError("engine.enable_chunked_prefill=False: engine.version=v1 always chunks; take v0")
            least = max(self.max_model_len, self.max_num_seqs)
            if self.max_num_batched_tokens < least:
                raise ValueError(
                    f"engine.max_num_batched_tokens={self.max_num_batched_tokens}: must be at least {least}, the "
                    "larger of max_model_len and max_num_seqs, with engine.enable_chunked_prefill=False"
                )

    def limits(self, total_blocks: int) -> Ints:
        """The settings as the compiled scheduler reads them, for an engine with `total_blocks` usable blocks."""
        if self.version == "v0":
            watermark = int(self.watermark * total_blocks)
            spare = max(watermark, 1)  # it preempts what has no free block in reach
        else:
            watermark = int(self.watermark * (total_blocks + 1))  # a share of all, the one that V1 keeps included
            spare = 0  # a sequence that is alone may fill them all
        needed = -(-self.max_model_len // self.block_size) + spare
        if needed > total_blocks:
            raise ValueError(
                f"engine.num_gpu_blocks={total_blocks}: a sequence of engine.max_model_len={self.max_model_len} tokens "
                f"needs {needed} KV blocks; raise the one or lower the other"
            )
        limits = np.zeros(s.LIMITS, dtype=np.int64)
        limits[s.V1] = self.version == "v1"
        limits[s.ASYNC] = self.async_scheduling
        limits[s.MAX_NUM_SEQS] = self.max_num_seqs
        limits[s.MAX_NUM_BATCHED_TOKENS] = self.max_num_batched_tokens
        limits[s.MAX_MODEL_LEN] = self.max_model_len
        limits[s.BLOCK_SIZE] = self.block_size
        limits[s.BLOCK_SHIFT] = self.block_size.bit_length() - 1
        limits[s.WATERMARK] = watermark
        limits[s.LONG_PREFILL] = self.long_prefill_token_threshold
        limits[s.RESERVE_FULL] = self.scheduler_reserve_full_isl
        limits[s.CHUNKED] = self.enable_chunked_prefill
        return limits
