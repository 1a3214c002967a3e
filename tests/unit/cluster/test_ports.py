"""Ports: what counts as free, and blocks that two clusters never share."""

from __future__ import annotations

import itertools
import socket

import pytest

from cluster.ports import BLOCK_SIZE, PortBlock, can_listen, free_ports
from cluster.session import DIRECT_PORTS


def test_a_listener_that_would_share_its_port_is_seen() -> None:
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
        listener.listen()
        assert not can_listen("127.0.0.1", port)
        assert not can_listen("", port)
    assert can_listen("127.0.0.1", port)


def test_a_port_in_time_wait_is_free() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        client = socket.create_connection(("127.0.0.1", port))
        server, _ = listener.accept()
        server.close()
        client.close()
    assert can_listen("127.0.0.1", port)


def test_an_address_of_another_machine_is_refused() -> None:
    assert not can_listen("203.0.113.1", 0)


def test_blocks_do_not_overlap_and_come_back() -> None:
    blocks = [PortBlock.take() for _ in range(5)]
    firsts = sorted(block.first for block in blocks)
    assert all(high - low >= BLOCK_SIZE for low, high in itertools.pairwise(firsts))
    for block in blocks:
        block.release()


def test_a_block_with_a_busy_port_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.ports._LOWEST", 21000)
    monkeypatch.setattr("cluster.ports._ephemeral_start", lambda: 21000 + 3 * BLOCK_SIZE)
    block = PortBlock.take()
    first = block.first
    block.release()
    with socket.create_server(("127.0.0.1", first + 7)):
        other = PortBlock.take()
        assert other.first != first
        with pytest.raises(OSError, match="no block of free ports"):
            PortBlock.take()
        other.release()


def test_a_block_has_room_for_everything_serve_opens() -> None:
    assert BLOCK_SIZE >= 4 + 2 * DIRECT_PORTS


def test_free_ports_differ_and_stay_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.ports._LOWEST", 22000)
    monkeypatch.setattr("cluster.ports._ephemeral_start", lambda: 22000 + 3 * BLOCK_SIZE)
    kept: list[PortBlock] = []
    monkeypatch.setattr("cluster.ports._kept", kept)
    ports = free_ports(20) + free_ports(BLOCK_SIZE)
    assert len(set(ports)) == 20 + BLOCK_SIZE and all(can_listen("127.0.0.1", port) for port in ports)
    with pytest.raises(OSError, match="no block of free ports"):
        PortBlock.take()
    for block in kept:
        block.release()
    with pytest.raises(ValueError, match="a block has"):
        free_ports(BLOCK_SIZE + 1)
