"""Pairs of engines over torch.distributed: a process group of two per pair and generation, not the engine's own world.

Gloo carries tensors in host memory, NCCL those on a GPU; both take the same constructor. The NCCL form needs two
devices and has not been run by the test suite.

A group is built on demand from the TCPStore of the listening side, under a name that is used once. Everything binds to
the node's own address and to ports the system chooses. A dead or stalled peer breaks its own pair only: each build
talks to the store over a connection of its own. No timeout of torch bounds an answer of the store: a sender that builds
while the listening process is frozen stands until that one goes on or dies.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch.distributed import (  # type: ignore[attr-defined]
    DistError,
    PrefixStore,
    TCPStore,
)

from actors.parallel.kv_transfer import KvTransferConfig, Transport, TransportError
from actors.parallel.process_groups import first_line, join_address, make_group, open_store, split_address

PREFILL_RANK = 0
DECODE_RANK = 1
_WAIT_SLICE_S = 0.1


class TorchTransport:
    """One end of a process group of two. ``launch`` orders the launches of all pairs of a rank, as NCCL wants.

    A group's sockets close when its last reference goes, so no frame keeps the group or a piece of its work beyond a
    call: the pieces own the sockets too.
    """

    def __init__(self, group: Any, *, peer: int, timeout_s: float, launch: threading.Lock) -> None:
        self._group = group
        self._peer = peer
        self._timeout = timedelta(seconds=timeout_s)
        self._launch = launch

    def send(self, tensors: Iterable[Tensor]) -> None:
        self._need_group()
        posted: list[Any] = []
        kept: list[Tensor] = []
        try:
            for tensor in tensors:
                kept.append(tensor)
                with self._launch, _transport_errors():
                    posted.append(self._group.send([tensor], self._peer, 0))
            self._wait_all(posted)
        finally:
            posted.clear()

    def recv(self, buffers: Sequence[Tensor], arrived: Callable[[int], None]) -> None:
        self._need_group()
        posted: list[Any] = []
        try:
            for buffer in buffers:
                with self._launch, _transport_errors():
                    posted.append(self._group.recv([buffer], self._peer, 0))
            self._wait_all(posted, arrived)
        finally:
            posted.clear()

    def _wait_all(self, posted: Sequence[Any], arrived: Callable[[int], None] = lambda _position: None) -> None:
        for position in range(len(posted)):
            with _transport_errors():
                posted[position].wait(self._timeout)
            arrived(position)

    def close(self) -> None:
        group, self._group = self._group, None
        if group is not None:
            group.abort()

    def _need_group(self) -> None:
        if self._group is None:
            raise TransportError("the generation has ended")


class TorchMeeting:
    """Builds the pairs of one engine. ``host`` is the node's own address; ``device`` chooses gloo or NCCL."""

    def __init__(self, *, host: str, device: torch.device, config: KvTransferConfig) -> None:
        self._host = host
        self._device = device
        self._config = config
        self._launch = threading.Lock()
        self._store_lock = threading.Lock()
        self._store: TCPStore | None = None

    @property
    def address(self) -> str:
        with self._store_lock:
            if self._store is None:
                self._store = open_store(self._host)
            return join_address(self._host, self._store.port)

    def listen(self, name: str, stop: threading.Event) -> Transport:
        return self._build(self.address, name, DECODE_RANK, stop)

    def connect(self, address: str, name: str, stop: threading.Event) -> Transport:
        return self._build(address, name, PREFILL_RANK, stop)

    def close(self) -> None:
        with self._store_lock:
            self._store = None

    def _build(self, address: str, name: str, rank: int, stop: threading.Event) -> Transport:
        host, port = split_address(address)
        timeout = timedelta(seconds=self._config.join_timeout_s)
        with _transport_errors():
            store = PrefixStore(name, TCPStore(host, port, None, False, wait_for_workers=False, timeout=timeout))
            self._await_peer(store, rank, stop)
            group = make_group(
                store, rank, 2, host=self._host, device=self._device, timeout_s=self._config.data_timeout_s
            )
        return TorchTransport(group, peer=1 - rank, timeout_s=self._config.data_timeout_s, launch=self._launch)

    def _await_peer(self, store: PrefixStore, rank: int, stop: threading.Event) -> None:
        """Waits here, where it can be stopped, and not in the group's constructor, where it cannot."""
        marks = ("prefill", "decode")
        store.set(marks[rank], "here")
        deadline = time.monotonic() + self._config.join_timeout_s
        while not stop.is_set() and time.monotonic() < deadline:
            try:
                store.wait([marks[1 - rank]], timedelta(seconds=_WAIT_SLICE_S))
                return
            except DistError:
                if not store.check([marks[rank]]):
                    raise
        raise TransportError("stopped" if stop.is_set() else "the peer did not come to build the pair")


@contextlib.contextmanager
def _transport_errors() -> Iterator[None]:
    """torch reports everything about a group or a store as a RuntimeError. Its traceback would keep the group alive."""
    try:
        yield
    except RuntimeError as error:
        raise TransportError(first_line(error)) from None
