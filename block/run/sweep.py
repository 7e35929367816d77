"""Sweeps: how far one is, what its jobs vary, and which of them failed.

The jobs of a sweep may run in other processes, and may be any number if a sweeper searches. So each leaves what became
of it in a file named by its number, artifacts/sweeps/…/.outcomes/<number>, and all is told from those files.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from warnings import filterwarnings

from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, open_dict, read_write
from omegaconf.errors import OmegaConfBaseException

from block.core.errors import message
from block.core.files import write_whole
from block.run import effects
from block.run.cli import run_job
from block.run.config_errors import ConfigError
from block.store import wandb_server

_SWEEP = "BLOCK_SWEEP"  # environment, which the processes that run the jobs inherit
_WATCH = "ends with the sweep"  # name of a thread

# A worker that has grown, as by a run on a thousand instances, is replaced by a fresh one, as it should be.
filterwarnings("ignore", "A worker stopped while some jobs were given", UserWarning)


@dataclass(frozen=True)
class _Sweep:
    """What the jobs of a sweep know of it."""

    jobs: int | None  # None: that is up to the sweeper
    began: float  # time.time()
    main: int  # process id
    folder: str  # of outcomes
    fixed: list[str]  # overrides that are the same for all jobs

    @staticmethod
    def running() -> _Sweep | None:
        """The sweep that this process belongs to."""
        text = os.environ.get(_SWEEP)
        return _Sweep(**json.loads(text)) if text else None

    def outcomes(self) -> dict[int, dict[str, str | None]]:
        """By number, what each job that began is called and its outcome: "ok", what went wrong, or None."""
        return {int(path.name): json.loads(path.read_text()) for path in Path(self.folder).glob("[0-9]*")}

    def note(self, number: int, job: str, outcome: str | None) -> None:
        """Keep what became of a job. A disk that is full costs the note, not the job."""
        path = Path(self.folder, str(number))
        try:
            write_whole(path, lambda place: place.write_text(json.dumps({"job": job, "outcome": outcome})))
        except OSError as error:
            print(f"failed: {path}: {error.strerror}: what became of this job is not counted", file=sys.stderr)


class Tally(Callback):
    """Looks at a sweep before it begins, and says at its end which jobs failed; `failed` is their number."""

    failed = 0
    command = "serve"  # what the jobs do: a key of `effects.READ`

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Hydra's hook, in the main process."""
        run_job(lambda: self._begin(config))  # Hydra would make a warning of an exception, and go on

    def _begin(self, config: DictConfig) -> None:
        hydra = config.hydra
        Tally.failed = 0
        overrides = _overrides(hydra)
        for one in overrides:
            try:
                empty = one.is_discrete_sweep() and not list(one.sweep_string_iterator())
            except ValueError as error:  # of a range
                raise ConfigError(f"{one.input_line}: {error}") from error
            if empty:
                raise ConfigError(f"{one.input_line}: no values to sweep over")
            if one.is_sweep_override() and not one.is_discrete_sweep() and not searching(hydra):
                raise ConfigError(
                    f"{one.input_line}: for sweepers that search; name the values, such as range(1,4) or 1,2"
                )
        if not searching(hydra) and GlobalHydra.instance().is_initialized():
            effects.refuse_in_all(_jobs(config, overrides), Tally.command)
        folder = Path(hydra.sweep.dir, ".outcomes").absolute()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for path in folder.iterdir():  # of an earlier sweep into the same folder
                path.unlink()
        except OSError as error:
            raise ConfigError(f"hydra.sweep.dir={hydra.sweep.dir}: {error.strerror}") from error
        fixed = [f"{one.get_key_element()}={one.get_value_element_as_str()}" for one in overrides if not _sweeps(one)]
        sweep = _Sweep(_count(hydra, overrides), time.time(), os.getpid(), str(folder), fixed)
        os.environ[_SWEEP] = json.dumps(asdict(sweep))
        wandb_server.share_trouble(folder / "wandb-trouble")

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Hydra's hook, in the main process."""
        _tell_failures()


def run_sweep(main: Callable[[], object], command: str = "serve") -> None:
    """Run `main`, of Hydra; if it is a sweep that something ends early, say which jobs failed before that.

    command: what its jobs do, a key of `effects.READ`.
    """
    Tally.command = command
    os.environ.pop(_SWEEP, None)  # of a sweep that has started this process
    try:
        main()
    except Exception as error:  # of a sweeper or launcher, such as for a worker that was killed
        sweep = _Sweep.running()
        if sweep is None or not sweep.outcomes():
            raise
        print(f"the sweep ended early: {message(error)}", file=sys.stderr)
        _tell_failures()
        Tally.failed = max(Tally.failed, 1)


def try_job(work: Callable[[], Any], hydra: DictConfig) -> Any:
    """Do the `work` of one job and return what it returns; if it fails, say so, return None and let the others go on.

    hydra: the job's Hydra config.
    """
    sweep = _Sweep.running()
    if sweep is None:
        return work()
    exit_with_parent(sweep.main)
    number, job = hydra.job.num, " ".join(hydra.overrides.task)
    sweep.note(number, job, None)
    try:
        result, outcome = work(), "ok"
    except Exception as error:
        result, outcome = None, message(error)
        print(f"failed: {job}: {outcome}", file=sys.stderr)
    sweep.note(number, job, outcome)
    return result


def exit_with_parent(main: int) -> None:
    """In a worker of the process `main`: end soon after it does, even if it was killed. Elsewhere: do nothing."""
    if os.getppid() != main or any(thread.name == _WATCH for thread in threading.enumerate()):
        return

    def watch() -> None:
        while os.getppid() == main:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, name=_WATCH, daemon=True).start()


def job_label(hydra: DictConfig) -> str:
    """What a job that has just finished is called: how far the sweep is, and the overrides that the sweep varies.

    "[37/119, 1:10 left] scheduler=block seed=4"; "[37 done] …" where a sweeper decides how many there will be.
    """
    sweep = _Sweep.running()
    fixed = [] if sweep is None else sweep.fixed
    job = " ".join(one for one in hydra.overrides.task if one not in fixed) or " ".join(hydra.overrides.task)
    if sweep is None:
        return job
    done = sum(one["outcome"] is not None for one in sweep.outcomes().values()) + 1
    if sweep.jobs is None:
        return f"[{done} done] {job}"
    left = (time.time() - sweep.began) / done * max(sweep.jobs - done, 0)
    return f"[{min(done, sweep.jobs)}/{sweep.jobs}, {int(left) // 60}:{int(left) % 60:02d} left] {job}"


def varies(hydra: DictConfig, group: str) -> bool:
    """Whether the jobs of the sweep differ in a config group, or in a key of it beside its rate."""
    running = _Sweep.running()
    fixed = running.fixed if running is not None else []
    keys = [one.partition("=")[0].lstrip("+~") for one in hydra.overrides.task if one not in fixed]
    return any(key == group or (key.startswith(f"{group}.") and key != f"{group}.qps") for key in keys)


def searching(hydra: DictConfig) -> bool:
    """Whether the sweeper looks for something and asks each job for its objective; Hydra's own makes all of a grid."""
    return not hydra.sweeper._target_.endswith(".BasicSweeper")


def _tell_failures() -> None:
    """Say which jobs of the sweep that has ended failed, did not finish or did not begin, and count them."""
    sweep = _Sweep.running()
    assert sweep is not None
    outcomes = sweep.outcomes()
    bad = {
        number: f"{one['job']}: {one['outcome'] or 'did not finish'}"
        for number, one in outcomes.items()
        if one["outcome"] != "ok"
    }
    absent = sorted(set(range(sweep.jobs or 0)) - set(outcomes))
    Tally.failed = len(bad) + len(absent)
    if Tally.failed:
        print(f"{Tally.failed} of {len(outcomes) + len(absent)} jobs failed:", file=sys.stderr)
    for number, what in sorted(bad.items()):
        print(f"  {number}: {what}", file=sys.stderr)
    if absent:
        print(f"  {', '.join(map(str, absent))}: did not begin", file=sys.stderr)


def _overrides(hydra: DictConfig) -> list[Override]:
    """What the sweep is given, the later override of a key counting."""
    given = [f"{key}={value}" for key, value in (hydra.sweeper.get("params") or {}).items()]
    instance = GlobalHydra.instance()
    loader = instance.config_loader() if instance.is_initialized() else None  # which knows what glob(…) stands for
    parsed = OverridesParser.create(loader).parse_overrides(given + list(hydra.overrides.task))
    return list({one.get_key_element(): one for one in parsed}.values())


def _jobs(config: DictConfig, overrides: list[Override]) -> Iterator[tuple[DictConfig, list[str]]]:
    """The jobs of a grid: the config of each, and what the command line gives it. Seeds and rates are not varied, on
    which the effect of no key hangs; what cannot be composed is left out.
    """
    loader = GlobalHydra.instance().config_loader()
    typed = {
        one.get_key_element() for one in OverridesParser.create().parse_overrides(list(config.hydra.overrides.task))
    }
    values = []
    for one in overrides:
        key = one.get_key_element()
        every = list(one.sweep_string_iterator()) if one.is_discrete_sweep() else [one.get_value_element_as_str()]
        values.append([(key, value) for value in (every[:1] if key in ("seed", "workload.qps") else every)])
    for job in itertools.product(*values):
        with suppress(HydraException, OmegaConfBaseException):
            settings = loader.load_sweep_config(config, [f"{key}={value}" for key, value in job])
            with read_write(settings), open_dict(settings):
                del settings["hydra"]
            yield settings, [f"{key}={value}" for key, value in job if key in typed]


def _sweeps(override: Override) -> bool:
    return bool(override.is_sweep_override())


def _count(hydra: DictConfig, overrides: list[Override]) -> int | None:
    """Jobs of a sweep: the product of what each override sweeps over. None: that is up to the sweeper."""
    if searching(hydra):
        return None
    jobs = 1
    for one in overrides:
        jobs *= len(list(one.sweep_string_iterator())) if one.is_discrete_sweep() else 1
    return jobs
