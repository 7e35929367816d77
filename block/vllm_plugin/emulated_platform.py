"""The platform class; apart from `platform`, because importing it imports vLLM."""

from __future__ import annotations

from typing import Any

from vllm.platforms.cpu import CpuPlatform
from vllm.platforms.interface import PlatformEnum


class EmulatedPlatform(CpuPlatform):  # type: ignore[misc]
    """A CPU as far as memory and tensors go; nothing is ever computed on it."""

    _enum = PlatformEnum.OOT
    device_name = "emulated"

    @classmethod
    def check_and_update_config(cls, vllm_config: Any) -> None:
        """Leave the settings as they are, asynchronous scheduling among them."""
        vllm_config.parallel_config.worker_cls = "vllm.v1.worker.worker_base.WorkerBase"

    @classmethod
    def import_ir_kernels(cls) -> None:
        """No kernels."""
