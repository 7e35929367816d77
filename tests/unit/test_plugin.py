"""The parts of the plugin that need no vLLM: requirements, the HTTP view, the platform's entry point."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from importlib.metadata import entry_points
from types import SimpleNamespace
from typing import Any

import pytest

from block.vllm_plugin import platform, requirements
from block.vllm_plugin import state_buffer as b
from block.vllm_plugin.environment import EMULATED, STATE_BUFFER
from block.vllm_plugin.requirements import Incompatible, check_version, require
from block.vllm_plugin.routes import SnapshotView
from block.vllm_plugin.state_buffer import StateBuffer


@pytest.mark.parametrize("version", ["0.27.0", "0.32.0", "0.33.1rc2"])
def test_the_versions_that_were_tried_pass(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.setattr(requirements, "vllm_version", lambda: version)
    check_version()


@pytest.mark.parametrize("version", ["0.26.3", "0.34.0", "1.0.0"])
def test_another_version_is_named_with_those_that_work(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.setattr(requirements, "vllm_version", lambda: version)
    with pytest.raises(Incompatible, match=rf"vLLM {version}: .* 0\.27 to 0\.33"):
        check_version()


def test_without_vllm_the_message_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise requirements.PackageNotFoundError(name)

    monkeypatch.setattr(requirements, "version", missing)
    with pytest.raises(Incompatible, match=r"pip install -e '\.\[gpu\]'"):
        check_version()


def test_a_hook_that_moved_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requirements, "vllm_version", lambda: "0.33.0")
    scheduler = SimpleNamespace(running=[], pool=SimpleNamespace(free=1))
    require(scheduler, "running", "pool.free")
    with pytest.raises(Incompatible, match=r"vLLM 0\.33\.0: SimpleNamespace has no waiting, pool\.used"):
        require(scheduler, "running", "waiting", "pool.used")


def test_the_platform_is_found_and_applies_only_when_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    (entry,) = [e for e in entry_points(group="vllm.platform_plugins") if e.name == "block_emulated"]
    assert entry.load() is platform.emulated
    monkeypatch.delenv(EMULATED, raising=False)
    assert platform.emulated() is None
    monkeypatch.setenv(EMULATED, "1")
    assert platform.emulated() == "block.vllm_plugin.emulated_platform.EmulatedPlatform"


def ask(view: SnapshotView, path: str, query: bytes = b"") -> tuple[int, dict[bytes, bytes], bytes]:
    """One GET of an ASGI application: status, headers, body."""
    sent: list[dict[str, Any]] = []

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    async def receive() -> dict[str, Any]:
        raise AssertionError("a GET has no body")

    asyncio.run(view({"type": "http", "path": path, "query_string": query}, receive, send))
    return sent[0]["status"], dict(sent[0]["headers"]), sent[1]["body"]


@pytest.fixture
def buffer(monkeypatch: pytest.MonkeyPatch) -> StateBuffer:
    made, path = StateBuffer.create()
    monkeypatch.setenv(STATE_BUFFER, path)
    return made


async def behind(scope: dict[str, Any], receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 299, "headers": []})
    await send({"type": "http.response.body", "body": scope["path"].encode()})


def test_the_view_shows_the_buffer_and_passes_on_all_else(buffer: StateBuffer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("block.vllm_plugin.routes.vllm_version", lambda: "0.32.0")
    buffer.seqs[:, :2] = 9
    buffer.header[b.COLUMNS] = 2
    buffer.steps[0] = range(b.STEP)
    buffer.steps[1] = range(b.STEP)
    buffer.header[b.TIMED] = 2
    view = SnapshotView(behind)
    status, headers, body = ask(view, "/block/info")
    assert headers[b"content-length"] == str(len(body)).encode()
    info = json.loads(body)
    assert (status, info["vllm"], info["nonce"]) == (200, "0.32.0", buffer.header[b.NONCE])
    assert StateBuffer.open(info["buffer"], info["nonce"]).header[b.COLUMNS] == 2
    assert json.loads(ask(view, "/block/steps", b"since=1")[2]) == {"timed": 2, "steps": [[*map(float, range(b.STEP))]]}
    assert ask(view, "/block/nothing")[0] == 404
    assert ask(view, "/v1/completions")[::2] == (299, b"/v1/completions")


def test_a_server_s_engine_core_does_not_import_numba_before_its_worker_has_begun() -> None:
    """vLLM's worker for CPUs looks through all modules that there are, and ends at one of llvmlite's objects."""
    code = "import sys, block.vllm_plugin.publisher, block.vllm_plugin.serve; print('llvmlite' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "False"
