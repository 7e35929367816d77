"""The command lines that Hydra reads: what is wrong is one line, with an exit code, and no traceback."""

from __future__ import annotations

import errno
import os
import re
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra._internal.utils import get_args_parser
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException
from yaml import MarkedYAMLError  # type: ignore[import-untyped]

from block.cluster.instance import LaunchFailed
from block.cluster.simulation import SimulationStalled
from block.core.files import NotStored
from block.core.user_code import UserFault
from block.run.config_errors import ConfigError, explain, piped
from block.run.hydra_schema import CHOICES, GROUPS, hint_for


def run_main(main: Callable[[], Any], flags: Mapping[str, str] | None = None) -> int:
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
    if options.config_path is not None:
        folder = Path(options.config_path)
        if not folder.is_dir():
            raise ConfigError(f"--config-path={folder}: no such folder")
        # Of the current folder, where Hydra would take one beside this module. The last one given holds.
        behind = next((i for i, one in enumerate(sys.argv) if i and _is_override(one)), len(sys.argv))
        sys.argv.insert(behind, f"--config-path={folder.resolve()}")
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
                raise ConfigError(f"{given}: {hint_for(group)}")
            if re.search(r"\.yaml\b", value):
                raise ConfigError(f"{given}: files are named without .yaml")


def _is_override(argument: str) -> bool:
    return not argument.startswith("-") and ("=" in argument or argument.startswith("~"))


def run_job(job: Callable[[], Any]) -> Any:
    """Do the `job` of a Hydra main in `run_main`, and return what it returns. What is wrong with its configuration is
    told here, before Hydra adds to it.
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
    *(UserFault, NotStored, SimulationStalled),
)
_NO_FOLDER = "is not available"  # Hydra's warning of a search path
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EEXIST, errno.ENOTDIR)
"""What the system says of a place that takes no files."""


def _tell(error: Exception) -> int:
    """Say what is wrong; returns the exit code."""
    print(f"error: {explain(error)}", file=sys.stderr)
    of_the_run = isinstance(error, LaunchFailed | NotStored | SimulationStalled)
    return 1 if of_the_run or getattr(error, "errno", None) in NO_ROOM else 2
