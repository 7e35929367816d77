"""As much of a W&B server as a run that is logged online asks of it; what arrives is kept."""

from __future__ import annotations

import gzip
import json
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

MODES = ("ok", "401", "500", "hang")


class Server(ThreadingHTTPServer):
    """Answers in one of MODES.

    asked: paths that were posted to; queries: names of what was asked; config, summary, rows, files: of runs, by name.
    """

    daemon_threads = True

    def handle_error(self, *_: Any) -> None:
        """Clients may go away."""

    def __init__(self, mode: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.mode = mode
        self.asked: list[str] = []
        self.queries: list[str] = []
        self.config: dict[str, dict[str, Any]] = {}
        self.summary: dict[str, dict[str, Any]] = {}
        self.rows: dict[str, int] = {}
        self.complete: set[str] = set()
        self.files: dict[str, bytes] = {}

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


@contextmanager
def serving(mode: str) -> Iterator[Server]:
    with Server(mode) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        yield server
        server.shutdown()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def log_message(self, *_: Any) -> None:
        """Nothing."""

    def _body(self) -> bytes:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        return gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body

    def _answer(self, document: Any, status: int = 200) -> None:
        body = json.dumps(document).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        self._answer({})

    def do_PUT(self) -> None:
        self.server.files[self.path.removeprefix("/upload/")] = self._body()
        self._answer({})

    def do_POST(self) -> None:
        body = self._body()
        self.server.asked.append(self.path)
        if self.server.mode == "hang":
            time.sleep(60)
        if self.server.mode == "401":
            return self._answer({"errors": [{"message": "invalid credentials"}]}, 401)
        if self.server.mode == "500":
            return self._answer({"errors": [{"message": "internal error"}]}, 500)
        if self.path == "/graphql":
            asked = json.loads(body)
            return self._answer({"data": self._data(asked["query"], asked.get("variables") or {})})
        if self.path.endswith("/file_stream"):
            self._stream(self.path.split("/")[-2], json.loads(body))
        return self._answer({})

    def _stream(self, run: str, said: dict[str, Any]) -> None:
        files = said.get("files") or {}
        if "wandb-summary.json" in files:
            self.server.summary[run] = json.loads(files["wandb-summary.json"]["content"][-1])
        if "wandb-history.jsonl" in files:
            self.server.rows[run] = self.server.rows.get(run, 0) + len(files["wandb-history.jsonl"]["content"])
        if said.get("complete"):
            self.server.complete.add(run)

    def _data(self, query: str, variables: dict[str, Any]) -> dict[str, Any]:
        name = (re.findall(r"(?:query|mutation)\s+(\w+)", query) or ["?"])[0]
        self.server.queries.append(name)
        run = variables.get("name") or variables.get("run") or "x"
        if name == "UpsertBucket":
            if variables.get("config"):
                self.server.config.setdefault(run, {}).update(json.loads(variables["config"]))
            project = {"id": "p", "name": "block", "entity": {"id": "e", "name": "us"}}
            bucket = {
                "id": "b",
                "name": run,
                "displayName": run,
                "description": "",
                "config": "{}",
                "sweepName": "",
                "historyLineCount": 0,
                "project": project,
            }
            return {"upsertBucket": {"bucket": bucket, "inserted": True}}
        if name == "CreateRunFiles":
            files = [{"name": one, "uploadUrl": f"{self.server.url}/upload/{run}/{one}"} for one in variables["files"]]
            return {"createRunFiles": {"runID": "b", "uploadHeaders": [], "files": files}}
        if name == "CreateArtifact":
            artifact = {"id": "a", "state": "COMMITTED", "artifactSequence": {"id": "s", "latestArtifact": None}}
            return {"createArtifact": {"artifact": artifact}}
        if name == "ArtifactType":
            return {"project": {"artifact": None}}
        return {
            "viewer": {
                "id": "v",
                "entity": "us",
                "username": "us",
                "email": "",
                "flags": "{}",
                "admin": False,
                "apiKeys": {"edges": []},
                "teams": {"edges": []},
            }
        }
