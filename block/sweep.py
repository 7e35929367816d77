"""Sweeps: how far one is, and which of its jobs failed.

The jobs of a sweep may run in other processes, so each leaves its outcome as a file in its Hydra output folder
(artifacts/sweeps/…/<job>/outcome), and all is told from those files.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.experimental.callback import Callback
from omegaconf import DictConfig

_JOBS = "BLOCK_SWEEP_JOBS"  # environment: number of jobs, inherited by the processes that run them
_BEGAN = "BLOCK_SWEEP_BEGAN"  # environment: time.time() at the start
_MAIN = "BLOCK_SWEEP_MAIN"  # environment: process id of the sweep
_OUTCOME = "outcome"  # "ok", or what went wrong


class Tally(Callback):
    """Counts the jobs of a sweep before it begins and says at its end which failed; `failed` is their number."""

    failed = 0

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Hydra's hook, in the main process."""
        os.environ[_JOBS] = str(_count(config))
        os.environ[_BEGAN] = str(time.time())
        os.environ[_MAIN] = str(os.getpid())
        Tally.failed = 0
        for path in _outcome_files(Path(config.hydra.sweep.dir)):  # of an earlier sweep into the same folder
            path.unlink()

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Hydra's hook, in the main process."""
        outcomes = _outcomes(Path(config.hydra.sweep.dir))
        bad = {job: outcome for job, outcome in sorted(outcomes.items()) if outcome != "ok"}
        Tally.failed = len(bad)
        if bad:
            print(f"{len(bad)} of {os.environ[_JOBS]} jobs failed:", file=sys.stderr)
            for job, outcome in bad.items():
                print(f"  {job}: {outcome}", file=sys.stderr)


def attempt(work: Callable[[], object], hydra: DictConfig) -> None:
    """Do the `work` of one job; if it fails, say so and let the others go on. `hydra` is the job's Hydra config."""
    end_with(int(os.environ.get(_MAIN, os.getpid())))
    folder = Path(hydra.runtime.output_dir)
    outcome = "ok"
    try:
        work()
    except Exception as error:
        outcome = f"{' '.join(hydra.overrides.task)}: {' '.join(str(error).split()) or type(error).__name__}"
        print(f"failed: {outcome}", file=sys.stderr)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / _OUTCOME).write_text(outcome)
    except OSError as error:
        print(f"failed: {folder}: {error.strerror}: this job is not counted", file=sys.stderr)


def end_with(main: int) -> None:
    """In a worker of the process `main`: end soon after it does, even if it was killed. Elsewhere: do nothing."""
    if os.getppid() != main or any(thread.name == _MAIN for thread in threading.enumerate()):
        return

    def watch() -> None:
        while os.getppid() == main:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, name=_MAIN, daemon=True).start()


def standing(hydra: DictConfig) -> str:
    """How far the sweep is, when the job that asks has just finished: "[37/119, 1:10 left] "."""
    total = int(os.environ.get(_JOBS, 0))
    if total == 0:
        return ""
    done = len(_outcomes(Path(hydra.sweep.dir))) + 1
    left = (time.time() - float(os.environ[_BEGAN])) / done * max(total - done, 0)
    return f"[{min(done, total)}/{total}, {int(left) // 60}:{int(left) % 60:02d} left] "


def _outcomes(folder: Path) -> dict[int, str]:
    return {int(path.parent.name): path.read_text() for path in _outcome_files(folder)}


def _outcome_files(folder: Path) -> Iterator[Path]:
    return folder.glob(f"*/{_OUTCOME}")


def _count(config: DictConfig) -> int:
    """Jobs of a sweep: the product of what each override sweeps over, the later override of a key counting."""
    params = config.hydra.sweeper.get("params") or {}
    overrides = [f"{key}={value}" for key, value in params.items()] + list(config.hydra.overrides.task)
    widths: dict[str, int] = {}
    hydra = GlobalHydra.instance()
    loader = hydra.config_loader() if hydra.is_initialized() else None  # which knows the files that glob(…) stands for
    for override in OverridesParser.create(loader).parse_overrides(overrides):
        swept = override.is_sweep_override()
        widths[override.get_key_element()] = len(list(override.sweep_string_iterator())) if swept else 1
    total = 1
    for width in widths.values():
        total *= width
    return total
