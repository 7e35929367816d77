"""Code that the user wrote, such as a policy: which files are theirs, and an error of it in a line with its place."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import sys
import sysconfig
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

from block.core.errors import one_line
from block.core.paths import PACKAGE


class UserFault(ValueError):
    """A class of the user's is at fault: one line that tells what it has done, its file and line."""


@contextmanager
def user_errors() -> Iterator[None]:
    """Within, what code of the user's raises becomes a UserFault; errors of this package stay what they are."""
    try:
        yield
    except (Exception, SystemExit) as error:  # by sys.exit() a run would end as if all were done
        if where := location(error):
            raise UserFault(f"{one_line(error)} ({where})") from error
        raise


def location(error: BaseException) -> str:
    """The last line of the user's code that led to an error, as "mine/freest.py:12"; empty if none did."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{display_path(Path(error.filename))}:{error.lineno}"
    frames = [(Path(frame.filename), frame.lineno) for frame in traceback.extract_tb(error.__traceback__)]
    own = [f"{display_path(path)}:{line}" for path, line in frames if path.exists() and is_own(path)]
    return own[-1] if own else ""


def defined_at(what: Any) -> str:
    """Where a class or function is defined, as `location` has it; empty if that is not known."""
    try:
        what = inspect.unwrap(what)
        file, line = inspect.getsourcefile(what), inspect.getsourcelines(what)[1]
    except (TypeError, OSError):
        return ""
    return f"{display_path(Path(file))}:{line}" if file else ""


def display_path(path: Path) -> str:
    """A path as people read it: relative to the current folder if it lies in it."""
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


def is_ours(module: str) -> bool:
    """Whether a module, by its dotted name, or a class in it, is of this package, and so not the user's."""
    return module.partition(".")[0] == PACKAGE.name


def is_own(path: Path) -> bool:
    """Whether a file of code is the user's: neither of this package nor of Python, nor installed."""
    path = path.resolve()
    return not any(path.is_relative_to(place) for place in _installed()) and "site-packages" not in path.parts


@cache
def _installed() -> tuple[Path, ...]:
    names = ("stdlib", "platstdlib", "purelib", "platlib")
    return (PACKAGE, *(Path(sysconfig.get_path(name)).resolve() for name in names))


def own_modules(name: str) -> dict[str, Path]:
    """The files of a module of the user's and of those that it imports, directly or through others, by their names.

    The user's are those that lie neither in this package nor where Python and what is installed do, and those of the
    package that the module is of. An import is one that stands in the source, at whatever depth; what a name computed
    at run time leads to is not found.
    """
    root = name.partition(".")[0]
    found: dict[str, Path] = {}
    waiting = [name]
    while waiting:
        for one in _parents(waiting.pop()):
            if one in found:
                continue
            path = _file_of(one)
            if path is None:  # a package without an __init__, or no module
                continue
            if not is_own(path) and one.partition(".")[0] != root:  # nor is what is below it, to find which imports it
                break
            found[one] = path
            if path.suffix == ".py":
                package = one if path.name == "__init__.py" else one.rpartition(".")[0]
                with suppress(SyntaxError, ValueError):  # such a module cannot be imported, and so imports nothing
                    waiting += _imports(ast.parse(path.read_bytes()), package)
    return dict(sorted(found.items()))


def _parents(name: str) -> Iterator[str]:
    """Of a.b.c: a, a.b and a.b.c, all of which run when it is imported."""
    parts = name.split(".")
    return (".".join(parts[: i + 1]) for i in range(len(parts)))


def _file_of(module: str) -> Path | None:
    """The file of a module, imported or not; None if there is none, as of a package without an __init__."""
    loaded = sys.modules.get(module)
    if loaded is not None:
        file = getattr(loaded, "__file__", None)
    else:
        try:
            spec = importlib.util.find_spec(module)
        except (ImportError, AttributeError, ValueError):  # a class or function of a module, say
            return None
        file = spec.origin if spec is not None and spec.has_location else None
    return Path(file) if file and Path(file).is_file() else None


def _imports(tree: ast.AST, package: str) -> Iterator[str]:
    """Names that may be modules, of all imports in a module of `package`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            prefix = ".".join([*filter(None, base), *([node.module] if node.module else [])])
            yield from (f"{prefix}.{alias.name}" if prefix else alias.name for alias in node.names)
