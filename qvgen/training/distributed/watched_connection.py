"""A TCP connection that the kernel gives up once the other machine answers nothing, whatever the processes on it do."""

from __future__ import annotations

import socket

UNREACHABLE_SECONDS = 60
"""A machine that answers nothing for so long is not reachable; a network that comes back sooner harms nobody."""
_IDLE_SECONDS, _PROBE_SECONDS = 15, 5
_CUT = ("timed out", "No route to host", "Network is unreachable", "Host is down")


def watch_connection(connection: socket.socket) -> None:
    """Have the kernel give a connection up once the other machine answers nothing for UNREACHABLE_SECONDS."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    probes = (UNREACHABLE_SECONDS - _IDLE_SECONDS) // _PROBE_SECONDS
    options = {"TCP_KEEPIDLE": _IDLE_SECONDS, "TCP_KEEPINTVL": _PROBE_SECONDS, "TCP_KEEPCNT": probes} | {
        "TCP_USER_TIMEOUT": 1000 * UNREACHABLE_SECONDS  # where something is under way
    }
    for name, value in options.items():
        if hasattr(socket, name):  # not everywhere but on Linux
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def how_it_ended(end: str) -> str:
    """What became of the other side, by the kernel's words for the end of a connection (none: it was closed).

    Example:
        >>> how_it_ended("Connection reset by peer")
        'is gone'
        >>> how_it_ended("No route to host")
        "can't be reached: its machine has answered nothing for 60 s (No route to host)"
    """
    if not any(word in end for word in _CUT):
        return "is gone"
    return f"can't be reached: its machine has answered nothing for {UNREACHABLE_SECONDS} s ({end})"
