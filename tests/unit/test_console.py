"""What a run says: every number of its summary, its paths whole, and why it was simulated."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from block.backends.simulated import Simulated
from block.backends.vllm import VLLM
from block.cluster import spec as cluster
from block.cluster.fleet import Backend
from block.cluster.spec import ClusterConfig, Mixed, Pool
from block.engine.config import EngineConfig
from block.hardware.catalogue import Model
from block.run.console import announce, progress, report, report_line
from block.store.results import Run

SUMMARY: dict[str, float | int | None] = {
    "ttft_mean_s": 0.5,
    "ttft_p50_s": 0.25,
    "ttft_p99_s": 2.5,
    "tpot_mean_s": 0.03,
    "tpot_p50_s": 0.02,
    "tpot_p99_s": 0.0615,
    "e2e_mean_s": 8.75,
    "e2e_p50_s": 7.5,
    "e2e_p99_s": 31.25,
    "request_throughput_rps": 29.5,
    "token_throughput_tps": 16789.4,
    "output_throughput_tps": 9000.0,
    "preemptions": 17,
    "e2e_error_mean": 0.2,
    "e2e_error_p50": 0.125,
    "dispatch_overhead_mean_s": 0.23,
    "dispatch_overhead_p99_s": 0.24,
    "forecast_p50_us": 3.5,
    "forecast_p99_us": 1234.5,
    "wall_time_s": 1.75,
}
LLAMA = Model("llama", "some/llama", 32, 4096, 11008, 32, 32, 128, 32000)


def run(**summary: float | None) -> Run:
    document = {
        "choices": {"scheduler": "block", "model": "llama2-7b"},
        "config": {"workload": {"qps": 30.0}, "seed": 4},
        "summary": {**SUMMARY, **summary},
        "counts": {"sent": 100, "ok": 98, "failed": 2, "fallback": 1, "preempted": 9},
    }
    return Run(Path("a/rather/long/folder/[for]/the/runs") / ("x" * 60), document)


def text_of(say: Any, width: int = 80) -> str:
    file = io.StringIO()
    say(Console(file=file, width=width))
    return file.getvalue()


def test_the_report_has_every_number_with_its_unit() -> None:
    text = text_of(lambda console: report(run(), Path("there/offline-run-7"), console))
    rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in text.splitlines() if line[0:1] == "│"]
    assert rows == [
        ["TTFT (ms)", "500", "250", "2,500"],
        ["token latency (ms)", "30", "20", "61.5"],
        ["end to end (s)", "8.75", "7.5", "31.25"],
    ]
    facts = {line[:13].strip(): line[13:] for line in text.splitlines()[-8:]}
    assert text.startswith("block · llama2-7b · 30 requests/s")
    assert facts == {
        "requests": "100 sent, 98 ok, 2 failed, 1 fallback, 9 preempted",
        "throughput": "29.5 requests/s, 16,789 tokens/s",
        "preemptions": "17",
        "dispatch": "230 ms mean",
        "forecasts": "3.5 µs P50, 1,234 µs P99 (measured); E2E off by 12.5 % P50",
        "wall time": "1.75 s",
        "run": str(run().path),
        "W&B": "there/offline-run-7",
    }


@pytest.mark.parametrize(
    ("compile_s", "told"), [(None, "1.75 s"), (0.0, "1.75 s"), (43.21, "1.75 s (+ 43.21 s compiling, once)")]
)
def test_compiling_is_told_apart(compile_s: float | None, told: str) -> None:
    text = text_of(lambda console: report(run(compile_s=compile_s), None, console))
    assert f"wall time    {told}\n" in text


def test_what_does_not_exist_is_a_dash_or_said_in_words() -> None:
    nothing = dict.fromkeys(("forecast_p50_us", "forecast_p99_us", "e2e_error_p50", "tpot_mean_s", "preemptions"))
    text = text_of(lambda console: report(run(**nothing), None, console))
    assert "forecasts    none: this policy does not use them" in text
    assert "W&B          not logged" in text
    assert "preemptions  not known" in text
    assert "│ token latency (ms) │ –" in text


def test_a_job_of_a_sweep_says_one_line() -> None:
    text = text_of(lambda console: report_line(run(), "[3/9, 0:42 left] seed=4", console), width=40)
    figures = "TTFT P99 2.5 s, E2E mean 8.75 s, 98 ok"
    assert text == f"[3/9, 0:42 left] seed=4: {figures} → {run().path}\n"


# ------------------------------------------------------------------------------------------------------- announcements


def fake_driver(folder: Path, monkeypatch: pytest.MonkeyPatch, *, gpus: int = 0, code: int = 0) -> None:
    """An `nvidia-smi` that lists so many GPUs, the only program there is beside the shell's."""
    script = folder / "nvidia-smi"
    script.write_text("#!/bin/sh\n" + "".join(f"echo {i}\n" for i in range(gpus)) + f"exit {code}\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))


def announced(backend: Backend, gpus: int = 4, config: ClusterConfig | Mixed | None = None) -> str:
    testbed = cluster.Testbed(LLAMA, config or ClusterConfig("a30", gpus), EngineConfig(), 0)
    return text_of(lambda console: announce(testbed, backend, console))


def test_auto_says_why_it_simulates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    auto = Simulated(auto=Simulated())
    monkeypatch.setenv("PATH", str(tmp_path))
    assert announced(auto).startswith("no GPUs visible, 4 asked for: running the simulated testbed\n")
    fake_driver(tmp_path, monkeypatch, gpus=1)
    assert announced(auto).startswith("1 GPU visible, 4 asked for: running the simulated testbed\n")
    fake_driver(tmp_path, monkeypatch, gpus=3)
    assert announced(auto).startswith("3 GPUs visible, 4 asked for: running the simulated testbed\n")
    mixed = Mixed((Pool("a30", 1), Pool("h100", 1)))
    assert announced(auto, config=mixed).startswith("GPUs of several kinds asked for: running the simulated testbed\n")
    fake_driver(tmp_path, monkeypatch, gpus=4, code=9)  # a driver that does not answer
    assert announced(auto).startswith("no GPUs visible")


def test_real_servers_are_announced() -> None:
    assert announced(VLLM()).startswith("starting vLLM servers; their logs are in the run's folder\n4 ×")
    assert announced(VLLM(urls=("http://a", "http://b"))) == "attaching to 2 servers\n"


def test_a_simulation_asked_for_needs_no_reason() -> None:
    text = announced(Simulated(), gpus=5)
    assert text.startswith("5 × llama on a30, ")
    assert "roofline: NVIDIA A30" in text
    assert "visible" not in text


def test_instances_are_counted_not_gpus() -> None:
    testbed = cluster.Testbed(replace(LLAMA, tensor_parallel=2), ClusterConfig("a30", 5), EngineConfig(), 0)
    backend = Simulated()
    text = text_of(lambda console: announce(testbed, backend, console))
    assert text.startswith("2 × llama on 2 × a30, ")


# ------------------------------------------------------------------------------------------------------------ progress


def test_progress_is_drawn_on_a_terminal_and_gone_at_its_end() -> None:
    file = io.StringIO()
    with progress(Console(file=file, force_terminal=True, width=100), "requests", 1000) as advance:
        assert "0/1000" in file.getvalue()
        advance(400)
    assert file.getvalue().endswith("\x1b[2K")  # the line erased


def test_progress_says_nothing_where_there_is_no_terminal() -> None:
    file = io.StringIO()
    with progress(Console(file=file), "requests", 1000) as advance:
        advance(1000)
    assert file.getvalue() == ""
