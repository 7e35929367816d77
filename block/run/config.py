"""RunConfig: what a run is made of, checked before anything starts.

Each Hydra group is one frozen dataclass is one constructor; defaults and ranges live there and nowhere else. `register`
shows those dataclasses to Hydra as ``schema/<group>[/<choice>]``, with the class as `_target_`, so that every key is
known and typed; the yaml files under ``conf/`` add published and measured values only.
"""

from __future__ import annotations

import copyreg
import dataclasses
import errno
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import yaml  # type: ignore[import-untyped]
from hydra._internal.utils import get_args_parser
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import MarkedYAMLError

from block.backends.emulated import Emulated
from block.backends.simulated import Simulated
from block.backends.vllm import VLLM
from block.backends.vllm_cpu import VLLMCPU
from block.cluster.fleet import Backend
from block.cluster.instance import LaunchFailed
from block.cluster.migration import MigrationConfig
from block.cluster.provisioner import Elastic, Preempt, Relief, Static
from block.cluster.spec import ClusterConfig, Mixed, Testbed
from block.core import paths
from block.dispatch import policies
from block.dispatch import policy_checks as answers
from block.dispatch.core import DispatchConfig
from block.engine.config import EngineConfig
from block.gateway.config import ServerConfig
from block.hardware.catalogue import Model
from block.hardware.devices import visible_gpus
from block.lengths import Constant, Injected, Lengths, Noisy, Oracle
from block.lengths.compact import Compact
from block.lengths.estimation import EstimationConfig
from block.lengths.roberta import RoBERTa
from block.run.capacity import CapacityConfig
from block.run.config_errors import ConfigError, explain, no_such_key, piped
from block.store.results import NotStored
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


@dataclass(frozen=True)
class RunConfig:
    """One run, resolved and checked.

    scheduler: the policy, which may have a state: a RunConfig is built for each run. peers: those of the dispatchers
    beside the first, each with a state of its own; where there are too few, these share `scheduler`.
    seed: of every random stream of the run. sample_every_s: interval of the instances' time series.
    replay_share: share of the requests that are tried on copies of all instances (`block.dispatch.counterfactual`).
    """

    scheduler: policies.Policy
    model: Model
    cluster: ClusterConfig | Mixed
    engine: EngineConfig
    workload: Workload
    lengths: Lengths
    backend: Backend
    dispatch: DispatchConfig
    tracking: Tracking
    migration: MigrationConfig = field(default_factory=MigrationConfig)
    provisioner: Static | Elastic = field(default_factory=Static)
    seed: int = 0
    sample_every_s: float = 1.0
    replay_share: float = 0.0
    peers: tuple[policies.Policy, ...] = ()

    def __post_init__(self) -> None:
        answers.check(self.scheduler)
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
            if self.dispatch.dispatchers > 1:
                raise ValueError(
                    f"dispatch.dispatchers={self.dispatch.dispatchers}: none would know what moved; take migration=none"
                )

    def _check_provisioner(self) -> None:
        scaling = self.provisioner
        if not isinstance(scaling, Elastic):
            return
        if scaling.forecasts and self.scheduler.needs is not policies.Needs.FORECAST:
            name = type(scaling).__name__.lower()
            raise ValueError(f"provisioner={name}: needs forecasts; choose a scheduler that makes them, such as block")
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


@dataclass
class _Root:
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
    command: str = "serve"  # what run.py does: a name of experiment.COMMANDS
    objective: Any = "ttft_p99_s"  # what sweepers that search are told of a run: a number of its summary, or a list
    seed: int = 0
    sample_every_s: float = 1.0
    replay_share: float = 0.0
    runs_dir: str = "artifacts/runs"
    server: Any = field(default_factory=lambda: schema(ServerConfig))  # read by block.gateway only
    estimation: Any = field(default_factory=lambda: schema(EstimationConfig))  # how lengths are estimated


def schema(cls: type) -> type:
    """A mutable twin of the frozen dataclass `cls` for Hydra, with the class's own name as `_target_`.

    Launchers pickle it for their processes.
    """
    hints = get_type_hints(cls)
    fields: list[tuple[str, Any, Any]] = [
        (f.name, _mutable(hints[f.name]), field(default=f.default, default_factory=f.default_factory))
        for f in dataclasses.fields(cls)
    ]
    fields.append(("_target_", str, field(default=f"{cls.__module__}.{cls.__qualname__}")))
    return dataclasses.make_dataclass(cls.__name__, fields, kw_only=True)


# A field without a default says so by this one object, which a pickled class must not have a copy of.
copyreg.pickle(type(dataclasses.MISSING), lambda missing: "MISSING")


def _mutable(hint: Any) -> Any:
    """A list of schemas for a tuple of dataclasses; any other type as it is."""
    item, *_ = get_args(hint) or (None,)
    return list[schema(item)] if get_origin(hint) is tuple and dataclasses.is_dataclass(item) else hint  # type: ignore


@cache
def register() -> None:
    """Show the dataclasses to Hydra, once for a process."""
    store = ConfigStore.instance()
    store.store(name="run_schema", node=_Root)
    for path, cls in _schemas().items():
        group, _, name = f"schema/{path}".rpartition("/")
        store.store(group=group, name=name, node=schema(cls))


def _schemas() -> dict[str, type]:
    """The classes by what they are called below ``schema``."""
    choices = {f"{group}/{name}": cls for group, classes in CHOICES.items() for name, cls in classes.items()}
    return {**GROUPS, "cluster/mixed": Mixed, **choices}


def build(config: DictConfig) -> RunConfig:
    """Construct what `config` describes; ConfigError if it cannot be."""
    check_keys(config)
    keys = [f.name for f in dataclasses.fields(RunConfig) if f.name != "peers"]
    try:
        parts = {key: config[key] for key in keys}
        for key in (*GROUPS, *CHOICES, "dispatch"):
            if not isinstance(parts[key], DictConfig):
                raise ConfigError(f"{key}={'null' if parts[key] is None else parts[key]}: {_kinds(key)}")
        groups = {key: node(part) for key, part in parts.items() if isinstance(part, DictConfig)}
        peers = tuple(node(parts["scheduler"]) for _ in range(1, groups["dispatch"].dispatchers))
        run = RunConfig(**{**parts, **groups, "peers": peers})
        run.testbed  # noqa: B018 — raises if the model does not fit
        run = _on_real_gpus(run)
    except (ValueError, OmegaConfBaseException) as error:
        raise ConfigError(explain(error)) from error
    return run


def check_keys(config: DictConfig) -> None:
    """ConfigError if the root of `config` has a key that there is not."""
    _refuse_unknown(config, [f.name for f in dataclasses.fields(_Root)])


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
        where = "" if cause is None else answers.place(cause)
        if where and not str(cause).startswith(f"{part._get_full_key(None)}."):  # a class of the user's does not work
            key = part._get_full_key("_target_")
            raise ConfigError(f"{key}={part['_target_']}: {answers.told(cause or error)} ({where})") from error
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
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"{key}={name}: {error}") from error
    except Exception as error:  # importing a module of the user's runs it
        raise ConfigError(f"{key}={name}: {answers.told(error)} ({answers.place(error)})") from error
    if not (isinstance(cls, type) and dataclasses.is_dataclass(cls)):
        raise ConfigError(f"{key}={name}: must be a dataclass, whose fields are the keys of {group}")
    return cls


def _refuse_unknown(part: DictConfig, known: Sequence[str]) -> None:
    """Hydra adds any key that is given with a +, and so must be told here which there are."""
    for key in map(str, part):
        if key not in known and key != "_target_":
            raise ConfigError(no_such_key(str(part._get_full_key(key)), key, known, root=part._get_root()))


def _kinds(key: str) -> str:
    """What the node `key` may be, for one that is not there."""
    if key in CHOICES:
        return f"choose from {', '.join(CHOICES[key])}, or another file of conf/{key}"
    return f"choose a file of conf/{key}" if key in GROUPS else f"set a key of it, such as {key}.ledger"


def plain(config: DictConfig) -> dict[str, Any]:
    """The resolved config in plain containers."""
    return OmegaConf.to_container(config, resolve=True, throw_on_missing=True)  # type: ignore[return-value]


def filed(config: DictConfig, choices: Mapping[str, str]) -> dict[str, str]:
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
        cls = _schemas().get(name.removeprefix("/schema/"))
        if name.startswith(f"/schema/{group}") and cls is not None:
            return f"{cls.__module__}.{cls.__qualname__}"
        if (base := next(_files(group, name), None)) is not None:
            return _target_of(base, group)
    return None


def guard(main: Callable[[], Any], flags: Mapping[str, str] | None = None) -> int:
    """Run a Hydra `main` and return the exit code: 2 and one line for a wrong configuration, 1 for servers that did
    not come up, for what cannot be stored and for an output that nobody reads on, 130 for Ctrl-C.

    flags: options of the command's own, by the override that each stands for.
    """
    sys.argv[1:] = [(flags or {}).get(argument, argument) for argument in sys.argv[1:]]
    return piped(lambda: _guarded(main))


def _guarded(main: Callable[[], Any]) -> int:
    if not {"-h", "--help"}.isdisjoint(sys.argv[1:]):
        print(sys.modules[main.__module__].__doc__)  # Hydra adds the groups
    os.environ["HYDRA_FULL_ERROR"] = "1"  # let errors through, so that they are told here and not by Hydra
    sys.path.append(str(Path.cwd()))  # where a `_target_` of the user's may lie
    sys.argv[1:] = sorted(sys.argv[1:], key=_is_override)  # which Hydra wants behind all options
    try:
        _check_arguments(sys.argv[1:])
        with warnings.catch_warnings():
            warnings.filterwarnings("error", f".*{_NO_FOLDER}", UserWarning)
            main()
    except _Told as error:
        return error.status
    except _WRONG as error:
        return _tell(error)
    except ValueError as error:
        unread = _unreadable(sys.argv[1:]) if isinstance(error, UnicodeDecodeError) else None
        if unread is None and not str(error).startswith(("Config group override must be", "Invalid defaults list")):
            raise
        return _tell(ConfigError(unread or explain(error)))
    except UserWarning as warning:
        if _NO_FOLDER not in str(warning):
            raise
        return _tell(ConfigError(f"hydra.searchpath: {str(warning).split(', ')[-1]}"))
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        return _tell(error)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


def _unreadable(arguments: Sequence[str]) -> str | None:
    """What is wrong with a file of a --config-dir that is not UTF-8."""
    folder = get_args_parser().parse_args(arguments).config_dir
    for path in sorted(Path(folder).rglob("*.yaml")) if folder else ():
        try:
            path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            return f"{path}: is not UTF-8: {error}"
    return None


def _check_arguments(arguments: Sequence[str]) -> None:
    """ConfigError for what Hydra would answer with its usage, or with an error that names no key."""

    def refuse(message: str) -> None:
        raise ConfigError(f"{message.replace('arguments: ', '')}: --help and --hydra-help tell what there is")

    parser = get_args_parser()
    parser.error = refuse  # type: ignore[assignment,method-assign]
    options = parser.parse_args(arguments)
    if options.resolve and not (options.cfg or options.help):
        refuse("argument --resolve: goes with --cfg")
    for given in options.overrides:
        group, _, value = given.lstrip("+~").partition("=")
        if not group:
            raise ConfigError(f"{given}: not of the form key=value")
        if "/" in group and not group.startswith("hydra/"):
            raise ConfigError(f"{given}: no such group; keys have dots: {group.replace('/', '.')}={value}")
        if group in GROUPS or group in CHOICES:
            if value == "null" or re.fullmatch(r"[-+.\d]+", value):
                raise ConfigError(f"{given}: {_kinds(group)}")
            if re.search(r"\.yaml\b", value):
                raise ConfigError(f"{given}: files are named without .yaml")


def _is_override(argument: str) -> bool:
    return not argument.startswith("-") and ("=" in argument or argument.startswith("~"))


def told(job: Callable[[], Any]) -> Any:
    """Do the `job` of a Hydra main in `guard`, and return what it returns; what is wrong with its configuration is told
    before Hydra adds to it.
    """
    try:
        return job()
    except _WRONG as error:
        raise _Told(_tell(error)) from error


class _Told(BaseException):
    """Told already. Hydra lets pass what is no Exception, and else would print a line about it."""

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


_WRONG = (
    *(ConfigError, HydraException, OmegaConfBaseException, FileNotFoundError, MarkedYAMLError, LaunchFailed),
    *(answers.UserFault, NotStored),
)
_NO_FOLDER = "is not available"  # Hydra's warning of a search path
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EEXIST, errno.ENOTDIR)
"""What the system says of a place that takes no files."""


def _tell(error: Exception) -> int:
    """Say what is wrong; returns the exit code."""
    print(f"error: {explain(error)}", file=sys.stderr)
    return 1 if isinstance(error, LaunchFailed | NotStored) or getattr(error, "errno", None) in NO_ROOM else 2
