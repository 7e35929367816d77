"""The actor that keeps one server on a node of a Ray cluster: the server is its child and cannot outlive it.

This process has no other work. It is the server's parent, and the kernel kills a child at the end of the *thread* that
started it: hence the server is started where Ray makes the actor, which is the main thread.
"""

from __future__ import annotations

import ipaddress
import os
import secrets
import socket
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from block.backends.launch import STOP_POLL_S, ServerProcess, ServerSpec, Subprocesses, free_ports, stopping
from block.core.paths import PACKAGE

LOOK_S = 0.1
"""From one look at the server to the next."""
MOST = 1 << 20
"""Bytes of the log that are told at a time."""


class Heard(NamedTuple):
    """How much of what a server has said is known. server: which, of those that were started one after the other."""

    server: str = ""
    length: int = 0


class News(NamedTuple):
    """What is new of a server: where it listens, what it has said since, and its exit status if it has ended.

    heard: what is known with this.
    """

    url: str
    said: bytes
    status: int | None
    heard: Heard


class ServerActor:
    """Starts a server and tells of it. address: gives that of this node; port: where it listens, if nobody does."""

    def __init__(self, spec: ServerSpec, port: int, address: Callable[[], str]) -> None:
        host = address()
        if not _is_free(host, port):
            (port,) = free_ports(1)
        self._log, name = tempfile.mkstemp(prefix="block-server-")
        paths = [str(PACKAGE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]  # a checkout need not be installed
        here = replace(spec, environment={"PYTHONPATH": os.pathsep.join(paths), **spec.environment}, log=Path(name))
        pid, ended = Subprocesses().start(here.on_this_host(host, port))
        here.log.unlink()  # it is read while it is open, and gone with this process
        self._server = ServerProcess(f"http://{_in_url(host)}:{port}", pid, here.log, ended)
        self._name = secrets.token_hex(8)

    def news(self, heard: Heard, patience_s: float) -> News:
        """What is new to who has heard so much; waits for something so long. An answer may be lost, so ask again."""
        deadline = time.monotonic() + patience_s
        known = heard.length if heard.server == self._name else 0
        while True:
            status = self._server.ended()  # before it is read what it said, so that nothing is left of one that ended
            said = os.pread(self._log, MOST, known)
            if said or status is not None or heard.server != self._name or time.monotonic() > deadline:
                ended = status if len(said) < MOST else None
                return News(self._server.url, said, ended, Heard(self._name, known + len(said)))
            time.sleep(LOOK_S)

    def stop(self) -> None:
        """Stop the server and all its processes."""
        for _ in stopping([self._server]):
            time.sleep(STOP_POLL_S)


def _is_free(host: str, port: int) -> bool:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as servers do
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True


def _in_url(host: str) -> str:
    return f"[{host}]" if ipaddress.ip_address(host).version == 6 else host
