"""Runs on servers that they start: emulated fleets and a tiny model on the CPU, and what is left of what is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from commands import built, covering
from processes import eventually, marked

from block.run.replay import requests_of
from block.store.results import Run, read_run, runs
from block.store.writer import recover
from block.workload.sessions import followers

# Found and not imported: to import it takes ten seconds, and each worker of the tests collects this file.
pytestmark = pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed")

ROOT = Path(__file__).resolve().parents[2]
LENGTHS = ["workload=trace", "workload.trace_path=lengths.csv", "workload.arrivals=poisson"]


def start(
    mark: str, folder: Path, *arguments: str, workload: Sequence[str] = LENGTHS, python: Sequence[str] = ()
) -> subprocess.Popen[str]:
    """`run.py` with these arguments in `folder`.

    workload: by default requests of 20 to 59 prompt and 10 to 29 response tokens. python: arguments of Python's own,
    such as `covering`.
    """
    rows = "".join(f"{20 + i % 40},{10 + i % 20}\n" for i in range(200))
    (folder / "lengths.csv").write_text("prompt_tokens,output_tokens\n" + rows)
    return subprocess.Popen(
        [sys.executable, *python, str(ROOT / "run.py"), "tracking=none", "runs_dir=runs", *workload, *arguments],
        cwd=folder,
        env={**os.environ, mark: "1", "COVERAGE_FILE": str(ROOT / ".coverage")},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def emulate(
    mark: str, folder: Path, engines: int, requests: int, qps: int, python: Sequence[str] = ()
) -> subprocess.Popen[str]:
    """`start` on emulated engines, undilated."""
    backend = ["backend=emulated", "backend.time_dilation=1", f"cluster.num_gpus={engines}"]
    return start(mark, folder, *backend, f"workload.num_requests={requests}", f"workload.qps={qps}", python=python)


def finish(process: subprocess.Popen[str], folder: Path, seconds: float = 240) -> tuple[Run, str]:
    """The run that `process` stores, and what it printed."""
    said, _ = process.communicate(timeout=seconds)
    assert process.returncode == 0, said
    (run,) = runs(root=folder / "runs")
    return run, said


def nothing_left(mark: str) -> bool:
    return eventually(lambda: not marked(mark), 10)


def servers(mark: str) -> dict[int, str]:
    """The zygote and the API servers among the marked processes: the leaders of their process groups."""
    return {pid: line for pid, line in marked(mark).items() if _leads_a_group(pid) and "run.py" not in line}


def _leads_a_group(pid: int) -> bool:
    try:
        return os.getpgid(pid) == pid
    except ProcessLookupError:  # it has just ended
        return False


def progress(folder: Path) -> int:
    """Requests that a run in `folder` has finished so far."""
    return sum(path.read_text().count("\n") for path in folder.glob("runs/*/finished.jsonl"))


CHAT = [
    "workload=chat",
    "workload.closed_loop=true",
    "workload.gap_s=1",
    "workload.output_mean=14",
    "workload.num_requests=60",
    "workload.qps=12",
]
CACHING = ["engine=vllm_v1", "scheduler=block_cache", "cluster.num_gpus=4"]


def test_four_emulated_engines_find_prefixes_as_simulated_ones_do_and_are_gone(
    mark: str, tmp_path: Path, pytestconfig: pytest.Config
) -> None:
    """Chats in a closed loop; what each server has cached is known when a request is placed, and forecast with."""
    backend = ["backend=emulated", "backend.time_dilation=1"]
    process = start(mark, tmp_path, *CACHING, *backend, workload=CHAT, python=covering(pytestconfig))
    run, said = finish(process, tmp_path)
    simulated = start(mark, tmp_path, *CACHING, "backend=simulated", "backend.dispatch_delay_s=0", workload=CHAT)
    simulated.communicate(timeout=60)
    expected = next(run for run in runs(root=tmp_path / "runs") if run.choices["backend"] == "simulated")
    requests, theirs = run.requests(), expected.requests()
    assert run.counts == {"sent": 60, "ok": 60, "failed": 0, "fallback": 0, "preempted": 0, "failed_over": 0}
    lengths = ["request_id", "prompt_tokens", "output_tokens"]
    assert (
        requests[lengths].sort_values("request_id").values == theirs[lengths].sort_values("request_id").values
    ).all()
    assert set(requests.instance_id) == {0, 1, 2, 3}
    assert (requests.first_token > requests.dispatched).all()
    assert (requests.finished >= requests.first_token).all()
    assert run.document["engines"]["total_blocks"] == 1051
    tokens = pd.read_parquet(run.path / "tokens.parquet")
    assert [len(times) for times in tokens.token_times] == list(requests.output_tokens)
    assert all((np.diff(times) > 0).all() for times in tokens.token_times)
    assert len(list((run.path / "instances").glob("instance-*.log"))) == 4
    assert "60 ok" in said
    assert nothing_left(mark), marked(mark)
    # A step takes 20 ms and more: the engines keep the latency model's time, not their own.
    long = requests[requests.output_tokens > 5]
    assert np.median((long.finished - long.first_token) / (long.output_tokens - 1)) > 0.018
    # Prompts are found again, responses among them, and as often.
    rate, theirs_rate = (one.cached_tokens.sum() / one.prompt_tokens.sum() for one in (requests, theirs))
    assert 0.4 < rate == pytest.approx(theirs_rate, abs=0.05)
    ttft = requests.first_token - requests.arrival
    assert np.median(np.abs(requests.forecast_ttft - ttft)) < 0.05 * ttft.mean() + 0.02
    assert "judged by what was sent" not in said
    # A turn comes when the one before it has been answered.
    arrival, finished = (requests.set_index("request_id")[name] for name in ("arrival", "finished"))
    following = followers(requests_of(built(*CHAT, *CACHING))[0])
    assert len(following) > 10
    for id_, (turn, thinking) in following.items():
        assert finished[id_] + thinking <= arrival[turn.id] < finished[id_] + thinking + 0.5


def test_a_server_killed_in_mid_run_loses_nothing(mark: str, tmp_path: Path) -> None:
    process = emulate(mark, tmp_path, engines=3, requests=60, qps=10)
    assert eventually(lambda: progress(tmp_path) > 10, 120)
    zygote = next(pid for pid, line in servers(mark).items() if "zygote" in line)
    victim = next(pid for pid in servers(mark) if pid != zygote)
    os.kill(victim, signal.SIGKILL)  # the API server; its engine core goes with it
    run, said = finish(process, tmp_path)
    assert run.counts is not None
    assert (run.counts["sent"], run.counts["ok"]) == (60, 60)
    assert run.counts["failed_over"] > 0
    ((_, lost, _),) = run.document["ejections"]
    assert f"lost         instance {lost}" in said
    late = run.requests().dispatched > run.document["ejections"][0][0]
    assert lost not in set(run.requests()[late].instance_id)
    assert nothing_left(mark), marked(mark)


def test_a_run_that_is_killed_leaves_no_process_and_its_finished_records(mark: str, tmp_path: Path) -> None:
    process = emulate(mark, tmp_path, engines=2, requests=200, qps=5)
    assert eventually(lambda: progress(tmp_path) > 5, 120)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert nothing_left(mark), marked(mark)
    assert runs(root=tmp_path / "runs") == []
    (folder,) = (tmp_path / "runs").iterdir()
    run = recover(folder)
    assert run is not None
    assert run.status == "interrupted"
    assert run.counts is not None
    assert run.counts["ok"] > 5
    assert (run.requests().output_tokens > 0).all()
    assert read_run(folder) is not None


def test_a_run_whose_zygote_is_killed_ends_and_says_what_it_lost(mark: str, tmp_path: Path) -> None:
    process = emulate(mark, tmp_path, engines=2, requests=40, qps=10)
    assert eventually(lambda: progress(tmp_path) > 2, 120)
    zygote = next(pid for pid, line in servers(mark).items() if "zygote" in line)
    os.kill(zygote, signal.SIGKILL)
    run, said = finish(process, tmp_path)
    assert run.counts is not None
    assert 2 < run.counts["ok"] < 40
    assert run.counts["failed"] == 40 - run.counts["ok"]
    assert "lost         instance 0" in said
    assert "lost         instance 1" in said
    assert nothing_left(mark), marked(mark)


def test_a_server_that_cannot_start_is_told_in_one_line_with_its_log(mark: str, tmp_path: Path) -> None:
    process = start(mark, tmp_path, "backend=vllm_cpu", "backend.arguments=[--no-such-option]", "cluster.num_gpus=1")
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 1, said
    assert "no-such-option" in said.splitlines()[-1]
    assert "instance-0.log" in said.splitlines()[-1]
    assert "Traceback" not in said
    assert nothing_left(mark), marked(mark)


def test_a_server_is_started_when_it_is_needed_and_stopped_when_not(mark: str, tmp_path: Path) -> None:
    """An engine that two requests fill; a burst that is too much for it; then little to do."""
    times = [0.1 * i for i in range(30)] + [3.0 + 0.5 * i for i in range(20)]
    rows = "".join(f"30,20,{time}\n" for time in times)
    (tmp_path / "burst.csv").write_text("prompt_tokens,output_tokens,arrival\n" + rows)
    process = start(
        *(mark, tmp_path, "backend=emulated", "backend.time_dilation=1", "cluster.num_gpus=2", "engine.max_num_seqs=2"),
        *("workload.trace_path=burst.csv", "workload.arrivals=trace", f"workload.num_requests={len(times)}"),
        *(f"workload.qps={(len(times) - 1) / times[-1]}", "provisioner=preempt", "provisioner.initial=1"),
        *("provisioner.threshold_s=1.5", "provisioner.drain_after_s=2"),
    )
    run, said = finish(process, tmp_path)
    assert run.counts is not None
    assert (run.counts["sent"], run.counts["ok"], run.counts["failed_over"]) == (50, 50, 0)
    changes = run.document["changes"]
    assert [(i, change) for _, i, change, _ in changes] == [(1, what) for what in ("start", "join", "drain", "stop")]
    started, joined, drained, stopped = (at for at, *_ in changes)
    assert started + 0.1 < joined  # it took its time
    theirs, decisions = run.requests().query("instance_id == 1"), run.decisions().query("chosen == 1")
    assert decisions.time.iloc[0] == pytest.approx(started, abs=0.01)  # by the request that called for it
    assert decisions.time.iloc[1] >= joined
    assert theirs.dispatched.min() >= joined
    assert decisions.time.max() <= drained
    assert theirs.finished.max() <= stopped
    active = run.instances().groupby("time").size()
    assert (active.iloc[0], active.max(), active.iloc[-1]) == (1, 2, 1)
    cost = run.requests().finished.max() + stopped - started
    assert run.summary["instance_seconds"] == pytest.approx(cost, abs=0.5)
    assert "1 joined, 1 drained" in said
    assert nothing_left(mark), marked(mark)


def test_a_server_of_a_real_model_joins_and_leaves_and_an_interrupted_run_keeps_its_records(
    mark: str, tmp_path: Path, pytestconfig: pytest.Config
) -> None:
    """An engine that one request fills, a few long ones, and little until the test has seen it and types Ctrl-C."""
    rows = ["100,300,0.0"] * 6 + [f"20,5,{1 + i}" for i in range(300)]
    (tmp_path / "burst.csv").write_text("\n".join(["prompt_tokens,output_tokens,arrival", *rows]))
    process = start(
        *(mark, tmp_path, "backend=vllm_cpu", "engine.max_num_seqs=1", "engine.enable_prefix_caching=true"),
        "workload.trace_path=burst.csv",
        *("workload.arrivals=trace", f"workload.num_requests={len(rows)}", f"workload.qps={(len(rows) - 1) / 300}"),
        *("provisioner=preempt", "provisioner.initial=1", "provisioner.threshold_s=1.5"),
        *("provisioner.drain_after_s=1", "provisioner.drain_ttft_s=0.5"),
        python=covering(pytestconfig),
    )
    for running in (1, 2, 1):
        assert eventually(lambda: len(servers(mark)) == running, 60), (running, servers(mark))  # noqa: B023
    (log,) = (tmp_path / "runs").glob("*/run.log")
    assert eventually(lambda: "instance 1: stop" in log.read_text(), 20), log.read_text()
    os.kill(process.pid, signal.SIGINT)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert nothing_left(mark), marked(mark)
    (run,) = runs(root=tmp_path / "runs", status="interrupted")
    assert run.counts is not None
    assert run.counts["ok"] > 6
    served = run.requests().query("status == 'ok'")
    assert (served.output_tokens == np.where(served.prompt_tokens == 100, 300, 5)).all()
    assert served.forecast_e2e.isna().sum() == 1  # of the one that waits for the server that it called for
    changes = run.document["changes"][:4]
    assert [(i, change) for _, i, change, _ in changes] == [(1, what) for what in ("start", "join", "drain", "stop")]
    joined, stopped = changes[1][0], changes[3][0]
    theirs = served.query("instance_id == 1")
    assert len(theirs) > 0
    assert joined <= theirs.dispatched.min() < theirs.finished.max() <= stopped


def test_a_server_that_has_not_joined_is_gone_when_the_run_ends(mark: str, tmp_path: Path) -> None:
    """What the other one does is pushed, as from another host: also which requests it has preempted."""
    tight = ["engine.num_gpu_blocks=5", "engine.max_model_len=64"]
    short = ["workload.max_total_tokens=64", "workload.too_long=drop"]
    process = start(
        *(mark, tmp_path, "backend=emulated", "backend.time_dilation=1", "cluster.num_gpus=2", "engine.max_num_seqs=2"),
        *("backend.shared_memory=false", *tight, *short),
        *("workload.num_requests=12", "workload.qps=12", "provisioner=relief", "provisioner.initial=1"),
        *("provisioner.threshold_s=0.5", "provisioner.startup_s=60"),
    )
    run, _ = finish(process, tmp_path)
    assert run.counts is not None
    assert run.counts["ok"] == 12
    preemptions = run.requests().preemptions
    assert preemptions.dtype == int  # all are known
    assert preemptions.sum() == run.summary["preemptions"] > 0
    assert run.counts["preempted"] == (preemptions > 0).sum()
    pushed = run.document["snapshots"][0]
    assert (pushed["by"], pushed["breaks"]) == ("push", 0)
    assert 0 <= pushed["late_p50_s"] < pushed["age_p50_s"] + 1
    assert [change for _, _, change, _ in run.document["changes"]] == ["start"]
    assert nothing_left(mark), marked(mark)
