"""Where the ranks of a group find their leader: an address and a key that are made at run time."""

from __future__ import annotations

import contextlib
import logging
import secrets
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection, answer_challenge, deliver_challenge
from typing import Any

from actors.engine.group.channel import GroupConfig, bound_socket
from actors.engine.group.messages import Hello

log = logging.getLogger(__name__)

KEY_BYTES = 32
POLL_S = 0.1


@dataclass(frozen=True, kw_only=True, slots=True)
class Invitation:
    """What a rank's process is given at its start. Whoever has it can run code in the group: it is a secret."""

    host: str
    port: int
    size: int
    """Ranks of the group, the leader included."""
    key: bytes = field(repr=False)
    config: GroupConfig


class Meeting:
    """The leader's side, until every rank has come."""

    def __init__(self, host: str, size: int, config: GroupConfig | None = None) -> None:
        """Listens on ``host`` at a port that is free."""
        self._server = socket.create_server((host, 0), backlog=size)
        self._lock = threading.Lock()
        self._come: dict[int, Connection[Any, Any]] = {}
        self._closed = False
        port = self._server.getsockname()[1]
        self.invitation = Invitation(
            host=host, port=port, size=size, key=secrets.token_bytes(KEY_BYTES), config=config or GroupConfig()
        )

    def wait(self, check: Callable[[], None] = lambda: None) -> dict[int, Connection[Any, Any]]:
        """Connections of ranks 1 .. size - 1, once all are here; closes the meeting.

        ``check`` is called now and then and raises if a rank will not come. Raises TimeoutError naming who is missing.
        """
        expected = set(range(1, self.invitation.size))
        deadline = time.monotonic() + self.invitation.config.join_timeout_s
        self._server.settimeout(POLL_S)
        try:
            while True:
                with self._lock:
                    missing = expected - self._come.keys()
                if not missing:
                    come, self._come = self._come, {}
                    return come
                check()
                if time.monotonic() > deadline:
                    raise TimeoutError(f"ranks {sorted(missing)} did not come to {self.invitation}")
                try:
                    accepted, peer = self._server.accept()
                except TimeoutError:
                    continue
                # A stranger that says nothing must keep nobody waiting.
                threading.Thread(target=self._greet, args=(accepted, peer), name="rank-greeting", daemon=True).start()
        finally:
            self.close()

    def close(self) -> None:
        """Idempotent."""
        self._server.close()
        with self._lock:
            self._closed = True
            for connection in self._come.values():
                connection.close()
            self._come.clear()

    def _greet(self, accepted: socket.socket, peer: object) -> None:
        accepted.settimeout(None)
        connection: Connection[Any, Any] = Connection(accepted.detach())
        try:
            with contextlib.closing(bound_socket(connection, self.invitation.config.silence_s)):
                deliver_challenge(connection, self.invitation.key)
                answer_challenge(connection, self.invitation.key)
                hello = connection.recv()
            if not isinstance(hello, Hello) or not 0 < hello.rank < self.invitation.size:
                raise AuthenticationError(f"{hello} is no rank of this group")
            with self._lock:
                if self._closed or hello.rank in self._come:
                    raise AuthenticationError(f"rank {hello.rank} is here already")
                self._come[hello.rank] = connection
        except (AuthenticationError, EOFError, OSError) as error:
            log.warning("a connection from %s was refused: %s", peer, error)
            connection.close()


def join(invitation: Invitation, rank: int) -> Connection[Any, Any]:
    """A rank's side. Raises OSError or AuthenticationError if the leader is not there."""
    connection: Connection[Any, Any] = Client((invitation.host, invitation.port), authkey=invitation.key)
    connection.send(Hello(rank))
    return connection
