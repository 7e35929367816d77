"""Shared by the tests against vLLM, which are skipped where it is not installed."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest


@pytest.fixture(scope="session")
def make_real(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """Makes vLLM engines; vLLM is imported and configured once, for it takes long."""
    pytest.importorskip("vllm")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`torch.jit.script", DeprecationWarning)  # torch's own use of it
        import vllm_scheduler

        base = vllm_scheduler.base_config(tmp_path_factory.mktemp("model"))

    def make(*args: Any, **options: Any) -> Any:  # and no partial, whose repr of `base` hypothesis cannot print
        return vllm_scheduler.VirtualEngine(base, *args, **options)

    return make
