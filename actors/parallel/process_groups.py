"""What pairs of engines and worlds of engine groups build over torch.distributed: stores, addresses, process groups.

Gloo carries tensors in host memory, NCCL those on a GPU. Everything binds to the node's own address and to ports the
system chooses.
"""

from __future__ import annotations

import socket
from datetime import timedelta
from typing import Any

import torch
from torch.distributed import (  # type: ignore[attr-defined]
    PrefixStore,
    ProcessGroupGloo,
    TCPStore,
)

from actors.parallel.kv_transfer import TransportError

_LISTEN_BACKLOG = 128


def join_address(host: str, port: int) -> str:
    """``host:port``, an IPv6 host in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def split_address(address: str) -> tuple[str, int]:
    """Inverse of ``join_address``. Raises ``TransportError`` on anything else."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise TransportError(f"not an address: {address!r}")
    return host.strip("[]"), int(port)


def open_store(host: str) -> TCPStore:
    """A store given a bound socket; left to itself it would listen on every address of the node."""
    family = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0][0]
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        listener.bind((host, 0))
        listener.listen(_LISTEN_BACKLOG)
        port = listener.getsockname()[1]
        return TCPStore(
            host, port, None, True, wait_for_workers=False, master_listen_fd=listener.detach(), use_libuv=True
        )


def make_group(store: PrefixStore, rank: int, size: int, *, host: str, device: torch.device, timeout_s: float) -> Any:
    """``device`` chooses gloo or NCCL; ``timeout_s`` is for one operation."""
    timeout = timedelta(seconds=timeout_s)
    if device.type == "cuda":
        from torch.distributed import ProcessGroupNCCL

        nccl = ProcessGroupNCCL.Options()
        nccl._timeout = timeout
        return ProcessGroupNCCL(store, rank, size, nccl)
    gloo = ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    gloo._timeout = timeout
    gloo._threads = 1
    gloo._devices = [ProcessGroupGloo.create_device(hostname=host)]
    return ProcessGroupGloo(store, rank, size, gloo)


def first_line(error: RuntimeError) -> str:
    """What torch says of a group or a store, without its advice."""
    line = next(iter(str(error).splitlines()), type(error).__name__)
    return line.split(". This is typically")[0]
