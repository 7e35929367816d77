"""A real server as an instance, played by a scripted one: what it is sent, what is recorded, and how it fails."""

from __future__ import annotations

import asyncio
import json
import math
import re
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import aiohttp
import numpy as np
import pytest
from aiohttp import web
from commands import built
from mock_servers import eventually, pushed
from testbed import constant_latency

from block.backends import servers
from block.backends.instance import VLLMInstance
from block.backends.servers import _prefixes, attached_fleet
from block.cluster.fleet import Fleet
from block.cluster.instance import InstanceFailed, RequestFailed
from block.core.clock import Clock
from block.core.hashing import hash_tokens
from block.core.snapshot import ID
from block.core.sockets import notice_lost_peer
from block.core.types import Request, RequestRecord
from block.engine.config import EngineConfig
from block.engine.prefix_table import note as note_changes
from block.engine.prefix_table import table_size
from block.vllm_plugin import state_buffer as b
from block.vllm_plugin.state_buffer import StateBuffer
from block.workload.content import token_ids, with_token_hashes

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
ONE = Request(5, 0.0, 40, 3, 7)


class Server:
    """Answers like a vLLM server with the plugin; `tokens` messages, then the count, then [DONE]."""

    def __init__(self, local: bool = True) -> None:
        self.buffer, self.path = StateBuffer.create()
        self.local = local
        self.bodies: list[dict[str, Any]] = []
        self.ending = [b'data: {"choices":[],"usage":{"completion_tokens":3}}\n\n', b"data: [DONE]\n\n"]
        self.status = 200
        self.well = True
        self.emulated = False
        self.pause_s = 0.02
        self.kv_events: dict[str, str] | None = None

    async def models(self, _: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": "tiny"}]})

    async def info(self, _: web.Request) -> web.Response:
        path = self.path if self.local else "/proc/0/fd/0"
        nonce = int(self.buffer.header[b.NONCE])
        own = {"emulated": self.emulated, "kv_events": self.kv_events}
        return web.json_response({"vllm": "0.32.0", "buffer": path, "nonce": nonce, **own})

    async def frames(self, http: web.Request) -> web.StreamResponse:
        return await pushed(self.buffer)(http)

    async def health(self, _: web.Request) -> web.Response:
        return web.Response(status=200 if self.well else 503)

    async def complete(self, request: web.Request) -> web.StreamResponse:
        self.bodies.append(await request.json())
        if self.status != 200:
            return web.json_response({"error": {"message": "no\nroom"}}, status=self.status)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for _ in range(3):
            await response.write(b'data: {"choices":[{"text":"a"}]}\n\n')
            await asyncio.sleep(self.pause_s)
        for event in self.ending:
            await response.write(event)
        return response

    @asynccontextmanager
    async def instance(self, plugin: bool = True, clock: Clock | None = None) -> AsyncIterator[VLLMInstance]:
        app = web.Application()
        app.router.add_get("/v1/models", self.models)
        app.router.add_get("/health", self.health)
        app.router.add_post("/v1/completions", self.complete)
        if plugin:
            app.router.add_get("/block/info", self.info)
            app.router.add_get("/block/frames", self.frames)
        runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.01)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        port = runner.addresses[0][1]
        async with aiohttp.ClientSession() as session:
            one = VLLMInstance(2, f"http://127.0.0.1:{port}/", session, clock or Clock(), 1000)
            try:
                yield one
            finally:
                await one.detach()
                await runner.cleanup()


def note(record: RequestRecord, now: float) -> None:
    record.first_token = now


def served(server: Server, request: Request = ONE, **options: Any) -> RequestRecord:
    """The record of one request."""

    async def main() -> RequestRecord:
        record = RequestRecord(request)
        async with server.instance() as instance:
            await instance.attach()
            await instance.generate(record, note)
        return record

    return asyncio.run(main())


def test_a_request_is_asked_for_exactly_and_its_times_are_noted() -> None:
    server = Server()
    server.buffer.gone[0] = 5, 2
    record = served(server)
    (body,) = server.bodies
    assert (body["model"], body["max_tokens"], body["ignore_eos"], body["stream"]) == ("tiny", 3, True, True)
    assert body["vllm_xargs"] == {"block_id": 5, "block_expected": 7}
    assert len(body["prompt"]) == 40
    assert all(300 <= token < 1000 for token in body["prompt"])
    assert record.output_tokens == 3
    assert record.preemptions == 2
    assert record.token_times is not None
    assert len(record.token_times) == 3
    assert (record.token_times[0], record.token_times[-1]) == (record.first_token, record.finished)
    assert 0.03 < record.finished - record.first_token < 1.0


def test_no_two_prompts_share_a_block() -> None:
    async def prompts() -> list[list[int]]:
        async with aiohttp.ClientSession() as session:
            instance = VLLMInstance(0, "http://x", session, Clock(), 32000)
            return [instance._body(Request(i, 0.0, 64, 1, 1))["prompt"] for i in range(300)]

    beginnings = [tuple(prompt[:16]) for prompt in asyncio.run(prompts())]
    assert len(set(beginnings)) == 300


CHAT = np.array([[1, 40], [2, 30], [3, 10]])  # a prompt of 70 tokens, and 10 to answer


@pytest.mark.parametrize("emulated", [True, False])
def test_an_emulated_gpu_is_told_what_to_answer(emulated: bool) -> None:
    server = Server()
    server.emulated = emulated
    served(server, Request(5, 0.0, 70, 10, 10, content=CHAT))
    (body,) = server.bodies
    tokens = token_ids(CHAT, 80, 1000)
    assert body["prompt"] == tokens[:70]
    assert body["vllm_xargs"].get("block_response") == (tokens[70:] if emulated else None)


def test_what_a_server_has_cached_is_looked_up_in_its_table() -> None:
    """A prompt of 70 tokens, in blocks of 16; the table has two blocks of it, one of them in use."""
    (asked,) = with_token_hashes([Request(1, 0.0, 70, 10, 10, content=CHAT)], 16, 1000)
    hashes = asked.block_hashes
    assert hashes is not None

    async def main() -> None:
        server = Server()
        settings = EngineConfig(version="v1", enable_prefix_caching=True).settings(1000)
        server.buffer.header[b.SETTINGS : b.SETTINGS + len(settings)] = settings
        async with server.instance() as instance:
            await instance.attach()
            assert instance.tells_prefixes is None
            assert instance.look_up(hashes, 4) is None
            assert instance.keep()(hashes, 4) is None
            server.buffer.header[b.PLACES] = table_size(10)
            table = server.buffer.prefix_table
            assert instance.tells_prefixes == "table"
            assert table is not None
            note_changes(table, np.array([(hashes[0], 1, 1), (hashes[1], 2, 0)]))
            assert instance.look_up(hashes, 4) == (2, 1)
            assert instance.look_up(hashes, 1) == (1, 1)
            kept = instance.keep()
            note_changes(table, np.array([(hashes[1], -2, 0)]))
            assert instance.look_up(hashes, 4) == (1, 1)
            assert kept(hashes, 4) == (2, 1)
        async with Server(local=False).instance() as far:
            await far.attach()
            assert far.tells_prefixes is None

    asyncio.run(main())


def test_a_server_on_another_host_tells_by_events_what_it_has_cached(tmp_path: Path) -> None:
    zmq, msgspec = pytest.importorskip("zmq"), pytest.importorskip("msgspec")
    tokens = list(range(70))
    hashes = hash_tokens(np.array(tokens), 16)
    stored = {"type": "BlockStored", "block_hashes": [7, 8], "parent_block_hash": None, "token_ids": tokens[:32]}

    async def main() -> None:
        server = Server(local=False)
        settings = EngineConfig(version="v1", enable_prefix_caching=True).settings(1000)
        server.buffer.header[b.SETTINGS : b.SETTINGS + len(settings)] = settings
        server.kv_events = {"endpoint": f"ipc://{tmp_path}/events", "topic": "kv"}
        with zmq.Context() as context, context.socket(zmq.PUB) as publisher:
            publisher.linger = 0
            publisher.bind(server.kv_events["endpoint"])
            async with server.instance() as instance:
                await instance.attach()
                assert instance.tells_prefixes is None  # nothing was heard
                now = 0.0
                async with asyncio.timeout(10):
                    while instance.look_up(hashes, 4) != (2, 0):  # until the socket is connected
                        now += 1
                        batch = [now, [{**stored, "block_size": 16}]]
                        publisher.send_multipart([b"kv", bytes(8), msgspec.msgpack.encode(batch)])
                        await asyncio.sleep(0.01)
                assert instance.tells_prefixes == "events"
                gap = msgspec.msgpack.encode([now + 1, []])
                publisher.send_multipart([b"kv", (7).to_bytes(8, "big"), gap])
                async with asyncio.timeout(10):
                    while instance.tells_prefixes is not None:
                        await asyncio.sleep(0.01)
                assert instance.look_up(hashes, 4) is None
                await instance.detach()
                assert instance.tells_prefixes is None

    asyncio.run(main())


def test_who_says_what_servers_have_cached(caplog: pytest.LogCaptureFixture) -> None:
    class Instance:
        def __init__(self, url: str, tells_prefixes: bool) -> None:
            self.url, self.tells_prefixes = url, tells_prefixes

    def told(by_both: bool = True, block_size: int = 16, asked: bool = True, cached: bool = True) -> str:
        """What is warned of; "told" if the servers tell."""
        caplog.clear()
        engine = EngineConfig(version="v1", enable_prefix_caching=asked)
        testbed: Any = SimpleNamespace(engine=engine)
        instances: Any = [Instance("http://a", True), Instance("http://b", by_both)]
        settings = engine.settings(1000)._replace(block_size=block_size, enable_prefix_caching=cached)
        prefixes = _prefixes(instances, instances, settings, testbed)
        if prefixes is not None:
            assert prefixes.block_size == 16
            return "told" if not caplog.records else "told, and warned of"
        return "".join(record.getMessage() for record in caplog.records)

    assert told() == "told"
    assert told(cached=False) == told(cached=False, by_both=False, asked=False) == ""
    assert told(asked=False).endswith("only with engine.enable_prefix_caching=true engine.block_size=16")
    assert told(block_size=32).endswith("only with engine.enable_prefix_caching=true engine.block_size=32")
    assert told(by_both=False) == "what is cached is judged by what was sent there; not told by http://b"


@pytest.mark.parametrize("local", [True, False])
def test_snapshots_come_from_shared_memory_or_are_pushed(local: bool) -> None:
    async def main() -> None:
        server = Server(local)
        server.buffer.seqs[ID, :2] = [8, 9]
        server.buffer.header[[b.COLUMNS, b.RUNNING, b.FREE]] = 2, 1, 55
        clock = Clock()
        async with server.instance(clock=clock) as instance:
            await instance.attach()
            assert instance.told(1.0)["by"] == ("shared memory" if local else "push")
            assert instance.is_current
            server.buffer.begin()
            server.buffer.times[b.STARTED] = time.monotonic() - 0.35
            server.buffer.end()
            await eventually(lambda: not math.isnan(instance.snapshot().step_started))
            snapshot = instance.snapshot()
            assert snapshot.instance_id == 2
            assert snapshot.seqs[ID].tolist() == [8, 9]
            assert (snapshot.running, snapshot.free_blocks) == (1, 55)
            assert clock.now() - snapshot.step_started == pytest.approx(0.35, abs=0.1)
            assert snapshot.taken_at == pytest.approx(clock.now(), abs=0.1)

    asyncio.run(main())


def go(buffer: StateBuffer, number: int, preemptions: int) -> None:
    finished = int(buffer.header[b.FINISHED])
    buffer.gone[finished % b.GONE] = number, preemptions
    buffer.header[b.FINISHED] = finished + 1


@pytest.mark.parametrize("local", [True, False])
@pytest.mark.parametrize("told", ["before the last token", "after it", "never"])
def test_preemptions_are_those_that_the_server_tells_or_not_known(local: bool, told: str) -> None:
    """Also after the response has ended, when nobody listens any more: its frame may be on its way."""
    server = Server(local)
    go(server.buffer, 5, 9)  # of another run

    async def main() -> RequestRecord:
        record = RequestRecord(ONE)
        async with server.instance() as instance:
            await instance.attach()
            serving = asyncio.create_task(instance.generate(record, note))
            await eventually(lambda: not math.isnan(record.first_token))
            server.buffer.begin()
            if told == "before the last token" or (local and told == "after it"):
                go(server.buffer, 5, 2)
            server.buffer.end()
            await serving
            if told == "after it":
                assert local or record.preemptions is None
                asyncio.get_running_loop().call_later(0.02, go, server.buffer, 5, 2)
                asyncio.get_running_loop().call_later(0.02, server.buffer.end)
                asyncio.get_running_loop().call_later(0.02, server.buffer.end)
            await instance.detach()
        return record

    if told == "never" and local:
        server.buffer.gone[:] = -1
    assert asyncio.run(main()).preemptions == (None if told == "never" else 2)


def test_it_is_told_how_snapshots_came_and_how_old_they_were() -> None:
    async def main() -> None:
        server = Server(local=False)
        async with server.instance(clock=Clock(dilation=2.0)) as instance:
            await instance.attach()
            assert instance.told(2.0)["age_p50_s"] is None  # it is not measured

        session = aiohttp.ClientSession()
        async with server.instance() as running, session:
            far = VLLMInstance(0, running.url, session, Clock(), shared_memory=False, measured=True)
            near = VLLMInstance(1, running.url, session, Clock(), measured=True)
            server.local = True
            for one in (far, near):
                await one.attach()
                one.snapshot()  # idle: it does not get old
                assert one.told(1.0)["age_p50_s"] is None
            for _ in range(3):
                published = server.buffer.times[b.PUBLISHED]
                server.buffer.begin()
                server.buffer.times[b.STARTED] = time.monotonic()
                server.buffer.header[b.STEPS] += 2
                server.buffer.end()
                assert server.buffer.times[b.PUBLISHED] > published
                came = far.told(1.0)["frames_per_s"]
                await eventually(lambda: far.told(1.0)["frames_per_s"] > came)  # noqa: B023
            await asyncio.sleep(0.05)
            for one in (far, near):
                one.snapshot()
            told = far.told(2.0)
            assert told["by"] == "push"
            assert 0.05 < told["age_p50_s"] == told["age_p99_s"] < 5
            assert 0 <= told["late_p50_s"] <= told["late_p99_s"] < 5
            assert told["frames_per_s"] == 2.0
            assert told["bytes_per_s"] == pytest.approx(4 * 560 / 2)
            assert (told["breaks"], told["skipped"]) == (0, 3)
            assert near.told(2.0).keys() == {"url", "by", "age_p50_s", "age_p99_s"}
            assert 0.05 < near.told(2.0)["age_p50_s"] < 5
            await far.detach()
            await near.detach()
            assert far.told(2.0) == told

    asyncio.run(main())


@pytest.mark.parametrize(("status", "error"), [(400, RequestFailed), (422, RequestFailed), (500, InstanceFailed)])
def test_a_refusal_is_the_request_s_fault_and_a_breakdown_the_server_s(status: int, error: type[Exception]) -> None:
    server = Server()
    server.status = status
    with pytest.raises(error, match=f"{status}: no room"):
        served(server)


@pytest.mark.parametrize("ending", [[], [b'data: {"error": {"message": "engine dead"}}\n\n']])
def test_a_stream_without_its_end_is_a_failure(ending: list[bytes]) -> None:
    server = Server()
    server.ending = ending
    with pytest.raises(InstanceFailed):
        served(server)


def test_a_server_that_is_gone_is_a_failure() -> None:
    async def main() -> None:
        async with aiohttp.ClientSession() as session:
            instance = VLLMInstance(0, "http://127.0.0.1:9", session, Clock())
            with pytest.raises(InstanceFailed, match=re.escape("http://127.0.0.1:9: ")):
                await instance.attach()
            with pytest.raises(InstanceFailed):
                await instance.generate(RequestRecord(ONE), note)

    asyncio.run(main())


def test_a_server_without_the_plugin_is_told_how_to_be_started() -> None:
    async def main() -> None:
        async with Server().instance(plugin=False) as instance:
            with pytest.raises(InstanceFailed, match=re.escape("python -m block.vllm_plugin.serve")):
                await instance.attach()

    asyncio.run(main())


def test_with_dilated_time_a_record_is_in_undilated_seconds() -> None:
    async def main() -> RequestRecord:
        record, clock = RequestRecord(ONE), Clock(dilation=10.0)
        async with Server().instance(clock=clock) as instance:
            await instance.attach()
            began = clock.now()
            await instance.generate(record, note)
            assert record.first_token >= began
        return record

    record = asyncio.run(main())
    assert 0.003 < record.finished - record.first_token < 0.1
    assert not math.isnan(record.finished)
    assert json.dumps(record.output_tokens) == "3"
    assert np.isfinite(record.first_token)


LONG = b"data: " + b"x" * 2**18 + b"\n\n"  # longer than aiohttp reads as a line


@pytest.mark.parametrize(
    "said",
    [b'{"usage": {"completion_tokens": "many"}}', b'{"usage": [3]}', b"[]", b"3}", b"\xff", b'{"error": "\xff"}', LONG],
)
def test_an_answer_that_is_not_vllm_s_is_the_server_s_failure(said: bytes) -> None:
    server = Server()
    server.ending = [b"data: " + said + b"\n\n", b"data: [DONE]\n\n"]
    with pytest.raises(InstanceFailed, match=re.escape("http://127.0.0.1:")):
        served(server)


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        *[("models", told) for told in ({}, {"data": []}, {"data": [3]}, [], "none", None)],
        *[("info", told) for told in ([], {}, {"vllm": "0.32.0", "buffer": "/none", "nonce": None})],
    ],
)
def test_what_vllm_or_the_plugin_would_not_tell_is_the_server_s_failure(
    asked: str, told: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def odd(_: Server, __: web.Request) -> web.Response:
        return web.json_response(told)

    monkeypatch.setattr(Server, asked, odd)
    with pytest.raises(InstanceFailed, match="does not answer as vLLM"):
        served(Server())


def test_a_fault_of_our_own_is_not_taken_for_the_server_s() -> None:
    def broken(record: RequestRecord, now: float) -> None:
        raise ValueError("ours")

    async def main() -> None:
        async with Server().instance() as instance:
            await instance.attach()
            await instance.generate(RequestRecord(ONE), broken)

    with pytest.raises(ValueError, match="ours"):
        asyncio.run(main())


def test_servers_of_too_little_memory_for_the_config_are_taken_as_they_are(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        server = Server()
        settings = EngineConfig(version="v1", max_model_len=512).settings(40)
        server.buffer.header[b.SETTINGS : b.SETTINGS + len(settings)] = settings
        testbed = built("model=tiny", "backend=vllm_cpu").testbed
        assert testbed.engine.max_model_len > 40 * 16
        async with server.instance() as one, attached_fleet([one.url], constant_latency(), testbed, Clock()) as fleet:
            assert fleet.engines["total_blocks"] == 40

    asyncio.run(main())
    assert "the servers run with EngineSettings" in caplog.text


# ---------------------------------------------------------------------------------------------------- lost, and back


@asynccontextmanager
async def attached(server: Server, plugin: bool = True) -> AsyncIterator[Fleet]:
    """A fleet of one, on servers with settings."""
    settings = EngineConfig(version="v1", max_model_len=512).settings(500)
    server.buffer.header[b.SETTINGS : b.SETTINGS + len(settings)] = settings
    testbed = built("model=tiny", "backend=vllm_cpu").testbed
    async with server.instance(plugin) as one, attached_fleet([one.url], constant_latency(), testbed, Clock()) as fleet:
        assert fleet.health is not None
        yield fleet


def renewed(server: Server, **settings: Any) -> None:
    """Another process at the same address."""
    before = server.buffer.read().settings
    server.buffer, server.path = StateBuffer.create()
    server.buffer.header[b.SETTINGS : b.SETTINGS + len(before)] = before._replace(**settings)


def test_a_server_that_was_started_again_takes_the_place_of_the_one_that_was_lost() -> None:
    async def main() -> None:
        server = Server()
        async with attached(server) as fleet:
            assert fleet.health is not None
            first = fleet.instances[0]
            assert await fleet.health.lost(0) is None
            server.well = False
            assert not await fleet.health.back(0)
            server.well = True
            assert await fleet.health.back(0)
            assert fleet.instances[0] is first  # which is the same
            renewed(server)
            server.buffer.header[b.FREE] = 77
            assert await fleet.health.back(0)
            assert fleet.instances[0].snapshot().free_blocks == 77

    asyncio.run(main())


def test_a_server_that_is_back_with_other_settings_is_told_of_once_and_not_used(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def main() -> None:
        server = Server()
        async with attached(server) as fleet:
            assert fleet.health is not None
            first = fleet.instances[0]
            renewed(server, max_num_seqs=7)
            assert [await fleet.health.back(0) for _ in range(2)] == [False, False]
            assert fleet.instances[0] is first

    asyncio.run(main())
    assert caplog.text.count("is back with other settings") == 1


def test_a_server_without_the_plugin_is_back_when_it_is_well() -> None:
    async def main() -> None:
        server = Server()
        async with attached(server, plugin=False) as fleet:
            assert fleet.predictor is None
            assert fleet.health is not None
            assert await fleet.health.back(0)

    asyncio.run(main())


def test_a_server_that_falls_silent_fails_its_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(servers, "SILENT_S", 0.05)

    async def main() -> None:
        server = Server()
        server.pause_s = 60.0
        async with attached(server) as fleet:
            with pytest.raises(InstanceFailed, match="Timeout on reading"):
                await fleet.instances[0].generate(RequestRecord(ONE), note)

    asyncio.run(main())


def test_a_connection_notices_that_its_host_is_lost() -> None:
    with servers._socket((socket.AF_INET, socket.SOCK_STREAM, 0, "", ("127.0.0.1", 1))) as opened:
        assert opened.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
        assert opened.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 20_000
    with socket.socket(socket.AF_UNIX) as other:
        notice_lost_peer(other)
