"""Runs commands for the tests, each in a process of its own that is forked from this one, where all is imported.

A command then costs what it does, not two seconds of imports and of loading compiled code. Requests are lines of JSON
on standard input; the answers are two lines each: the process's id, and its exit code. `commands.command` talks to it.
"""

from __future__ import annotations

import gc
import json
import os
import runpy
import select
import signal
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def prepare() -> None:
    """Import what commands import, and load the compiled code that most runs use."""
    import one_composition  # noqa: F401
    import seaborn  # noqa: F401
    from hydra import compose, initialize_config_dir

    import block.lengths.estimation
    import block.run.campaign
    import block.run.capacity
    import block.store.wandb  # noqa: F401
    from block.run import config, hydra_schema
    from block.run.replay import Outcome, replay, requests_of
    from block.store.provenance import code_hash

    code_hash()
    hydra_schema.register()
    for engine in ("vllm_v0", "vllm_v1"):
        with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
            settings = compose("config", [f"engine={engine}", "workload.num_requests=50", "backend=simulated"])
        run = config.build(settings)
        replay(run, requests_of(run)[0], Outcome())
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)  # as in conftest.py


def serve_commands() -> Callable[[], None]:
    """Fork for each request; in the child return what it shall do, and in the parent never."""
    for line in sys.stdin.buffer:
        request = json.loads(line)
        pid = os.fork()
        if pid == 0:
            return lambda: run(**request)
        print(pid, flush=True)
        ended = os.pidfd_open(pid)
        if ended not in select.select([ended, sys.stdin], [], [])[0]:  # the tests are gone, and their command goes too
            os.killpg(pid, signal.SIGKILL)
        os.close(ended)
        _, status = os.waitpid(pid, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)
    sys.exit()


def run(script: str, arguments: list[str], folder: str, environment: dict[str, str], out: str, err: str) -> None:
    """Be the command; output goes to the files `out` and `err`."""
    os.setsid()
    for number, path, flags in (
        (0, os.devnull, os.O_RDONLY),
        (1, out, os.O_WRONLY | os.O_CREAT),
        (2, err, os.O_WRONLY | os.O_CREAT),
    ):
        opened = os.open(path, flags)
        os.dup2(opened, number)
        os.close(opened)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = [script, *arguments]
    sys.path[0] = str(Path(script).parent)
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    sys.path.insert(1, str(ROOT))
    prepare()
    del sys.path[0]
    command = serve_commands()
    command()  # at the top, so that the child ends as any script does
