"""What is compiled is said, timed apart from the run, done once, and done before a gateway is open."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import aiohttp
import numba
import pytest
from mock_servers import STREAMED, PluginMock, stream

from block.core import jit
from block.core.jit import _Stopwatch
from block.store.results import runs

ROOT = Path(__file__).resolve().parents[2]
LINE = "compiling, once for this version of the code: half a minute or so\n"
pytestmark = pytest.mark.skipif(os.environ.get("NUMBA_DISABLE_JIT") == "1", reason="nothing is compiled")


def cache_without(folder: Path, *modules: str) -> Path:
    """A folder for machine code with what has been compiled so far, without that of some modules.

    To compile all of it takes half a minute, each time.
    """
    warm = Path(numba.config.CACHE_DIR)
    if warm.exists():
        shutil.copytree(warm, folder / warm.name)
    for module in modules:
        for path in folder.rglob(f"{module}.*.nb[ic]"):
            path.unlink()
    return folder


def test_what_is_compiled_for_another_function_counts_once() -> None:
    watch = _Stopwatch()
    for _ in range(2):
        watch.on_start(None)
    time.sleep(0.02)
    watch.on_end(None)
    assert watch.seconds == 0
    watch.on_end(None)
    assert 0.02 <= watch.seconds < 0.5


def test_compiling_is_said_only_where_it_takes_long(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    watch = _Stopwatch()
    monkeypatch.setattr(jit, "LONG_S", 0.05)
    for spent in (0.0, 0.2, 0.2):
        watch.on_start(None)
        time.sleep(spent)
        watch.on_end(None)
    assert capsys.readouterr().err == LINE


@pytest.mark.slow
def test_two_first_runs_at_once_compile_once_and_their_wall_time_is_without(tmp_path: Path) -> None:
    env = {**os.environ, "NUMBA_CACHE_DIR": str(cache_without(tmp_path / "cache", "batch"))}
    small = ["scheduler=block", "workload.num_requests=100", "tracking=none", f"runs_dir={tmp_path / 'runs'}"]
    command = [sys.executable, str(ROOT / "run.py"), *small]

    def compile_s() -> list[float]:
        found = runs(root=tmp_path / "runs")
        assert all(run.summary["wall_time_s"] < 5 for run in found)
        return sorted(run.summary["compile_s"] for run in found)

    both = [
        subprocess.Popen(command, cwd=tmp_path, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    said = [process.communicate(timeout=300) for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert any(LINE in err for _, err in said)
    less, more = compile_s()
    assert less == 0 < more  # all was loaded
    assert any(f"(+ {more:.4g} s compiling, once)" in out for out, _ in said)
    again = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=100)
    assert LINE not in again.stderr
    assert "compiling" not in again.stdout
    assert compile_s() == [0, 0, more]


@pytest.mark.slow
@pytest.mark.parametrize("scheduler", ["block", "llumnix_minus"])
def test_a_gateway_has_compiled_all_before_it_is_open(scheduler: str, tmp_path: Path) -> None:
    cache = cache_without(tmp_path / "cache", "predictor", "correction", "policies")  # what it calls

    def code() -> dict[str, int]:
        """The machine code on disk."""
        return {path.name: path.stat().st_mtime_ns for path in cache.rglob("*.nb[ic]")}

    async def main() -> None:
        mocks = [PluginMock(stream), PluginMock(stream)]
        for mock in mocks:
            await mock.start()
        mocks[0].place(1, 1000, 500)
        urls = ",".join(mock.url for mock in mocks)
        corrected = ["dispatch.correction_steps=20"] if scheduler == "block" else []
        keys = [f"gateway.urls=[{urls}]", "gateway.host=127.0.0.1", "gateway.port=0", f"scheduler={scheduler}"]
        gateway = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "block.gateway", *keys, *corrected),
            env={**os.environ, "NUMBA_CACHE_DIR": str(cache)},
            cwd=ROOT,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        try:
            assert gateway.stdout is not None
            ready = (await asyncio.wait_for(gateway.stdout.readline(), 200)).decode()
            compiled_before = code()
            assert compiled_before
            async with aiohttp.ClientSession() as client:
                for _ in range(3):
                    url = f"{ready.split(': ')[0]}/v1/completions"
                    async with client.post(url, data=STREAMED) as answer:
                        assert answer.status == 200
                        await answer.read()
            assert code() == compiled_before
        finally:
            gateway.send_signal(signal.SIGTERM)
            _, err = await asyncio.wait_for(gateway.communicate(), 30)
            for mock in mocks:
                await mock.runner.cleanup()
        assert gateway.returncode == 0
        if scheduler == "block":
            assert err.decode().startswith(LINE)

    asyncio.run(main())
