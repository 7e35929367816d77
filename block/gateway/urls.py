"""What URLs of servers look like."""

from __future__ import annotations

import re
from collections.abc import Sequence
from urllib.parse import urlsplit

_HOST = re.compile(r"[\w.:%-]+")
_PATH = re.compile(r"[!$-;=@-\[\]_a-z~]*")  # what may stand in the first line of a request


def check_url(url: str, key: str) -> None:
    """ValueError, which names `key`, if it is no URL of a server, or of a name with dns+ in front."""
    if url.startswith("dns+https:"):
        raise ValueError(f"{key}={url}: certificates are of names, not of their addresses; give each server's name")
    if not is_server(url.removeprefix("dns+")):
        raise ValueError(
            f"{key}={url}: must be of the form http://host:port, https://host:port or dns+http://name:port"
        )


def every_address(url: str) -> bool:
    """Whether each address of its name is a server."""
    return url.startswith("dns+")


def is_server(url: str, schemes: Sequence[str] = ("http", "https")) -> bool:
    """Whether it is one of these schemes, with a host, and perhaps a port and a path."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        return False
    plain = not (parts.username or "?" in url or "#" in url) and port != 0
    sound = is_host(parts.hostname or "") and _PATH.fullmatch(parts.path) is not None
    return parts.scheme in schemes and plain and sound


def is_host(name: str) -> bool:
    """Whether it can be looked up, or is an address."""
    try:
        name.encode("idna")
    except UnicodeError:
        return False
    return _HOST.fullmatch(name) is not None
