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
from block.gateway.urls import every_address, server_url
from block.gateway.watched_file import WatchedLines

log = logging.getLogger(__name__)

RESOLVE_S = 5.0
"""How long a name may take to be resolved."""


class Discovery:
    """Finds the servers. given: their URLs; that of a name whose every address is one begins with dns+.

    file: with more of them, one a line, and comments after #; None: there is none. ValueError if it is of no use.
    admin_file: for what admins change, where other processes are to know of it; None: there are none.
    """

    def __init__(self, given: Sequence[str], file: str | None, admin_file: Path | None = None) -> None:
        self._given = given
        self._file = None if file is None else WatchedLines(file, "gateway.urls_file", _url_in)
        self._addresses: dict[str, Sequence[str]] = {}  # by a name's URL, those of its addresses
        self._unresolved: dict[str, str] = {}  # by a name's URL, why
        self._admin_file = admin_file
        self._by_admin: dict[str, bool] = {}  # URLs: whether there is such a server

    @property
    def changes(self) -> bool:
        """Whether it is of use to look again and again."""
        return self._file is not None or self._admin_file is not None or any(map(every_address, self._given))

    def urls(self) -> Sequence[str]:
        """Of all servers, as they were found last, each with one address."""
        found = [*self._found(), *(url for url, there in self._by_admin.items() if there)]
        return [url for url in dict.fromkeys(found) if self._by_admin.get(url, True)]

    def _found(self) -> list[str]:
        return [one for url in self._named for one in (self._addresses.get(url, ()) if every_address(url) else [url])]

    @property
    def _named(self) -> Sequence[str]:
        return self._given if self._file is None else list(dict.fromkeys([*self._given, *self._file.now]))

    async def look(self) -> None:
        """Look at files and names again."""
        if self._file is not None:
            await asyncio.to_thread(self._file.look)
        await asyncio.to_thread(self._read_changes)
        await asyncio.gather(*(self._resolve(url) for url in self._named if every_address(url)))

    async def _resolve(self, url: str) -> None:
        parts = urlsplit(url.removeprefix("dns+"))
        host, why = parts.hostname or "", ""
        try:
            found = await addresses(host)
        except OSError as error:
            why = f"{host} cannot be resolved: {message(error)}"
        else:
            bare = [f"[{one}]" if ":" in one else one for one in found]
            self._addresses[url] = [f"http://{one}{f':{parts.port}' if parts.port else ''}{parts.path}" for one in bare]
        if why != self._unresolved.get(url, ""):
            log.warning("%s: %s", url, why or "well again")
        self._unresolved[url] = why

    # ------------------------------------------------------------------------------------------------------ by an admin

    async def change(self, url: str, *, there: bool) -> None:
        """An admin adds this server, or has it back; or takes it away, wherever it is from."""
        await asyncio.to_thread(self._change, url, there)

    def _change(self, url: str, there: bool) -> None:
        if self._admin_file is None:
            self._note(url, there)
            return
        with self._admin_file.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            self._read_changes()
            self._note(url, there)
            write_json(self._admin_file, self._by_admin)

    def _note(self, url: str, there: bool) -> None:
        found = self._found()
        kept = {one: was for one, was in self._by_admin.items() if was or one in found}
        self._by_admin = {**kept, url: there}

    def _read_changes(self) -> None:
        if self._admin_file is not None:
            with suppress(FileNotFoundError):
                self._by_admin = json.loads(self._admin_file.read_text())


def _url_in(line: str) -> str:
    """The URL in a line; empty if it has none."""
    url = line.partition("#")[0].strip()
    return server_url(url, "url") if url else ""


async def addresses(host: str) -> Sequence[str]:
    """All that a name has, in order: those of IPv4 if there are any, or a host of both would be two.

    OSError if there is none, or it is not told in time.
    """
    loop = asyncio.get_running_loop()
    async with asyncio.timeout(RESOLVE_S):
        found = await loop.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    all_of_them = sorted({str(address[0]) for _, _, _, _, address in found})
    return [one for one in all_of_them if ":" not in one] or all_of_them


async def warn_of_many(url: str) -> None:
    """Log if this name has several addresses: it counts as one server, which they would not be."""
    with suppress(OSError, ValueError):
        found = [] if every_address(url) else await addresses(urlsplit(url).hostname or "")
        if len(found) > 1:
            log.warning("%s: one server, with %d addresses; dns+%s makes each a server", url, len(found), url)
