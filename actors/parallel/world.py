"""The world of an engine group: one process group for all its ranks, with a time limit on every collective.

Gloo carries tensors in host memory, NCCL those on a GPU. The group is built from a store whose address is found at run
time, under a name used once, and is never torch's process-wide default group: an engine has other groups beside it.
The NCCL form has not been run by the test suite: there a collective is only queued by the host, and the group's own
watchdog, not ``WorldError``, ends a process whose peer does not come.

R ranks.
"""

from __future__ import annotations

import contextlib
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch.distributed import (  # type: ignore[attr-defined]
    AllToAllOptions,
    DistError,
    PrefixStore,
    TCPStore,
)

from actors.parallel.process_groups import first_line, join_address, make_group, open_store, split_address

_ROLL_CALL_S = 0.2
"""A loss has to be told within half a second."""
_SOURCE_PLACE = re.compile(r"^\[\S+:\d+\] ")
"""Gloo's own file and line."""
_WAIT_SLICE_S = 1.0
"""How soon ``stop`` is noticed. torch warns at the end of each slice."""


class WorldError(Exception):
    """A collective of the group failed here: a peer is gone, or one did not come in time. The world is lost for all.

    ``step`` is the one this rank began last, None before the first; ``layer`` is None outside of layers; ``timed_out``
    tells the two causes apart.
    ``silent``: ranks that did not notice the end of the world with this one: dead, frozen, or busy elsewhere.
    """

    def __init__(
        self,
        reason: str,
        *,
        rank: int,
        size: int,
        step: int | None,
        layer: int | None,
        what: str,
        timed_out: bool,
        silent: tuple[int, ...] = (),
    ) -> None:
        parts = (f"rank {rank} of {size}", None if step is None else f"step {step}")
        place = ", ".join(part for part in (*parts, None if layer is None else f"layer {layer}", what) if part)
        who = f" (no word from rank {', '.join(map(str, silent))})" if silent else ""
        super().__init__(f"{place}: {reason}{who}")
        self.rank = rank
        self.step = step
        self.layer = layer
        self.timed_out = timed_out
        self.silent = silent


@dataclass(frozen=True, kw_only=True, slots=True)
class WorldConfig:
    """Bounds, in seconds."""

    join_timeout_s: float = 60.0
    """For all ranks to come and connect."""
    collective_timeout_s: float = 30.0
    """For one collective. Longer than ranks may be apart: they meet twice or three times in every MoE layer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Seat:
    """How one rank finds its world."""

    address: str
    """Of the leader's ``MeetingPlace``."""
    name: str
    """Of the world: the same for all its ranks, and never used again."""
    rank: int
    size: int
    host: str
    """This rank's own node."""
    config: WorldConfig = WorldConfig()

    def join(self, device: torch.device, stop: threading.Event | None = None) -> World:
        """See ``join_world``."""
        return join_world(
            self.address,
            name=self.name,
            rank=self.rank,
            size=self.size,
            host=self.host,
            device=device,
            config=self.config,
            stop=stop,
        )


class MeetingPlace:
    """The store the ranks of worlds find each other by; the leader keeps it as long as worlds are joined."""

    def __init__(self, host: str) -> None:
        """``host``: the address of this node that the other ranks reach. The system chooses the port."""
        self._store: TCPStore | None = open_store(host)
        self.address = join_address(host, self._store.port)

    def close(self) -> None:
        self._store = None


def join_world(
    address: str,
    *,
    name: str,
    rank: int,
    size: int,
    host: str,
    device: torch.device,
    config: WorldConfig,
    stop: threading.Event | None = None,
) -> World:
    """Meets the other ranks at a ``MeetingPlace``. All give the same ``name``, which no other world ever had.

    ``host`` is the address of this rank's own node. ``stop`` ends the waiting.

    Raises WorldError if not all ranks came in time, the place is gone, or ``stop`` was set; TransportError if
    ``address`` is none.
    """
    if not 0 <= rank < size:
        raise ValueError(f"rank {rank} of {size}")
    store_host, port = split_address(address)
    timeout = timedelta(seconds=config.join_timeout_s)
    with _named_errors(rank, size, step=None, layer=None, what="joining the group"):
        tcp_store = TCPStore(store_host, port, None, False, wait_for_workers=False, timeout=timeout)
        store = PrefixStore(name, tcp_store)
        _await_all(store, rank, size, config.join_timeout_s, stop)
        group = make_group(store, rank, size, host=host, device=device, timeout_s=config.collective_timeout_s)
    return World(group, store, rank=rank, size=size, device=device, timeout_s=config.collective_timeout_s)


class World:
    """One rank's end of the group. ``step`` is what errors name; whoever starts a step sets it.

    Not thread-safe: all ranks issue the same collectives in the same order. After a WorldError the world is closed, so
    that ranks waiting for this one learn of it at once.
    """

    def __init__(
        self, group: Any, store: PrefixStore, *, rank: int, size: int, device: torch.device, timeout_s: float
    ) -> None:
        self._group = group
        self._store = store
        self._timeout = None if device.type == "cuda" else timedelta(seconds=timeout_s)
        self.rank = rank
        self.size = size
        self.device = device
        self.step: int | None = None

    def all_to_all(
        self,
        out: Tensor,
        out_rows: Sequence[int],
        rows: Tensor,
        rows_per_rank: Sequence[int],
        *,
        layer: int | None,
        what: str,
    ) -> None:
        """Sends ``rows_per_rank[r]`` successive rows to rank r; ``out`` gets ``out_rows[r]`` from it, by rank."""
        with self._collective(layer, what) as group:
            options = AllToAllOptions()
            self._wait(group.alltoall_base(out, rows, list(out_rows), list(rows_per_rank), options))

    def all_gather(self, out: Tensor, mine: Tensor, *, layer: int | None, what: str) -> None:
        """``out`` [R * n, ...] gets every rank's ``mine`` [n, ...], by rank."""
        with self._collective(layer, what) as group:
            self._wait(group._allgather_base(out, mine))

    def reduce_scatter(self, out: Tensor, parts: Tensor, *, layer: int | None, what: str) -> None:
        """``out`` [n, ...] gets the sum over ranks of the part of their ``parts`` [R * n, ...] that is this rank's."""
        with self._collective(layer, what) as group:
            self._wait(group._reduce_scatter_base(out, parts))

    def meet(self, mark: str, *, timeout_s: float, stop: threading.Event | None = None) -> None:
        """Waits until all ranks have come here, for longer than a collective may. A world uses a mark once."""
        with _named_errors(self.rank, self.size, step=self.step, layer=None, what=f"waiting until all are {mark}"):
            _await_all(PrefixStore(mark, self._store), self.rank, self.size, timeout_s, stop)

    def close(self) -> None:
        """Leaves the group; whoever waits for this rank gets an error."""
        group, self._group = self._group, None
        if group is not None:
            group.abort()

    def _wait(self, work: Any) -> None:
        if self._timeout is None:
            work.wait()
        else:
            work.wait(self._timeout)

    @contextlib.contextmanager
    def _collective(self, layer: int | None, what: str) -> Iterator[Any]:
        with _named_errors(self.rank, self.size, step=self.step, layer=layer, what=what, silent=self._call_roll):
            if self._group is None:
                raise RuntimeError("this rank has left the group")
            try:
                yield self._group
            except RuntimeError:
                self.close()
                raise

    def _call_roll(self) -> tuple[int, ...]:
        """Ranks that do not leave the broken world within a moment. Empty if the store does not tell.

        In a thread, because no timeout of torch bounds an answer of a store whose process is frozen.
        """
        silent = set(range(self.size)) - {self.rank}
        answered = threading.Event()

        def ask() -> None:
            with contextlib.suppress(RuntimeError):
                self._store.set(f"rank {self.rank} left", "")
                deadline = time.monotonic() + _ROLL_CALL_S
                while silent and time.monotonic() < deadline:
                    silent.difference_update([rank for rank in silent if self._store.check([f"rank {rank} left"])])
                    time.sleep(_ROLL_CALL_S / 20)
                answered.set()

        threading.Thread(target=ask, daemon=True, name="roll call").start()
        return tuple(sorted(silent)) if answered.wait(2 * _ROLL_CALL_S) else ()


def _nobody() -> tuple[int, ...]:
    return ()


@contextlib.contextmanager
def _named_errors(
    rank: int,
    size: int,
    *,
    step: int | None,
    layer: int | None,
    what: str,
    silent: Callable[[], tuple[int, ...]] = _nobody,
) -> Iterator[None]:
    """torch reports everything about a group or a store as a RuntimeError. Its traceback would keep sockets open."""
    try:
        yield
    except RuntimeError as error:
        reason = _SOURCE_PLACE.sub("", first_line(error))
        raise WorldError(
            reason,
            rank=rank,
            size=size,
            step=step,
            layer=layer,
            what=what,
            timed_out="timed out" in reason.lower(),
            silent=silent(),
        ) from None


def _await_all(store: PrefixStore, rank: int, size: int, timeout_s: float, stop: threading.Event | None) -> None:
    """Waits here, where it can be stopped, and not in the group's constructor, where it cannot."""
    store.set(f"rank {rank}", "here")
    missing = [f"rank {other}" for other in range(size)]
    deadline = time.monotonic() + timeout_s
    while missing:
        if stop is not None and stop.is_set():
            raise RuntimeError("stopped")
        if time.monotonic() > deadline:
            raise RuntimeError(f"timed out after {timeout_s:g} s without {', '.join(missing)}")
        try:
            store.wait(missing, timedelta(seconds=_WAIT_SLICE_S))
            missing = []
        except DistError:
            missing = [mark for mark in missing if not store.check([mark])]
