"""Frames: what is pushed of the state buffer, to those that listen well, badly or no more."""

from __future__ import annotations

import asyncio
import struct
from typing import Any

import pytest

from block.core.snapshot import FIELDS, ID
from block.vllm_plugin import frames
from block.vllm_plugin import state_buffer as b
from block.vllm_plugin.environment import STATE_BUFFER
from block.vllm_plugin.frames import Frame, FrameReader, encode
from block.vllm_plugin.routes import SnapshotView
from block.vllm_plugin.state_buffer import StateBuffer


@pytest.fixture
def buffer(monkeypatch: pytest.MonkeyPatch) -> StateBuffer:
    made, path = StateBuffer.create()
    monkeypatch.setenv(STATE_BUFFER, path)
    return made


def publish(buffer: StateBuffer, value: int, columns: int = 4) -> None:
    buffer.begin()
    buffer.seqs[:, :columns] = value
    buffer.header[[b.COLUMNS, b.RUNNING]] = columns, 1
    buffer.header[b.STEPS] += 1
    buffer.end()


def go(buffer: StateBuffer, number: int, preemptions: int) -> None:
    finished = int(buffer.header[b.FINISHED])
    buffer.gone[finished % b.GONE] = number, preemptions
    buffer.header[b.FINISHED] = finished + 1


@pytest.mark.parametrize("piece", [1, 7, 100, 10**6])
@pytest.mark.parametrize("value", [-5, 2**31 - 1, 2**31, -(2**40)])
def test_what_is_sent_is_read_however_it_is_cut(buffer: StateBuffer, piece: int, value: int) -> None:
    publish(buffer, value)
    go(buffer, 2**50, 3)
    first, finished = encode(buffer, 0, 0)
    publish(buffer, 1, columns=0)
    second, finished = encode(buffer, 1, finished)
    assert finished == 1
    sent, reader = first + second, FrameReader()
    one, two = (frame for i in range(0, len(sent), piece) for frame in reader.feed(sent[i : i + piece]))
    assert (one.state.seqs == value).all()
    assert one.state.seqs.shape == (FIELDS, 4)
    assert one.gone.tolist() == [[2**50, 3]]
    assert (one.state.header[b.NONCE], one.state.header[b.STEPS]) == (buffer.header[b.NONCE], 1)
    assert two.state.seqs.shape == (FIELDS, 0)
    assert two.gone.shape == (0, 2)
    assert two.sent >= one.sent >= one.state.published
    one.state.seqs[0, 0] = 9  # a copy of the reader's own
    small = -(2**31) <= value < 2**31
    assert len(first) == 48 + 8 * 64 + (4 if small else 8) * FIELDS * 4 + 16


def changed(data: bytes, at: int, word: int) -> bytes:
    return data[:at] + struct.pack("<q", word) + data[at + 8 :]


MAGIC_AT, COLUMNS_AT = 48, 48 + 8 * b.COLUMNS


@pytest.mark.parametrize(
    ("at", "word"),
    [(0, 0), (8, 7), (8, 2**40), (8, -8), (16, 1), (32, 10**6), (32, -1), (40, 5), (MAGIC_AT, 0), (COLUMNS_AT, 5)],
)
def test_what_is_no_frame_is_refused(buffer: StateBuffer, at: int, word: int) -> None:
    publish(buffer, 3)
    good, _ = encode(buffer, 0, 0)
    assert len(FrameReader().feed(good)) == 1
    with pytest.raises(ValueError, match="this version"):
        FrameReader().feed(changed(good, at, word))


class Listener:
    """One connection to the route, at which it is said when it takes what is sent and when it leaves."""

    def __init__(self, view: SnapshotView, query: bytes = b"", server: Any = None) -> None:
        self.takes = asyncio.Event()
        self.takes.set()
        self.leaves = asyncio.Event()
        self.sent: list[dict[str, Any]] = []
        self._reader = FrameReader()
        state = type("State", (), {"server": server})
        app = type("App", (), {"state": state})
        scope = {"type": "http", "path": "/block/frames", "query_string": query, "app": app}
        self.task = asyncio.ensure_future(view(scope, self._receive, self._send))

    async def _receive(self) -> dict[str, Any]:
        await self.leaves.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: dict[str, Any]) -> None:
        await self.takes.wait()  # as servers do: what one part leaves in the way is waited for with the next
        self.sent.append(message)

    def frames(self) -> list[Frame]:
        """Those that have come since the last time."""
        sent, self.sent = self.sent, []
        return self._reader.feed(b"".join(message.get("body", b"") for message in sent))

    async def next(self) -> list[Frame]:
        async with asyncio.timeout(10):
            while not (found := self.frames()):
                await asyncio.sleep(0.001)
        return found


async def end(*listeners: Listener) -> None:
    for one in listeners:
        one.leaves.set()
    async with asyncio.timeout(10):
        await asyncio.gather(*(one.task for one in listeners))


def test_each_change_is_pushed_to_all_that_listen(buffer: StateBuffer) -> None:
    async def main() -> None:
        view = SnapshotView(None)  # type: ignore[arg-type]
        one, other = Listener(view), Listener(view)
        for value in range(1, 5):
            publish(buffer, value)
            for listener in (one, other):
                while (await listener.next())[-1].state.seqs[ID, 0] != value:
                    pass
        await end(one)
        one.frames()
        publish(buffer, 9)
        assert (await other.next())[-1].state.seqs[ID, 0] == 9
        assert one.frames() == []
        await end(other)
        publish(buffer, 10)
        again = Listener(view)  # whom none is there to tell, any more
        assert (await again.next())[-1].state.seqs[ID, 0] == 10
        publish(buffer, 11)
        assert (await again.next())[-1].state.seqs[ID, 0] == 11
        await end(again)
        assert view._pushing._watch is not None
        await asyncio.wait_for(view._pushing._watch, 10)

    asyncio.run(main())


def test_who_lags_gets_the_newest_and_all_that_has_gone(buffer: StateBuffer) -> None:
    async def main() -> None:
        listener = Listener(SnapshotView(None))  # type: ignore[arg-type]
        (first,) = await listener.next()
        listener.takes.clear()
        for value in range(50):
            publish(buffer, value)
            go(buffer, value, value % 2)
            await asyncio.sleep(0.001)
        listener.takes.set()
        found = await listener.next()
        assert len(found) == 1
        assert (found[0].number, first.number) == (1, 0)
        assert found[0].state.seqs[ID, 0] == 49
        assert found[0].gone.tolist() == [[value, value % 2] for value in range(50)]
        await end(listener)

    asyncio.run(main())


def test_a_frame_comes_when_nothing_happens(buffer: StateBuffer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frames, "HEARTBEAT_S", 0.01)

    async def main() -> None:
        listener = Listener(SnapshotView(None))  # type: ignore[arg-type]
        sent = [(await listener.next())[-1].sent for _ in range(4)]
        assert sent == sorted(set(sent))
        buffer.begin()  # a scheduler that ended here shows nothing that could be sent
        monkeypatch.setattr(b, "PATIENCE_S", 0.001)
        await asyncio.sleep(0.03)
        listener.frames()
        await asyncio.sleep(0.03)
        assert listener.frames() == []
        await end(listener)

    asyncio.run(main())


def test_who_comes_back_is_told_what_has_gone_meanwhile(buffer: StateBuffer) -> None:
    for number in range(5):
        go(buffer, number, number)
    nonce = int(buffer.header[b.NONCE])

    async def gone(query: str) -> list[list[int]]:
        listener = Listener(SnapshotView(None), query.encode())  # type: ignore[arg-type]
        (frame,) = await listener.next()
        await end(listener)
        return frame.gone.tolist()

    assert asyncio.run(gone("")) == []
    assert asyncio.run(gone(f"nonce={nonce}&since=3")) == [[3, 3], [4, 4]]
    assert asyncio.run(gone(f"nonce={nonce + 1}&since=3")) == []  # it counts those of another process


def test_a_server_that_ends_ends_its_responses(buffer: StateBuffer) -> None:
    async def main() -> None:
        server = type("Server", (), {"should_exit": False})
        listener = Listener(SnapshotView(None), server=server)  # type: ignore[arg-type]
        await listener.next()
        server.should_exit = True  # type: ignore[attr-defined]
        async with asyncio.timeout(10):
            await listener.task
        assert not listener.sent[-1].get("more_body")

    asyncio.run(main())


def test_frames_are_no_more_than_a_hundred_a_second(buffer: StateBuffer) -> None:
    async def main() -> None:
        listener = Listener(SnapshotView(None))  # type: ignore[arg-type]
        await listener.next()
        loop = asyncio.get_running_loop()
        began, count = loop.time(), 0
        while loop.time() < began + 0.2:
            publish(buffer, 1)
            await asyncio.sleep(0)
            count += len(listener.frames())
        assert 1 < count <= (loop.time() - began) / frames.GAP_S + 2
        await end(listener)

    asyncio.run(main())
