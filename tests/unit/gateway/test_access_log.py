"""The access log: each request has one line, whatever became of it, and a disk that takes none costs no request."""

from __future__ import annotations

import asyncio
import gzip
import json
import os
import signal
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from mock_servers import (
    ASKED,
    DONE,
    EVENTS,
    STREAMED,
    USAGE,
    Mock,
    PluginMock,
    cut,
    eventually,
    hang,
    run,
    running_gateway,
    says,
    stream,
)

from block.dispatch import policies
from block.gateway import access_log, client_connections
from block.gateway.access_log import AccessLog
from block.gateway.admission import Slo

ROOT = Path(__file__).resolve().parents[3]
FIELDS = ["time", "client", "method", "path", "model", "status", "outcome", "server", "retries", "prompt_tokens"]
FIELDS += ["output_tokens", "cached_tokens", "ttft_s", "e2e_s", "predicted_ttft_s", "predicted_e2e_s", "fallback"]
FIELDS += ["trace_id", "request_id"]


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_line_tells_all_of_a_request_that_was_answered(tmp_path: Path) -> None:
    path = tmp_path / "access.log"

    async def main() -> None:
        async with running_gateway([PluginMock(stream)], policies.Block(), access_log=str(path)) as gateway:
            before = datetime.now(UTC)
            asked = STREAMED.replace(b"}}", b'},"max_tokens":5}')
            assert (await gateway.ask(asked, "/v1/completions?key=secret", headers={"X-Request-Id": "mine"}))[0] == 200
            assert (await gateway.ask())[0] == 200
            await eventually(lambda: len(lines(path)) == 2)
            first, second = lines(path)
            assert list(first) == FIELDS
            assert first["time"].endswith("Z")
            assert abs(datetime.fromisoformat(first["time"]) - before) < timedelta(seconds=10)
            assert 0 < first["ttft_s"] <= first["e2e_s"] < 10
            assert first["predicted_ttft_s"] < first["predicted_e2e_s"] == pytest.approx(5.0)
            told = {name: first[name] for name in FIELDS[1:12]}
            assert told == {
                "client": "127.0.0.1",
                "method": "POST",
                "path": "/v1/completions",
                "model": "m",
                "status": 200,
                "outcome": "ok",
                "server": gateway.mocks[0].url,
                "retries": 0,
                "prompt_tokens": 3,
                "output_tokens": 5,
                "cached_tokens": None,
            }
            assert (first["fallback"], first["trace_id"], first["request_id"]) == (None, None, "mine")
            assert second["request_id"] == str(gateway.dispatcher.history.records[1].request.id)

    run(main())


def test_each_request_has_one_line_whatever_became_of_it(tmp_path: Path) -> None:
    path = tmp_path / "access.log"

    async def main() -> None:
        mock = Mock(says(200, b'{"usage": {"prompt_tokens": 9, "completion_tokens": 4, "cached_tokens": 8}}'))
        async with running_gateway([mock], access_log=str(path)) as gateway:

            async def tells(**fields: Any) -> None:
                nonlocal told
                told += 1
                await eventually(lambda: len(lines(path)) == told)
                line = lines(path)[-1]
                assert {name: line[name] for name in fields} == fields

            told = 0
            await gateway.ask()
            await tells(status=200, outcome="ok", prompt_tokens=9, output_tokens=4, cached_tokens=8, ttft_s=None)
            await gateway.ask(b"{}")
            await tells(model=None, prompt_tokens=9)
            await gateway.ask(b"{")
            await tells(status=400, outcome="refused", server=None, model=None, prompt_tokens=None)
            await gateway.ask(b'{"model": "nobody\'s"}')
            await tells(status=404, outcome="refused", server=None, model="nobody's")
            await gateway.ask(b"{}", "/sleep")
            await tells(status=403, outcome="refused", path="/sleep")
            await gateway.ask(b'{"model": "m", "input": "x"}', "/v1/embeddings")
            await tells(status=200, outcome="ok", server=mock.url, model="m", path="/v1/embeddings", prompt_tokens=None)
            packed = gzip.compress(b'{"model": "m"}')
            await gateway.ask(packed, "/v1/embeddings", headers={"Content-Encoding": "gzip"})
            await tells(model="m")
            for own in ("/health", "/v1/models", "/metrics"):
                async with gateway.client.get(gateway.url + own) as answer:
                    assert answer.status == 200
                await tells(method="GET", path=own, status=200, outcome="ok", server=None)
            mock.answer = says(422)
            await gateway.ask()
            await tells(status=422, outcome="refused", server=mock.url)
            mock.answer = says(500)
            await gateway.ask()
            await tells(status=500, outcome="failed", server=mock.url)
            mock.answer = cut(EVENTS[0])
            await gateway.ask(STREAMED)
            await tells(status=200, outcome="failed", output_tokens=1)
            gateway.dispatcher.instance_down(0, "for the test", gateway.gateway._clock.now())
            mock.well = False
            await gateway.ask()
            await tells(status=503, outcome="failed", server=None)
            async with gateway.client.get(gateway.url + "/health"):
                await tells(status=503, outcome="failed")
        assert len({line["request_id"] for line in lines(path)}) == told == len(lines(path))

    run(main())


def test_a_request_that_begins_anew_has_one_line_with_the_server_that_answered(tmp_path: Path) -> None:
    path = tmp_path / "access.log"

    async def main() -> None:
        mocks = [Mock(says(503)), Mock()]
        async with running_gateway(mocks, access_log=str(path)) as gateway:
            assert (await gateway.ask())[0] == 200
            url = mocks[1].url
        (line,) = lines(path)
        assert (line["server"], line["retries"], line["status"], line["outcome"]) == (url, 1, 200, "ok")

    run(main())


def test_a_request_whose_forecast_misses_tells_the_forecast(tmp_path: Path) -> None:
    path = tmp_path / "access.log"

    async def main() -> None:
        slo = Slo(e2e_s=4.0, missed="refuse")
        async with running_gateway([PluginMock()], policies.Block(), slo=slo, access_log=str(path)) as gateway:
            assert (await gateway.ask())[0] == 429
        (line,) = lines(path)
        assert (line["status"], line["outcome"], line["server"]) == (429, "refused", None)
        assert line["predicted_e2e_s"] == pytest.approx(5.0)

    run(main())


@pytest.mark.parametrize(
    ("answer", "body", "status"),
    [(hang, ASKED, None), (hang, STREAMED, None), (stream, STREAMED, 200)],
    ids=["whole", "no byte", "in a stream"],
)
def test_a_request_whose_client_goes_away_is_cancelled(answer: Any, body: bytes, status: int, tmp_path: Path) -> None:
    path = tmp_path / "access.log"

    async def main() -> None:
        async with running_gateway([Mock(answer)], access_log=str(path)) as gateway:
            gateway.mocks[0].go.clear()
            reader, writer = await gateway.connect()
            writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
            if status is None:
                await eventually(lambda: len(gateway.mocks[0].seen) == 1)
            else:
                assert await reader.read(100)
            writer.transport.abort()
            await eventually(lambda: len(lines(path)) == 1)
        (line,) = lines(path)
        assert (line["status"], line["outcome"]) == (status, "cancelled")

    run(main())


def test_what_is_no_request_has_a_line_with_what_is_known_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_connections, "LINGER_S", 0.05)
    path = tmp_path / "access.log"
    post = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%s" % (len(ASKED), ASKED)
    long = b"POST /long HTTP/1.1\r\nHost: x\r\nX-Request-Id: l\r\nContent-Length: 99999999\r\n\r\n"

    async def main() -> None:
        async with running_gateway([Mock()], access_log=str(path), max_body_mib=1) as gateway:
            for sent in (
                b"\x00\r\n\r\n",
                post + post + b"\x00\r\n",
                long,
                b"PUT /x HTTP/1.1\r\n\r\n",
                b"GET /#a HTTP/1.1\r\nHost: x\r\n\r\n",
            ):
                reader, writer = await gateway.connect()
                writer.write(sent)
                await reader.read()
                writer.close()
            gateway.gateway.most_clients = 0
            reader, writer = await gateway.connect()
            await reader.read()
            writer.close()
        found = [(line["method"], line["path"], line["status"], line["outcome"]) for line in lines(path)]
        answered = ("POST", "/v1/completions", 200, "ok")
        assert found == [
            (None, None, 400, "refused"),
            *(answered, answered, (None, None, 400, "refused")),
            ("POST", "/long", 413, "refused"),
            ("PUT", "/x", 400, "refused"),
            ("GET", "/#a", 400, "refused"),
            (None, None, 503, "failed"),
        ]
        assert lines(path)[4]["request_id"] == "l"

    run(main())


def test_texts_of_clients_are_cut_and_escaped(tmp_path: Path) -> None:
    path = tmp_path / "access.log"

    async def main() -> None:
        async with running_gateway([Mock()], access_log=str(path)) as gateway:
            body = json.dumps({"model": "x\n" * 10_000}).encode()
            await gateway.ask(body, headers={"X-Request-Id": '"' * 5000})
            await gateway.ask(b'{"model": 7}')
        first, second = lines(path)
        assert (len(first["model"]), len(first["request_id"]), second["model"]) == (1000, 1000, None)

    run(main())


def test_a_full_disk_costs_lines_and_no_request(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        async with running_gateway([Mock()], access_log="/dev/full") as gateway:
            for _ in range(3):
                assert (await gateway.ask())[0] == 200
            metrics: dict[str, float] = {}
            while metrics.get("block_access_log_lines_lost_total", 0) < 3:
                await asyncio.sleep(0.05)
                metrics = await gateway.metrics()
        (said,) = [record.getMessage() for record in caplog.records]
        assert said == "the access log is not written, and lines are lost: No space left on device"

    run(main())


def test_a_line_that_is_not_whole_spoils_no_other(tmp_path: Path) -> None:
    """A disk that fills up takes the beginning of what is written; other processes may write behind it."""
    path = tmp_path / "access.log"

    async def main() -> None:
        log = AccessLog(str(path))
        log._file.close()
        log._file = _FillsUp(str(path), "a")
        for number in range(3):
            log.write({"line": number})
        log.reopen()
        log.write({"line": 3})
        await log.close()
        whole, torn, last = path.read_text().splitlines()
        assert [json.loads(line)["line"] for line in (whole, last)] == [0, 3]
        assert '{"line":1}'.startswith(torn)
        assert log.lost == 2

    run(main())


class _FillsUp(access_log.FileIO):
    room = 15

    def write(self, data: Any) -> int:
        if self.room == 0:
            raise OSError(28, "No space left on device")
        written = super().write(data[: self.room])
        self.room -= written
        return written


def test_a_disk_that_hangs_holds_up_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(access_log, "MOST_WAITING", 2)
    monkeypatch.setattr(access_log, "CLOSE_S", 0.05)
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)

    async def main() -> None:
        read = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
        filled = os.open(fifo, os.O_WRONLY | os.O_NONBLOCK)
        os.write(filled, b"x" * 2**16)
        try:
            async with running_gateway([Mock()], access_log=str(fifo)) as gateway:
                for _ in range(3):
                    assert (await gateway.ask())[0] == 200
                assert (await gateway.metrics())["block_access_log_lines_lost_total"] == 1
        finally:
            os.close(filled)
            os.close(read)
        assert "the access log is not written: 4 lines are lost" in caplog.text

    run(main())


def test_a_file_that_was_moved_away_is_followed_by_another(tmp_path: Path) -> None:
    path, moved = tmp_path / "access.log", tmp_path / "access.log.1"

    async def main() -> None:
        mock = Mock()
        await mock.start()
        gateway = await started("gateway.port=0", f"gateway.urls=[{mock.url}]", f"gateway.access_log={path}")
        assert gateway.stdout is not None
        address = (await gateway.stdout.readline()).decode().split(": ")[0]
        async with aiohttp.ClientSession() as client:
            for number in (1, 2):
                async with client.post(f"{address}/v1/completions", data=ASKED) as answer:
                    assert answer.status == 200
                if number == 1:
                    path.rename(moved)
                    gateway.send_signal(signal.SIGHUP)
                    await eventually(path.exists)
        gateway.terminate()
        await gateway.communicate()
        assert gateway.returncode == 0
        assert (len(lines(moved)), len(lines(path))) == (1, 1)
        await mock.runner.cleanup()

    run(main())


def test_lines_may_go_to_stdout(tmp_path: Path) -> None:
    async def main() -> None:
        mock = Mock(stream)
        await mock.start()
        gateway = await started("gateway.port=0", f"gateway.urls=[{mock.url}]", "gateway.access_log=-")
        assert gateway.stdout is not None
        address = (await gateway.stdout.readline()).decode().split(": ")[0]
        async with (
            aiohttp.ClientSession() as client,
            client.post(f"{address}/v1/completions", data=STREAMED) as answer,
        ):
            assert await answer.read() == b"".join([*EVENTS, USAGE, DONE])
        assert json.loads(await gateway.stdout.readline())["path"] == "/v1/completions"
        gateway.terminate()
        await gateway.communicate()
        await mock.runner.cleanup()

    run(main())


@pytest.mark.parametrize(
    ("path", "says"),
    [("/nowhere/log", "No such file or directory"), ("/", "Is a directory")],
)
def test_a_log_that_cannot_be_written_is_told_in_one_line(path: str, says: str) -> None:
    async def main() -> None:
        gateway = await started("gateway.urls=[http://127.0.0.1:9]", f"gateway.access_log={path}")
        output, errors = await gateway.communicate()
        assert errors.decode() == f"error: gateway.access_log={path}: cannot be written: {says}\n"
        assert (output, gateway.returncode) == (b"", 2)

    run(main())


async def started(*keys: str) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "block.gateway", "scheduler=random", "gateway.host=127.0.0.1", *keys),
        cwd=ROOT,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
