"""One end of the connection between a group's leader and another rank.

    process ends             the kernel resets the connection      known at once
    process or network still no message and no tick arrives        known after ``silence_s``, or ``serving_silence_s``

A thread reads, another ticks when nothing was sent for a while. Both live from ``start`` to ``close``.
"""

from __future__ import annotations

import os
import pickle
import socket
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from actors.engine.group.messages import Tick


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupConfig:
    """Times of a group, in seconds."""

    tick_s: float = 1.0
    """Each side says something at least so often."""
    silence_s: float = 10.0
    """A side that says nothing for so long is lost. Long enough for what may hold an interpreter while it loads."""
    serving_silence_s: float = 3.0
    """The same of a rank that may have requests, whose clients wait as long: what routers give an engine."""
    step_timeout_s: float = 120.0
    """A step that takes longer hangs."""
    join_timeout_s: float = 120.0
    """Until every rank's process has connected; loading is not part of it."""

    def __post_init__(self) -> None:
        for name in ("tick_s", "silence_s", "serving_silence_s", "step_timeout_s", "join_timeout_s"):
            if getattr(self, name) <= 0:
                raise ValueError(f"GroupConfig.{name} must be positive, got {getattr(self, name)}")
        for name in ("silence_s", "serving_silence_s"):
            if getattr(self, name) <= self.tick_s:
                raise ValueError(f"GroupConfig.{name} = {getattr(self, name)} must be more than tick_s = {self.tick_s}")


CLOSED = "the connection was closed"


class ChannelBroken(Exception):
    """Nothing can be sent any more."""


class RankChannel:
    """``send`` may be called on any thread.

    Args:
        on_message: called on the reading thread with everything but ticks, in order.
        on_broken: called at most once, on any thread, with the reason; not after ``close``.
    """

    def __init__(
        self,
        connection: Connection[Any, Any],
        config: GroupConfig,
        *,
        name: str,
        on_message: Callable[[Any], None],
        on_broken: Callable[[str], None],
    ) -> None:
        self._connection = connection
        self._socket = bound_socket(connection, config.silence_s)
        self._config = config
        self._patience_s = config.silence_s
        self._on_message = on_message
        self._on_broken = on_broken
        self._sending = threading.Lock()
        self._told = threading.Lock()
        self._over = threading.Event()
        self._quiet = threading.Event()
        """Nothing was sent since the last tick was due."""
        self._threads = [
            threading.Thread(target=self._read, name=f"{name}-read", daemon=True),
            threading.Thread(target=self._tick, name=f"{name}-tick", daemon=True),
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def be_patient(self, patient: bool) -> None:
        """Whether the other side may be silent for ``silence_s``, as at first, or only for ``serving_silence_s``."""
        self._patience_s = self._config.silence_s if patient else self._config.serving_silence_s

    def send(self, message: Any) -> int:
        """The number of bytes. Raises ChannelBroken, and tells it, if the other side is gone or does not read."""
        data = pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
        self._quiet.clear()
        try:
            with self._sending:
                self._connection.send_bytes(data)
        except OSError as error:
            reason = CLOSED if isinstance(error, ConnectionError) else f"nothing can be sent: {error}"
            self._break(reason)
            raise ChannelBroken(reason) from error
        return len(data)

    def close(self) -> None:
        """Ends the connection and the threads; the other side sees it at once. Idempotent."""
        with self._told:
            self._over.set()
        self._hang_up()
        for thread in self._threads:
            if thread.ident is not None and thread is not threading.current_thread():
                thread.join()
        self._connection.close()
        self._socket.close()

    def hang_up(self) -> None:
        """The other side is to notice that this end is lost. Any thread; ``close`` is still needed."""
        with self._told:
            self._over.set()
        self._hang_up()

    def _hang_up(self) -> None:
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass  # The other side was faster.

    def _break(self, reason: str) -> None:
        with self._told:
            if self._over.is_set():
                return
            self._over.set()
        self._on_broken(reason)

    def _read(self) -> None:
        silent_s = 0.0
        slice_s = self._config.tick_s / 2
        try:
            while not self._over.is_set():
                if not self._connection.poll(slice_s):
                    # Slices are counted, not time: where all processes stood still, nobody was silent.
                    silent_s += slice_s
                    if silent_s >= self._patience_s:
                        self._break(f"it said nothing for {self._patience_s} s")
                        return
                    continue
                silent_s = 0.0
                message = pickle.loads(self._connection.recv_bytes())
                if not isinstance(message, Tick):
                    self._on_message(message)
        except (EOFError, ConnectionError):
            self._break(CLOSED)
        except OSError as error:
            self._break(f"the connection broke: {error}")
        except Exception as error:  # nobody reads on: the other side must not be left waiting
            self._break(f"a message could not be taken: {error!r}")

    def _tick(self) -> None:
        while not self._over.wait(self._config.tick_s / 2):
            if self._quiet.is_set():
                try:
                    self.send(Tick())
                except ChannelBroken:
                    return
            self._quiet.set()


def bound_socket(connection: Connection[Any, Any], timeout_s: float) -> socket.socket:
    """The connection's own socket: small messages leave at once, and no read or write of a part blocks for longer."""
    one = socket.socket(fileno=os.dup(connection.fileno()))
    one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    span = struct.pack("ll", int(timeout_s), int(timeout_s % 1 * 1e6))
    one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, span)
    one.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, span)
    return one
