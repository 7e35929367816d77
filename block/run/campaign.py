"""A campaign: many runs and capacity searches, those that are stored found again, the rest done in parallel.

A job is told by its *grid point*: values by their keys, of config groups ("scheduler") and of single settings
("workload.qps"), beside which everything is as in conf/.
"""

from __future__ import annotations

import copy
import gc
import json
import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from joblib import Memory, Parallel, delayed
from omegaconf import OmegaConf
from rich.console import Console

from block.core.paths import PACKAGE, cache_folder, shipped
from block.core.user_code import is_ours
from block.run import config, hydra_schema
from block.run.capacity_search import search_one
from block.run.config_errors import explain
from block.run.console import progress
from block.run.execute import compile_ahead, execute
from block.run.fingerprints import fingerprints
from block.run.sweep import exit_with_parent
from block.store import provenance, searches
from block.store.results import DEFAULT_ROOT, Run, experiment_hash, runs

CACHED = 2000  # compositions and fingerprints kept on disk
FEW = 8  # so many are computed one after the other
SEARCH_RUNS = 5  # runs that a search takes, about
_FINGERPRINTED = ("model", "cluster", "engine", "backend", "lengths", "workload")  # nodes that they hang on
REQUEST_S = 1.4e-4  # seconds that a request of a simulated run takes, about
CACHED_REQUEST_S = 7e-4  # the same of a run with prefix caches, whose prompts are longer


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
    def requests(self) -> int:
        """How many it serves, those of all runs of a search; about, if they are not numbered."""
        return int(self.settings["workload"]["num_requests"] or 10_000) * (SEARCH_RUNS if self.search else 1)

    @property
    def seconds(self) -> float:
        """How long it takes one core in simulation, about."""
        cached = self.settings["engine"]["enable_prefix_caching"]
        return self.requests * (CACHED_REQUEST_S if cached else REQUEST_S)

    def find(self, stored: Mapping[str, Sequence[Run]]) -> Run | searches.Search | None:
        """What is stored of it, the latest among runs by their config hash; None if there is none that is current."""
        if self.search:
            return searches.find(self.settings, self.hashes)
        same = reversed(stored.get(self.identity[1], ()))
        return next((run for run in same if run.document.get("hashes") == self.hashes), None)

    def __str__(self) -> str:
        qps = self.settings["workload"]["qps"]
        at = "capacity" if self.search else "qps=null" if qps is None else f"qps={qps:g}"
        return f"scheduler={self.choices['scheduler']} {at} seed={self.settings['seed']}"


class Composer:
    """Makes the jobs of points, from the config files in `folder`; `always`: overrides of all of them.

    Hydra takes long to compose a choice of files (and of keys that others refer to), and so does hashing what they
    name; both are kept on disk for the next call, until a file of the project changes. What hangs on other files is
    hashed by each call.
    """

    def __init__(self, folder: Path, always: Sequence[str]) -> None:
        memory = Memory(_cache(), verbose=0)
        memory.reduce_size(items_limit=CACHED)
        self._on_disk = {function: memory.cache(function) for function in (_compose, _fingerprints)}
        self._folder = folder
        self._always = tuple(always)
        self._state = _state(folder)
        self._composed = {*hydra_schema.GROUPS, *hydra_schema.CHOICES, *_referred(folder)}

    def jobs(self, points: Sequence[tuple[bool, Mapping[str, Any]]]) -> list[Job]:
        """The jobs of points, of which each is to be searched or run. KeyError if one names a setting that there is
        not.
        """
        chosen = [
            (*(f"{key}={point[key]}" for key in point if key in self._composed), *self._always) for _, point in points
        ]
        composed = self._once(_compose, [(str(self._folder), one, self._state) for one in (*chosen, self._always)])
        usual = composed.pop()[0]
        all_settings = []
        for (_, point), (base, _) in zip(points, composed, strict=True):
            all_settings.append(copy.deepcopy(base))
            for key in point.keys() - self._composed:
                _set(all_settings[-1], key, point[key])
        hashes = self._once(_fingerprints, [(_same(usual, settings), self._state) for settings in all_settings])
        both = zip(points, all_settings, composed, hashes, strict=True)
        return [Job(search, settings, choices, found) for (search, _), settings, (_, choices), found in both]

    def _once(self, function: Callable[..., Any], all_arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
        """What a function returns for each of these; what is not on the disk is computed in parallel."""
        on_disk = self._on_disk[function]
        distinct = dict.fromkeys(all_arguments)
        kept = {arguments: not _reads(arguments[0]) for arguments in distinct}
        new = [one for one in distinct if not (kept[one] and on_disk.check_call_in_cache(*one))]
        work = (delayed(on_disk if kept[arguments] else function)(*arguments) for arguments in new)
        found = Parallel(n_jobs=-1 if len(new) > FEW else 1)(work)
        known = dict(zip(new, found, strict=True))
        known |= {arguments: on_disk(*arguments) for arguments in distinct if arguments not in known}
        return [known[arguments] for arguments in all_arguments]


def _referred(folder: Path) -> set[str]:
    """The keys whose values others take over in these files, such as engine.max_model_len."""
    files = [path.read_text(encoding="utf-8") for path in folder.rglob("*.yaml")]
    return {key for text in files for key in re.findall(r"\$\{([a-z_]+(?:\.[a-z_]+)+)\}", text)}


def _same(usual: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    """What fingerprints depend on: it is the same at every rate, and for every policy of the package."""
    same = {key: settings[key] for key in (*_FINGERPRINTED, "seed")}
    same |= {key: part for key, part in settings.items() if _own_classes(part)}
    rate = None if settings["workload"]["qps"] is None else 1.0
    same["workload"] = {**settings["workload"], "qps": rate}
    return json.dumps({**usual, **same}, sort_keys=True)


def _own_classes(part: Any) -> bool:
    """Whether a node of a config is of a class of the user's."""
    return isinstance(part, dict) and not is_ours(str(part.get("_target_", "block")))


def _reads(arguments: str) -> bool:
    """Whether the settings that `_fingerprints` gets hang on more than the project's own files."""
    try:
        settings = json.loads(arguments)
    except ValueError:  # of `_compose`
        return False
    texts = [text for key in _FINGERPRINTED for text in settings[key].values() if isinstance(text, str) and text]
    named = [Path(text).resolve() for text in texts if Path(text).exists()]
    return (
        settings["workload"]["source"] == "trace"
        or any(map(_own_classes, settings.values()))
        or not all(path.is_relative_to(shipped("artifacts")) for path in named)
    )


def _compose(folder: str, chosen: tuple[str, ...], state: str) -> tuple[dict[str, Any], dict[str, str]]:
    """The resolved config of a choice of files, and all choices."""
    hydra_schema.register()
    with initialize_config_dir(folder, version_base="1.3"):
        made = compose("config", overrides=list(chosen), return_hydra_config=True)
    named = made.hydra.runtime.choices.items()
    choices = {str(key): str(value) for key, value in named if not str(key).startswith("hydra/")}
    keys = [str(key) for key in made if key != "hydra"]
    return config.plain(OmegaConf.masked_copy(made, keys)), choices


def _fingerprints(settings: str, state: str) -> dict[str, str]:
    return fingerprints(config.build(OmegaConf.create(json.loads(settings))))


def _cache() -> Path | None:
    """Where compositions are kept; None if nothing can be kept there."""
    try:
        (path := cache_folder() / "composed").mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):
        return None
    return path if os.access(path, os.W_OK) else None


def _state(folder: Path) -> str:
    """Changes with every file that a config, or what it names, is made of: settings, code, fits, sketches."""
    folders = (folder, PACKAGE, *(shipped("artifacts", name) for name in ("latency", "workloads", "lengths")))
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


def attach_stored(jobs: Iterable[Job]) -> None:
    """Give each job what is stored of it."""
    stored: dict[str, list[Run]] = defaultdict(list)
    for run in runs(root=DEFAULT_ROOT):
        stored[str(run.get("config_hash", None))].append(run)
    for job in jobs:
        job.stored = job.find(stored)


def distinct(jobs: Iterable[Job]) -> list[Job]:
    """Each job once, the longest first, so that no core is idle at the end."""
    once = {job.identity: job for job in jobs}.values()
    return sorted(once, key=lambda job: (job.requests, job.settings["cluster"].get("num_gpus", 0)), reverse=True)


def run_jobs(missing: Sequence[Job], *, at_once: int, fresh: bool = False) -> list[str]:
    """Do the jobs, `at_once` in parallel (-1: one a core); returns what went wrong, a line for each that did.

    fresh: search even what is stored; runs always are made.
    """
    if not missing:
        return []
    for job in {job.choices.get("scheduler"): job for job in missing}.values():
        with suppress(ValueError):  # one that cannot be built is told with the others
            # Here, since joblib ends a worker that grows as much as compiling makes it grow.
            compile_ahead(config.build(OmegaConf.create(job.settings)))
    failures = []
    work = (delayed(_one)(job, os.getpid(), fresh) for job in missing)
    with progress(Console(stderr=True), "requests", sum(job.requests for job in missing)) as advance:
        for requests, error in Parallel(n_jobs=at_once, return_as="generator_unordered")(work):
            advance(requests)
            if error:
                failures.append(error)
    return failures


def _one(job: Job, main: int, fresh: bool) -> tuple[int, str]:
    """A job, in a process of its own; returns its requests and what went wrong."""
    exit_with_parent(main)
    settings = OmegaConf.create(job.settings)
    settings.capacity.fresh = fresh
    gc.disable()  # what a run leaves goes by itself; a pass over all of it, while it is stored, takes 3 % of the run
    try:
        if job.search:
            if (trouble := search_one(settings, job.choices).trouble) is not None:
                raise trouble
        else:
            execute(settings, job.choices, quiet=True)
    except Exception as error:  # the others go on, and what lacks is told at the end
        return job.requests, f"{job}: {explain(error)}"
    finally:
        gc.enable()
    return job.requests, ""
