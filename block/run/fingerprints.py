"""Hashes of what a run's results depend on beside its config: code, engines, requests, and what is the user's own."""

from __future__ import annotations

import errno
import hashlib
import inspect
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import asdict, fields, is_dataclass, replace
from itertools import islice
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from block.backends.simulated import Simulated
from block.core.files import json_value
from block.core.types import Request
from block.core.user_code import is_ours, is_own, own_modules
from block.lengths import tag
from block.run.config import RunConfig
from block.run.replay import requests_of
from block.store import provenance
from block.workload import spec as workload

MOST_FILES = 1000
"""Files that a folder named by an object of the user's may hold for a run to be found again."""


def fingerprints(run: RunConfig, requests: Sequence[Request] | None = None) -> dict[str, str]:
    """Hashes of what a run's results depend on beside its config, by name: the code and what computes with it, the
    engines and their step times, its requests' lengths, their arrivals, and what is believed of their lengths. Each
    module of the user's, and each file that an object of the user's names, has one of its own.

    They are the same at every request rate, and for every policy of this package.
    """
    requests = requests_of(run)[0] if requests is None else requests
    at_any_rate = run.workload if run.workload.qps is None else replace(run.workload, qps=1.0)
    arrivals = requests if at_any_rate == run.workload else workload.generate(at_any_rate, run.seed)
    backend, kinds = run.backend, run.testbed.kinds
    latency = [backend.latency(kind).pack() for kind in kinds]
    if isinstance(backend, Simulated) and backend.predictor_gpu is not None:  # what the engines are, beside that
        latency += [replace(backend, predictor_gpu=None).latency(kind).pack() for kind in kinds]
    engines = [type(backend).__name__, asdict(run.testbed.engine)]
    blocks = [[kind.instances, kind.total_blocks] for kind in kinds]
    sessions = run.workload.source == "sessions"  # of which the rate decides which turns there are
    alike = tag(arrivals, run.lengths, run.seed) if sessions else requests
    lengths = np.array([_column(alike, field, np.int64) for field in ("prompt_tokens", "output_tokens")])
    contents = [request.content for request in alike if request.content is not None]
    texts = [request.prompt for request in requests if request.prompt is not None]
    hashes = {
        "code": provenance.code_hash(),
        "libraries": provenance.config_hash(provenance.libraries(*(() if backend.virtual else ("torch", "vllm")))),
        "engines": provenance.config_hash(json_value([engines, blocks])),
        "latency_model": _hash(np.concatenate(latency)),
        "data_set": _hash(np.concatenate([lengths, *(one.T for one in contents)], axis=1), *texts),
        "arrivals": _hash(_column(arrivals, "arrival", np.float64)),
        "estimates": _hash(_column(alike, "predicted_output_tokens", np.int64)),
    }
    sources = {name: provenance.source_hash(path) for name, path in _modules(run).items()} | _loose_classes(run)
    return hashes | sources | _named_files(run)


def _column(requests: Sequence[Request], field: str, kind: type[np.generic]) -> NDArray[Any]:
    return np.fromiter(map(attrgetter(field), requests), kind, len(requests))


def _hash(array: NDArray[Any], *texts: str) -> str:
    digest = hashlib.sha256(np.ascontiguousarray(array).tobytes())
    for text in texts:
        digest.update(f"{len(text)} {text}".encode("utf-8", "replace"))
    return digest.hexdigest()[:16]


def _modules(run: RunConfig) -> dict[str, Path]:
    """The modules of the user's that the run's objects are of, and those that these import, by name."""
    found: dict[str, Path] = {}
    for name in {type(part).__module__ for part in _parts(run)}:
        found |= {} if is_ours(name) else own_modules(name)
    return dict(sorted(found.items()))


def _loose_classes(run: RunConfig) -> dict[str, str]:
    """Hashes of the user's classes that no file holds, as in a notebook; what nothing tells is never the same again."""
    found = {}
    for cls in {type(part) for part in _parts(run) if not is_ours(type(part).__module__)}:
        if cls.__module__ not in own_modules(cls.__module__):
            try:
                text = inspect.getsource(cls)
            except (OSError, TypeError):
                text = secrets.token_hex()
            found[f"{cls.__module__}.{cls.__qualname__}"] = hashlib.sha256(text.encode()).hexdigest()[:16]
    return dict(sorted(found.items()))


def _named_files(run: RunConfig) -> dict[str, str]:
    """Hashes of the files, and of those in the folders, that the fields of objects of the user's classes name.

    What cannot be read, and a folder of more than MOST_FILES, is never the same again.
    """
    texts = {text for part in _parts(run) if not is_ours(type(part).__module__) for text in _texts(part)}
    found = {}
    for text in sorted(texts):
        try:
            path = Path(text)
            files = list(islice(filter(Path.is_file, [path] if path.is_file() else path.rglob("*")), MOST_FILES + 1))
        except ValueError:
            continue
        except OSError as error:
            if error.errno == errno.ENAMETOOLONG:  # a text that is no path
                continue
            files = []
            found[text] = secrets.token_hex(8)
        if len(files) > MOST_FILES:
            found[text] = secrets.token_hex(8)
        else:
            found |= {str(file): _file_hash(file) for file in sorted(files)}
    return found


def _file_hash(path: Path) -> str:
    try:
        return provenance.file_hash(path)[:16]
    except OSError:
        return secrets.token_hex(8)


def own_files(run: RunConfig) -> list[Path]:
    """What the user has written of the run's objects and might have committed: modules and data sheets."""
    sheets = [Path(value) for part in _parts(run) for value in _texts(part) if value.endswith(".yaml")]
    modules = filter(is_own, _modules(run).values())
    return [*modules, *(path for path in sheets if path.is_file())]


def _parts(value: Any, within: tuple[int, ...] = ()) -> Iterator[Any]:
    """The dataclasses that a value is made of, itself among them; `within` these, by their ids."""
    if id(value) in within:  # one of the user's may hold itself
        return
    within = (*within, id(value))
    if is_dataclass(value):
        yield value
        for field in fields(value):
            yield from _parts(getattr(value, field.name, None), within)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _parts(item, within)


def _texts(part: Any) -> Iterator[str]:
    """The strings among a dataclass's fields, except names of nothing."""
    values = (getattr(part, field.name, None) for field in fields(part))
    return (value for value in values if isinstance(value, str) and value)
