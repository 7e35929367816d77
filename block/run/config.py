"""RunConfig: what a run is made of, checked before anything starts."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

from hydra.errors import HydraException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from block.backends.simulated import Simulated
from block.backends.vllm import VLLM
from block.cluster.fleet import RealBackend
from block.cluster.migration import MigrationConfig
from block.cluster.provisioner import Elastic, Static
from block.cluster.spec import ClusterConfig, Mixed, Testbed
from block.core.errors import one_line
from block.core.user_code import is_ours, location
from block.dispatch import policies, policy_checks
from block.dispatch.config import DispatchConfig
from block.engine.config import EngineConfig
from block.hardware.catalogue import Model
from block.hardware.devices import visible_gpus
from block.lengths import Lengths
from block.run.config_errors import ConfigError, explain, no_such_key
from block.run.hydra_schema import CHOICES, GROUPS, Root, hint_for
from block.store.wandb import Tracking
from block.workload.spec import Workload


@dataclass(frozen=True)
class RunConfig:
    """One run, resolved and checked.

    policy: what the key `scheduler` chooses. It may have a state: a RunConfig is built for each run.
    peers: policies of the dispatchers beside the first, each with a state of its own; where there are too few, these
        share `policy`.
    seed: of every random generator of the run. sample_every_s: interval of the instances' time series.
    replay_share: share of the requests that are tried on copies of all instances (`block.dispatch.counterfactual`).
    """

    policy: policies.Policy
    model: Model
    cluster: ClusterConfig | Mixed
    engine: EngineConfig
    workload: Workload
    lengths: Lengths
    backend: Simulated | RealBackend
    dispatch: DispatchConfig
    tracking: Tracking
    migration: MigrationConfig = field(default_factory=MigrationConfig)
    provisioner: Static | Elastic = field(default_factory=Static)
    seed: int = 0
    sample_every_s: float = 1.0
    replay_share: float = 0.0
    peers: tuple[policies.Policy, ...] = ()

    def __post_init__(self) -> None:
        policy_checks.check_policy(self.policy)
        if self.seed < 0:
            raise ValueError(f"seed={self.seed}: must be 0 or more")
        if not 0 < self.sample_every_s < float("inf"):
            raise ValueError(f"sample_every_s={self.sample_every_s}: must be greater than 0")
        if not 0 <= self.replay_share <= 1:
            raise ValueError(f"replay_share={self.replay_share}: must be between 0 and 1")
        if self.replay_share > 0 and not self.backend.virtual:
            raise ValueError(f"replay_share={self.replay_share}: only simulated instances can be copied")
        longest = self.workload.max_total_tokens
        if longest > self.engine.max_model_len:
            raise ValueError(
                f"workload.max_total_tokens={longest}: exceeds engine.max_model_len={self.engine.max_model_len}; "
                f"set both to the model's length"
            )
        if not self.backend.virtual and self.engine.version != "v1":
            raise ValueError(f"engine.version={self.engine.version}: real engines schedule by v1; take engine=vllm_v1")
        self._check_provisioner()
        self._check_mixed()
        if self.migration.interval_s > 0:
            if not isinstance(self.backend, Simulated):
                raise ValueError(
                    f"migration.interval_s={self.migration.interval_s}: only backend=simulated migrates; take 0"
                )
            if self.engine.async_scheduling:
                raise ValueError("engine.async_scheduling=True: requests do not migrate then; take migration=none")
            if self.engine.enable_prefix_caching:
                raise ValueError(
                    "engine.enable_prefix_caching=True: requests do not migrate then; take false, or migration=none"
                )
            if self.dispatch.dispatchers > 1:
                raise ValueError(
                    f"dispatch.dispatchers={self.dispatch.dispatchers}: none would know what moved; take migration=none"
                )

    def _check_provisioner(self) -> None:
        scaling = self.provisioner
        if not isinstance(scaling, Elastic):
            return
        if scaling.forecasts and self.policy.needs is not policies.Needs.FORECAST:
            name = type(scaling).__name__.lower()
            raise ValueError(
                f"provisioner={name}: needs forecasts; choose a policy that makes them, such as scheduler=block"
            )
        for key, value, off in (
            ("replay_share", self.replay_share, 0),
            ("migration.interval_s", self.migration.interval_s, 0),
            ("dispatch.dispatchers", self.dispatch.dispatchers, 1),
        ):
            if value > off:
                raise ValueError(f"{key}={value}: counts on all instances; take provisioner=static")

    def _check_mixed(self) -> None:
        if not isinstance(self.cluster, Mixed):
            return
        if not self.backend.virtual:
            raise ValueError("cluster.pools: only the simulated testbed mixes GPUs; take backend=simulated")
        for key, value in (
            ("migration.interval_s", self.migration.interval_s),
            ("dispatch.correction_steps", self.dispatch.correction_steps),
        ):
            if value > 0:
                raise ValueError(f"{key}={value}: wants instances that are alike; take 0, or a cluster of one kind")

    @property
    def testbed(self) -> Testbed:
        """The testbed that the backend is to bring up; ValueError if the model does not fit."""
        initial = self.provisioner.initial if isinstance(self.provisioner, Elastic) else None
        return Testbed(self.model, self.cluster, self.engine, self.seed, self.migration, initial)


def build(config: DictConfig) -> RunConfig:
    """Construct what `config` describes; ConfigError if it cannot be."""
    check_keys(config)
    _check_numbers(OmegaConf.to_container(config))
    keys = ["scheduler", *(f.name for f in dataclasses.fields(RunConfig) if f.name not in ("policy", "peers"))]
    try:
        parts = {key: config[key] for key in keys}
        for key in (*GROUPS, *CHOICES, "dispatch"):
            if not isinstance(parts[key], DictConfig):
                raise ConfigError(f"{key}={'null' if parts[key] is None else parts[key]}: {hint_for(key)}")
        groups = {key: node(part) for key, part in parts.items() if isinstance(part, DictConfig)}
        peers = tuple(node(parts["scheduler"]) for _ in range(1, groups["dispatch"].dispatchers))
        values = {**parts, **groups, "peers": peers}
        run = RunConfig(policy=values.pop("scheduler"), **values)
        run.testbed  # noqa: B018 — raises if the model does not fit
        run = _on_real_gpus(run)
    except (ValueError, OmegaConfBaseException) as error:
        raise ConfigError(explain(error)) from error
    return run


def check_keys(config: DictConfig) -> None:
    """ConfigError if the root of `config` has a key that there is not."""
    _refuse_unknown(config, [f.name for f in dataclasses.fields(Root)])


def _check_numbers(part: Any, key: str = "") -> None:
    """ConfigError for a number that no arithmetic of this package's would survive, whatever it stands for.

    part: a node of a config in plain containers, called `key`. What is of a class of the user's is theirs to check.
    """
    if isinstance(part, dict):
        if is_ours(str(part.get("_target_", "block"))):
            for name, value in part.items():
                _check_numbers(value, f"{key}.{name}" if key else str(name))
    elif isinstance(part, list):
        for value in part:
            _check_numbers(value, key)
    elif isinstance(part, int | float) and _is_beyond(part):
        raise ConfigError(f"{key}={part}: must be between ±1e-12 and ±1e12, or 0")


def _is_beyond(number: float) -> bool:
    if isinstance(number, int):
        return abs(number) >= 1 << 53
    return math.isfinite(number) and number != 0 and not 1e-12 <= abs(number) <= 1e12


def _on_real_gpus(run: RunConfig) -> RunConfig:
    """What backend=auto means: the same on real engines if there are GPUs for it. These schedule by v1.

    ValueError if the user has set what only a simulation has.
    """
    backend = run.backend
    if not (isinstance(backend, Simulated) and backend.auto and visible_gpus() >= run.cluster.num_gpus):
        return run
    if isinstance(run.cluster, Mixed):  # nothing here knows which of the GPUs is which
        return run
    kept = {f.name for f in dataclasses.fields(VLLM)}
    values = {f.name: getattr(backend, f.name) for f in dataclasses.fields(Simulated) if f.name != "auto"}
    for key, value in values.items():
        if key not in kept and value != getattr(backend.auto, key):
            told = list(value) if isinstance(value, tuple) else value
            raise ValueError(f"backend.{key}={told}: real GPUs are here, which cannot do it; take backend=simulated")
    engine = dataclasses.replace(run.engine, version="v1", watermark=0.0)
    real = VLLM(**{key: value for key, value in values.items() if key in kept})
    return dataclasses.replace(run, engine=engine, backend=real)


def node(part: DictConfig) -> Any:
    """The object that one node describes; ConfigError if it cannot be."""
    _refuse_unknown(part, [f.name for f in dataclasses.fields(class_of(part))])
    try:
        return instantiate(part, _convert_="all")
    except (HydraException, OmegaConfBaseException) as error:
        cause = error.__cause__
        where = "" if cause is None else location(cause)
        if where and not str(cause).startswith(f"{part._get_full_key(None)}."):  # a class of the user's does not work
            key = part._get_full_key("_target_")
            raise ConfigError(f"{key}={part['_target_']}: {one_line(cause or error)} ({where})") from error
        try:
            plain(part)
        except OmegaConfBaseException as unresolved:  # which says of what key it is
            raise ConfigError(explain(unresolved)) from error
        raise ConfigError(explain(error)) from error


def class_of(part: DictConfig) -> type:
    """The dataclass that a node's `_target_` names: one of this package, or of a module of the user's."""
    key, group = str(part._get_full_key("_target_")), str(part._get_full_key(None))
    if "_target_" not in part:
        raise ConfigError(f"{group}: its file lacks the line `defaults: [/schema/{group}@_here_, _self_]`")
    name = str(part["_target_"])
    module, dot, attribute = name.rpartition(".")
    if not dot:
        raise ConfigError(f"{key}={name}: not of the form module.Class")
    try:
        cls = getattr(import_module(module), attribute)
    except (Exception, SystemExit) as error:  # importing a module of the user's runs it
        where = location(error)
        raise ConfigError(f"{key}={name}: {f'{one_line(error)} ({where})' if where else error}") from error
    if not (isinstance(cls, type) and dataclasses.is_dataclass(cls)):
        raise ConfigError(f"{key}={name}: must be a dataclass, whose fields are the keys of {group}")
    return cls


def _refuse_unknown(part: DictConfig, known: Sequence[str]) -> None:
    """Hydra adds any key that is given with a +, and so must be told here which there are."""
    for key in map(str, part):
        if key not in known and key != "_target_":
            raise ConfigError(no_such_key(str(part._get_full_key(key)), key, known, root=part._get_root()))


def plain(config: DictConfig) -> dict[str, Any]:
    """The resolved config in plain containers."""
    return OmegaConf.to_container(config, resolve=True, throw_on_missing=True)  # type: ignore[return-value]
