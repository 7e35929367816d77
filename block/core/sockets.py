"""Connections on which it shows that the other host is lost, although an answer may be long in coming."""

from __future__ import annotations

import socket

PEER_DEAD_S = 20
"""Seconds without a sign of TCP's after which a host counts as lost; a busy server's host still gives one."""

_KEEPALIVE = {
    "TCP_KEEPIDLE": PEER_DEAD_S // 4,
    "TCP_KEEPINTVL": PEER_DEAD_S // 4,
    "TCP_KEEPCNT": 3,
    "TCP_USER_TIMEOUT": PEER_DEAD_S * 1000,
}


def notice_lost_peer(opened: socket.socket) -> None:
    """Have a TCP connection fail once its other host is silent for `PEER_DEAD_S`; other sockets are let be."""
    if opened.family in (socket.AF_INET, socket.AF_INET6):
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in _KEEPALIVE.items():
            if hasattr(socket, option):  # else not Linux
                opened.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
