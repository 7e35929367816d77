"""Whether Weights & Biases can be had: the key, a sign of life of the server, and what is known of its trouble.

That is asked before W&B is, which would wait for half a minute. What one process has found, all of a sweep know.
"""

from __future__ import annotations

import base64
import json
import logging
import netrc
import os
from http.client import HTTPException
from pathlib import Path
from ssl import SSLError
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

from block.core.errors import message, one_line

PATIENCE_S = 4.0  # for the server's sign of life
_NOTE = "BLOCK_WANDB_NOTE"  # environment: as of `share_trouble`

log = logging.getLogger(__name__)
_trouble: str | None = None  # why W&B cannot be had, as this process knows


class Unavailable(Exception):
    """W&B cannot be had; the message says why and what to do."""


def share_trouble(note: Path) -> None:
    """Let the processes that this one starts, and itself, log offline once one of them has found that W&B cannot be
    had; that one writes the reason to `note`, which does not exist yet.
    """
    os.environ[_NOTE] = str(note)


def go_offline(error: Exception) -> None:
    """Say, once, why nothing more is logged online. Silent if that is known."""
    global _trouble
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # which W&B sends to the server, key given, even offline
    if _trouble is not None or isinstance(error, _AlreadySaid):
        return
    _trouble = told(error)
    if note := os.environ.get(_NOTE):
        try:
            with Path(note).open("x", encoding="utf-8") as file:
                file.write(_trouble)
        except FileExistsError:  # another process was faster, and has said so
            return
        except OSError:
            pass
    log.warning("W&B: %s; runs are logged offline, in their folders. Later: python scripts/log_runs.py", _trouble)


def is_server_trouble(error: Exception) -> bool:
    """Whether it says something of W&B at large, and not of one run."""
    theirs = any(kind.__module__.startswith("wandb.") for kind in type(error).__mro__)
    return theirs or isinstance(error, (Unavailable, TimeoutError, ConnectionError))


def told(error: Exception) -> str:
    """An error in one line, with its kind unless it is `Unavailable`."""
    return message(error) if isinstance(error, Unavailable) else one_line(error)


class _AlreadySaid(Unavailable):
    """It has been found before, and said."""


def check_reachable() -> None:
    """Ask the server who we are. Unavailable if it does not answer within PATIENCE_S, or does not know us."""
    global _trouble
    note = os.environ.get(_NOTE)
    if _trouble is None and note and Path(note).exists():
        _trouble = Path(note).read_text(encoding="utf-8")
    if _trouble is not None:
        raise _AlreadySaid(_trouble)
    url = _server()
    headers = {"Content-Type": "application/json"}
    if key := _key():
        headers["Authorization"] = f"Basic {base64.b64encode(f'api:{key}'.encode()).decode()}"
    question = json.dumps({"query": "query Viewer { viewer { id } }"}).encode()
    refused = Unavailable(f"{url} does not accept the API key: correct WANDB_API_KEY (or netrc)")
    try:
        with urlopen(Request(f"{url}/graphql", question, headers), timeout=PATIENCE_S) as answer:
            told = json.loads(answer.read(1 << 16))
        if key and told.get("data", {}).get("viewer", True) is None:
            raise refused
    except HTTPError as error:
        error.close()
        if error.code in (401, 403) and key:
            raise refused from error
        if error.code >= 500:
            raise Unavailable(f"{url} answers {error.code} {error.reason}") from error
    except TimeoutError as error:
        raise Unavailable(f"{url} does not answer within {PATIENCE_S:g} s") from error
    except URLError as error:
        if isinstance(error.reason, TimeoutError):
            raise Unavailable(f"{url} does not answer within {PATIENCE_S:g} s") from error
        if not isinstance(error.reason, SSLError):  # W&B may know certificates that are unknown here
            raise Unavailable(f"{url} cannot be reached: {error.reason}") from error
    except (OSError, HTTPException, ValueError, AttributeError) as error:
        raise Unavailable(f"{url} does not answer as a W&B server: {type(error).__name__}: {error}") from error


def _server() -> str:
    return (os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").rstrip("/")


def has_key() -> bool:
    """Whether W&B would find credentials without asking."""
    return bool(os.environ.get("WANDB_IDENTITY_TOKEN_FILE") or _key())


def _key() -> str | None:
    """The API key, from the environment or a netrc file, where W&B looks too; None if there is none."""
    if key := os.environ.get("WANDB_API_KEY"):
        return key
    host = urlsplit(_server()).hostname or ""
    candidates = [os.environ.get("NETRC"), "~/.netrc", "~/_netrc"]
    for path in [Path(name).expanduser() for name in candidates if name]:
        try:
            if path.exists():
                hosts = netrc.netrc(path).hosts
                return hosts[host][2] if host in hosts else None
        except (OSError, netrc.NetrcParseError):
            continue
    return None
