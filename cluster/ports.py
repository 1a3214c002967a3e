"""Ports of one machine: checks for the public ones, and a block for everything Serve listens on besides.

Serve's replicas open their gRPC servers with SO_REUSEPORT in a fixed default range: two clusters on one machine would
silently answer each other's requests. Each cluster therefore takes a block of ports of its own and holds it, by an
abstract unix socket that ends with the process, for as long as it lives.
"""

from __future__ import annotations

import random
import socket
from contextlib import closing
from pathlib import Path

BLOCK_SIZE = 48
_LOWEST = 20000
_USUAL_EPHEMERAL = 32768


class PortBlock:
    """``BLOCK_SIZE`` consecutive ports below the ephemeral range. ``release`` gives them back."""

    def __init__(self, first: int, holder: socket.socket) -> None:
        self.first = first
        self._holder = holder

    @classmethod
    def take(cls) -> PortBlock:
        """Finds a block on which nothing listens and which no other cluster holds.

        Raises:
            OSError: none is left.
        """
        starts = list(range(_LOWEST, _ephemeral_start() - BLOCK_SIZE, BLOCK_SIZE))
        random.shuffle(starts)
        for first in starts:
            holder = _hold(first)
            if holder is None:
                continue
            if all(can_listen("", first + offset) for offset in range(BLOCK_SIZE)):
                return cls(first, holder)
            holder.close()
        raise OSError("no block of free ports is left on this machine")

    def release(self) -> None:
        self._holder.close()


def _hold(first: int) -> socket.socket | None:
    holder = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        holder.bind(f"\0ernie-serving-ports-{first}")
    except OSError:
        holder.close()
        return None
    return holder


def _ephemeral_start() -> int:
    try:
        return int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return _USUAL_EPHEMERAL


def can_listen(host: str, port: int) -> bool:
    """True when nothing listens there, not even a listener that would share the port."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with closing(socket.socket(family, socket.SOCK_STREAM)) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
            probe.listen(1)
        except OSError:
            return False
    return True


_kept: list[PortBlock] = []


def free_ports(count: int) -> list[int]:
    """Ports of a block that is held until this process ends: neither another cluster nor the kernel, which gives ports
    of its own range to whoever connects, takes one of them before it is used.

    Raises:
        ValueError: more than a block has.
        OSError: no block is left.
    """
    if count > BLOCK_SIZE:
        raise ValueError(f"{count} ports asked, a block has {BLOCK_SIZE}")
    block = PortBlock.take()
    _kept.append(block)
    return list(range(block.first, block.first + count))
