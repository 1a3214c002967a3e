"""Fetches over TLS from a local server that stands for the media host of the model cards."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from actors.errors import InvalidRequest, MediaTooLarge
from actors.processing.fetch import MediaFetcher
from actors.types import MediaSource
from tests.media_site import FIELD, HOST, Site, media_site


@pytest.fixture
def site() -> Iterator[Site]:
    with media_site() as found:
        yield found


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
    refused(lambda: site.read(trusts=False), "MEDIA_UNREACHABLE", "certificate")


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
