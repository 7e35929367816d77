"""Files that are written whole or not at all; a result that cannot be written where it belongs is not lost."""

from __future__ import annotations

import enum
import errno
import json
import math
import os
import secrets
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

PROBE = 1 << 18  # bytes that there must be room for before a run begins; one of 10,000 requests takes four times that


class NotStored(OSError):
    """A result is not where it belongs: one line that says why, and where it lies instead, if anywhere.

    result: what is to be shown of it all the same.
    """

    result: Any = None


def check_writable(folder: Path) -> None:
    """OSError if `folder`, or where it is to be made, takes no file of `PROBE` bytes. Nothing of that stays."""
    there = next(place for place in (folder, *folder.parents) if place.exists())
    if not there.is_dir():
        number = errno.EEXIST if there == folder else errno.ENOTDIR
        raise OSError(number, os.strerror(number), str(there))
    with tempfile.TemporaryFile(dir=there) as file:
        file.write(bytes(PROBE))


def write_json(path: Path, document: Mapping[str, Any]) -> None:
    """Write `path` whole or not at all, even if the machine stops. Raises OSError, or ValueError for a NaN."""
    text = json.dumps(document, indent=1, allow_nan=False) + "\n"
    write_whole(path, lambda place: place.write_text(text, encoding="utf-8"), durable=True)


def write_whole(path: Path, write: Callable[[Path], object], *, durable: bool = False) -> None:
    """Have a file written whole or not at all, whoever else writes it meanwhile. OSError if that cannot be.

    write: is given the place to write to, which lies beside `path`. durable: it is so even if the machine stops.
    """
    if _is_device(path):
        write(path)
        return
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        write(part)
        if durable:  # else the new name might reach the disk before what it names
            sync(part)
        part.replace(path)
    except OSError:
        with suppress(OSError):
            part.unlink()
        raise
    if durable:
        sync(path.parent)


def write_or_divert(key: str, path: Path, write: Callable[[Path], None]) -> tuple[Path, NotStored | None]:
    """Have a result written to `path`, which is called `key`, or else into the temporary folder; returns where it is,
    and what is to be told if that is not `path`.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path)
    except OSError as error:
        try:
            write(where := diverted(path.name))
        except OSError as again:
            return path, NotStored(f"{key}: {reason(error)}; nor is it stored elsewhere: {reason(again)}")
        return where, NotStored(f"{key}: {reason(error)}; it is in {where} instead")
    return path, None


def write_json_or_divert(key: str, path: Path, document: Mapping[str, Any]) -> tuple[Path, NotStored | None]:
    """`write_or_divert` for a document."""
    return write_or_divert(key, path, lambda place: write_json(place, document))


def diverted(name: str) -> Path:
    """Where a result goes that cannot be written where it belongs: into the temporary folder. OSError without one."""
    return Path(tempfile.gettempdir()) / f"block-{name}"


def reason(error: OSError) -> str:
    """What the system says: No space left on device."""
    return error.strerror or str(error).rpartition("] ")[2]  # as Arrow puts it: "… Detail: [errno 28] No space …"


def sync(path: Path) -> None:
    """Wait until a file, or what a folder lists, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_state(path: Path) -> tuple[int, ...]:
    """What changes when a file is written or replaced; empty if there is none. What was read of it is kept by that."""
    if not path.exists():
        return ()
    state = path.stat()
    return state.st_dev, state.st_ino, state.st_mtime_ns, state.st_size


def _is_device(path: Path) -> bool:
    """Such as /dev/null, in whose place no file is to be put."""
    return path.exists() and not path.is_file()


def json_value(value: Any) -> Any:
    """`value` in JSON's types; an infinite or missing number is spelt as in YAML (".inf")."""
    if isinstance(value, Mapping):
        return {str(key): json_value(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [json_value(item) for item in value]
    if isinstance(value, enum.Enum):
        return value.name
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, np.generic | np.ndarray):
        return json_value(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return ".nan" if math.isnan(value) else ".inf" if value > 0 else "-.inf"
    return value
