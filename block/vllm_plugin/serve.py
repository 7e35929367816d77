"""A vLLM server that publishes its scheduler's state:

    python -m block.vllm_plugin.serve --model … --port …     any arguments of `vllm serve`

It is vLLM's own API server with two public options set, ``--scheduler-cls`` and ``--middleware``. The state is on the
buffer (this host) and pushed by ``/block/frames`` (other hosts); ``/block/info`` says where.
"""

from __future__ import annotations

import os
import runpy
import sys
import warnings
from collections.abc import Sequence

from block.vllm_plugin.environment import PARENT, STATE_BUFFER
from block.vllm_plugin.lifetime import die_with_parent
from block.vllm_plugin.requirements import Incompatible, check_version
from block.vllm_plugin.state_buffer import StateBuffer

API_SERVER = "vllm.entrypoints.openai.api_server"

HOOKS = [
    "--scheduler-cls=block.vllm_plugin.publisher.publishing",
    "--middleware=block.vllm_plugin.routes.SnapshotView",
]


def serve(arguments: Sequence[str]) -> None:
    """Become a server, to the end of this process. Raises Incompatible."""
    check_version()
    if PARENT in os.environ:
        die_with_parent(int(os.environ[PARENT]))
    buffer, path = StateBuffer.create()
    os.environ[STATE_BUFFER] = path
    sys.argv = ["vllm serve", *HOOKS, *arguments]
    with warnings.catch_warnings():
        # `python -m` works in all versions; `vllm serve` fails where the distribution has another name.
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        runpy.run_module(API_SERVER, run_name="__main__")
    del buffer


if __name__ == "__main__":
    try:
        serve(sys.argv[1:])
    except Incompatible as error:
        sys.exit(f"error: {error}")
