"""A real vLLM server as an instance: tokens over HTTP, snapshots from its state buffer.

The server must have been started with this package's plugin (`python -m block.vllm_plugin.serve`). On this host its
buffer is mapped; on another one it pushes the same (`block.backends.subscription`), and what its prefix cache has is
told by vLLM's own events, if it publishes them.
"""

from __future__ import annotations

import asyncio
import json
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import aiohttp
import numpy as np

from block.backends.cache_events import CacheEvents, EventSource, begin_to_follow
from block.backends.subscription import Received, Subscription
from block.cluster.instance import FirstToken, InstanceFailed, RequestFailed
from block.core.arrays import Floats, Ints
from block.core.clock import Clock
from block.core.errors import message, one_line
from block.core.snapshot import Snapshot
from block.core.types import Request, RequestRecord
from block.dispatch.prefixes import Kept
from block.engine.config import EngineSettings
from block.engine.prefix_table import PrefixTable, held
from block.vllm_plugin.state_buffer import STEP, State, StateBuffer
from block.vllm_plugin.tags import TAG_EXPECTED, TAG_ID, TAG_RESPONSE
from block.workload.content import token_ids

TOLD_S = 1.0
"""How long what a server has to say of requests that have ended is waited for, before nobody listens any more."""

# What comes of reading an answer that is not as vLLM gives: no JSON, not these keys, not these types.
_ODD = (ValueError, LookupError, TypeError, AttributeError)


class WithoutPlugin(InstanceFailed):
    """The server shows no snapshots."""


class VLLMInstance:
    """One vLLM server with the plugin, as an instance of a fleet. `attach` first, `detach` at the end.

    instance_id: its place in the fleet. url: of the server, http://host:port. session: what it is asked through.
    clock: the run's, which dates snapshots and tokens. vocabulary: prompts are made of token ids below it.
    shared_memory: whether its state buffer is mapped where it can be. measured: whether `told` is wanted.
    """

    def __init__(
        self,
        instance_id: int,
        url: str,
        session: aiohttp.ClientSession,
        clock: Clock,
        vocabulary: int = 32000,
        *,
        shared_memory: bool = True,
        measured: bool = False,
    ) -> None:
        self.instance_id = instance_id
        self.url = url.rstrip("/")
        self._session = session
        self._clock = clock
        self._vocabulary = vocabulary
        self._emulated = False  # its GPU is, and answers what it is told to
        self._buffer: StateBuffer | None = None
        self._state: State | None = None
        self._shared_memory = shared_memory
        self._subscription: Subscription | None = None
        self._untold: dict[int, RequestRecord] = {}  # whose preemptions are to be pushed
        self._ages: array[float] | None = array("d") if measured else None  # of the snapshots of busy engines
        self._received = Received(late=array("d") if measured else None)
        self._by: str | None = None
        self._background: list[asyncio.Task[None]] = []
        self._events: CacheEvents | None = None
        self._nonce = 0
        self.models: Sequence[str] = ("",)
        """What the server calls its model; all other names that it knows are those of adapters."""
        self.vllm_version = ""

    async def attach(self) -> EngineSettings:
        """Find the state buffer and the name of the model; returns the engine's settings.

        InstanceFailed if the server does not answer as it should, WithoutPlugin if it has no state buffer but answers.
        """
        try:
            async with self._session.get(f"{self.url}/v1/models") as response:
                with self._as_vllm():
                    found = (await response.json())["data"]
                    self.models = [one["id"] for one in found if not one.get("parent")] or [found[0]["id"]]
            async with self._session.get(f"{self.url}/block/info") as response:
                if response.status != 200:
                    raise WithoutPlugin(
                        f"{self.url}: runs without this package's plugin; start it by python -m block.vllm_plugin.serve"
                    )
                with self._as_vllm():
                    info = await response.json()
                    self.vllm_version, path, nonce = info["vllm"], str(info["buffer"]), int(info["nonce"])
                    self._nonce = nonce
                    self._emulated = bool(info.get("emulated", False))
                    published = info.get("kv_events")
            try:
                if self._shared_memory:
                    self._buffer = StateBuffer.open(path, nonce)
            except (OSError, ValueError):  # another host, or another container of this one
                pass
            if self._buffer is None:
                subscription = Subscription(self.url, self._session, self._have_gone, self._received)
                with self._as_vllm():
                    await subscription.begin()
                self._subscription = subscription
            self._by = "push" if self._buffer is None else "shared memory"
        except (aiohttp.ClientError, TimeoutError) as error:
            raise InstanceFailed(f"{self.url}: {message(error)}") from error
        settings = self._read().settings
        if published is not None and self._prefix_table is None:
            source = EventSource(**published).seen_from(self.url)
            self._events, following = await begin_to_follow(source, settings.block_size)
            self._background.append(following)
        return settings

    async def is_same(self) -> bool:
        """Whether the process that was attached to still answers, and publishes what can be read."""
        try:
            if self._buffer is not None:
                self._buffer.read()
            async with self._session.get(f"{self.url}/block/info") as response:
                return response.status == 200 and int((await response.json())["nonce"]) == self._nonce
        except (aiohttp.ClientError, TimeoutError, *_ODD):
            return False

    @property
    def is_current(self) -> bool:
        """Whether snapshots are known to be the latest: from shared memory, or pushed without a break."""
        return self._buffer is not None or (self._subscription is not None and self._subscription.current)

    @property
    def _prefix_table(self) -> PrefixTable | None:
        if self._events is not None:
            return self._events.told
        return None if self._buffer is None else self._buffer.prefix_table

    @property
    def tells_prefixes(self) -> str | None:
        """How it is known what the server has in its prefix cache: by its "table" or its "events"; None: it is not."""
        if self._prefix_table is None:
            return None
        return "table" if self._events is None else "events"

    async def detach(self) -> None:
        """Stop looking; `attach` may follow again, to another server."""
        if self._subscription is not None:
            with suppress(TimeoutError):
                async with asyncio.timeout(TOLD_S):
                    while self._untold and self._subscription.current:
                        await asyncio.sleep(0.01)
            await self._subscription.end()
        self._untold.clear()
        for task in self._background:
            task.cancel()
        await asyncio.gather(*self._background, return_exceptions=True)
        self._background.clear()
        self._buffer = self._state = self._events = self._subscription = None

    def _read(self) -> State:
        if self._buffer is not None:
            with suppress(TimeoutError):  # what was read last; whether the server is dead, `generate` will notice
                self._state = self._buffer.read()
        elif self._subscription is not None:
            self._state = self._subscription.state
        if self._state is None:
            raise WithoutPlugin(f"{self.url}: shows no snapshots")
        return self._state

    def snapshot(self) -> Snapshot:
        """What the scheduler published last."""
        state = self._read()
        now, started = self._clock.now(), self._clock.at(state.started)
        if self._ages is not None and started == started:  # else it is idle, and what it showed is as it is
            self._ages.append(now - self._clock.at(state.published))
        return state.snapshot(self.instance_id, now, started)

    def told(self, seconds: float) -> dict[str, Any]:
        """How snapshots came, and what that cost in `seconds` of the run; None for what was not measured.

        age: from the publication to the look at it, of snapshots that show a step in flight. late: from the publication
        to its arrival here. Both are seconds of the run.
        """
        facts = {"url": self.url, "by": self._by, **_percentiles("age", self._ages)}
        if self._by != "push":
            return facts
        received = self._received
        return {
            **facts,
            **_percentiles("late", received.late, self._clock.at(1.0) - self._clock.at(0.0)),
            "frames_per_s": received.frames / seconds,
            "bytes_per_s": received.bytes / seconds,
            "skipped": received.skipped,
            "breaks": received.breaks,
        }

    def look_up(self, hashes: Ints, most: int) -> tuple[int, int] | None:
        """Of the first `most` blocks with these hashes, how many the server's prefix cache has, and how many of these
        are in use; None if it does not tell.
        """
        table = self._prefix_table
        return None if table is None else held(table, hashes, most)

    def keep(self) -> Kept:
        """What the server's prefix cache has now, to be looked up in later; as of `block.dispatch.prefixes`."""
        table = self._prefix_table
        kept = None if table is None else PrefixTable(table.hashes.copy(), table.counts.copy())
        return lambda hashes, most: None if kept is None else held(kept, hashes, most)

    async def step_times(self, since: int) -> tuple[int, Floats]:
        """How many steps the engine has timed, and those after the first `since`: float[n, STEP]."""
        if self._buffer is not None:
            return self._buffer.step_times(since)
        async with self._session.get(f"{self.url}/block/steps", params={"since": since}) as response:
            found = await response.json()
        return found["timed"], np.array(found["steps"], dtype=np.float64).reshape(-1, STEP)

    def _have_gone(self, gone: Ints) -> None:
        """Requests have left the server; it had others than this run's, too."""
        for number, preemptions in gone.tolist():
            if (record := self._untold.pop(number, None)) is not None:
                record.preemptions = preemptions

    async def generate(self, record: RequestRecord, first_token: FirstToken) -> None:
        """Stream the response, noting when each token came."""
        record.preemptions = None
        if self._subscription is not None:
            self._untold[record.request.id] = record
        try:
            await self._ask(record, first_token)
        except BaseException:
            self._untold.pop(record.request.id, None)
            raise
        if self._buffer is not None:
            record.preemptions = self._buffer.preemptions_of(record.request.id)

    async def _ask(self, record: RequestRecord, first_token: FirstToken) -> None:
        body = self._body(record.request)
        try:
            async with self._session.post(f"{self.url}/v1/completions", json=body) as response:
                if response.status != 200:
                    text = f"{self.url}: {response.status}: {await _message(response)}"
                    raise (InstanceFailed if response.status >= 500 else RequestFailed)(text)
                await self._stream(response, record, first_token)
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise InstanceFailed(f"{self.url}: {message(error)}") from error

    def _body(self, request: Request) -> dict[str, Any]:
        content = np.array([[request.id, request.prompt_tokens]]) if request.content is None else request.content
        prompt = request.prompt_tokens
        tokens = token_ids(content, prompt + request.output_tokens, self._vocabulary)
        tags: dict[str, Any] = {TAG_ID: request.id, TAG_EXPECTED: request.predicted_output_tokens}
        if self._emulated and len(tokens) > prompt:
            tags[TAG_RESPONSE] = tokens[prompt:]
        return {
            "model": self.models[0],
            "prompt": tokens[:prompt],
            "max_tokens": request.output_tokens,
            "ignore_eos": True,
            "temperature": 0.0,
            "stream": True,
            "stream_options": {"include_usage": True},
            "vllm_xargs": tags,
        }

    async def _stream(self, response: aiohttp.ClientResponse, record: RequestRecord, first_token: FirstToken) -> None:
        """Read server-sent events to [DONE]; the last one before it carries the token counts."""
        last = b""
        times = record.token_times = []
        while line := await self._line(response):
            if not line.startswith(b"data: "):
                continue
            now = self._clock.now()
            if line.startswith(b"data: [DONE]"):
                with self._as_vllm():
                    usage = json.loads(last).get("usage") or {}
                    record.output_tokens = int(usage.get("completion_tokens", 0))
                    details = usage.get("prompt_tokens_details") or {}
                    record.cached_tokens = int(details.get("cached_tokens", -1))
                return
            if line.startswith(b'data: {"error"'):
                raise InstanceFailed(f"{self.url}: {line[6:].decode(errors='replace').strip()}")
            if b'"choices":[]' not in line:
                if record.first_token != record.first_token:  # NaN
                    first_token(record, now)
                record.finished = now
                times.append(now)
            last = line[6:]
        raise InstanceFailed(f"{self.url}: the stream ended before its end")

    async def _line(self, response: aiohttp.ClientResponse) -> bytes:
        with self._as_vllm():  # a line may be longer than any of vLLM's
            return await response.content.readline()

    @contextmanager
    def _as_vllm(self) -> Iterator[None]:
        """Within, what is not as vLLM answers (no JSON, not its keys, not its types) is an InstanceFailed."""
        try:
            yield
        except _ODD as error:
            raise InstanceFailed(f"{self.url}: does not answer as vLLM: {one_line(error)}") from error


async def _message(response: aiohttp.ClientResponse) -> str:
    """What an error response says, in one line."""
    text = await response.text(errors="replace")
    with suppress(*_ODD):
        text = str(json.loads(text)["error"]["message"])
    return " ".join(text.split())[:300]


def _percentiles(name: str, values: Sequence[float] | None, unit: float = 1.0) -> dict[str, float | None]:
    median, high = (np.percentile(values, [50, 99]) * unit).tolist() if values else (None, None)
    return {f"{name}_p50_s": median, f"{name}_p99_s": high}
