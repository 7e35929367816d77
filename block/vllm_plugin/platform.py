"""The platform of the emulated GPU: no device, but asynchronous scheduling and forked workers as on a GPU.

vLLM finds it by its entry point in every environment that has this package, and asks `emulated` whether it applies:
only where the launcher says so (BLOCK_EMULATED).
"""

from __future__ import annotations

import os

from block.vllm_plugin.environment import EMULATED


def emulated() -> str | None:
    """The platform's name if this process is to emulate, else None."""
    return "block.vllm_plugin.emulated_platform.EmulatedPlatform" if os.environ.get(EMULATED) == "1" else None
