"""Sweeps: the number of their jobs, how far they are, and what is said of those that failed."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from omegaconf import DictConfig, OmegaConf

from block.sweep import Tally, attempt, standing


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a sweep tells its jobs through the environment ends with the test."""
    for name in ("BLOCK_SWEEP_JOBS", "BLOCK_SWEEP_BEGAN", "BLOCK_SWEEP_MAIN"):
        monkeypatch.setenv(name, "0")
        monkeypatch.delenv(name)


def hydra(folder: Path, *task: str, job: int = 0, params: dict[str, str] | None = None) -> DictConfig:
    """Hydra's own settings in job number `job` of a sweep into `folder`."""
    return OmegaConf.create(
        {
            "sweep": {"dir": str(folder)},
            "sweeper": {"params": params},
            "overrides": {"task": list(task)},
            "runtime": {"output_dir": str(folder / str(job))},
        }
    )


def begin(folder: Path, *task: str, params: dict[str, str] | None = None) -> None:
    Tally().on_multirun_start(OmegaConf.create({"hydra": hydra(folder, *task, params=params)}))


def end(folder: Path) -> int:
    Tally().on_multirun_end(OmegaConf.create({"hydra": hydra(folder)}))
    return Tally.failed


def fail(message: str) -> None:
    raise ValueError(message)


# ------------------------------------------------------------------------------------------------------------- counting


@pytest.mark.parametrize(
    ("task", "params", "jobs"),
    [
        ([], None, 1),
        (["seed=3"], None, 1),
        (["scheduler=random,block"], None, 2),
        (["scheduler=random,block", "workload.qps=range(20,37)"], None, 34),
        (["workload.qps=range(20,30,2.5)"], None, 4),
        (["scheduler=choice(random,block,po2)", "seed=1"], None, 3),
        (["workload.arrivals='gamma,constant'"], None, 1),  # quoted: one value
        (["capacity.slo_s=[3,10]"], None, 1),  # a list: one value
        (["capacity.slo_s=[3],[10],[3,10]"], None, 3),
        ([], {"scheduler": "random,block", "workload.qps": "range(20,37)"}, 34),
        (
            ["scheduler=block"],
            {"scheduler": "random,block", "workload.qps": "range(20,37)"},
            17,
        ),  # the later counts
        (["scheduler=po2,po_k,p2c", "seed=range(2)"], {"scheduler": "random,block"}, 6),
        (["+group.key=1,2", "~engine"], None, 2),
    ],
)
def test_jobs_are_the_product_of_what_is_swept(
    task: list[str], params: dict[str, str] | None, jobs: int, tmp_path: Path
) -> None:
    begin(tmp_path, *task, params=params)
    assert standing(hydra(tmp_path)).startswith(f"[1/{jobs}, ")


def test_standing_counts_the_jobs_that_left_an_outcome(tmp_path: Path) -> None:
    begin(tmp_path, "seed=range(4)")
    attempt(lambda: None, hydra(tmp_path, "seed=0", job=0))
    attempt(lambda: None, hydra(tmp_path, "seed=1", job=1))
    assert standing(hydra(tmp_path, job=2)).startswith("[3/4, ")


def test_standing_estimates_from_the_pace_so_far(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begin(tmp_path, "seed=range(10)")
    monkeypatch.setenv("BLOCK_SWEEP_BEGAN", str(time.time() - 20))  # the first two jobs took 20 s: 80 s for eight more
    attempt(lambda: None, hydra(tmp_path, job=0))
    assert standing(hydra(tmp_path, job=1)) in ("[2/10, 1:20 left] ", "[2/10, 1:21 left] ")


def test_without_a_sweep_there_is_no_standing(tmp_path: Path) -> None:
    assert standing(hydra(tmp_path)) == ""


def test_an_earlier_sweep_into_the_same_folder_does_not_count(tmp_path: Path) -> None:
    begin(tmp_path, "seed=range(3)")
    attempt(lambda: fail("no"), hydra(tmp_path, job=2))
    begin(tmp_path, "seed=1,2")
    assert standing(hydra(tmp_path)).startswith("[1/2, ")
    assert end(tmp_path) == 0


# -------------------------------------------------------------------------------------------------------------- failing


def test_failed_jobs_are_told_at_once_and_at_the_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    begin(tmp_path, "seed=range(11)")
    for job in range(11):
        work = (lambda: fail("two\nlines")) if job in (2, 10) else (lambda: None)
        attempt(work, hydra(tmp_path, f"seed={job}", job=job))
    told = capsys.readouterr().err.splitlines()
    assert told == ["failed: seed=2: two lines", "failed: seed=10: two lines"]
    assert end(tmp_path) == 2
    told = capsys.readouterr().err.splitlines()
    assert told == ["2 of 11 jobs failed:", "  2: seed=2: two lines", "  10: seed=10: two lines"]


def test_an_error_without_words_is_told_by_its_kind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def work() -> None:
        raise ZeroDivisionError

    attempt(work, hydra(tmp_path, "seed=1"))
    assert capsys.readouterr().err == "failed: seed=1: ZeroDivisionError\n"


def test_a_sweep_without_failures_is_silent(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    begin(tmp_path, "seed=1,2")
    attempt(lambda: None, hydra(tmp_path))
    assert end(tmp_path) == 0
    assert capsys.readouterr().err == ""


def test_ctrl_c_ends_the_sweep_and_is_no_outcome_of_a_job(tmp_path: Path) -> None:
    def work() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        attempt(work, hydra(tmp_path))
    assert list(tmp_path.glob("*/*")) == []


# -------------------------------------------------------------------------------------------------------------- workers


def test_a_worker_ends_soon_after_the_process_that_started_it() -> None:
    worker = "import os, time; from block.sweep import end_with; end_with(os.getppid()); print(os.getpid(), flush=True)"
    main = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {worker + '; time.sleep(60)'!r}])"
    with subprocess.Popen([sys.executable, "-c", main], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        pid = int(process.stdout.readline())
        assert (Path("/proc") / str(pid)).exists() or not Path("/proc").exists()
        process.kill()
        began = time.monotonic()
        process.stdout.read()  # until the worker, which holds the other end, is gone
        assert time.monotonic() - began < 10


def test_only_a_worker_ends_with_its_parent() -> None:
    lines = "import os, time; from block.sweep import end_with; end_with({}); time.sleep(1.2); print('alive')"
    for main in ("os.getpid()", "1 if os.getppid() != 1 else 2"):  # the main process itself; a stranger
        done = subprocess.run(
            [sys.executable, "-c", lines.format(main)], capture_output=True, text=True, timeout=60, env=dict(os.environ)
        )
        assert done.stdout == "alive\n"
