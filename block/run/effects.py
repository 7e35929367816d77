"""Which keys have an effect: one that was given and cannot have any is refused, not passed over in silence.

`READ` has the keys that each command reads, `RULES` those of them that have no effect all the same, and when. A key is
given if it stands on the command line, and is left alone if its value is the default, which is in force anyway. What a
file of conf/, or of the user's, says is for every run that takes it, and is not looked at.

A sweep is one command for many runs: a key is refused only if it has no effect in any of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from fnmatch import fnmatchcase
from functools import cache
from typing import Any

import yaml  # type: ignore[import-untyped]
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from block.backends.simulated import Simulated
from block.backends.vllm import VLLM
from block.backends.vllm_cpu import VLLMCPU
from block.cluster.spec import Mixed
from block.core.user_code import is_ours
from block.dispatch import policies, routers
from block.dispatch.policies import Needs
from block.lengths import Constant, Oracle, Reader
from block.lengths.roberta import RoBERTa
from block.run.config import RunConfig, build, check_keys, class_of
from block.run.config_errors import ConfigError
from block.run.hydra_schema import CHOICES, CONF, GROUPS
from block.workload import prompts

RUNS = ("serve", "capacity")


@dataclass(frozen=True)
class Rule:
    """Keys that have no effect `when` a run is so, and why, with the way out. keys: patterns, as in a shell.

    of: the commands that it holds for.
    """

    keys: tuple[str, ...]
    when: Callable[[RunConfig], Any]
    why: str
    of: tuple[str, ...] = RUNS


def _counts(run: RunConfig) -> bool:
    return run.policy.needs is Needs.COUNTS


def _forecasts(run: RunConfig) -> bool:
    return run.policy.needs is Needs.FORECAST


def _ours(run: RunConfig) -> bool:
    return is_ours(type(run.policy).__module__)


_READS_LENGTHS = (policies.Block, policies.BlockCache, policies.LeastTokens, routers.Preble)


def _reads_lengths(run: RunConfig) -> bool:
    """Whether the policy looks at what is believed of response lengths, which one of the user's may."""
    return not _ours(run) or isinstance(run.policy, _READS_LENGTHS)


def _attached(run: RunConfig) -> bool:
    return isinstance(run.backend, VLLM) and bool(run.backend.urls)


def _from_file(run: RunConfig) -> bool:
    return getattr(run.backend, "latency_model", None) is not None


def _prompts(run: RunConfig) -> bool:
    path = run.workload.trace_path
    return run.workload.source == "trace" and path is not None and prompts.is_pairs(path)


_FORECASTING = "this policy makes no forecasts; take one that does, such as scheduler=block"
_SERVERS = "the servers of backend.urls run already, with settings of their own; give it to them"

RULES = (
    Rule(
        ("dispatch.ledger", "dispatch.snapshot_interval_s"),
        _counts,
        "this policy only counts, and takes no snapshots; take one that does, such as scheduler=block",
        (*RUNS, "gateway"),
    ),
    Rule(
        ("dispatch.ledger",),
        lambda run: isinstance(run.policy, policies.INFaaS),
        "this policy does not look at requests in transit; take one that does, such as scheduler=block",
        (*RUNS, "gateway"),
    ),
    Rule(
        ("dispatch.prefixes",),
        lambda run: _counts(run) or not run.engine.enable_prefix_caching,
        "nobody asks what is cached; take engine=vllm_v1, which caches, and a policy that does, such as "
        "scheduler=block_cache",
    ),
    Rule(
        ("dispatch.prefixes",),
        _counts,
        "this policy does not ask what is cached; take one that does, such as scheduler=block_cache",
        ("gateway",),
    ),
    Rule(
        ("gateway.tokenizer", "gateway.tokenize_timeout_s"),
        lambda run: _counts(run) and not hasattr(run.policy, "block_size"),
        "this policy looks at no prompts; take one that does, such as scheduler=block_cache",
        ("gateway",),
    ),
    Rule(
        ("dispatch.correction_steps", "dispatch.forecast_noise", "backend.predictor_gpu", "lengths.outrun_share"),
        lambda run: not _forecasts(run),
        _FORECASTING,
        (*RUNS, "gateway"),
    ),
    Rule(
        ("backend.latency_model", "backend.step_time_factor", "backend.step_overhead_s"),
        lambda run: isinstance(run.backend, VLLM | VLLMCPU) and not _forecasts(run),
        f"only forecasts follow from it, and {_FORECASTING}",
        (*RUNS, "gateway"),
    ),
    Rule(
        ("lengths", "lengths.*"),
        lambda run: not _reads_lengths(run) and not isinstance(run.lengths, Oracle),
        "this policy does not look at lengths of responses; take one that does, such as scheduler=block",
        (*RUNS, "gateway"),
    ),
    Rule(
        ("lengths", "lengths.*"),
        lambda run: not isinstance(run.lengths, Reader),
        "it reads no prompts; take one that does, such as lengths=compact",
        ("gateway",),
    ),
    Rule(
        ("scheduler.kappa", "scheduler.gamma", "scheduler.others"),
        lambda run: not run.engine.enable_prefix_caching,
        "it prices what is not cached, and nothing is; take engine=vllm_v1, which caches",
    ),
    Rule(
        ("lengths.encoder",),
        lambda run: isinstance(run.lengths, RoBERTa),
        "only scripts/train_lengths.py reads it; lengths.path is the trained model",
        (*RUNS, "gateway"),
    ),
    Rule(
        ("lengths.max_prompt_tokens", "lengths.batch_size", "lengths.device"),
        lambda run: isinstance(run.lengths, RoBERTa) and not _prompts(run),
        "this workload has no prompts to read; take workload=trace with a data set that has, such as gpteacher",
    ),
    Rule(
        ("lengths.spread",),
        lambda run: isinstance(run.lengths, Constant),
        "no policy looks at what an estimate claims to be off by",
        (*RUNS, "gateway"),
    ),
    Rule(
        ("migration.*",),
        lambda run: run.migration.interval_s == 0,
        "nothing migrates; take migration=llumnix, or migration.interval_s greater than 0",
    ),
    Rule(
        ("tracking.[!m]*",),  # but its mode
        lambda run: run.tracking.mode == "disabled",
        "nothing goes to W&B; leave tracking=none away",
    ),
    Rule(
        ("provisioner.drain_ttft_s",),
        lambda run: getattr(run.provisioner, "drain_after_s", 0) is None,
        "no instance is drained; give provisioner.drain_after_s, too",
    ),
    Rule(("engine", "engine.*", "cluster.num_gpus"), _attached, _SERVERS),
    Rule(
        ("backend.arguments", "backend.ready_timeout_s", "backend.launcher", "backend.placement"), _attached, _SERVERS
    ),
    Rule(
        ("backend.placement",),
        lambda run: getattr(run.backend, "launcher", None) != "ray",
        "all servers are on one host; take backend.launcher=ray",
    ),
    Rule(
        ("engine.gpu_memory_utilization",),
        lambda run: run.engine.num_gpu_blocks is not None and not isinstance(run.backend, VLLM),
        "engine.num_gpu_blocks says how many KV blocks there are; take one of the two",
    ),
    Rule(
        ("engine.scheduler_reserve_full_isl",),
        lambda run: run.engine.version == "v0",
        "only vLLM V1 reserves so; take engine=vllm_v1",
    ),
    Rule(
        ("engine.scheduler_reserve_full_isl",),
        lambda run: not run.backend.virtual,
        "real engines reserve as they do by default; take backend=simulated",
    ),
    Rule(
        ("backend.step_time_factor", "backend.step_overhead_s"),
        _from_file,
        "backend.latency_model says how long a step takes; take one of the two",
        (*RUNS, "gateway"),
    ),
    Rule(
        ("cluster.gpu",),
        lambda run: isinstance(run.backend, VLLMCPU) or (_attached(run) and (_from_file(run) or not _forecasts(run))),
        "the step times are not its own here, and the servers know how many KV blocks they have",
    ),
    Rule(
        ("model.hf_id",),
        lambda run: not isinstance(run.backend, VLLM) or _attached(run),
        "no server is started with it; take backend=vllm",
    ),
    Rule(
        ("model.tensor_parallel",),
        lambda run: isinstance(run.cluster, Mixed) and all(pool.tensor_parallel for pool in run.cluster.pools),
        "each of cluster.pools has its own",
    ),
    Rule(
        ("backend.slowdown",),
        lambda run: isinstance(run.backend, Simulated) and len(run.backend.slowdown) > run.testbed.instances,
        "more factors than there are instances; take fewer, or a larger cluster",
    ),
    Rule(
        ("model", "model.*", "cluster", "cluster.*", "backend", "backend.*"),
        lambda run: not _forecasts(run),
        f"only forecasts follow from it, and {_FORECASTING}",
        ("gateway",),
    ),
    Rule(
        (
            *("model.hf_id", "cluster.num_gpus", "backend.urls", "backend.arguments", "backend.ready_timeout_s"),
            *("backend.time_dilation", "backend.stream_interval", "backend.at_once", "backend.launcher"),
            "backend.placement",
            *("backend.step_noise", "backend.slowdown", "backend.dispatch_delay_s"),
        ),
        lambda run: True,
        "a gateway starts nothing; gateway.urls are its servers",
        ("gateway",),
    ),
    Rule(
        ("backend.shared_memory",),
        lambda run: True,
        "for experiments; a gateway reads shared memory wherever it can",
        ("gateway",),
    ),
)

_RUN = (*GROUPS, *CHOICES, "dispatch", "seed")
_PAIRS = ("estimation.tokenizer", "estimation.train", "estimation.test")
_TABLE = ("estimation.data_sets", "estimation.estimators", "estimation.scores")
_TRAINING = ("epochs", "batch_size", "learning_rate", "patience", "checkpoint_every")
READ: Mapping[str, tuple[str, ...]] = {
    "serve": (*_RUN, "sample_every_s", "replay_share", "runs_dir", "command"),
    "evaluate_lengths": ("command", *_PAIRS, *_TABLE),
    "capacity": (*_RUN, "capacity"),
    "gateway": ("scheduler", "model", "cluster", "backend", "lengths", "dispatch", "seed", "gateway"),
    "train_lengths": (
        *("lengths", "seed", "tracking", "estimation.data", *_PAIRS),
        *(f"estimation.{key}" for key in (*_TRAINING, "force")),
    ),
}
"""What each command reads, by how its keys begin: run.py by what the key `command` says, and the others."""
_NAMES = {
    "serve": "run.py",
    "evaluate_lengths": "command=evaluate_lengths",
    "capacity": "scripts/capacity.py",
    "gateway": "python -m block.gateway",
    "train_lengths": "scripts/train_lengths.py",
}
_UNREAD = {
    ("capacity", "tracking"): "searches are not mirrored",
    ("capacity", "workload.qps"): "the search looks for it; capacity.low and capacity.high say where it begins",
    ("train_lengths", "lengths.outrun_share"): "it is for runs",
}
_OBJECTIVE = "only a sweeper that searches is told of it"


def without_effect(
    config: DictConfig, given: Iterable[str], command: str, run: RunConfig | None = None
) -> dict[str, str]:
    """Of the overrides `given`, the keys that have no effect in the job that `config` describes, and what to say.

    command: a key of READ. run: what `config` builds, if that is known. ConfigError if it cannot be built, or has keys
    that there are not.
    """
    check_keys(config)
    found = {}
    for key, value, text in _keys(given):
        if _as_usual(config, key, value):
            continue
        why = _UNREAD.get((command, key)) or _UNREAD.get((command, key.partition(".")[0]))
        if not why and not any(f"{key}.".startswith(f"{read}.") for read in READ[command]):
            readers = [_NAMES[name] for name, keys in READ.items() if any(f"{key}.".startswith(f"{k}.") for k in keys)]
            why = f"not read by {_NAMES[command]}; {', '.join(readers)} {'does' if len(readers) == 1 else 'do'}"
            why = _OBJECTIVE if key == "objective" else why
        elif not why and command in (*RUNS, "gateway"):
            run = run or build(config)
            why = next((rule.why for rule in RULES if _holds(rule, key, command) and rule.when(run)), None)
        if why:
            found[key] = f"{text}: has no effect: {why}"
    return found


def _holds(rule: Rule, key: str, command: str) -> bool:
    return command in rule.of and any(fnmatchcase(key, pattern) for pattern in rule.keys)


def refuse(config: DictConfig, command: str, run: RunConfig | None = None) -> None:
    """ConfigError if the Hydra job at hand was given a key that has no effect. Jobs of sweeps are let be."""
    if HydraConfig.initialized() and HydraConfig.get().mode is RunMode.RUN:
        for line in without_effect(config, HydraConfig.get().overrides.task, command, run).values():
            raise ConfigError(line)


def refuse_in_all(jobs: Iterable[tuple[DictConfig, Sequence[str]]], command: str) -> None:
    """ConfigError if a key has no effect in any of the jobs of a sweep, of which each is its config and the overrides.

    Jobs that cannot be built do not count: that is told when it is their turn.
    """
    idle: dict[str, str] | None = None
    for config, given in jobs:
        try:
            named = str(config.command) if command == "serve" else command
            found = without_effect(config, given, named if named in READ else command)
        except ConfigError:
            continue
        idle = found if idle is None else {key: line for key, line in idle.items() if key in found}
        if not idle:
            return
    for line in (idle or {}).values():
        raise ConfigError(f"{line} (in none of the jobs)")


def _keys(given: Iterable[str]) -> Iterator[tuple[str, Any, str]]:
    """The keys of overrides, in full, each with its value and its text."""
    for override in OverridesParser.create().parse_overrides(list(given)):
        name = override.key_or_group
        if override.is_delete() or name in ("experiment", "hydra") or name.startswith(("hydra.", "hydra/")):
            continue
        value = override.value()
        if isinstance(value, dict):
            yield from ((key, one, f"{key}={one}") for key, one in _flat(value, name))
        else:
            yield name, value, str(override.input_line)


def _flat(value: Mapping[Any, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, one in value.items():
        key = f"{prefix}.{name}"
        yield from _flat(one, key) if isinstance(one, dict) else [(key, one)]


def _as_usual(config: DictConfig, key: str, chosen: Any) -> bool:
    """Whether a key has the value that it has by default, or asks for nothing."""
    group, _, name = key.partition(".")
    if name.startswith("_"):
        return True  # a class
    if key in (*GROUPS, *CHOICES):
        return bool(chosen in (_default_choices().get(key), "none"))
    value = OmegaConf.select(config, key)
    if not name:
        return bool(value == ConfigStore.instance().load("run_schema.yaml").node[key])
    field = next((one for one in fields(class_of(config[group])) if one.name == name), None)
    if field is None:  # inside a list
        return False
    default = field.default if field.default_factory is MISSING else field.default_factory()
    return bool(list(value) == list(default) if isinstance(default, tuple) else value == default)


@cache
def _default_choices() -> dict[str, str]:
    """The choices of conf/config.yaml."""
    entries = yaml.safe_load((CONF / "config.yaml").read_text())["defaults"]
    return {key: value for entry in entries if isinstance(entry, dict) for key, value in entry.items()}
