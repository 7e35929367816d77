"""The command of scripts/capacity.py: search for the capacity of what a config describes, or find it stored."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from joblib import Parallel, delayed
from omegaconf import DictConfig
from rich.console import Console

from block.core.files import NotStored, check_writable, reason
from block.core.user_code import user_errors
from block.run import effects
from block.run.capacity import NoSuchRate, crossings
from block.run.config import build, node, plain
from block.run.config_errors import ConfigError
from block.run.console import progress, tell
from block.run.fingerprints import fingerprints, own_files
from block.run.hydra_schema import filed_choices, own_choices
from block.run.replay import Outcome, replay, requests_of
from block.run.sweep import exit_with_parent
from block.store import provenance, searches
from block.store.searches import Search
from block.store.summary import interval, summarise
from block.store.tables import request_columns


def search(config: DictConfig, choices: Mapping[str, str]) -> dict[str, Any]:
    """Find the capacity of what `config` describes (its node `capacity`) and print it; returns, for each objective, the
    mean capacity_qps, its half_width_qps and those by_seed (NaN where the latency crosses it nowhere, and then the mean
    is None).

    Several seeds run in parallel, one process each. ConfigError if the configuration is wrong; NotStored, after
    printing, if a search could not be stored where it belongs.
    """
    wanted = node(config.capacity)
    run = build(config)  # tell what is wrong before any process starts
    effects.refuse(config, "capacity", run)
    if run.workload.source == "trace":
        tell(requests_of(run)[1], Console(stderr=True), searched=True)
    choices = filed_choices(config, choices)
    seeds = range(config.seed, config.seed + wanted.seeds)
    console = Console()
    found = []
    files = own_choices()  # which only this process knows
    jobs = (delayed(_search)(config, choices, files, seed, os.getpid()) for seed in seeds)
    with progress(Console(stderr=True), "seeds", len(seeds)) as advance:
        alone = len(seeds) == 1  # and needs no process of its own, which takes two seconds to start
        for one in Parallel(n_jobs=1 if alone else -1, return_as="generator")(jobs):
            found.append(one)
            advance(1)
    objectives = {}
    for slo in wanted.slo_s:
        rates = [one.capacity(slo) for one in found]
        gaps = [why for one in found if (why := one.gap(slo)) is not None]
        mean, half = (None, None) if gaps else interval(rates)
        objectives[f"{slo:g}"] = {"capacity_qps": mean, "half_width_qps": half, "by_seed": rates}
        what = f"{choices['scheduler']} on {choices['model']}"
        how = f"{wanted.metric} ≤ {slo:g} s"
        if mean is None:
            said = f"no capacity at {how}: {gaps[0]} ({len(gaps)} of {len(found)} seeds)"
        else:
            spread = "" if half is None else f" ± {half:.2f}"
            each = ", ".join(f"{rate:.2f}" for rate in rates)
            said = f"{mean:.2f}{spread} requests/s at {how} (95 % interval; by seed: {each})"
        console.print(f"{what}: {said}", highlight=False, soft_wrap=True)
    for one in found:
        stored = f" stored {one.created}, --fresh searches anew" if one.again else ""
        console.print(f"[dim]{one.path}{stored}[/dim]", highlight=False, soft_wrap=True)
    if troubles := [str(one.trouble) for one in found if one.trouble is not None]:
        raise NotStored("; ".join(dict.fromkeys(troubles)))
    return objectives


def _search(config: DictConfig, choices: Mapping[str, str], files: Sequence[Path], seed: int, main: int) -> Search:
    exit_with_parent(main)
    seeded = config.copy()
    seeded.seed = seed
    return search_one(seeded, choices, files)


def search_one(config: DictConfig, choices: Mapping[str, str], files: Sequence[Path] = ()) -> Search:
    """The search that `config` describes for its own seed: the stored one, or a new one, which is stored.

    files: those of the user's that `config` was composed of.

    All is built anew for each rate that is tried, as for a run. ConfigError if the configuration is wrong.
    """
    run = build(config)
    wanted = node(config.capacity)
    settings, hashes = plain(config), fingerprints(run)
    if not wanted.fresh and (stored := searches.find(settings, hashes)) is not None:
        return stored
    try:
        check_writable(searches.DEFAULT_ROOT)
    except OSError as error:
        raise ConfigError(f"{searches.DEFAULT_ROOT}: {reason(error)}") from error

    def latency(qps: float) -> float:
        settings = config.copy()
        settings.workload.qps = qps
        try:
            at_rate = build(settings)
        except ConfigError as error:  # it is sound at another rate
            raise NoSuchRate(str(error)) from error
        outcome = Outcome()
        with user_errors():
            replay(at_rate, requests_of(at_rate)[0], outcome)
        assert outcome.history is not None
        value = summarise(request_columns(outcome.history.records)).get(wanted.metric)
        if value is None:
            raise ConfigError(f"capacity.metric={wanted.metric}: a run's summary has no such number")
        return float(value)

    try:
        found = crossings(latency, wanted)
    except NoSuchRate as error:
        raise ConfigError(f"capacity.low={wanted.low:g}: {error}") from error
    document = {
        "created": datetime.now(UTC).isoformat(),
        "choices": {
            key: value for key, value in filed_choices(config, choices).items() if not key.startswith("hydra/")
        },
        "config": settings,
        "hashes": hashes,
        "git": provenance.origin([*own_files(run), *files]),
        "capacities_qps": {
            f"{slo:g}": None if slo in found.reasons else rate
            for slo, rate in zip(wanted.slo_s, found.rates, strict=True)
        },
        "gaps": {f"{slo:g}": why for slo, why in found.reasons.items()},
        "points": found.points,
    }
    return searches.store(document)
