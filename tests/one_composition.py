"""Spares each command that a test runs one of Hydra's two compositions: the first only reads `hydra.mode`."""

from __future__ import annotations

from typing import Any

from hydra._internal.hydra import Hydra

_get_mode = Hydra.get_mode


def _mode(self: Hydra, config_name: str | None, overrides: list[str]) -> Any:
    """Only experiments and the command line say what `hydra.mode` is; unsaid, Hydra finds None."""
    said = any(name in override for override in overrides for name in ("experiment", "hydra."))
    return _get_mode(self, config_name, overrides) if said else None


Hydra.get_mode = _mode  # type: ignore[method-assign]
