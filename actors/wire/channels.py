"""gRPC channels and servers between our own parts: one set of options for all."""

from __future__ import annotations

import grpc.aio

MAX_MESSAGE_BYTES = 64 << 20
"""A prompt of 131072 ids and its media spans stay far below; bulk bytes travel in chunks of at most 1 MB."""

_OPTIONS = [
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 3_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    ("grpc.enable_http_proxy", 0),
]


def open_channel(address: str) -> grpc.aio.Channel:
    """Opens a channel to ``host:port``; also an async context manager."""
    return grpc.aio.insecure_channel(address, options=_OPTIONS)


def node_address() -> str:
    """This node's address as Ray knows it."""
    import ray.util  # here: only a replica needs it, and it is slow to import

    return str(ray.util.get_node_ip_address())  # type: ignore[no-untyped-call]


def make_server() -> grpc.aio.Server:
    """Makes a server without ports; see ``bind``."""
    return grpc.aio.server(
        options=[
            *_OPTIONS,
            ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
            ("grpc.so_reuseport", 0),
        ]
    )


def bind(server: grpc.aio.Server, host: str) -> str:
    """Gives a server a free port of ``host``; returns the address ``host:port``, an IPv6 host in brackets."""
    shown = f"[{host}]" if ":" in host else host
    return f"{shown}:{server.add_insecure_port(f'{shown}:0')}"
