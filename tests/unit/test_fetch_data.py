import hashlib
import os
import re
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from commands import load_script

ROOT = Path(__file__).parents[2]
CONTENT = bytes(range(256)) * 1000
DIGEST = hashlib.sha256(CONTENT).hexdigest()


fetch_data = load_script("fetch_data")


class Handler(BaseHTTPRequestHandler):
    """Serves CONTENT: /file honours ranges, /plain does not, /short breaks off half-way; the rest is 404."""

    ranges: list[str | None] = []  # noqa: RUF012 - one list for a test, reset by the fixture

    def do_GET(self) -> None:
        asked = self.headers["Range"]
        type(self).ranges.append(asked)
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked and self.path != "/plain" else 0
        if self.path not in ("/file", "/plain", "/short"):
            self.send_error(404)
        elif start >= len(CONTENT):
            self.send_error(416)
        else:
            body = CONTENT[start:]
            self.send_response(206 if start else 200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body[: len(body) // 2] if self.path == "/short" else body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    Handler.ranges = []
    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=http.serve_forever, args=(0.01,))
    thread.start()
    yield f"http://127.0.0.1:{http.server_address[1]}"
    http.shutdown()
    thread.join()
    http.server_close()


def remote(url: str | None, digest: str = DIGEST) -> object:
    return fetch_data.Remote(url, "traces/it.csv", digest, "MIT", "ask the authors")


def test_a_file_arrives_whole_and_is_not_fetched_twice(server: str, tmp_path: Path) -> None:
    assert fetch_data.fetch("it", remote(f"{server}/file"), tmp_path) is True
    assert (tmp_path / "traces" / "it.csv").read_bytes() == CONTENT
    assert fetch_data.fetch("it", remote(f"{server}/file"), tmp_path) is False
    assert len(Handler.ranges) == 1
    assert [path.name for path in (tmp_path / "traces").iterdir()] == ["it.csv"]


def test_an_interrupted_download_goes_on_where_it_stopped(server: str, tmp_path: Path) -> None:
    with pytest.raises(fetch_data.FetchError, match=r"ended after 128,000 of 256,000 bytes"):
        fetch_data.fetch("it", remote(f"{server}/short"), tmp_path)
    assert not (tmp_path / "traces" / "it.csv").exists()
    assert fetch_data.fetch("it", remote(f"{server}/file"), tmp_path) is True
    assert Handler.ranges == [None, "bytes=128000-"]
    assert (tmp_path / "traces" / "it.csv").read_bytes() == CONTENT


@pytest.mark.parametrize(("path", "have"), [("plain", 1000), ("file", len(CONTENT))])
def test_a_server_may_send_all_or_say_that_nothing_is_missing(
    server: str, tmp_path: Path, path: str, have: int
) -> None:
    (tmp_path / "traces").mkdir()
    (tmp_path / "traces" / "it.csv.part").write_bytes(CONTENT[:have])
    assert fetch_data.fetch("it", remote(f"{server}/{path}"), tmp_path) is True
    assert (tmp_path / "traces" / "it.csv").read_bytes() == CONTENT


def test_what_has_the_wrong_checksum_is_not_kept(server: str, tmp_path: Path) -> None:
    with pytest.raises(fetch_data.FetchError, match="another SHA-256"):
        fetch_data.fetch("it", remote(f"{server}/file", "0" * 64), tmp_path)
    assert list((tmp_path / "traces").iterdir()) == []


def test_a_file_of_ones_own_is_never_overwritten(server: str, tmp_path: Path) -> None:
    (tmp_path / "traces").mkdir()
    (tmp_path / "traces" / "it.csv").write_text("mine")
    with pytest.raises(fetch_data.FetchError, match="not the original"):
        fetch_data.fetch("it", remote(f"{server}/file"), tmp_path)
    assert (tmp_path / "traces" / "it.csv").read_text() == "mine"


def test_failures_are_one_line_each_and_the_rest_is_fetched(
    server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as free:  # a port that nobody listens on
        free.bind(("127.0.0.1", 0))
        dead = f"http://127.0.0.1:{free.getsockname()[1]}/it"
    monkeypatch.setenv("BLOCK_DATA", str(tmp_path))
    remotes = {
        "dead": remote(dead),
        "gone": remote(f"{server}/gone"),
        "manual": remote(None),
        "it": remote(f"{server}/file"),
    }
    assert fetch_data.main(["dead", "gone", "manual", "it"], remotes) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert [line.split()[1] for line in lines] == ["dead:", "gone:", "manual:"]
    assert f"cannot download {dead}: " in lines[0]
    assert "Not Found" in lines[1]
    assert "ask the authors" in lines[2]
    assert (tmp_path / "traces" / "it.csv").read_bytes() == CONTENT
    assert fetch_data.main(["it"], remotes) == 0


def test_an_unknown_name_lists_the_choices(capsys: pytest.CaptureFixture[str]) -> None:
    assert fetch_data.main(["alpaca"]) == 2
    assert capsys.readouterr().err.startswith("error: name='alpaca': choose from azure_conv, azure_code,")


def test_the_table_of_public_files_is_well_formed() -> None:
    for entry in fetch_data.REMOTES.values():
        assert entry.url is None or entry.url.startswith("https://")
        assert re.fullmatch("[0-9a-f]{64}", entry.sha256)
        assert entry.licence
        assert entry.url or entry.note


@pytest.mark.parametrize("name", ["sharegpt", "arxiv", "azure_conv", "azure_code"])
def test_checksums_are_those_of_the_originals(name: str) -> None:
    if "BLOCK_DATA" not in os.environ:
        pytest.skip("BLOCK_DATA is unset: the public traces are not here")
    entry = fetch_data.REMOTES[name]
    content = (Path(os.environ["BLOCK_DATA"]) / entry.path).read_bytes()
    assert hashlib.sha256(content).hexdigest() == entry.sha256


def test_a_sketch_is_offered_only_where_there_is_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("BLOCK_DATA", str(tmp_path))
    assert fetch_data.main(["sharegpt", "mooncake"]) == 2
    sharegpt, mooncake = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert sharegpt.endswith(" (workload.source=sketch needs no file)")
    assert mooncake.endswith(" (workload.source=sketch needs no file)")
    monkeypatch.setattr(fetch_data, "SKETCHES", tmp_path)
    assert fetch_data.main(["mooncake"]) == 2
    assert capsys.readouterr().err.endswith(f"save it as {tmp_path}/traces/mooncake_conversation.jsonl.gz\n")
