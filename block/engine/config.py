"""The settings of an engine: what a user chooses, and what its scheduler works by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from block.core.arrays import Ints


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
    enable_prefix_caching: bool = False

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
        if self.enable_prefix_caching and self.version == "v0":
            raise ValueError("engine.enable_prefix_caching=True: only engine.version=v1 has the prefix cache")
        if not self.enable_chunked_prefill:
            if self.version == "v1":
                raise ValueError("engine.enable_chunked_prefill=False: engine.version=v1 always chunks; take v0")
            least = max(self.max_model_len, self.max_num_seqs)
            if self.max_num_batched_tokens < least:
                raise ValueError(
                    f"engine.max_num_batched_tokens={self.max_num_batched_tokens}: must be at least {least}, the "
                    "larger of max_model_len and max_num_seqs, with engine.enable_chunked_prefill=False"
                )

    def settings(self, total_blocks: int) -> EngineSettings:
        """Those of an engine with `total_blocks` usable KV blocks; ValueError if the longest sequence needs more.

        `total_blocks` is its `num_gpu_blocks` without those `blocks_kept`.
        """
        is_v1 = self.version == "v1"
        settings = EngineSettings(
            is_v1=is_v1,
            max_num_seqs=self.max_num_seqs,
            max_num_batched_tokens=self.max_num_batched_tokens,
            max_model_len=self.max_model_len,
            block_size=self.block_size,
            total_blocks=total_blocks,
            watermark_blocks=int(self.watermark * (total_blocks + blocks_kept(is_v1))),  # a share of all
            async_scheduling=self.async_scheduling,
            long_prefill_token_threshold=self.long_prefill_token_threshold,
            scheduler_reserve_full_isl=self.scheduler_reserve_full_isl,
            enable_chunked_prefill=self.enable_chunked_prefill,
            enable_prefix_caching=self.enable_prefix_caching,
        )
        settings.check()
        return settings


def blocks_kept(is_v1: bool) -> int:
    """KV blocks of `num_gpu_blocks` that an engine keeps for itself: V1's ``BlockPool`` keeps its null block."""
    return 1 if is_v1 else 0


class EngineSettings(NamedTuple):
    """What a scheduler works by, under vLLM's names: made of an `EngineConfig`, or reported by a server.

    The compiled scheduler reads them as integers in this order (`to_array`, `block.engine.state`), and so does who maps
    a server's memory.
    """

    is_v1: bool
    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    block_size: int
    total_blocks: int  # usable KV blocks
    watermark_blocks: int  # blocks that admission leaves free
    async_scheduling: bool = False
    long_prefill_token_threshold: int = 0
    scheduler_reserve_full_isl: bool = True
    enable_chunked_prefill: bool = True
    enable_prefix_caching: bool = False

    @staticmethod
    def of(values: Sequence[int]) -> EngineSettings:
        """The settings whose fields are these integers."""
        pairs = zip(EngineSettings._fields, values, strict=True)
        return EngineSettings(**{name: bool(value) if name in _FLAGS else value for name, value in pairs})  # type: ignore[arg-type]

    def check(self) -> None:
        """ValueError if a sequence of max_model_len tokens could not finish, even alone."""
        # V0 preempts what has no free block in reach; in V1 a sequence that is alone may fill them all.
        spare = 0 if self.is_v1 else max(self.watermark_blocks, 1)
        needed = -(-self.max_model_len // self.block_size) + spare
        if needed > self.total_blocks:
            raise ValueError(
                f"engine.num_gpu_blocks={self.total_blocks}: a sequence of engine.max_model_len={self.max_model_len} "
                f"tokens needs {needed} KV blocks; raise the one or lower the other"
            )

    def to_array(self) -> Ints:
        """int64[SETTINGS], as compiled code reads them."""
        return np.array([*self, self.block_size.bit_length() - 1], dtype=np.int64)


_FLAGS = (
    "is_v1",
    "async_scheduling",
    "scheduler_reserve_full_isl",
    "enable_chunked_prefill",
    "enable_prefix_caching",
)
