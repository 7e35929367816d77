"""Several processes on one port: each is a gateway of its own, and one that ends is begun anew.

The kernel gives each connection to one of them (SO_REUSEPORT). What they tell each other, metrics and the servers that
an admin has added, lies in files of a temporary folder.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import multiprocessing
import os
import re
import signal
import socket
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

from prometheus_client import CollectorRegistry, Metric, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample

from block.core.files import write_whole
from block.gateway.metrics import SUMMED_GAUGES
from block.vllm_plugin.lifetime import die_with_parent

log = logging.getLogger(__name__)

AGAIN_S = 1.0
"""From the end of a worker to the beginning of the next."""


class WorkerFailed(RuntimeError):
    """A worker did not come up, and has said why; or what they need is not there."""


@dataclass(frozen=True)
class Seat:
    """A worker's: `index` of `count`, and the folder that they share."""

    index: int
    count: int
    folder: Path

    @property
    def admin_file(self) -> Path:
        """For the servers that an admin adds and takes away."""
        return self.folder / "servers.json"

    def tell_metrics(self, text: bytes) -> None:
        """For the others to add to theirs. OSError if it cannot be written."""
        write_whole(self._metrics_of(self.index), lambda path: path.write_bytes(text))

    def all_metrics(self) -> bytes:
        """What all have told last, in one. Whoever is asked answers the same, or counts would seem to fall."""
        with self._locked(fcntl.LOCK_SH):
            there = _read(self._metrics_of(i) for i in range(self.count))
            return summed([*there, *(_of_servers(there, past) if there else past for past in _read([self._past]))])

    def bury(self) -> None:
        """This worker has ended: what it has counted goes on to count. OSError if that cannot be written."""
        with self._locked(fcntl.LOCK_EX):
            told = _read([self._past, self._metrics_of(self.index)])
            if told:
                write_whole(self._past, lambda path: path.write_bytes(summed(told, gauges=False)))
            self._metrics_of(self.index).unlink(missing_ok=True)

    @contextmanager
    def _locked(self, how: int) -> Iterator[None]:
        with (self.folder / "metrics.lock").open("w") as lock:
            fcntl.flock(lock, how)
            yield

    @property
    def _past(self) -> Path:
        return self.folder / "past.prom"

    def _metrics_of(self, index: int) -> Path:
        return self.folder / f"{index}.prom"


def _read(files: Iterable[Path]) -> list[bytes]:
    found = []
    for file in files:
        with suppress(FileNotFoundError):
            found.append(file.read_bytes())
    return found


_SERVER = re.compile(rb'server="([^"]*)"')


def _of_servers(there: Iterable[bytes], past: bytes) -> bytes:
    """What is told of servers that are there."""
    known = {name for text in there for name in _SERVER.findall(text)}
    lines = [(line, _SERVER.search(line)) for line in past.splitlines(keepends=True)]
    return b"".join(line for line, of in lines if of is None or of[1] in known)


def summed(texts: Iterable[bytes], *, gauges: bool = True) -> bytes:
    """Metrics of several gateways in one, as Prometheus has them. What counts is added; of other gauges the highest
    holds, or with gauges=False none is told.
    """
    families: dict[str, Metric] = {}
    values: dict[str, dict[tuple[str, tuple[tuple[str, str], ...]], float]] = {}
    for text in texts:
        for family in text_string_to_metric_families(text.decode()):
            if family.type == "gauge" and not gauges:
                continue
            families.setdefault(family.name, family)
            added = family.type != "gauge" or family.name in SUMMED_GAUGES
            known = values.setdefault(family.name, {})
            for sample in family.samples:
                key = sample.name, tuple(sample.labels.items())
                before = known.get(key, 0.0)
                known[key] = before + sample.value if added else max(before, sample.value)
    for name, family in families.items():
        family.samples = [Sample(one, dict(labels), value) for (one, labels), value in values[name].items()]
    registry = CollectorRegistry()
    registry.register(_Told(families.values()))
    return generate_latest(registry)


class _Told(Collector):
    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return self._families


Work = Callable[[Seat, int, Callable[[str], None]], None]
"""Serves at a port until it is told to stop; has the address told once it does."""


def supervise(
    count: int,
    work: Work,
    host: str,
    port: int,
    listening: Callable[[str], None],
    hand_on: Sequence[signal.Signals] = (),
) -> None:
    """Have `count` workers serve at `host` and `port` until SIGTERM or SIGINT; each is handed on to them.

    listening: told the address once all serve. hand_on: other signals that they know. OSError if it cannot be listened
    at, WorkerFailed if one does not come up.
    """
    with _reserved(host, port) as held, _folder() as folder:
        supervisor = _Supervisor(work, Path(folder), count, int(held.getsockname()[1]), listening)
        asyncio.run(supervisor.run(hand_on))


def _folder() -> tempfile.TemporaryDirectory[str]:
    try:
        return tempfile.TemporaryDirectory(prefix="block-gateway-")
    except OSError as error:
        raise WorkerFailed(f"there is no folder for what workers share: {error}") from error


def _reserved(host: str, port: int) -> socket.socket:
    """A socket that holds a port for workers; no connection goes to it. OSError if somebody else has the port."""
    family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    with socket.socket(family) as alone:  # others who share ports would not be noticed
        alone.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        alone.bind(address)
        port = alone.getsockname()[1]
    held = socket.socket(family)
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    held.bind((address[0], port, *address[2:]))
    return held


class _Supervisor:
    def __init__(self, work: Work, folder: Path, count: int, port: int, listening: Callable[[str], None]) -> None:
        self._work = work
        self._seats = [Seat(i, count, folder) for i in range(count)]
        self._port = port
        self._listening = listening
        self._processes: dict[int, BaseProcess] = {}
        self._up: dict[int, str] = {}  # addresses, by worker
        self._stopping = False

    async def run(self, hand_on: Sequence[signal.Signals]) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop)
        for number in hand_on:
            loop.add_signal_handler(number, self._hand_on, number)
        keepers = [asyncio.create_task(self._keep(seat)) for seat in self._seats]
        try:
            await asyncio.gather(*keepers)
        finally:
            self._stop()
            await asyncio.gather(*keepers, return_exceptions=True)

    def _stop(self) -> None:
        self._stopping = True
        self._hand_on(signal.SIGTERM)

    def _hand_on(self, number: signal.Signals) -> None:
        for process in self._processes.values():
            if process.pid is not None and process.is_alive():
                os.kill(process.pid, number)

    async def _keep(self, seat: Seat) -> None:
        """Have a worker in this seat as long as there is to be one."""
        context = multiprocessing.get_context("spawn")
        while not self._stopping:
            hears, tells = context.Pipe(duplex=False)
            process = context.Process(target=_begin, args=(self._work, seat, self._port, tells, os.getpid()))
            process.start()
            tells.close()
            self._processes[seat.index] = process
            if await _readable(hears.fileno()):
                with suppress(EOFError):
                    self._came_up(seat, hears.recv())
            hears.close()
            await _readable(process.sentinel)
            process.join()
            if seat.index not in self._up:
                if self._stopping:
                    return
                raise WorkerFailed(f"worker {seat.index} did not come up")
            try:
                seat.bury()
            except OSError as error:
                log.warning("what worker %d has counted is lost: %s", seat.index, error)
            if not self._stopping:
                log.warning("worker %d has ended (%s); another begins", seat.index, process.exitcode)
                await asyncio.sleep(AGAIN_S)

    def _came_up(self, seat: Seat, address: str) -> None:
        first = len(self._up) < len(self._seats)
        self._up[seat.index] = address
        if first and len(self._up) == len(self._seats):
            self._listening(address)


async def _readable(descriptor: int) -> bool:
    """Wait until there is something to be read; True."""
    loop, there = asyncio.get_running_loop(), asyncio.Event()
    loop.add_reader(descriptor, there.set)
    try:
        return await there.wait()
    finally:
        loop.remove_reader(descriptor)


def _begin(work: Work, seat: Seat, port: int, tells: Connection, parent: int) -> None:
    """In a worker's process."""
    die_with_parent(parent)
    os.setpgrp()  # what is typed at a terminal is handed on by the parent, once
    work(seat, port, tells.send)
