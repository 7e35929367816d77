"""Runs on the nodes of a Ray cluster, whose processes, nodes and servers are killed. The nodes are simulated here."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from commands import covering
from mock_backend import MARK
from processes import eventually, marked

from block.store.results import runs
from block.store.writer import recover

pytestmark = pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed")

ROOT = Path(__file__).resolve().parents[2]
ROOM = {"num_cpus": 1, "num_gpus": 2}
MOCKS = ["backend=mocks", "engine=vllm_v1", "engine.enable_prefix_caching=false", "scheduler=round_robin"]
ENDLESS = ["workload.num_requests=100000", "workload.qps=20"]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Three nodes with room for a server each."""
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")  # or a token would be left in the home folder
        patch.setenv("PYTHONPATH", str(ROOT / "tests"))
        started = Cluster(initialize_head=True, head_node_args={**ROOM, "include_dashboard": False})
        try:
            for _ in range(2):
                started.add_node(**ROOM)
            yield started
        finally:
            started.shutdown()


def start(
    mark: str,
    folder: Path,
    address: str,
    *arguments: str,
    backend: Sequence[str] = MOCKS,
    python: Sequence[str] = (),
) -> subprocess.Popen[str]:
    """`run.py` on the Ray cluster at `address`. python: arguments of Python's own, such as `covering`."""
    (folder / "conf" / "backend").mkdir(parents=True)
    keys = "launcher: ray, placement: spread, arguments: [], ready_timeout_s: 60"
    (folder / "conf" / "backend" / "mocks.yaml").write_text(f"{{_target_: mock_backend.Mocks, {keys}}}")
    rows = "".join(f"{20 + i % 40},{10 + i % 20}\n" for i in range(200))
    (folder / "lengths.csv").write_text("prompt_tokens,output_tokens\n" + rows)
    usual = ["--config-dir=conf", "tracking=none", "runs_dir=runs"]
    workload = ["workload=trace", "workload.trace_path=lengths.csv", "workload.arrivals=poisson"]
    own = {mark: "1", MARK: mark, "RAY_ADDRESS": address, "RAY_AUTH_MODE": "disabled"}
    paths = {"PYTHONPATH": str(ROOT / "tests"), "COVERAGE_FILE": str(ROOT / ".coverage")}
    return subprocess.Popen(
        [sys.executable, *python, str(ROOT / "run.py"), *usual, *workload, *backend, *arguments],
        cwd=folder,
        env={**os.environ, **own, **paths},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def servers(mark: str) -> dict[str, int]:
    """The processes of servers, by their ports."""
    ports = {pid: re.search(r"--port=(\d+)", line) for pid, line in marked(mark).items()}
    return {found[1]: pid for pid, found in ports.items() if found}


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def raylet(server: int) -> int:
    """What stands for the node of a server: the parent of its actor."""
    return parent(parent(server))


def nodes_by_raylet(cluster: Any) -> dict[int, Any]:
    """All nodes but the head."""
    return {node.all_processes["raylet"][0].process.pid: node for node in cluster.worker_nodes}


def visible_gpus(pid: int) -> str:
    variables = Path(f"/proc/{pid}/environ").read_text().split("\0")
    return dict(one.partition("=")[::2] for one in variables)["CUDA_VISIBLE_DEVICES"]


def log_of(folder: Path) -> str:
    return "".join(path.read_text() for path in folder.glob("runs/*/run.log"))


def finished(folder: Path) -> int:
    return sum(path.read_text().count("\n") for path in folder.glob("runs/*/finished.jsonl"))


def nothing_left(mark: str) -> bool:
    return eventually(lambda: not marked(mark), 10)


def test_a_server_an_actor_a_node_and_the_run_are_killed(cluster: Any, mark: str, tmp_path: Path) -> None:
    """Two servers with two GPUs each, as far as Ray counts them, and a node to spare."""
    run = start(mark, tmp_path, cluster.address, "cluster.num_gpus=4", "model.tensor_parallel=2", *ENDLESS)

    def whole(again: int) -> bool:
        """All servers run and have said so, so many of them again, and all get requests."""
        back = log_of(tmp_path).count("gets requests again")
        said = sum(path.read_text().count("listening on") for path in tmp_path.glob("runs/*/instances/*.log"))
        served = finished(tmp_path) > 20 * (1 + again)
        return served and len(servers(mark)) == 2 and (back, said) == (again, 2 + again)

    assert eventually(lambda: whole(0) or run.poll() is not None, 60)
    assert run.poll() is None, run.communicate()
    first = servers(mark)
    assert len({raylet(pid) for pid in first.values()}) == 2
    assert {visible_gpus(pid) for pid in first.values()} == {"0,1"}
    port, victim = next((port, pid) for port, pid in first.items() if raylet(pid) in nodes_by_raylet(cluster))

    os.kill(victim, signal.SIGKILL)
    assert eventually(lambda: whole(1), 30), log_of(tmp_path)

    victim = servers(mark)[port]  # where it was
    os.kill(parent(victim), signal.SIGKILL)
    assert eventually(lambda: victim not in marked(mark), 10)
    assert eventually(lambda: whole(2), 30), log_of(tmp_path)

    victim = servers(mark)[port]
    cluster.remove_node(nodes_by_raylet(cluster)[raylet(victim)])
    try:
        assert eventually(lambda: victim not in marked(mark), 10)
        assert eventually(lambda: whole(3), 60), log_of(tmp_path)
    finally:
        cluster.add_node(**ROOM)

    run.kill()
    run.communicate()
    assert nothing_left(mark), marked(mark)
    (folder,) = tmp_path.glob("runs/*")
    recovered = recover(folder)
    assert recovered is not None
    assert recovered.counts is not None
    assert recovered.counts["ok"] > 80
    assert recovered.counts["failed"] == 0
    assert recovered.counts["failed_over"] >= 3


def test_an_instance_joins_on_another_node_and_leaves_again(
    cluster: Any, mark: str, tmp_path: Path, pytestconfig: pytest.Config
) -> None:
    """A burst of long responses, and then little to do."""
    rows = ["20,60,0.0"] * 10 + [f"20,5,{2 + 0.25 * i}" for i in range(20)]
    (tmp_path / "burst.csv").write_text("\n".join(["prompt_tokens,output_tokens,arrival", *rows]))
    run = start(
        *(mark, tmp_path, cluster.address, "cluster.num_gpus=2", "backend.placement=strict_spread"),
        *("workload.trace_path=burst.csv", "workload.arrivals=trace", "workload.num_requests=30"),
        *("workload.qps=4.3", "scheduler=block", "provisioner=preempt", "provisioner.initial=1"),
        *("provisioner.threshold_s=0.1", "provisioner.drain_after_s=1", "provisioner.drain_ttft_s=5"),
        python=covering(pytestconfig),
    )
    assert eventually(lambda: len(servers(mark)) == 2 or run.poll() is not None, 60)
    assert run.poll() is None, run.communicate()
    assert len({raylet(pid) for pid in servers(mark).values()}) == 2
    said, _ = run.communicate(timeout=60)
    assert run.returncode == 0, said
    (stored,) = runs(root=tmp_path / "runs")
    assert stored.counts is not None
    assert (stored.counts["ok"], stored.counts["failed_over"]) == (30, 0)
    changes = [(i, what) for _, i, what, _ in stored.document["changes"]]
    assert changes == [(1, what) for what in ("start", "join", "drain", "stop")]
    assert nothing_left(mark), marked(mark)


def test_a_server_that_cannot_start_is_told_in_one_line_with_its_log(cluster: Any, mark: str, tmp_path: Path) -> None:
    run = start(mark, tmp_path, cluster.address, "cluster.num_gpus=1", "backend.arguments=[--no-such-option]")
    said, _ = run.communicate(timeout=60)
    assert run.returncode == 1, said
    assert re.search(r"ended with status 2 .*ValueError: no-such-option \(log: .*0\.log\)", said.splitlines()[-1]), said
    (log,) = tmp_path.glob("runs/*/instances/*.log")
    assert log.read_text().endswith("ValueError: no-such-option\nand more of it\n")
    assert nothing_left(mark), marked(mark)


@pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed")
def test_without_a_cluster_one_is_started_here_and_is_gone_with_the_run(mark: str, tmp_path: Path) -> None:
    """A real vLLM server, whose GPU is emulated."""
    emulated = ["backend=emulated", "backend.launcher=ray", "backend.time_dilation=1", "cluster.num_gpus=1"]
    run = start(mark, tmp_path, "local", "workload.num_requests=10", "workload.qps=10", backend=emulated)
    said, _ = run.communicate(timeout=240)
    assert run.returncode == 0, said
    (stored,) = runs(root=tmp_path / "runs")
    assert stored.counts is not None
    assert stored.counts["ok"] == 10
    assert stored.document["engines"]["total_blocks"] == 1051
    assert nothing_left(mark), marked(mark)
