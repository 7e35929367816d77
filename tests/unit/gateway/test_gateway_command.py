"""The gateway's command: wrong keys in one line, where it listens, and how it ends."""

from __future__ import annotations

import asyncio
import math
import os
import re
import runpy
import signal
import socket
import sys
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from mock_servers import DONE, EVENTS, STREAMED, Mock, eventually, run, running_gateway, stream

from block.backends.launch import free_ports
from block.gateway.config import GatewayConfig

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({}, "gateway.urls=[]: give at least one, such as [http://host:8000]"),
        ({"urls": ["h1:8000"]}, "gateway.urls=h1:8000: must be of the form http://host:port"),
        ({"urls": ["http://"]}, "gateway.urls=http://: must be of the form"),
        ({"urls": ["http://h:port"]}, "gateway.urls=http://h:port: must be of the form"),
        ({"urls": ["http://me:key@h:1"]}, "gateway.urls=http://me:key@h:1: must be of the form"),
        ({"urls": ["http://h:1", "http://h:1/"]}, "gateway.urls=http://h:1: given twice"),
        ({"urls": ["http://a..b:80"]}, "gateway.urls=http://a..b:80: must be of the form"),
        ({"urls": ["http://exa mple:80"]}, "gateway.urls=http://exa mple:80: must be of the form"),
        ({"urls": ["http://host:80/a b"]}, "gateway.urls=http://host:80/a b: must be of the form"),
        ({"urls": ["http://x:80/a?"]}, "gateway.urls=http://x:80/a?: must be of the form"),
        ({"urls": ["http://a\\x00:80"]}, "gateway.urls=http://a\\x00:80: must be of the form"),
        ({"host": "a..b"}, "gateway.host=a..b: must be a name or an address"),
        ({"port": 70000}, "gateway.port=70000: must be between 1 and 65535"),
        ({"expected_output_tokens": 0}, "gateway.expected_output_tokens=0: must be at least 1"),
        ({"max_body_mib": 0}, "gateway.max_body_mib=0: must be at least 1"),
        ({"probe_interval_s": 0.0}, "gateway.probe_interval_s=0.0: must be greater than 0"),
        ({"connect_timeout_s": math.inf}, "gateway.connect_timeout_s=inf: must be greater than 0"),
        ({"read_timeout_s": -1.0}, "gateway.read_timeout_s=-1.0: must be greater than 0"),
        ({"grace_s": -1.0}, "gateway.grace_s=-1.0: must be 0 or more seconds"),
        ({"access_log": ""}, "gateway.access_log=: must be a file, or - for standard output"),
        (
            {"otlp_traces_endpoint": "ftp://h:1"},
            "gateway.otlp_traces_endpoint=ftp://h:1: must be of the form http://host:4317 (gRPC), or "
            "http://host:4318/v1/traces (http/protobuf)",
        ),
    ],
)
def test_a_wrong_key_is_told_with_its_value(keys: dict[str, Any], says: str) -> None:
    if "urls" not in keys and keys:
        keys = {"urls": ["http://h:1"], **keys}
    with pytest.raises(ValueError, match=re.escape(says)):
        GatewayConfig(**keys)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "error: gateway.urls=[]: give at least one"),
        (["gateway.urls=[h1:8000]"], "error: gateway.urls=h1:8000: must be"),
        (["gateway.prot=80"], "error: gateway.prot: no such key; did you mean port? choose from urls, urls_file, "),
        (["gateway.port=http"], "error: gateway.port=http: wants an integer"),
        (
            ["gateway.urls=[http://h:1]", "scheduler=random", "gateway.plugin=false"],
            "error: gateway.plugin=False: has no effect, for scheduler=random looks at no server's state",
        ),
        (["scheduler=roundrobin"], "error: scheduler=roundrobin: did you mean round_robin?"),
        (
            ["gateway.urls=[http://h:1]", "scheduler=random", "scheduler._target_=nobody_s_policy.Two"],
            "error: scheduler._target_=nobody_s_policy.Two: candidates, for request 0 of 1 instances, returned [0, 1]: "
            "1 is not between 0 and 0 (nobody_s_policy.py:6)",
        ),
    ],
)
def test_a_wrong_command_ends_in_one_line(
    arguments: list[str],
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nobody_s_policy.py").write_text(
        "from dataclasses import dataclass\nfrom block.dispatch.policies import Random\n\n"
        "@dataclass(frozen=True)\nclass Two(Random):\n    def candidates(self, *_):\n        return [0, 1]\n"
    )
    ends_in_one_line(arguments, says, monkeypatch, capsys)


def ends_in_one_line(
    arguments: list[str], says: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command with these arguments says so, and nothing else, and ends with 2."""
    monkeypatch.setattr(sys, "argv", ["block.gateway", *arguments])
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("block.gateway", run_name="__main__")
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert line.startswith(says)
    assert (captured.out, ended.value.code) == ("", 2)


async def command(*arguments: str) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "block.gateway",
        "gateway.host=127.0.0.1",
        *arguments,
        env={**os.environ, "HYDRA_FULL_ERROR": "0"},
        cwd=ROOT,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )


def connects(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


def test_the_command_says_where_it_listens_and_finishes_its_streams_when_told_to_stop() -> None:
    async def main() -> None:
        mock = Mock(stream)
        await mock.start()
        mock.go.clear()
        urls = f"gateway.urls=[{mock.url},http://127.0.0.1:{free_ports(1)[0]}]"
        gateway = await command("scheduler=round_robin", urls, "gateway.port=0")
        assert gateway.stdout is not None
        line = (await gateway.stdout.readline()).decode()
        assert line.endswith(f": round_robin over {urls[len('gateway.urls=[') : -1].replace(',', ', ')}\n")
        address = line.split(": ")[0]
        port = int(address.rpartition(":")[2])
        async with aiohttp.ClientSession() as client:
            async with client.get(f"{address}/health") as answer:
                assert (answer.status, await answer.json()) == (200, {"active": 1, "instances": 2})
            async with client.post(f"{address}/v1/completions", data=STREAMED) as answer:
                assert await answer.content.readany() == EVENTS[0]
                gateway.send_signal(signal.SIGTERM)
                while connects(port):
                    await asyncio.sleep(0.01)
                mock.go.set()
                assert (await answer.content.read()).endswith(DONE)
        _, errors = await gateway.communicate()
        assert gateway.returncode == 0
        (warning,) = errors.decode().splitlines()
        assert "is not well: " in warning
        await mock.runner.cleanup()

    run(main())


def test_a_stream_that_outlasts_the_grace_period_is_cut_and_its_request_cancelled() -> None:
    async def main() -> None:
        async with running_gateway([Mock(stream)], grace_s=0.1) as gateway:
            mock = gateway.mocks[0]
            mock.go.clear()
            asked = asyncio.create_task(gateway.ask(STREAMED))
            await eventually(lambda: gateway.in_flight() == 1)
            await asyncio.sleep(0.05)
            await gateway.stop()
            with pytest.raises(aiohttp.ClientError):
                await asked
            await eventually(lambda: mock.cancelled == 1)

    run(main())


def test_a_host_that_is_not_there_is_told_and_servers_may_be_of_ipv6() -> None:
    async def main() -> None:
        gateway = await command("scheduler=random", "gateway.urls=[http://127.0.0.1:9]", "gateway.host=192.0.2.1")
        _, errors = await gateway.communicate()
        assert (
            errors.decode().splitlines()[-1].startswith("error: gateway.host=192.0.2.1: cannot listen on 192.0.2.1: ")
        )
        assert gateway.returncode == 2
        assert GatewayConfig(urls=("http://[::1]:8000", "http://h_1.x-y/a/b%20c")).urls

    run(main())


def test_a_port_that_is_taken_is_told() -> None:
    async def main() -> None:
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            port = taken.getsockname()[1]
            gateway = await command("scheduler=random", "gateway.urls=[http://127.0.0.1:9]", f"gateway.port={port}")
            _, errors = await gateway.communicate()
        last = errors.decode().splitlines()[-1]
        assert last.startswith(f"error: gateway.port={port}: cannot listen on 127.0.0.1: ")
        assert "in use" in last
        assert gateway.returncode == 2

    run(main())
