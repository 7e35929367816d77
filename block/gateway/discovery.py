"""Where the servers are: those that were given, a file's, all addresses of a name, and those that an admin adds.

What cannot be read or resolved now is as it was: a name server that fails takes no model server away.
"""

from __future__ import annotations

import asyncio
import fcntl
import json
import logging
import socket
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit

from block.core.errors import message
from block.core.files import write_json
from block.gateway.urls import check_url, every_address

log = logging.getLogger(__name__)

RESOLVE_S = 5.0
"""How long a name may take to be resolved."""


class Discovery:
    """Finds the servers. given: their URLs; that of a name whose every address is one begins with dns+. file: with more
    of them, one a line, and comments after #; None: there is none. admin_file: what admins have changed, where other
    processes are to know of it; None: they are not.
    """

    def __init__(self, given: Sequence[str], file: str | None, admin_file: Path | None = None) -> None:
        self._given = given
        self._file = None if file is None else Path(file)
        self._in_file: list[str] = []
        self._addresses: dict[str, list[str]] = {}  # by a name's URL, those of its addresses
        self._admin_file = admin_file
        self._by_admin: dict[str, bool] = {}  # URLs: whether there is such a server
        self._complaints: dict[str, str] = {}

    @property
    def changes(self) -> bool:
        """Whether it is of use to look again and again."""
        return self._file is not None or self._admin_file is not None or any(map(every_address, self._given))

    def add(self, url: str) -> None:
        """An admin adds this server, or has it back. ValueError if it is no URL of a server."""
        check_url(url, "url")
        self._change(url, there=True)

    def remove(self, url: str) -> None:
        """An admin takes this server away, wherever it is from."""
        self._change(url, there=False)

    def _change(self, url: str, *, there: bool) -> None:
        if self._admin_file is None:
            self._by_admin[url] = there
            return
        with self._admin_file.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            self._read_changes()
            self._by_admin[url] = there
            write_json(self._admin_file, self._by_admin)

    def _read_changes(self) -> None:
        if self._admin_file is not None:
            with suppress(FileNotFoundError):
                self._by_admin = json.loads(self._admin_file.read_text())

    async def look(self) -> Sequence[str]:
        """The URLs of all servers that there are now, each with one address."""
        if self._file is not None:
            try:
                self._in_file = await asyncio.to_thread(urls_in, self._file)
                self._complain(str(self._file), "")
            except (OSError, ValueError) as error:
                self._complain(str(self._file), message(error))
        self._read_changes()
        named = [*self._given, *self._in_file]
        await asyncio.gather(*(self._resolve(url) for url in dict.fromkeys(named) if every_address(url)))
        found: list[str] = []
        for url in named:
            found += self._addresses.get(url, ()) if every_address(url) else [url]
        return [url for url in dict.fromkeys([*found, *self._by_admin]) if self._by_admin.get(url, True)]

    async def _resolve(self, url: str) -> None:
        plain = url.removeprefix("dns+")
        parts = urlsplit(plain)
        host, port = parts.hostname or "", parts.port
        try:
            found = await addresses(host)
            self._complain(url, "")
        except OSError as error:
            self._complain(url, f"{host} cannot be resolved: {message(error)}")
            return
        bare = [f"[{one}]" if ":" in one else one for one in found]
        self._addresses[url] = [f"http://{one}{f':{port}' if port else ''}{parts.path}" for one in bare]

    def _complain(self, about: str, what: str) -> None:
        """Log what is wrong, once, and that it is right again."""
        if what != self._complaints.get(about, ""):
            log.warning("%s: %s", about, what or "well again")
        self._complaints[about] = what


def urls_in(file: Path) -> list[str]:
    """The URLs in a file. OSError if it cannot be read, ValueError for what is no URL of a server."""
    lines = [line.partition("#")[0].strip().rstrip("/") for line in file.read_text().splitlines()]
    urls = [line for line in lines if line]
    for url in urls:
        check_url(url, "a line")
    return urls


async def addresses(host: str) -> list[str]:
    """All that a name has, in order. OSError if there is none, or it is not told in time."""
    loop = asyncio.get_running_loop()
    async with asyncio.timeout(RESOLVE_S):
        found = await loop.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    return sorted({str(address[0]) for _, _, _, _, address in found})


async def warn_of_many(url: str) -> None:
    """Log if this name has several addresses: it counts as one server, which they would not be."""
    with suppress(OSError, ValueError):
        found = [one for one in await addresses(urlsplit(url).hostname or "") if ":" not in one]
        if len(found) > 1 and not every_address(url):
            log.warning("%s: one server, with %d addresses; dns+%s makes each a server", url, len(found), url)


def check_file(file: str) -> None:
    """ValueError if the file `gateway.urls_file` is of no use."""
    try:
        urls_in(Path(file))
    except OSError as error:
        raise ValueError(f"gateway.urls_file={file}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"gateway.urls_file={file}: {error}") from error
