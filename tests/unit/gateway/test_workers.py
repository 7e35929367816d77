"""Several processes on one port: they count as one, all know what an admin tells one, and one that dies is back."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
from collections.abc import Sequence
from pathlib import Path

import aiohttp
import pytest
from mock_servers import ASKED, Mock
from test_gateway_command import command

from block.gateway.workers import Seat, summed

ONE = b"""# HELP block_requests_total Requests
# TYPE block_requests_total counter
block_requests_total{server="a",status="ok"} 2.0
# HELP block_in_flight Requests now
# TYPE block_in_flight gauge
block_in_flight{server="a"} 1.0
# HELP block_instance_active Whether
# TYPE block_instance_active gauge
block_instance_active{server="a"} 1.0
# HELP block_e2e_seconds Time
# TYPE block_e2e_seconds histogram
block_e2e_seconds_bucket{le="1.0"} 1.0
block_e2e_seconds_bucket{le="+Inf"} 2.0
block_e2e_seconds_count 2.0
block_e2e_seconds_sum 3.5
"""


def test_counts_are_added_and_other_gauges_are_not() -> None:
    other = ONE.replace(b'server="a"', b'server="b"').replace(b"2.0", b"5.0")
    lines = summed([ONE, ONE, other]).decode().splitlines()
    assert 'block_requests_total{server="a",status="ok"} 4.0' in lines
    assert 'block_requests_total{server="b",status="ok"} 5.0' in lines
    assert 'block_in_flight{server="a"} 2.0' in lines
    assert 'block_instance_active{server="a"} 1.0' in lines
    assert 'block_e2e_seconds_bucket{le="+Inf"} 9.0' in lines
    assert "block_e2e_seconds_sum 10.5" in lines
    assert "# TYPE block_e2e_seconds histogram" in lines
    assert summed([ONE]).decode().splitlines() == ONE.decode().splitlines()


def test_what_a_worker_has_counted_outlives_it(tmp_path: Path) -> None:
    first, second = Seat(0, 2, tmp_path), Seat(1, 2, tmp_path)
    for _ in range(2):
        second.tell_metrics(ONE)
        second.bury()
    assert second.all_metrics().decode().count('status="ok"} 4.0') == 1
    assert b"block_in_flight" not in second.all_metrics()
    second.tell_metrics(ONE)
    first.tell_metrics(ONE)
    for seat in (first, second):
        assert b'status="ok"} 8.0' in seat.all_metrics()
        assert b'block_in_flight{server="a"} 2.0' in seat.all_metrics()
    for seat in (first, second):
        seat.tell_metrics(ONE.replace(b'"a"', b'"b"'))
    assert b'"a"' not in first.all_metrics()  # all have forgotten that server


def children(pid: int) -> list[int]:
    """Its worker processes."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            status = (folder / "status").read_text()
            if f"\nPPid:\t{pid}\n" in status and b"spawn_main" in (folder / "cmdline").read_bytes():
                found.append(int(folder.name))
        except OSError:  # it has ended
            continue
    return found


async def ask_all(address: str, requests: int) -> Sequence[int]:
    """Statuses of requests over connections of their own, which the kernel spreads over the workers."""

    async def ask(client: aiohttp.ClientSession) -> int:
        async with client.post(f"{address}/v1/completions", data=ASKED) as answer:
            await answer.read()
            return answer.status

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(force_close=True)) as client:
        return await asyncio.gather(*(ask(client) for _ in range(requests)))


async def answered(address: str) -> float:
    """Requests that were answered, by the metrics of whichever worker tells them."""
    async with aiohttp.ClientSession() as client, client.get(f"{address}/metrics") as answer:
        return sum(map(float, re.findall(r'^block_requests_total{.*status="ok"} (\S+)$', await answer.text(), re.M)))


@pytest.mark.slow
def test_workers_share_a_port_and_one_that_dies_is_back(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    async def main() -> None:
        mocks = [Mock(), Mock()]
        for mock in mocks:
            await mock.start()
        (tmp_path / "admins").write_text("sesame\n")
        keys = [f"gateway.urls=[{mocks[0].url}]", f"gateway.admin_key_file={tmp_path / 'admins'}", "gateway.port=0"]
        gateway = await command("scheduler=round_robin", *keys, "gateway.workers=2")
        request.addfinalizer(lambda: gateway.returncode is None and gateway.kill())
        assert gateway.stdout is not None
        line = (await gateway.stdout.readline()).decode()
        assert line.endswith(f": round_robin, 2 workers over {mocks[0].url}\n")
        address = line.split(": ")[0]
        workers = children(gateway.pid)
        assert len(workers) == 2
        assert set(await ask_all(address, 40)) == {200}

        headers = {"Authorization": "Bearer sesame"}
        async with aiohttp.ClientSession() as client:
            add = client.post(f"{address}/servers", headers=headers, data=json.dumps({"url": mocks[1].url}))
            async with add as answer:
                assert answer.status == 201
        asked = 40
        while len(mocks[1].seen) == 0 or await of_all_workers_go_to_both(address, headers) is False:
            assert set(await ask_all(address, 10)) == {200}
            asked += 10
        while {await answered(address) for _ in range(12)} != {asked}:  # each may be asked of any of them
            await asyncio.sleep(0.05)

        os.kill(workers[0], signal.SIGKILL)
        while len(now := children(gateway.pid)) != 2 or workers[0] in now:
            await asyncio.sleep(0.05)
        while await answered(address) < asked:
            await asyncio.sleep(0.05)
        assert set(await ask_all(address, 10)) == {200}

        gateway.send_signal(signal.SIGINT)
        _, errors = await gateway.communicate()
        assert gateway.returncode == 0
        assert "worker 0 has ended (-9); another begins" in errors.decode()
        assert "Traceback" not in errors.decode()
        assert children(gateway.pid) == []
        assert not any(Path(f"/proc/{pid}").exists() for pid in [*workers, *now])
        for mock in mocks:
            await mock.runner.cleanup()

    async def of_all_workers_go_to_both(address: str, headers: dict[str, str]) -> bool:
        counts = []
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(force_close=True)) as client:
            for _ in range(12):
                async with client.get(f"{address}/servers", headers=headers) as answer:
                    counts.append(len((await answer.json())["servers"]))
        return set(counts) == {2}

    asyncio.run(asyncio.wait_for(main(), 90))


@pytest.mark.slow
def test_workers_that_cannot_serve_end_in_one_line(tmp_path: Path) -> None:
    async def main() -> None:
        mock = Mock()
        await mock.start()
        urls = f"gateway.urls=[{mock.url}]"
        gateway = await command("scheduler=round_robin", urls, f"gateway.port={mock.port}", "gateway.workers=2")
        _, errors = await gateway.communicate()
        (line,) = errors.decode().splitlines()
        assert line.startswith(f"error: gateway.port={mock.port}: cannot listen on 127.0.0.1: ")
        assert gateway.returncode == 2
        await mock.runner.cleanup()

    asyncio.run(asyncio.wait_for(main(), 60))
