"""What URLs of servers look like."""

from __future__ import annotations

import re
from collections.abc import Sequence
from urllib.parse import urlsplit

_HOST = re.compile(r"[\w.:%-]+")
_PATH = re.compile(r"[!$-;=@-\[\]_a-z~]*")  # what may stand in the first line of a request
_USUAL = {"http": 80, "https": 443}
_FORMS = "http://host:port, https://host:port or dns+http://name:port"


def server_url(text: str, key: str) -> str:
    """The URL of a server, or with dns+ in front that of a name, in one of the many ways to write it.

    ValueError, which names `key`, if it is none.
    """
    plain = text.removeprefix("dns+")
    if not is_url(plain):
        raise ValueError(f"{key}={text}: must be of the form {_FORMS}")
    parts = urlsplit(plain)
    if every_address(text) and parts.scheme == "https":
        raise ValueError(f"{key}={text}: certificates are of names, not of their addresses; give each server's name")
    host = f"[{parts.hostname}]" if ":" in (parts.hostname or "") else parts.hostname
    port = "" if parts.port in (None, _USUAL[parts.scheme]) else f":{parts.port}"
    return f"{'dns+' * every_address(text)}{parts.scheme}://{host}{port}{parts.path.rstrip('/')}"


def every_address(url: str) -> bool:
    """Whether each address of its name is a server."""
    return url.startswith("dns+")


def is_url(text: str, schemes: Sequence[str] = ("http", "https")) -> bool:
    """Whether it is one of these schemes, with a host, and perhaps a port and a path."""
    try:
        parts = urlsplit(text)
        port = parts.port
    except ValueError:
        return False
    plain = not (parts.username or any(one in text for one in "?# ")) and text.isprintable() and port != 0
    sound = is_host(parts.hostname or "") and _PATH.fullmatch(parts.path) is not None
    return parts.scheme in schemes and plain and sound


def is_host(name: str) -> bool:
    """Whether it can be looked up, or is an address."""
    try:
        name.encode("idna")
    except UnicodeError:
        return False
    return _HOST.fullmatch(name) is not None
