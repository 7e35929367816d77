"""What Hydra knows of the configuration: the groups, their classes as schemas, and what a composition was made of.

Each Hydra group is one frozen dataclass is one constructor; defaults and ranges live there and nowhere else. `register`
shows those dataclasses to Hydra as ``schema/<group>[/<choice>]``, with the class as `_target_`, so that every key is
known and typed; the yaml files under ``conf/`` add published and measured values only.
"""

from __future__ import annotations

import copyreg
import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import yaml  # type: ignore[import-untyped]
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from block.backends.emulated import Emulated
from block.backends.simulated import Simulated
from block.backends.vllm import VLLM
from block.backends.vllm_cpu import VLLMCPU
from block.cluster.migration import MigrationConfig
from block.cluster.provisioner import Preempt, Relief, Static
from block.cluster.spec import ClusterConfig, Mixed
from block.core import paths
from block.dispatch import policies, routers
from block.dispatch.config import DispatchConfig
from block.engine.config import EngineConfig
from block.gateway.config import GatewayConfig
from block.hardware.catalogue import Model
from block.lengths import Constant, Injected, Noisy, Oracle
from block.lengths.compact import Compact
from block.lengths.estimation import EstimationConfig
from block.lengths.roberta import RoBERTa
from block.run.capacity import CapacityConfig
from block.store.wandb import Tracking
from block.workload.spec import Workload

CONF = paths.shipped("conf")

# Groups whose choices are values of one class, and groups whose choices are classes.
GROUPS: dict[str, type] = {
    "model": Model,
    "cluster": ClusterConfig,
    "engine": EngineConfig,
    "migration": MigrationConfig,
    "workload": Workload,
    "tracking": Tracking,
}
CHOICES: dict[str, dict[str, type]] = {
    "scheduler": {
        "random": policies.Random,
        "round_robin": policies.RoundRobin,
        "min_qpm": policies.MinQPM,
        "least_requests": policies.LeastRequests,
        "infaas": policies.INFaaS,
        "llumnix_minus": policies.LlumnixMinus,
        "llumnix": policies.Llumnix,
        "least_tokens": policies.LeastTokens,
        "block": policies.Block,
        "block_cache": policies.BlockCache,
        "cache_aware": routers.CacheAware,
        "llmd": routers.LLMD,
        "dynamo": routers.Dynamo,
        "lmetric": routers.LMetric,
        "aibrix": routers.AIBrix,
        "preble": routers.Preble,
        "sticky": routers.Sticky,
    },
    "lengths": {
        "oracle": Oracle,
        "noisy": Noisy,
        "injected": Injected,
        "constant": Constant,
        "compact": Compact,
        "roberta": RoBERTa,
    },
    "backend": {"simulated": Simulated, "vllm": VLLM, "vllm_cpu": VLLMCPU, "emulated": Emulated},
    "provisioner": {"static": Static, "preempt": Preempt, "relief": Relief},
}


@dataclass
class Root:
    """The keys of the config, and the types of those that are no group."""

    scheduler: Any = None
    model: Any = None
    cluster: Any = None
    engine: Any = None
    migration: Any = None
    workload: Any = None
    lengths: Any = None
    backend: Any = None
    tracking: Any = None
    provisioner: Any = None
    dispatch: Any = field(default_factory=lambda: schema(DispatchConfig))
    capacity: Any = field(default_factory=lambda: schema(CapacityConfig))  # read by scripts/capacity.py only
    command: str = "serve"  # what run.py does: a name of execute.COMMANDS
    objective: Any = "ttft_p99_s"  # what sweepers that search are told of a run: a number of its summary, or a list
    seed: int = 0
    sample_every_s: float = 1.0
    replay_share: float = 0.0
    runs_dir: str = "artifacts/runs"
    gateway: Any = field(default_factory=lambda: schema(GatewayConfig))  # read by block.gateway only
    estimation: Any = field(default_factory=lambda: schema(EstimationConfig))  # how lengths are estimated


def schema(cls: type) -> type:
    """A mutable twin of the frozen dataclass `cls` for Hydra, with the class's own name as `_target_`.

    Launchers pickle it for their processes.
    """
    hints = get_type_hints(cls)
    fields: list[tuple[str, Any, Any]] = [
        (f.name, _mutable(hints[f.name]), field(default=f.default, default_factory=_default(f, hints[f.name])))
        for f in dataclasses.fields(cls)
    ]
    fields.append(("_target_", str, field(default=f"{cls.__module__}.{cls.__qualname__}")))
    return dataclasses.make_dataclass(cls.__name__, fields, kw_only=True)


# A field without a default says so by this one object, which a pickled class must not have a copy of.
copyreg.pickle(type(dataclasses.MISSING), lambda missing: "MISSING")


@cache
def _nested(cls: type) -> type:
    """One schema of a class, however often it is asked for: a field's type and its default must have the same."""
    return schema(cls)


def _default(one: dataclasses.Field[Any], hint: Any) -> Any:
    """What makes the default of a field: of one that is a dataclass, its schema."""
    return _mutable(hint) if dataclasses.is_dataclass(hint) else one.default_factory


def _mutable(hint: Any) -> Any:
    """A schema for a dataclass, a list of them for a tuple of dataclasses; any other type as it is."""
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return _nested(hint)
    item, *_ = get_args(hint) or (None,)
    return list[schema(item)] if get_origin(hint) is tuple and dataclasses.is_dataclass(item) else hint  # type: ignore


@cache
def register() -> None:
    """Show the dataclasses to Hydra, once for a process."""
    store = ConfigStore.instance()
    store.store(name="run_schema", node=Root)
    for path, cls in schemas().items():
        group, _, name = f"schema/{path}".rpartition("/")
        store.store(group=group, name=name, node=schema(cls))


def schemas() -> dict[str, type]:
    """The classes by what they are called below ``schema``."""
    choices = {f"{group}/{name}": cls for group, classes in CHOICES.items() for name, cls in classes.items()}
    return {**GROUPS, "cluster/mixed": Mixed, **choices}


def hint_for(key: str) -> str:
    """What the node `key` may be, for one that is not there."""
    if key in CHOICES:
        return f"choose from {', '.join(CHOICES[key])}, or another file of conf/{key}"
    return f"choose a file of conf/{key}" if key in GROUPS else f"set a key of it, such as {key}.ledger"


def filed_choices(config: DictConfig, choices: Mapping[str, str]) -> dict[str, str]:
    """What a result is filed under: the choices, except that a node which was given another class than its file names
    goes by that class, such as "mine.freest.Freest".
    """
    named = dict(choices)
    for group in (*GROUPS, *CHOICES):
        target = OmegaConf.select(config, f"{group}._target_")
        if group in named and target is not None:
            meant = next((_target_of(path, group) for path in _files(group, named[group])), None)
            if meant is not None and target != meant:
                named[group] = str(target)
    return named


def own_choices() -> list[Path]:
    """The files of the user's that the Hydra job at hand was composed of: choices that conf/ does not have."""
    if not HydraConfig.initialized():
        return []
    chosen = HydraConfig.get().runtime.choices.items()
    found = (next(_files(str(group), str(choice)), None) for group, choice in chosen if choice is not None)
    return [path for path in found if path is not None and not path.is_relative_to(CONF)]


def _files(group: str, choice: str) -> Iterator[Path]:
    """The yaml files that Hydra may take for a choice, in its order."""
    sources = HydraConfig.get().runtime.config_sources if HydraConfig.initialized() else ()
    own = (Path(source.path) for source in sources if source.schema == "file" and source.path)
    return (path for folder in (CONF, *own) if (path := folder / group / f"{choice}.yaml").is_file())


@cache
def _target_of(path: Path, group: str) -> str | None:
    """The class that a file of a group names, or that it begins with; None if neither can be told."""
    content = yaml.safe_load(path.read_text())
    if not isinstance(content, dict):
        return None
    if "_target_" in content:
        return str(content["_target_"])
    for entry in map(str, content.get("defaults", ())):
        name = entry.partition("@")[0]
        cls = schemas().get(name.removeprefix("/schema/"))
        if name.startswith(f"/schema/{group}") and cls is not None:
            return f"{cls.__module__}.{cls.__qualname__}"
        if (base := next(_files(group, name), None)) is not None:
            return _target_of(base, group)
    return None
