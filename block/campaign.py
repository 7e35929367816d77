"""A campaign: many runs and capacity searches, those that are stored found again, the rest done in parallel.

A job is told by its *cell*: values by their keys, of config groups ("scheduler") and of single settings
("workload.qps"), beside which everything is as in conf/.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from joblib import Memory, Parallel, delayed
from omegaconf import OmegaConf
from rich.console import Console

from block import config, experiment, provenance, searches
from block.complaints import explain
from block.console import progress
from block.instances.model_files import cache_folder
from block.provenance import SOURCE
from block.results import DEFAULT_ROOT, Run, experiment_hash, runs
from block.sweep import end_with

CACHED = 2000  # compositions and fingerprints kept on disk
SEARCH_RUNS = 5  # runs that a search takes, about
RUN_S = 1.2  # seconds that a simulated run of 10,000 requests takes, about


@dataclass
class Job:
    """A run or a search: the resolved config, what was chosen, what it depends on, and what is stored of it."""

    search: bool
    settings: dict[str, Any]
    choices: dict[str, str]
    hashes: dict[str, str]
    stored: Run | searches.Search | None = None

    @property
    def identity(self) -> tuple[bool, str]:
        """The same for jobs that do the same."""
        return self.search, str(searches.path_of(self.settings)) if self.search else experiment_hash(self.settings)

    @property
    def weight(self) -> int:
        """Its time, in runs of 10,000 requests."""
        runs = int(self.settings["workload"]["num_requests"]) // 10_000
        return max(runs, 1) * (SEARCH_RUNS if self.search else 1)

    def find(self, stored: Mapping[str, Run]) -> Run | searches.Search | None:
        """What is stored of it, among runs by their config hash; None if there is none, or it is outdated."""
        if self.search:
            return searches.find(self.settings, self.hashes)
        run = stored.get(self.identity[1])
        return run if run is not None and run.document["hashes"] == self.hashes else None

    def __str__(self) -> str:
        at = "capacity" if self.search else f"qps={self.settings['workload']['qps']:g}"
        return f"scheduler={self.choices['scheduler']} {at} seed={self.settings['seed']}"


class Composer:
    """Makes the jobs of cells, from the config files in `folder`; `always`: overrides of all of them.

    Hydra takes long to compose a choice of files, and so does hashing what they name; both are kept on disk for the
    next call, until a file changes.
    """

    def __init__(self, folder: Path, always: Sequence[str]) -> None:
        memory = Memory(_cache(), verbose=0)
        memory.reduce_size(items_limit=CACHED)
        self._on_disk = {function: memory.cache(function) for function in (_compose, _fingerprints)}
        self._folder = folder
        self._always = tuple(always)
        self._state = _state(folder)
        self._known: dict[tuple[Any, ...], Any] = {}

    def job(self, cell: Mapping[str, Any], *, search: bool) -> Job:
        """The job of a cell. KeyError if it names a setting that there is not."""
        groups = {key: value for key, value in cell.items() if key in config.GROUPS or key in config.CHOICES}
        chosen = (*(f"{key}={value}" for key, value in groups.items()), *self._always)
        base, choices = self._composed(chosen)
        settings = copy.deepcopy(base)
        for key in cell.keys() - groups.keys():
            _set(settings, key, cell[key])
        # What results depend on beside the config is the same at every rate and for every scheduler.
        same = {key: settings[key] for key in ("model", "cluster", "engine", "backend", "lengths", "seed")}
        same["workload"] = {**settings["workload"], "qps": 1.0}
        text = json.dumps(self._composed(self._always)[0] | same, sort_keys=True)
        return Job(search, settings, choices, self._once(_fingerprints, text, self._state))

    def _composed(self, chosen: tuple[str, ...]) -> tuple[dict[str, Any], dict[str, str]]:
        return self._once(_compose, str(self._folder), chosen, self._state)  # type: ignore[no-any-return]

    def _once(self, function: Callable[..., Any], *arguments: Any) -> Any:
        key = (function, *arguments)
        if key not in self._known:
            self._known[key] = self._on_disk[function](*arguments)
        return self._known[key]


def _compose(folder: str, chosen: tuple[str, ...], state: str) -> tuple[dict[str, Any], dict[str, str]]:
    """The resolved config of a choice of files, and all choices."""
    config.register()
    with initialize_config_dir(folder, version_base="1.3"):
        made = compose("config", overrides=list(chosen), return_hydra_config=True)
    named = made.hydra.runtime.choices.items()
    choices = {str(key): str(value) for key, value in named if not str(key).startswith("hydra/")}
    keys = [str(key) for key in made if key != "hydra"]
    return config.plain(OmegaConf.masked_copy(made, keys)), choices


def _fingerprints(settings: str, state: str) -> dict[str, str]:
    return experiment.fingerprints(config.build(OmegaConf.create(json.loads(settings))))


def _cache() -> Path | None:
    """Where compositions are kept; None if nothing can be kept there."""
    try:
        (path := cache_folder() / "composed").mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):
        return None
    return path if os.access(path, os.W_OK) else None


def _state(folder: Path) -> str:
    """Changes with every file that a config, or what it names, is made of: settings, code, fits, sketches."""
    folders = (folder, SOURCE / "block", *(SOURCE / "artifacts" / name for name in ("latency", "workloads", "lengths")))
    files = sorted(
        path for one in folders for path in one.rglob("*") if path.suffix in (".yaml", ".py", ".json", ".npz")
    )
    return provenance.config_hash({str(path): provenance.file_hash(path) for path in files})


def _set(settings: dict[str, Any], key: str, value: Any) -> None:
    """Set what is there already; an integer for a float becomes one, as it does in a config."""
    *path, last = key.split(".")
    node = settings
    for name in path:
        node = node[name]
    node[last] = float(value) if isinstance(node[last], float) else value


def find(jobs: Iterable[Job]) -> None:
    """Give each job what is stored of it; of runs with the same config hash the latest."""
    stored = {run.document["config_hash"]: run for run in runs(root=DEFAULT_ROOT)}
    for job in jobs:
        job.stored = job.find(stored)


def distinct(jobs: Iterable[Job]) -> list[Job]:
    """Each job once, the longest first, so that no core is idle at the end."""
    once = {job.identity: job for job in jobs}.values()
    return sorted(once, key=lambda job: (job.weight, job.settings["cluster"].get("num_gpus", 0)), reverse=True)


def do(missing: Sequence[Job], *, at_once: int) -> list[str]:
    """Do the jobs, `at_once` in parallel (-1: one a core); returns what went wrong, a line for each that did."""
    if not missing:
        return []
    failures = []
    work = (delayed(_one)(job, os.getpid()) for job in missing)
    with progress(Console(stderr=True), "runs", sum(job.weight for job in missing)) as advance:
        for weight, error in Parallel(n_jobs=at_once, return_as="generator_unordered")(work):
            advance(weight)
            if error:
                failures.append(error)
    return failures


def _one(job: Job, main: int) -> tuple[int, str]:
    """A job, in a process of its own; returns its weight and what went wrong."""
    end_with(main)
    settings = OmegaConf.create(job.settings)
    try:
        if job.search:
            experiment.search_one(settings, job.choices)
        else:
            experiment.execute(settings, job.choices, quiet=True)
    except Exception as error:  # the others go on, and what lacks is told at the end
        return job.weight, f"{job}: {explain(error)}"
    return job.weight, ""
