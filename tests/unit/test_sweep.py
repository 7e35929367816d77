"""Sweeps: the number of their jobs, how far they are, and what is said of those that failed."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from commands import command, new_process
from omegaconf import DictConfig, OmegaConf

from block.run.sweep import Tally, job_label, try_job


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a sweep tells its jobs through the environment ends with the test."""
    for name in ("BLOCK_SWEEP", "BLOCK_WANDB_NOTE"):
        monkeypatch.setenv(name, "")


BASIC = "hydra._internal.core_plugins.basic_sweeper.BasicSweeper"


def hydra(
    folder: Path, *task: str, job: int = 0, params: dict[str, str] | None = None, sweeper: str = BASIC
) -> DictConfig:
    """Hydra's own settings in job number `job` of a sweep into `folder`."""
    return OmegaConf.create(
        {
            "job": {"num": job},
            "sweep": {"dir": str(folder)},
            "sweeper": {"params": params, "_target_": sweeper},
            "overrides": {"task": list(task)},
        }
    )


def begin(folder: Path, *task: str, params: dict[str, str] | None = None, sweeper: str = BASIC) -> None:
    Tally().on_multirun_start(OmegaConf.create({"hydra": hydra(folder, *task, params=params, sweeper=sweeper)}))


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
    assert job_label(hydra(tmp_path)).startswith(f"[1/{jobs}, ")


def test_standing_counts_the_jobs_that_left_an_outcome(tmp_path: Path) -> None:
    begin(tmp_path, "seed=range(4)")
    try_job(lambda: None, hydra(tmp_path, "seed=0", job=0))
    try_job(lambda: None, hydra(tmp_path, "seed=1", job=1))
    assert job_label(hydra(tmp_path, job=2)).startswith("[3/4, ")


def test_standing_estimates_from_the_pace_so_far(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begin(tmp_path, "seed=range(10)")
    told = json.loads(os.environ["BLOCK_SWEEP"])
    monkeypatch.setenv(
        "BLOCK_SWEEP", json.dumps({**told, "began": time.time() - 20})
    )  # the first two jobs took 20 s: 80 s for eight more
    try_job(lambda: None, hydra(tmp_path, job=0))
    assert job_label(hydra(tmp_path, job=1)) in ("[2/10, 1:20 left] ", "[2/10, 1:21 left] ")


def test_without_a_sweep_a_job_is_called_by_all_its_overrides(tmp_path: Path) -> None:
    assert job_label(hydra(tmp_path, "seed=1", "scheduler=block")) == "seed=1 scheduler=block"


def test_an_earlier_sweep_into_the_same_folder_does_not_count(tmp_path: Path) -> None:
    begin(tmp_path, "seed=range(3)")
    try_job(lambda: fail("no"), hydra(tmp_path, job=2))
    begin(tmp_path, "seed=1,2")
    assert job_label(hydra(tmp_path)).startswith("[1/2, ")
    for job in range(2):
        try_job(lambda: None, hydra(tmp_path, job=job))
    assert end(tmp_path) == 0


# -------------------------------------------------------------------------------------------------------------- failing


def test_failed_jobs_are_told_at_once_and_at_the_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    begin(tmp_path, "seed=range(11)")
    for job in range(11):
        work = (lambda: fail("two\nlines")) if job in (2, 10) else (lambda: None)
        try_job(work, hydra(tmp_path, f"seed={job}", job=job))
    told = capsys.readouterr().err.splitlines()
    assert told == ["failed: seed=2: two lines", "failed: seed=10: two lines"]
    assert end(tmp_path) == 2
    told = capsys.readouterr().err.splitlines()
    assert told == ["2 of 11 jobs failed:", "  2: seed=2: two lines", "  10: seed=10: two lines"]


def test_an_error_without_words_is_told_by_its_kind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def work() -> None:
        raise ZeroDivisionError

    begin(tmp_path, "seed=1,2")
    try_job(work, hydra(tmp_path, "seed=1"))
    assert capsys.readouterr().err == "failed: seed=1: ZeroDivisionError\n"


def test_a_sweep_without_failures_is_silent(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    begin(tmp_path, "seed=1,2")
    for job in range(2):
        try_job(lambda: None, hydra(tmp_path, job=job))
    assert end(tmp_path) == 0
    assert capsys.readouterr().err == ""


def test_what_did_not_finish_or_begin_has_failed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    begin(tmp_path, "seed=range(5)")
    try_job(lambda: None, hydra(tmp_path, "seed=0", job=0))
    with pytest.raises(KeyboardInterrupt):
        try_job(interrupted, hydra(tmp_path, "seed=1", job=1))
    assert end(tmp_path) == 4
    told = capsys.readouterr().err.splitlines()
    assert told == ["4 of 5 jobs failed:", "  1: seed=1: did not finish", "  2, 3, 4: did not begin"]


def test_a_job_gives_the_sweeper_what_it_returns(tmp_path: Path) -> None:
    begin(tmp_path, "seed=1,2")
    assert try_job(lambda: [1.5, 2], hydra(tmp_path)) == [1.5, 2]
    assert try_job(lambda: fail("no"), hydra(tmp_path, job=1)) is None


def test_a_note_that_cannot_be_written_costs_no_result(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    begin(tmp_path, "seed=1,2")
    (tmp_path / ".outcomes").rmdir()
    assert try_job(lambda: 7, hydra(tmp_path)) == 7
    assert "outcomes/0: No such file or directory" in capsys.readouterr().err


@pytest.mark.parametrize("swept", ["seed=range(0,0)", "+key=range(3,3)"])
def test_a_sweep_over_nothing_is_refused(swept: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(BaseException):  # noqa: B017, PT011 — of `config.told`, which lets Hydra say nothing more
        begin(tmp_path, swept)
    assert capsys.readouterr().err == f"error: {swept}: no values to sweep over\n"


# -------------------------------------------------------------------------------------------------- of other sweepers


def test_a_job_is_called_by_what_the_sweep_varies(tmp_path: Path) -> None:
    given = ["tracking=none", "cluster.num_gpus=4,8", "capacity.slo_s=[3, 10]", "engine.max_num_seqs=range(24,26)"]
    begin(tmp_path, *given, params={"seed": "1,2", "scheduler": "block"})
    job = ["scheduler=block", "seed=2", "tracking=none", "cluster.num_gpus=8", "capacity.slo_s=[3,10]"]
    name = job_label(hydra(tmp_path, *job, "engine.max_num_seqs=24")).split("] ")[1]
    assert name == "seed=2 cluster.num_gpus=8 engine.max_num_seqs=24"


def test_how_many_jobs_a_search_has_is_unknown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    begin(tmp_path, "workload.qps=interval(20,40)", "seed=3", params={"scheduler": "choice(a,b)"}, sweeper="x.Optuna")
    job = ["workload.qps=31.5", "scheduler=b", "seed=3"]
    assert job_label(hydra(tmp_path, *job)) == "[1 done] workload.qps=31.5 scheduler=b"
    try_job(lambda: None, hydra(tmp_path, *job))
    try_job(lambda: fail("no"), hydra(tmp_path, "seed=3", job=7))
    assert job_label(hydra(tmp_path, *job)).startswith("[3 done]")
    assert end(tmp_path) == 1
    assert capsys.readouterr().err.splitlines()[1:] == ["1 of 2 jobs failed:", "  7: seed=3: no"]


SEARCHER = """
from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper


class Searcher(Sweeper):
    def setup(self, *, hydra_context, task_function, config):
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments):
        for i in range(2):  # one after the other: what one answers decides on the next
            (done,) = self.launcher.launch([[*arguments, f"seed={i}"]], initial_job_idx=i)
            print("told", done.return_value)
            if done.return_value is None:
                raise ValueError("no number")


name = f"{__name__}.Searcher"
ConfigStore.instance().store(group="hydra/sweeper", name="searcher", node={"_target_": name})
"""


FEW = ["workload.num_requests=20", "tracking=none", "scheduler=random"]


def swept(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`run.py -m` of few requests, in a folder."""
    return command("run.py", "-m", *FEW, *arguments, folder=folder)


def searched(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The same by hydra/sweeper=searcher, which Hydra finds at its start."""
    plugin = folder / "hydra_plugins" / "searcher.py"
    plugin.parent.mkdir()
    plugin.write_text(SEARCHER)
    path = {"PYTHONPATH": os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])}
    return new_process("run.py", "-m", *FEW, "hydra/sweeper=searcher", *arguments, folder=folder, environment=path)


@pytest.mark.slow
@pytest.mark.parametrize("subdir", ["${hydra.job.override_dirname}", "same/for/all"])
def test_jobs_are_told_by_their_number_not_their_folder(subdir: str, tmp_path: Path) -> None:
    done = swept(tmp_path, "seed=0,-1", f"hydra.sweep.subdir={subdir}", "hydra.sweep.dir=here/there")
    assert done.returncode == 1
    assert done.stdout.startswith("[1/2, ")
    assert "] seed=0: TTFT" in done.stdout
    told = done.stderr.splitlines()[-2:]
    assert told[0] == "1 of 2 jobs failed:"
    assert told[1].endswith("seed=-1: seed=-1: must be 0 or more")


KILLED = """
from dataclasses import dataclass
from typing import ClassVar
from block.dispatch.policies import Needs
import os, signal

@dataclass(frozen=True)
class Killed:
    needs: ClassVar[Needs] = Needs.COUNTS

    def candidates(self, instances, request_index, rng):
        os.kill(os.getpid(), signal.SIGKILL)

    def choose(self, request, views, rng):
        return 0
"""


@pytest.mark.slow
def test_a_worker_that_is_killed_fails_its_job_and_the_sweep(tmp_path: Path) -> None:
    (tmp_path / "killed.py").write_text(KILLED)
    done = swept(
        tmp_path, "seed=0,1,2", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "scheduler._target_=killed.Killed"
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "3 of 3 jobs failed:" in done.stderr
    assert "seed=0 scheduler._target_=killed.Killed: did not finish" in done.stderr


@pytest.mark.slow
def test_a_sweeper_that_searches_is_told_each_objective(tmp_path: Path) -> None:
    done = searched(tmp_path, "objective=[e2e_mean_s,preemptions]")
    assert (done.returncode, done.stderr) == (0, "")
    one, first, two, second = done.stdout.splitlines()
    assert one.startswith("[1 done] seed=0: TTFT")
    assert two.startswith("[2 done] seed=1: TTFT")
    for said, told in ((one, first), (two, second)):
        mean, preemptions = json.loads(told.removeprefix("told "))
        assert mean == pytest.approx(float(re.findall("E2E mean ([0-9.]+)", said)[0]), rel=1e-3)
        assert preemptions == 0


@pytest.mark.slow
def test_a_search_for_what_a_run_does_not_have_ends_in_words(tmp_path: Path) -> None:
    done = searched(tmp_path, "objective=forecast_p99_us")
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "objective=forecast_p99_us: this run has no such number" in done.stderr
    assert "the sweep ended early: no number\n1 of 1 jobs failed:\n" in done.stderr


# -------------------------------------------------------------------------------------------------------------- workers


def test_a_worker_ends_soon_after_the_process_that_started_it() -> None:
    worker = "import os, time; from block.run.sweep import exit_with_parent; exit_with_parent(os.getppid())"
    worker += "; print(os.getpid(), flush=True)"
    main = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {worker + '; time.sleep(60)'!r}])"
    with subprocess.Popen([sys.executable, "-c", main], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        pid = int(process.stdout.readline())
        assert (Path("/proc") / str(pid)).exists() or not Path("/proc").exists()
        process.kill()
        began = time.monotonic()
        process.stdout.read()  # until the worker, which holds the other end, is gone
        assert time.monotonic() - began < 10


@pytest.mark.slow
def test_only_a_worker_ends_with_its_parent() -> None:
    lines = "import os, time; from block.run.sweep import exit_with_parent; exit_with_parent({})"
    lines += "; time.sleep(1.2); print('alive')"
    for main in ("os.getpid()", "1 if os.getppid() != 1 else 2"):  # the main process itself; a stranger
        done = subprocess.run(
            [sys.executable, "-c", lines.format(main)], capture_output=True, text=True, timeout=60, env=dict(os.environ)
        )
        assert done.stdout == "alive\n"


GROWING = """
import builtins, time
from joblib import Parallel, delayed
{}
def grow(mib):
    time.sleep(1.1)  # joblib looks once a second
    builtins.kept = b"x" * (mib << 20)
    return mib
print(sum(Parallel(n_jobs=2)(delayed(grow)(mib) for mib in (1, 1, 400, 400, 1, 1, 1, 1))))
"""


@pytest.mark.slow
def test_a_worker_that_has_grown_is_replaced_without_a_word() -> None:
    told = {}
    for first in ("import block.run.sweep", ""):
        done = subprocess.run([sys.executable, "-c", GROWING.format(first)], capture_output=True, text=True, timeout=60)
        assert done.stdout == "806\n"
        told[first] = "A worker stopped" in done.stderr
    assert told == {"import block.run.sweep": False, "": True}
