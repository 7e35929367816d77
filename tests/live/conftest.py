"""Shared by the tests against vLLM, which are skipped where it is not installed."""

from __future__ import annotations

import uuid
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from processes import kill_all


@pytest.fixture
def mark() -> Iterator[str]:
    """A name in the environment of all processes of a test, by which they are found; none outlives it."""
    name = f"BLOCK_TEST_{uuid.uuid4().hex}"
    yield name
    kill_all(name)


@pytest.fixture(scope="session")
def vllm() -> Any:
    """vLLM with what the tests need of it, imported once."""
    pytest.importorskip("vllm")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`torch.jit.script", DeprecationWarning)  # torch's own use of it
        import vllm_scheduler

        import block.vllm_plugin.executor  # noqa: F401
    return vllm_scheduler


@pytest.fixture(scope="session")
def make_real(vllm: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """Makes vLLM engines; vLLM is configured once, for it takes long."""
    base = vllm.base_config(tmp_path_factory.mktemp("model"))

    def make(*args: Any, **options: Any) -> Any:  # and no partial, whose repr of `base` hypothesis cannot print
        return vllm.VirtualEngine(base, *args, **options)

    return make
