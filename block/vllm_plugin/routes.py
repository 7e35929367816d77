"""The HTTP view of the state buffer, for those who ask from another host; an ASGI middleware of vLLM's API server.

GET /block/info       JSON: versions, the state buffer's path and nonce, the engine's settings, where cache events come
GET /block/frames     the state buffer, pushed at each change (`block.vllm_plugin.frames`); ?nonce=…&since=n: a listener
                      that comes back, and knows which were the first n requests to go
GET /block/steps?since=n    JSON: how many steps were timed, and those after the first n
"""

from __future__ import annotations

import json
import os
from collections.abc import Awaitable, Callable
from typing import Any
from urllib.parse import parse_qs

from block.vllm_plugin.environment import EMULATED, STATE_BUFFER
from block.vllm_plugin.frames import Pushing, Receive, Send
from block.vllm_plugin.requirements import vllm_version
from block.vllm_plugin.state_buffer import NONCE, PLAIN_HITS, StateBuffer

Scope = dict[str, Any]


class SnapshotView:
    """Answers GET /block/…, and passes everything else on to `app`."""

    def __init__(self, app: Callable[[Scope, Receive, Send], Awaitable[None]]) -> None:
        self._app = app
        self._path = os.environ[STATE_BUFFER]
        self._buffer = StateBuffer.open(self._path)
        self._pushing = Pushing(self._buffer)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI has it: one connection's request."""
        if scope["type"] != "http" or not scope["path"].startswith("/block/"):
            await self._app(scope, receive, send)
            return
        if scope["path"] == "/block/frames":
            await self._push(scope, receive, send)
            return
        status, kind, body = self._answer(scope)
        headers = [(b"content-type", kind), (b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    async def _push(self, scope: Scope, receive: Receive, send: Send) -> None:
        asked = parse_qs(scope.get("query_string", b"").decode())
        same = asked.get("nonce") == [str(int(self._buffer.header[NONCE]))]
        headers = [(b"content-type", b"application/octet-stream"), (b"cache-control", b"no-store")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        since = int(asked["since"][0]) if same and "since" in asked else None
        await self._pushing.push(since, receive, send, _stopping(scope))

    def _answer(self, scope: Scope) -> tuple[int, bytes, bytes]:
        path, query = scope["path"], scope.get("query_string", b"").decode()
        if path == "/block/info":
            state = self._buffer.read()
            info = {
                "vllm": vllm_version(),
                "buffer": self._path,
                "nonce": int(state.header[NONCE]),
                "emulated": EMULATED in os.environ,
                "settings": state.settings._asdict(),
                "kv_events": _published_events(scope) if state.header[PLAIN_HITS] else None,
            }
            return 200, b"application/json", json.dumps(info).encode()
        if path == "/block/steps":
            since = int(parse_qs(query).get("since", ["0"])[0])
            timed, steps = self._buffer.step_times(since)
            return 200, b"application/json", json.dumps({"timed": timed, "steps": steps.tolist()}).encode()
        return 404, b"application/json", b'{"error": {"message": "no such view", "code": 404}}'


def _stopping(scope: Scope) -> Callable[[], bool]:
    """Tells whether vLLM's server is about to end: it waits for all responses to."""
    server = getattr(getattr(scope.get("app"), "state", None), "server", None)
    return lambda: getattr(server, "should_exit", False)


def _published_events(scope: Scope) -> dict[str, str | None] | None:
    """Where vLLM's own events of the prefix cache come from, if others can connect there: it binds what has a ``*`` or
    ``::``, and a port of 0 is known to the engine only.
    """
    vllm_config = getattr(getattr(scope.get("app"), "state", None), "vllm_config", None)
    events = getattr(vllm_config, "kv_events_config", None)
    if events is None or not events.enable_kv_cache_events or events.publisher != "zmq":
        return None

    def reachable(endpoint: str | None) -> bool:
        return endpoint is not None and endpoint.startswith(("tcp://*:", "tcp://[::]:")) and not endpoint.endswith(":0")

    if not reachable(events.endpoint):
        return None
    replay = events.replay_endpoint if reachable(events.replay_endpoint) else None
    return {"endpoint": events.endpoint, "replay": replay, "topic": events.topic}
