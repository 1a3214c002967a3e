from __future__ import annotations

import base64
import http.server
import ipaddress
import threading
from collections.abc import Iterator

import httpx
import pytest

from actors.errors import InvalidRequest, MediaTooLarge, MediaUnreadable, RequestCancelled
from actors.processing.fetch import MediaFetcher, Resolve, resolve_host
from actors.types import MediaSource

FIELD = "messages[0].content[0].image_url"
BODY = b"picture bytes"
PUBLIC, PRIVATE = "93.184.216.34", "10.0.0.7"
NAMES = {
    "media.example.com": PUBLIC,
    "other.example.com": PUBLIC,
    "inside.example.com": PRIVATE,
    "evil.example.net": PUBLIC,
    "localhost": "127.0.0.1",
    "127.0.0.1": "127.0.0.1",
    "169.254.169.254": "169.254.169.254",
    "six.example.com": "2606:2800:220:1::1",
    "::1": "::1",
    "mapped.example.com": "::ffff:10.0.0.7",
    "shared.example.com": "::ffff:100.64.0.1",
    "translated.example.com": "64:ff9b::a9fe:a9fe",
    "tunnelled.example.com": "2002:a00:7::1",
    "compatible.example.com": "::127.0.0.1",
    "site.example.com": "fec0::1",
    "multicast.example.com": "224.0.0.1",
    "dns64.example.com": "64:ff9b::5db8:d822",
}


class Web:
    """Answers requests and remembers them."""

    def __init__(self, *answers: httpx.Response) -> None:
        self.answers = list(answers) or [httpx.Response(200, content=BODY)]
        self.seen: list[httpx.Request] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.seen.append(request)
        return self.answers[min(len(self.seen), len(self.answers)) - 1]


def resolve(host: str, port: int) -> list[str]:
    if host not in NAMES:
        raise OSError("Name or service not known")
    return [NAMES[host]]


def read(
    uri: str,
    *allowed: str,
    web: Web | None = None,
    limit: int = 1000,
    resolver: Resolve = resolve,
    networks: tuple[str, ...] = (),
) -> bytes:
    fetcher = MediaFetcher(allowed, 5.0, networks, transport=httpx.MockTransport(web or Web()), resolve=resolver)
    try:
        return fetcher.read(MediaSource(uri=uri), limit, FIELD, lambda: None)
    finally:
        fetcher.close()


def refused(
    uri: str,
    *allowed: str,
    web: Web | None = None,
    reason: str = "MEDIA_NOT_ALLOWED",
    resolver: Resolve | None = None,
    networks: tuple[str, ...] = (),
) -> InvalidRequest:
    web = web or Web()
    with pytest.raises(InvalidRequest) as caught:
        read(uri, *allowed, web=web, resolver=resolver or resolve, networks=networks)
    assert caught.value.field == FIELD
    assert caught.value.reason == reason
    return caught.value


def test_content_as_is() -> None:
    fetcher = MediaFetcher((), 5.0)
    assert fetcher.read(MediaSource(content=BODY), 1000, FIELD, lambda: None) == BODY
    with pytest.raises(MediaTooLarge, match="limit of 5 bytes"):
        fetcher.read(MediaSource(content=BODY), 5, FIELD, lambda: None)
    with pytest.raises(InvalidRequest):
        fetcher.read(MediaSource(), 5, FIELD, lambda: None)


@pytest.mark.parametrize(
    "uri",
    [
        "data:image/png;base64," + base64.b64encode(BODY).decode(),
        "DATA:;base64," + base64.b64encode(BODY).decode(),
        "data:image/png;base64,cGljdHVyZSBi\neXRlcw==",
        "data:text/plain,picture%20bytes",
        "data:image/png;base64,cGljdHVyZSBieXRlcw%3D%3D",
    ],
)
def test_data_uri(uri: str) -> None:
    assert read(uri) == BODY


def test_bad_data_uri() -> None:
    for uri in ("data:image/png;base64", "data:image/png;base64,@@@@", "data:image/png;base64,abc"):
        with pytest.raises(MediaUnreadable):
            read(uri)
    with pytest.raises(MediaTooLarge, match="10 bytes"):
        read("data:;base64," + base64.b64encode(BODY).decode(), limit=10)


@pytest.mark.parametrize("uri", ["file:///etc/passwd", "FILE:/etc/passwd", " file:///etc/passwd"])
def test_file_is_never_read(uri: str) -> None:
    assert "file:" in refused(uri, "*").message


@pytest.mark.parametrize("uri", ["ftp://media.example.com/a", "/etc/passwd", "gopher:x", "", "media.example.com/a"])
def test_other_schemes(uri: str) -> None:
    refused(uri, "*")


def test_host_must_be_listed_and_the_refusal_names_the_flag() -> None:
    web = Web()
    error = refused("https://media.example.com/a.png", web=web)
    assert "--allowed-media-domains" in error.message
    assert "media.example.com" in error.message
    refused("https://evil.example.net/?x=media.example.com", "media.example.com", web=web)
    refused("https://media.example.com.evil.example.net/", "media.example.com", web=web)
    refused("https://media.example.com@evil.example.net/", "media.example.com", web=web)
    refused("https://user:secret@media.example.com/", "media.example.com", web=web)
    assert not web.seen


def test_listed_host_is_fetched_at_the_checked_address() -> None:
    web = Web()
    assert read("https://Media.Example.com:8443/a.png?b=1", "media.example.com", web=web) == BODY
    (request,) = web.seen
    assert request.url == f"https://{PUBLIC}:8443/a.png?b=1"
    assert request.headers["host"] == "media.example.com:8443"
    assert request.headers["accept-encoding"] == "identity"
    assert request.extensions["sni_hostname"] == "media.example.com"


def test_wildcards() -> None:
    assert read("http://media.example.com/", "*.example.com") == BODY
    assert read("http://media.example.com./", "media.example.com") == BODY
    assert read("http://evil.example.net/", "*") == BODY
    refused("http://evil.example.net/", "*.example.com")
    refused("http://example.com/", "*.example.com")


@pytest.mark.parametrize(
    "host",
    [
        "localhost",
        "127.0.0.1",
        "inside.example.com",
        "169.254.169.254",
        "[::1]",
        "mapped.example.com",
        "shared.example.com",
        "translated.example.com",
        "tunnelled.example.com",
        "compatible.example.com",
        "site.example.com",
        "multicast.example.com",
    ],
)
def test_private_addresses_need_their_network_or_to_be_listed_themselves(host: str) -> None:
    web = Web()
    refusal = refused(f"http://{host}/", "*", "*.example.com", web=web).message
    assert "private" in refusal and "--allowed-media-networks" in refusal
    literal = not host[0].isalpha()
    if literal:
        assert read(f"http://{host}/", host) == BODY
    else:
        refused(f"http://{host}/", host, web=web)
    assert not web.seen
    address = ipaddress.ip_address(NAMES[host.strip("[]")])
    opened = str(ipaddress.ip_network(f"{address}/{'8' if address.version == 4 else '64'}", strict=False))
    assert read(f"http://{host}/", "*", networks=(opened,)) == BODY
    refused(f"http://{host}/", "*", web=web, networks=("192.168.0.0/16", "fd00::/8"))


def test_redirects_are_checked_again() -> None:
    def hop(location: str) -> httpx.Response:
        return httpx.Response(302, headers={"location": location})

    web = Web(hop("https://other.example.com/b"), hop("/c"), httpx.Response(200, content=BODY))
    assert read("https://media.example.com/a", "*.example.com", web=web) == BODY
    assert [request.headers["host"] for request in web.seen] == [
        "media.example.com",
        "other.example.com",
        "other.example.com",
    ]
    assert web.seen[-1].url.path == "/c"
    for location in (
        "https://evil.example.net/",
        "http://169.254.169.254/latest/meta-data",
        "http://inside.example.com/",
        "file:///etc/passwd",
        "https://user@other.example.com/",
    ):
        refused("https://media.example.com/a", "*.example.com", web=Web(hop(location)))
    refused("https://media.example.com/a", "*.example.com", web=Web(hop("/a")), reason="MEDIA_UNREACHABLE")


def test_byte_cap_holds_while_streaming() -> None:
    taken = 0

    def endless() -> object:
        nonlocal taken
        while True:
            taken += 1
            yield b"x" * 100

    class Endless(httpx.SyncByteStream):
        def __iter__(self) -> object:  # type: ignore[override]
            return endless()

    with pytest.raises(MediaTooLarge, match="1000 bytes"):
        read("http://media.example.com/", "media.example.com", web=Web(httpx.Response(200, stream=Endless())))
    assert taken <= 12
    announced = httpx.Response(200, headers={"content-length": "5000"}, stream=Endless())
    taken = 0
    with pytest.raises(MediaTooLarge):
        read("http://media.example.com/", "media.example.com", web=Web(announced))
    assert taken == 0


def test_time_and_the_caller_end_a_fetch() -> None:
    now = 0.0

    class Slow(httpx.SyncByteStream):
        def __iter__(self) -> Iterator[bytes]:
            nonlocal now
            for _ in range(100):
                now += 1.0
                yield b"x"

    def gone() -> None:
        if now > 3:
            raise RequestCancelled("gone")

    web = Web(httpx.Response(200, stream=Slow()))
    fetcher = MediaFetcher(("*",), 5.0, transport=httpx.MockTransport(web), resolve=resolve, clock=lambda: now)
    source = MediaSource(uri="http://media.example.com/")
    with pytest.raises(InvalidRequest, match="within 5 s"):
        fetcher.read(source, 1000, FIELD, lambda: None)
    assert now == 6
    now = 0.0
    web.answers = [httpx.Response(200, stream=Slow())]
    with pytest.raises(RequestCancelled):
        fetcher.read(source, 1000, FIELD, gone)
    assert now == 4

    def late(request: httpx.Request) -> httpx.Response:
        nonlocal now
        now += 5.0
        return httpx.Response(302, headers={"location": "/next"})

    now = 0.0
    hops = MediaFetcher(("*",), 5.0, transport=httpx.MockTransport(late), resolve=resolve, clock=lambda: now)
    with pytest.raises(InvalidRequest, match="within 5 s"):
        hops.read(source, 1000, FIELD, lambda: None)
    assert now == 5


def test_packed_bodies_are_refused_unread() -> None:
    """A few layers of gzip make gigabytes of one chunk."""

    class Body(httpx.SyncByteStream):
        def __iter__(self) -> Iterator[bytes]:
            raise AssertionError("the body was read")

    packed = httpx.Response(200, headers={"content-encoding": "gzip, gzip"}, stream=Body())
    error = refused("http://media.example.com/", "*", web=Web(packed), reason="MEDIA_UNREACHABLE")
    assert "gzip, gzip" in error.message
    plain = httpx.Response(200, headers={"content-encoding": "Identity"}, content=BODY)
    assert read("http://media.example.com/", "*", web=Web(plain)) == BODY


def test_failures_of_the_host() -> None:
    assert (
        "404"
        in refused("http://media.example.com/", "*", web=Web(httpx.Response(404)), reason="MEDIA_UNREACHABLE").message
    )
    refused("http://unknown.example.com/", "*", reason="MEDIA_UNREACHABLE")

    def broken(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectTimeout("too slow")

    refused("http://media.example.com/", "*", web=broken, reason="MEDIA_UNREACHABLE")  # type: ignore[arg-type]
    refused("http://[::bad/", "*", reason="INVALID_FIELD")
    refused(f"http://{'a' * 80}.example.com/", "*", reason="MEDIA_UNREACHABLE", resolver=resolve_host)


def test_addresses_of_version_six() -> None:
    web = Web()
    assert read("http://six.example.com/a", "*", web=web) == BODY
    assert web.seen[0].url == "http://[2606:2800:220:1::1]/a"
    assert web.seen[0].headers["host"] == "six.example.com"
    assert read("http://dns64.example.com/a", "*") == BODY


def test_a_slow_resolver_is_not_waited_for() -> None:
    asked = threading.Event()

    def hang(host: str, port: int) -> list[str]:
        asked.wait(30)
        return [PUBLIC]

    fetcher = MediaFetcher(("*",), 0.05, transport=httpx.MockTransport(Web()), resolve=hang)
    with pytest.raises(InvalidRequest, match=r"within 0\.05 s"):
        fetcher.read(MediaSource(uri="http://media.example.com/"), 100, FIELD, lambda: None)
    asked.set()
    fetcher.close()


def test_requests_share_no_cookies() -> None:
    web = Web(httpx.Response(200, headers={"set-cookie": "who=first; Path=/"}, content=BODY))
    fetcher = MediaFetcher(("*",), 5.0, transport=httpx.MockTransport(web), resolve=resolve)
    for _ in range(2):
        fetcher.read(MediaSource(uri="http://media.example.com/"), 100, FIELD, lambda: None)
    assert [request.headers.get("cookie") for request in web.seen] == [None, None]


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        if self.path == "/moved":
            self.send_response(301)
            self.send_header("Location", "/picture")
            self.end_headers()
            return
        self.send_response(200)
        self.end_headers()
        self.wfile.write(f"{self.headers['Host']} {self.path}".encode())

    def log_message(self, *args: object) -> None:
        pass


def test_over_a_real_socket(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")  # would be asked in place of the host
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        fetcher = MediaFetcher(("127.0.0.1",), 5.0)
        try:
            port = server.server_address[1]
            body = fetcher.read(MediaSource(uri=f"http://127.0.0.1:{port}/moved"), 100, FIELD, lambda: None)
            assert body == f"127.0.0.1:{port} /picture".encode()
        finally:
            fetcher.close()
            server.shutdown()
            thread.join()
    closed = MediaFetcher(("127.0.0.1",), 5.0)
    with pytest.raises(InvalidRequest, match="could not be fetched"):
        closed.read(MediaSource(uri=f"http://127.0.0.1:{port}/"), 100, FIELD, lambda: None)
