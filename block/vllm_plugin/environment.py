"""Names of environment variables by which a server is told what the plugin is to do. Imports nothing of vLLM's."""

STATE_BUFFER = "BLOCK_STATE_BUFFER"
"""The file in shared memory that the scheduler publishes into; set by `block.vllm_plugin.serve`."""

RECORD = "BLOCK_RECORD"
"""A file into which every decision of the scheduler is written; unset: none is."""

PARENT = "BLOCK_PARENT"
"""The process with which the server ends."""

EMULATED = "BLOCK_EMULATED"
"""Set where the GPU is to be emulated."""

LATENCY = "BLOCK_LATENCY"
"""The file of the emulated GPU's step times."""

DILATION = "BLOCK_DILATION"
"""Wall-clock seconds that the emulated GPU takes for one second of those."""
