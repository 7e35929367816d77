"""Following what a server pushes: over breaks, restarts, silence and nonsense, and between hosts of other clocks."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import SimpleNamespace

import aiohttp
import pytest
from aiohttp import web
from mock_servers import LIMITS, eventually, pushed, run

from block.backends import subscription as module
from block.backends.subscription import Received, Subscription
from block.core.arrays import Ints
from block.core.snapshot import ID
from block.engine.config import EngineSettings
from block.vllm_plugin import frames
from block.vllm_plugin import state_buffer as b
from block.vllm_plugin.frames import encode
from block.vllm_plugin.state_buffer import StateBuffer


class Server:
    """Pushes what is on `buffer`; `cut` ends its connections, `odd` is sent instead."""

    def __init__(self) -> None:
        self.begin_anew(LIMITS)
        self.odd: bytes | None = None
        self.asked: list[dict[str, str]] = []
        self._connections: list[web.Request] = []

    def begin_anew(self, settings: EngineSettings) -> None:
        """As another process at the same place."""
        self.buffer, _ = StateBuffer.create()
        self.buffer.header[b.SETTINGS : b.SETTINGS + len(settings)] = settings

    def publish(self, value: int, gone: tuple[int, int] | None = None) -> None:
        buffer = self.buffer
        buffer.begin()
        buffer.seqs[:, :2] = value
        buffer.header[b.COLUMNS] = 2
        buffer.header[b.STEPS] += 1
        if gone is not None:
            finished = int(buffer.header[b.FINISHED])
            buffer.gone[finished % b.GONE] = gone
            buffer.header[b.FINISHED] = finished + 1
        buffer.end()

    def cut(self) -> None:
        for one in self._connections:
            if one.transport is not None:
                one.transport.abort()
        self._connections.clear()

    async def _frames(self, http: web.Request) -> web.StreamResponse:
        self.asked.append(dict(http.query))
        self._connections.append(http)
        if self.odd is None:
            return await pushed(self.buffer)(http)
        response = web.StreamResponse()
        await response.prepare(http)
        await response.write(self.odd)
        await asyncio.Event().wait()
        raise AssertionError

    @asynccontextmanager
    async def followed(self) -> AsyncIterator[tuple[Subscription, Received, list[list[int]]]]:
        app = web.Application()
        app.router.add_get("/block/frames", self._frames)
        runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.01)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        gone: list[list[int]] = []

        def tell(found: Ints) -> None:
            gone.extend(found.tolist())

        received = Received()
        # As the gateway's: whatever else is asked is answered within seconds.
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=0.3)) as session:
            subscription = Subscription(f"http://127.0.0.1:{runner.addresses[0][1]}", session, tell, received)
            try:
                await subscription.begin()
                yield subscription, received, gone
            finally:
                await subscription.end()
                await runner.cleanup()


def shown(subscription: Subscription) -> int:
    state = subscription.state
    assert state is not None
    return int(state.seqs[ID, 0]) if state.seqs.size else -1


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "AGAIN_S", 0.01)


def test_a_lost_connection_is_opened_again_and_nothing_that_has_gone_is_lost(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        server = Server()
        server.publish(1, gone=(1, 1))  # before anybody listened
        async with server.followed() as (subscription, received, gone):
            assert shown(subscription) == 1
            server.publish(2, gone=(2, 0))
            await eventually(lambda: shown(subscription) == 2)
            for value in (3, 4):
                server.cut()
                server.publish(value, gone=(value, value))
                await eventually(lambda: shown(subscription) == value)  # noqa: B023
            assert gone == [[2, 0], [3, 3], [4, 4]]
            assert received.breaks == 2
            assert server.asked[0] == {}
            assert [one["since"] for one in server.asked[1:]] == ["2", "3"]
            await asyncio.sleep(0.4)  # longer than the session's time for an answer
            assert received.breaks == 2

    run(main())
    assert len([one for one in caplog.messages if "is asked for anew" in one]) == 1


def test_another_process_at_the_same_place_is_followed_if_it_is_alike(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        server = Server()
        async with server.followed() as (subscription, _, gone):
            for value in range(1, 4):
                server.publish(value, gone=(value, 1))
            await eventually(lambda: len(gone) == 3)
            server.begin_anew(LIMITS)
            server.publish(7, gone=(8, 1))
            server.cut()
            await eventually(lambda: shown(subscription) == 7)
            server.publish(8, gone=(9, 2))
            await eventually(lambda: shown(subscription) == 8)
            assert gone[3:] == [[9, 2]]
            server.begin_anew(LIMITS._replace(max_num_seqs=9))
            server.publish(9)
            server.cut()
            await eventually(lambda: "another server is there" in caplog.text)
            assert shown(subscription) == 8
            asked = len(server.asked)
            await asyncio.sleep(0.05)
            assert len(server.asked) == asked  # it is not asked again and again

    run(main())


def test_what_is_no_frame_is_dropped_and_asked_for_again() -> None:
    async def main() -> None:
        server = Server()
        server.publish(1)
        async with server.followed() as (subscription, received, _):
            body, _ = encode(server.buffer, 3, 0)  # three are missing
            for odd in (b"x" * 100, body):
                server.odd = odd
                asked = len(server.asked)
                server.cut()
                await eventually(lambda: len(server.asked) > asked + 2)  # noqa: B023
                assert shown(subscription) == 1
            server.odd = None
            server.publish(2)
            await eventually(lambda: shown(subscription) == 2)
            assert received.breaks == 1  # which was told once

    run(main())


@pytest.mark.parametrize("odd", [b"x" * 100, b""])
def test_a_server_that_pushes_nothing_is_not_begun_with(odd: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SILENCE_S", 0.05)

    async def main() -> None:
        server = Server()
        server.odd = odd
        with pytest.raises(TimeoutError if odd == b"" else ValueError):
            async with server.followed():
                raise AssertionError

    run(main())


def test_silence_means_that_nobody_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SILENCE_S", 0.1)
    monkeypatch.setattr(frames, "HEARTBEAT_S", 0.02)

    async def main() -> None:
        server = Server()
        async with server.followed() as (subscription, received, _):
            await asyncio.sleep(0.15)
            assert subscription.current  # nothing has happened, and frames say so
            assert received.breaks == 0
            monkeypatch.setattr(b, "PATIENCE_S", 0.0)
            server.buffer.begin()  # it ends in the midst of a change
            await eventually(lambda: received.breaks == 1 and not subscription.current)
            server.buffer.end()
            await eventually(lambda: subscription.current)

    run(main())


def test_the_other_host_s_clock_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its times are put on this host's clock. What is much later than others is not waited for."""
    monkeypatch.setattr(module, "LATE_S", 0.2)
    ahead = 1e6
    theirs = SimpleNamespace(monotonic=lambda: time.monotonic() + ahead, sleep=time.sleep)
    monkeypatch.setattr(frames, "time", theirs)
    monkeypatch.setattr(b, "time", theirs)

    async def main() -> None:
        nonlocal ahead
        server = Server()
        server.buffer.times[b.STARTED] = theirs.monotonic() - 5.0
        async with server.followed() as (subscription, received, _):
            server.publish(1)
            await eventually(lambda: shown(subscription) == 1)
            state = subscription.state
            assert state is not None
            assert time.monotonic() - state.started == pytest.approx(5.0, abs=1.0)
            assert 0 <= time.monotonic() - state.published < 1.0
            ahead -= 2.0  # it stood still for so long, or what it sends is that late
            server.publish(2)
            await eventually(lambda: shown(subscription) == 2)
            assert time.monotonic() - subscription._sent > 1.5
            assert received.breaks == 0  # what was held up once is read on
            await asyncio.sleep(0.3)
            server.publish(2)
            await eventually(lambda: received.breaks == 1)
            server.publish(3)
            await eventually(lambda: shown(subscription) == 3)
            assert subscription.state is not None
            assert 0 <= time.monotonic() - subscription.state.published < 1.0
            await asyncio.sleep(0.05)
            assert received.breaks == 1

    run(main())
