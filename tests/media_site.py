"""A local HTTPS server that stands for the media host of the model cards, with an authority made here."""

from __future__ import annotations

import contextlib
import http.server
import ssl
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field

import httpcore
import trustme

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
        content = self.server.files.get(self.path, b"picture " * 16)  # type: ignore[attr-defined]
        with contextlib.suppress(OSError):
            for _ in range(10_000 if self.path == "/endless" else 1):
                self.wfile.write(content)

    def log_message(self, *args: object) -> None:
        pass


@dataclass
class Site:
    """A server with a certificate for ``HOST``, and a fetcher whose names and ports lead to it."""

    port: int
    seen: list[tuple[str, str]]
    files: dict[str, bytes]
    addresses: dict[str, list[str]] = field(default_factory=lambda: {HOST: ["127.0.0.1"]})
    connected: list[str] = field(default_factory=list)
    resolved: list[str] = field(default_factory=list)

    def resolve(self, host: str, port: int) -> list[str]:
        assert port == 443
        self.resolved.append(host)
        return self.addresses[host]

    def fetcher(
        self, *allowed: str, networks: tuple[str, ...] = LOOPBACK, timeout: float = 20, trusts: bool = True
    ) -> MediaFetcher:
        authorities = ssl.create_default_context()
        if trusts:
            AUTHORITY.configure_trust(authorities)
        transport = FetchTransport(authorities, Rerouted(self))
        return MediaFetcher(allowed or (HOST,), timeout, networks, transport=transport, resolve=self.resolve)

    def read(
        self,
        url: str = URL,
        *allowed: str,
        networks: tuple[str, ...] = LOOPBACK,
        limit: int = 1000,
        trusts: bool = True,
    ) -> bytes:
        fetcher = self.fetcher(*allowed, networks=networks, trusts=trusts)
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


@contextlib.contextmanager
def media_site() -> Iterator[Site]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        site = Site(server.server_address[1], [], {})
        server.seen, server.files = site.seen, site.files  # type: ignore[attr-defined]
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        AUTHORITY.issue_cert(HOST).configure_cert(context)
        server.socket = context.wrap_socket(server.socket, server_side=True)
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield site
        finally:
            server.shutdown()
            thread.join()
