"""Fetches over TLS from a local server that stands for the media host of the model cards."""

from __future__ import annotations

import contextlib
import http.server
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import httpcore
import pytest
import trustme

from actors.errors import InvalidRequest, MediaTooLarge
from actors.processing.fetch import MediaFetcher
from actors.processing.fetch_transport import FetchTransport
from actors.types import MediaSource

HOST = "paddlenlp.bj.bcebos.com"
URL = f"https://{HOST}/datasets/paddlemix/demo_images/example1.jpg"
FIELD = "messages[0].content[0].image_url"
LOOPBACK = ("127.0.0.0/8",)
AUTHORITY = trustme.CA()


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.server.seen.append((self.headers["Host"], self.path))  # type: ignore[attr-defined]
        if self.path.startswith("/to/"):
            self.send_response(302)
            self.send_header("Location", f"https://{self.path.removeprefix('/to/')}")
            self.end_headers()
            return
        self.send_response(200)
        self.end_headers()
        with contextlib.suppress(OSError):
            for _ in range(10_000 if self.path == "/endless" else 1):
                self.wfile.write(b"picture " * 16)

    def log_message(self, *args: object) -> None:
        pass


@dataclass
class Site:
    """A server with a certificate for ``HOST``, and a fetcher whose names and ports lead to it."""

    port: int
    seen: list[tuple[str, str]]
    addresses: dict[str, list[str]] = field(default_factory=lambda: {HOST: ["127.0.0.1"]})
    connected: list[str] = field(default_factory=list)
    resolved: list[str] = field(default_factory=list)

    def resolve(self, host: str, port: int) -> list[str]:
        assert port == 443
        self.resolved.append(host)
        return self.addresses[host]

    def read(
        self,
        url: str = URL,
        *allowed: str,
        networks: tuple[str, ...] = LOOPBACK,
        limit: int = 1000,
        timeout: float = 20,
    ) -> bytes:
        authorities = ssl.create_default_context()
        AUTHORITY.configure_trust(authorities)
        fetcher = MediaFetcher(
            allowed or (HOST,),
            timeout,
            networks,
            transport=FetchTransport(authorities, Rerouted(self)),
            resolve=self.resolve,
        )
        try:
            return fetcher.read(MediaSource(uri=url), limit, FIELD, lambda: None)
        finally:
            fetcher.close()


class Rerouted(httpcore.SyncBackend):
    """Port 443 of any address is the local server's."""

    def __init__(self, site: Site) -> None:
        self._site = site

    def connect_tcp(self, host: str, port: int, *args: object, **options: object) -> httpcore.NetworkStream:
        self._site.connected.append(f"{host}:{port}")
        return super().connect_tcp("127.0.0.1", self._site.port, *args, **options)  # type: ignore[arg-type]


@pytest.fixture
def site() -> Iterator[Site]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.seen = []  # type: ignore[attr-defined]
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        AUTHORITY.issue_cert(HOST).configure_cert(context)
        server.socket = context.wrap_socket(server.socket, server_side=True)
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield Site(server.server_address[1], server.seen)  # type: ignore[attr-defined]
        server.shutdown()
        thread.join()


def refused(read: Callable[[], bytes], reason: str, said: str) -> None:
    with pytest.raises(InvalidRequest, match=said) as caught:
        read()
    assert (caught.value.reason, caught.value.field) == (reason, FIELD)


def test_a_picture_of_the_cards_comes_from_the_address_that_was_checked(site: Site) -> None:
    assert site.read() == b"picture " * 16
    assert site.connected == ["127.0.0.1:443"], "the name is never looked up again"
    assert site.resolved == [HOST]
    assert site.seen == [(HOST, "/datasets/paddlemix/demo_images/example1.jpg")]


def test_private_networks_are_closed_unless_opened(site: Site) -> None:
    refused(lambda: site.read(networks=()), "MEDIA_NOT_ALLOWED", "--allowed-media-networks")
    refused(lambda: site.read(networks=("10.0.0.0/8",)), "MEDIA_NOT_ALLOWED", "its address is private")
    site.addresses[HOST] = ["93.184.216.34", "127.0.0.1"]
    refused(lambda: site.read(networks=()), "MEDIA_NOT_ALLOWED", "its address is private")
    assert not site.connected


def test_the_certificate_must_be_that_of_the_name(site: Site) -> None:
    site.addresses["other.example.com"] = ["127.0.0.1"]
    refused(lambda: site.read("https://other.example.com/a.jpg", "*"), "MEDIA_UNREACHABLE", "certificate")
    assert not site.seen
    stranger = MediaFetcher(
        (HOST,),
        20,
        LOOPBACK,
        transport=FetchTransport(ssl.create_default_context(), Rerouted(site)),
        resolve=site.resolve,
    )
    refused(lambda: stranger.read(MediaSource(uri=URL), 1000, FIELD, lambda: None), "MEDIA_UNREACHABLE", "certificate")
    stranger.close()


def test_every_redirect_is_checked_again(site: Site) -> None:
    assert site.read(f"https://{HOST}/to/{HOST}/there") == b"picture " * 16
    assert site.resolved == [HOST, HOST]
    site.addresses["inside.bcebos.com"] = ["10.0.0.7"]
    refused(lambda: site.read(f"https://{HOST}/to/inside.bcebos.com/a"), "MEDIA_NOT_ALLOWED", "--allowed-media-domains")
    inside = lambda: site.read(f"https://{HOST}/to/inside.bcebos.com/a", "*.bcebos.com", "*.bj.bcebos.com")  # noqa: E731
    refused(inside, "MEDIA_NOT_ALLOWED", "its address is private")
    assert all(connected == "127.0.0.1:443" for connected in site.connected)


def test_a_name_that_moves_between_two_hops_is_checked_where_it_leads(site: Site) -> None:
    answers = [["127.0.0.1"], ["169.254.169.254"]]
    site.resolve = lambda host, port: answers.pop(0)  # type: ignore[method-assign]
    refused(lambda: site.read(f"https://{HOST}/to/{HOST}/there"), "MEDIA_NOT_ALLOWED", "its address is private")


def test_size_is_bounded_while_it_streams(site: Site) -> None:
    with pytest.raises(MediaTooLarge, match="1000 bytes"):
        site.read(f"https://{HOST}/endless")


def test_headers_that_never_end_are_cut_off() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        stop = threading.Event()

        def trickle() -> None:
            connection, _ = listener.accept()
            with connection, contextlib.suppress(OSError):
                connection.sendall(b"HTTP/1.1 200 OK\r\n")
                while not stop.wait(0.05):
                    connection.sendall(b"X: y\r\n")

        thread = threading.Thread(target=trickle)
        thread.start()
        fetcher = MediaFetcher(("127.0.0.1",), 0.5)
        source = MediaSource(uri=f"http://127.0.0.1:{listener.getsockname()[1]}/")
        begun = time.monotonic()
        refused(lambda: fetcher.read(source, 1000, FIELD, lambda: None), "MEDIA_UNREACHABLE", r"within 0\.5 s")
        assert time.monotonic() - begun < 20
        stop.set()
        thread.join()
        fetcher.close()
