"""The zygote: imports vLLM once and forks servers, so that many are up in seconds and share their code's memory.

    python -m block.vllm_plugin.zygote      driven over its standard input and output, a line of JSON each

A request {"arguments": [...], "environment": {...}, "log": path} forks a server (`serve`) into a process group of its
own and is answered {"pid": n}. When a server ends, {"ended": pid, "status": n} is written. At the end of its input, or
when its parent ends, the zygote ends, and every server with it.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import selectors
import signal
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from block.engine.latency import LatencyModel
from block.vllm_plugin import serve
from block.vllm_plugin.environment import LATENCY, PARENT
from block.vllm_plugin.executor import step_seconds
from block.vllm_plugin.lifetime import die_with_parent

PRELOADED = (
    serve.API_SERVER,
    "vllm.v1.engine.core",
    "vllm.v1.engine.async_llm",
    "vllm.v1.core.sched.async_scheduler",
    "vllm.model_executor.models.llama",
    "block.vllm_plugin.publisher",
    "block.vllm_plugin.routes",
)


def main() -> None:
    """Serve until the input ends."""
    if PARENT in os.environ:
        die_with_parent(int(os.environ[PARENT]))
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what vLLM prints while it is imported is no answer
    for module in PRELOADED:
        importlib.import_module(module)
    if LATENCY in os.environ:  # load what is compiled once, for all
        step_seconds(LatencyModel.load(Path(os.environ[LATENCY])).pack(), [(2, 0), (1, 1)])
    gc.collect()
    gc.freeze()  # what is shared stays shared: a collection in a server would write to it
    wakeup, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    events = selectors.DefaultSelector()
    events.register(0, selectors.EVENT_READ)
    events.register(wakeup, selectors.EVENT_READ)
    print(json.dumps({"ready": True}), file=answers)
    pending = b""
    while True:
        for key, _ in events.select():
            received = os.read(key.fd, 65536)
            if key.fd == wakeup:
                _reap(answers)
                continue
            if not received:
                return
            *lines, pending = (pending + received).split(b"\n")
            for line in lines:
                print(json.dumps({"pid": _fork(json.loads(line))}), file=answers)


def _reap(answers: Any) -> None:
    with suppress(ChildProcessError):
        while True:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                return
            print(json.dumps({"ended": pid, "status": os.waitstatus_to_exitcode(status)}), file=answers)


def _fork(request: dict[str, Any]) -> int:
    parent = os.getpid()
    pid = os.fork()
    if pid:
        return pid
    try:
        os.setpgid(0, 0)
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        log = os.open(Path(request["log"]), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        nothing = os.open(os.devnull, os.O_RDONLY)
        for source, target in ((nothing, 0), (log, 1), (log, 2)):
            os.dup2(source, target)
        os.environ.update(request["environment"])
        os.environ[PARENT] = str(parent)
        serve.serve(request["arguments"])
    except SystemExit as end:
        sys.stderr.flush()
        os._exit(end.code if isinstance(end.code, int) else 1)
    except BaseException:
        import traceback

        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    os._exit(0)


if __name__ == "__main__":
    main()
