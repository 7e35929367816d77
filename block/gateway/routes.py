"""Which paths are what: those that ask a model for a response, those that change a server, and those of the gateway."""

from __future__ import annotations

from urllib.parse import unquote_to_bytes

from block.gateway.http1 import HTTPRequest

RESPONSES = b"/v1/responses"
"""Its answers are kept by the server, for who asks for them again."""

MESSAGES = b"/v1/messages"
"""Anthropic's."""

GENERATES = frozenset({b"/v1/completions", b"/v1/chat/completions", RESPONSES, MESSAGES})
"""Placed by the policy. All that is not named here goes by outstanding work, unchanged."""

OPEN = frozenset({b"/health", b"/metrics", b"/ping"})
"""Need no key."""

READS = (b"GET", b"HEAD", b"OPTIONS")
"""Methods that change nothing."""

OWN_VIEWS = b"/block/"
"""What the plugin shows of one server: who asked a gateway would take it for that server."""

CHANGES = frozenset(
    {
        b"/abort_requests",
        b"/collective_rpc",
        b"/fault_tolerance/apply",
        b"/finish_weight_update",
        b"/inference/v1/abort_requests",
        b"/init_weight_transfer_engine",
        b"/pause",
        b"/release_kv_cache_memory",
        b"/reset_encoder_cache",
        b"/reset_mm_cache",
        b"/reset_prefix_cache",
        b"/resume",
        b"/scale_elastic_ep",
        b"/shutdown_weight_transfer_engine",
        b"/sleep",
        b"/start_draft_weight_update",
        b"/start_profile",
        b"/start_weight_update",
        b"/stop_profile",
        b"/update_weight_version",
        b"/update_weights",
        b"/v1/load_lora_adapter",
        b"/v1/unload_lora_adapter",
        b"/wake_up",
        b"/weight_checker",
    }
)
"""Change a server, by vLLM 0.32's routes: for `gateway.admin=true` only, and then for every server."""


def is_servers(path: bytes) -> bool:
    """Whether it is /servers, which lists the servers and changes the list, for admins."""
    return _plain(path) == b"/servers"


def changes_servers(path: bytes) -> bool:
    """Whether a path is one of these, however it is written: servers may see past slashes, escapes and line ends."""
    return is_odd(path) or _plain(path) in CHANGES


def is_odd(path: bytes) -> bool:
    """Whether a server may take a path for another."""
    plain = unquote_to_bytes(path)
    return b"//" in plain or b"/." in plain or any(byte < 0x21 or byte == 0x7F for byte in plain)


def _plain(path: bytes) -> bytes:
    return b"/" + unquote_to_bytes(path).lower().strip(b"/")


def is_preflight(http: HTTPRequest) -> bool:
    """Whether a browser asks what it may send; it shows no key then."""
    return http.method == b"OPTIONS" and any(
        name.lower() == b"access-control-request-method" for name, _ in http.headers
    )
