"""Bytes of a media source: as sent, out of a ``data:`` URI, or fetched from a host the deployment allows.

A fetch goes to one resolved address: the address that was checked is the address that is used, so a name cannot point
elsewhere between the two; the certificate is still that of the name. Private, loopback and link-local addresses are
refused unless they lie in a network that the deployment opens, or are themselves on the list of hosts: no name there
opens them. Every redirect is checked again, one time bounds all of it. ``file:`` is refused whatever the list says.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import ipaddress
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.cookiejar import CookieJar, DefaultCookiePolicy
from urllib.parse import unquote_to_bytes

import httpx

from actors.errors import InvalidRequest, MediaTooLarge, MediaUnreadable
from actors.processing.fetch_transport import FetchTransport, trusted_authorities
from actors.types import MediaSource

_MAX_REDIRECTS = 5
_REDIRECTS = frozenset((301, 302, 303, 307, 308))
_FLAG = "--allowed-media-domains"
_NETWORKS_FLAG = "--allowed-media-networks"
_RESOLVERS = 8
"""Names looked up at once; the system's resolver knows no deadline, so it runs apart."""
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
_GLOBAL_UNICAST = ipaddress.IPv6Network("2000::/3")

Resolve = Callable[[str, int], list[str]]


def resolve_host(host: str, port: int) -> list[str]:
    """Addresses of a host, in the system's order. Raises OSError."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


class MediaFetcher:
    """Safe for use from many threads. ``transport``, ``resolve`` and ``clock`` are seams for tests."""

    def __init__(
        self,
        allowed_domains: tuple[str, ...],
        timeout_s: float,
        allowed_networks: tuple[str, ...] = (),
        *,
        transport: httpx.BaseTransport | None = None,
        resolve: Resolve = resolve_host,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._allowed = tuple(_normal_host(domain) for domain in allowed_domains)
        self._networks = tuple(ipaddress.ip_network(network) for network in allowed_networks)
        self._timeout_s = timeout_s
        self._resolve = resolve
        self._resolvers = ThreadPoolExecutor(_RESOLVERS, thread_name_prefix="resolve")
        self._clock = clock
        self._client = httpx.Client(
            transport=transport or FetchTransport(trusted_authorities()),
            follow_redirects=False,
            # A proxy would resolve the name itself, past the address check.
            trust_env=False,
            # Requests share nothing.
            cookies=CookieJar(DefaultCookiePolicy(allowed_domains=())),
        )

    def close(self) -> None:
        self._client.close()
        self._resolvers.shutdown(wait=False, cancel_futures=True)

    def read(self, source: MediaSource, limit: int, field: str, check: Callable[[], None]) -> bytes:
        """At most ``limit`` bytes.

        Raises MediaTooLarge over the limit; MediaUnreadable for a malformed URI; InvalidRequest when fetching is not
        allowed or fails. Each names ``field``.
        """
        if (source.content is None) == (source.uri is None):
            raise InvalidRequest("media needs either content or a URI", field=field)
        if source.content is not None:
            _check_size(len(source.content), limit, field)
            return source.content
        uri = (source.uri or "").strip()
        scheme = uri.partition(":")[0].lower() if ":" in uri else ""
        if scheme == "data":
            return _decode_data_uri(uri, limit, field)
        if scheme in ("http", "https"):
            return self._fetch(uri, limit, field, check)
        if scheme == "file":
            raise InvalidRequest("file: URIs are never read", reason="MEDIA_NOT_ALLOWED", field=field)
        raise InvalidRequest(
            "media URIs must start with data:, http: or https:", reason="MEDIA_NOT_ALLOWED", field=field
        )

    def _fetch(self, uri: str, limit: int, field: str, check: Callable[[], None]) -> bytes:
        deadline = self._clock() + self._timeout_s
        try:
            url = httpx.URL(uri)
            for _ in range(_MAX_REDIRECTS + 1):
                with self._open(url, deadline, field) as response:
                    if response.status_code not in _REDIRECTS:
                        return self._body(response, limit, deadline, field, check)
                    url = url.join(response.headers.get("location", ""))
        except httpx.InvalidURL as error:
            raise InvalidRequest(f"not a URL: {error}", field=field) from error
        except httpx.TimeoutException:
            raise self._late(field) from None
        except (httpx.HTTPError, OSError, UnicodeError) as error:
            # UnicodeError: a host name that no name server could be asked for.
            raise _failed(f"media could not be fetched: {str(error) or type(error).__name__}", field) from error
        raise _failed(f"media could not be fetched: more than {_MAX_REDIRECTS} redirects", field)

    @contextlib.contextmanager
    def _open(self, url: httpx.URL, deadline: float, field: str) -> Iterator[httpx.Response]:
        if url.scheme not in ("http", "https"):
            raise InvalidRequest(f"redirect to {url.scheme}: is refused", reason="MEDIA_NOT_ALLOWED", field=field)
        if url.userinfo:
            raise InvalidRequest("media URLs must not carry a user name", reason="MEDIA_NOT_ALLOWED", field=field)
        address = self._address(url, deadline, field)
        request = self._client.build_request(
            "GET",
            url.copy_with(host=address),
            headers={"Host": url.netloc.decode("ascii"), "Accept-Encoding": "identity"},
            timeout=self._left(deadline, field),
            extensions={"sni_hostname": url.raw_host.decode("ascii")},
        )
        response = self._client.send(request, stream=True)
        try:
            yield response
        finally:
            response.close()

    def _left(self, deadline: float, field: str) -> float:
        left = deadline - self._clock()
        if left <= 0:
            raise self._late(field)
        return left

    def _late(self, field: str) -> InvalidRequest:
        return _failed(f"media could not be fetched within {self._timeout_s:g} s", field)

    def _address(self, url: httpx.URL, deadline: float, field: str) -> str:
        host = _normal_host(url.host)
        exact = host in self._allowed
        if not exact and not any(_covers(domain, host) for domain in self._allowed):
            raise InvalidRequest(
                f"media from {host or 'an unnamed host'} is refused: the host is not in {_FLAG}",
                reason="MEDIA_NOT_ALLOWED",
                field=field,
            )
        search = self._resolvers.submit(self._resolve, host, url.port or (443 if url.scheme == "https" else 80))
        try:
            addresses = search.result(self._left(deadline, field))
        except TimeoutError:
            raise self._late(field) from None
        if not addresses:
            raise _failed(f"media could not be fetched: {host} has no address", field)
        literal = exact and _is_address(host)
        if not literal and not all(self._may_reach(address) for address in addresses):
            raise InvalidRequest(
                f"media from {host} is refused: its address is private and not in {_NETWORKS_FLAG}",
                reason="MEDIA_NOT_ALLOWED",
                field=field,
            )
        return addresses[0].partition("%")[0]

    def _may_reach(self, address: str) -> bool:
        found = ipaddress.ip_address(address.partition("%")[0])
        return _is_public(address) or any(found in network for network in self._networks)

    def _body(
        self, response: httpx.Response, limit: int, deadline: float, field: str, check: Callable[[], None]
    ) -> bytes:
        if response.status_code != httpx.codes.OK:
            raise _failed(f"media could not be fetched: the host answered {response.status_code}", field)
        coding = response.headers.get("content-encoding", "").strip().lower()
        if coding not in ("", "identity"):
            # Unpacked, one small chunk may be gigabytes.
            raise _failed(f"media could not be fetched: the host sent it in encoding {coding[:40]!r}, unasked", field)
        announced = response.headers.get("content-length", "")
        if announced.isdecimal():
            _check_size(int(announced), limit, field)
        body = bytearray()
        for chunk in response.iter_bytes():
            check()
            body += chunk
            _check_size(len(body), limit, field)
            if self._clock() > deadline:
                raise self._late(field)
        return bytes(body)


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _is_public(address: str) -> bool:
    """Whether an address, or the version 4 address that it stands for, belongs to the public internet."""
    found = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(found, ipaddress.IPv6Address):
        translated = ipaddress.IPv4Address(int(found) & 0xFFFFFFFF) if found in _NAT64 else None
        inner = found.ipv4_mapped or found.sixtofour or translated
        if inner is None and found not in _GLOBAL_UNICAST:
            return False
        found = inner or found
    return found.is_global and not found.is_multicast


def _decode_data_uri(uri: str, limit: int, field: str) -> bytes:
    head, comma, body = uri[len("data:") :].partition(",")
    if not comma:
        raise MediaUnreadable("data: URI has no comma", field=field)
    if head.lower().endswith(";base64"):
        text = "".join(body.split())
        if "%" in text:
            text = unquote_to_bytes(text).decode("ascii", "replace")
        _check_size(len(text) // 4 * 3 - text[-2:].count("="), limit, field)
        try:
            return base64.b64decode(text, validate=True)
        except (binascii.Error, ValueError) as error:
            raise MediaUnreadable("data: URI is not valid base64", field=field) from error
    content = unquote_to_bytes(body)
    _check_size(len(content), limit, field)
    return content


def _check_size(size: int, limit: int, field: str) -> None:
    if size > limit:
        raise MediaTooLarge(f"media of {size} bytes or more is over the limit of {limit} bytes", field=field)


def _failed(message: str, field: str) -> InvalidRequest:
    return InvalidRequest(message, reason="MEDIA_UNREACHABLE", field=field)


def _normal_host(host: str) -> str:
    return host.strip().lower().rstrip(".").removeprefix("[").removesuffix("]")


def _covers(domain: str, host: str) -> bool:
    if domain == "*":
        return bool(host)
    return domain.startswith("*.") and host.endswith(domain[1:])
