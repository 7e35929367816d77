"""What admission by forecasts is worth: goodput of the gateway beyond capacity, with what misses its objective served,
refused or queued.

    python benchmarks/goodput.py [qps=12] [requests=1200] [gpus=4] [ttft_s=2]

Real vLLM servers on emulated A30s with Llama-2-7B take ShareGPT's requests through the gateway (scheduler=block). The
paper's twelve carry 30 requests/s, so four carry 10, and the default is 1.2 times that. Goodput is the share of all
requests whose first token comes within the objective. The three take turns on the same servers with the same requests.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import cast

import numpy as np
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table
from testbed import compose_run

from block.cluster.fleet import RealBackend
from block.core.clock import Clock
from block.store.summary import only_ok, ttft

ROOT = Path(__file__).resolve().parent.parent
SETTINGS = {key: value for key, _, value in (one.partition("=") for one in sys.argv[1:])}
QPS, REQUESTS = float(SETTINGS.get("qps", 12)), int(SETTINGS.get("requests", 1200))
GPUS, TTFT_S = int(SETTINGS.get("gpus", 4)), float(SETTINGS.get("ttft_s", 2))
MISSED = ("serve", "refuse", "queue")


async def through_gateway(urls: list[str], missed: str, folder: Path) -> Path:
    """Run the workload through a gateway before these servers; returns the folder of the run."""
    served = ["scheduler=block", "model=llama2-7b", "cluster.gpu=a30", f"gateway.urls=[{','.join(urls)}]"]
    slo = [f"gateway.slo.ttft_s={TTFT_S}", f"gateway.slo.missed={missed}", "gateway.port=0"]
    gateway = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "block.gateway", *served, *slo, cwd=ROOT, stdout=subprocess.PIPE
    )
    assert gateway.stdout is not None
    try:
        address = (await gateway.stdout.readline()).decode().split(": ")[0]
        load = [f"workload.qps={QPS}", f"workload.num_requests={REQUESTS}", "workload=sharegpt", "tracking=none"]
        runs = f"runs_dir={folder / missed}"
        run = await asyncio.create_subprocess_exec(
            sys.executable,
            *["run.py", "scheduler=round_robin", "backend=vllm", "model=llama2-7b", f"backend.urls=[{address}]"],
            *[*load, runs],
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
        )
        await run.wait()
    finally:
        gateway.terminate()
        await gateway.wait()
    return next(iter((folder / missed).glob("*/requests.parquet"))).parent


async def main() -> None:
    keys = ["backend=emulated", "model=llama2-7b", f"cluster.num_gpus={GPUS}"]
    run = compose_run(*keys, "backend.time_dilation=1", "backend.stream_interval=8")
    backend = cast(RealBackend, run.backend)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        table = Table("missed=", "goodput", "answered", "TTFT P50", "TTFT P99")
        async with backend.start(run.testbed, Clock(), folder / "logs") as fleet:
            urls = [str(one.url) for one in fleet.instances]  # type: ignore[attr-defined]
            for missed in MISSED:
                stored = await through_gateway(urls, missed, folder)
                table.add_row(missed, *told(stored))
        Console().print(table)


def told(stored: Path) -> list[str]:
    columns = {
        name: np.asarray(column) for name, column in pq.read_table(stored / "requests.parquet").to_pydict().items()
    }
    ok = only_ok(columns)
    waited = ttft(ok)
    share = (waited <= TTFT_S).sum() / len(columns["arrival"])
    return [
        f"{share:.1%}",
        f"{len(waited) / len(columns['arrival']):.1%}",
        *(f"{np.percentile(waited, p):.2f} s" for p in (50, 99)),
    ]


if __name__ == "__main__":
    asyncio.run(main())
