from __future__ import annotations

import pytest

from actors.reports import EncoderInfo
from actors.types import Grid, MediaKind, PromptMedia
from cluster.registry import EncoderEntry
from cluster.router import encoders as module
from cluster.router.encoders import EncoderBook, patches_of


def entry(name: str, queued: int = 0) -> EncoderEntry:
    info = EncoderInfo(encoder_id=name, incarnation=name, address=name, fingerprint="f", dtype="float32")
    return EncoderEntry(info=info, queued_patches=queued)


def item(*keys: bytes, frames: int = 1) -> PromptMedia:
    kind = MediaKind.IMAGE if frames == 1 else MediaKind.VIDEO
    return PromptMedia(kind=kind, offset=0, grid=Grid(frames, 4, 6), content_keys=keys)


def test_patches_are_counted_once_per_distinct_unit() -> None:
    film = item(b"f", b"g", frames=4)
    assert patches_of([item(b"a"), item(b"b"), item(b"a"), film]) == (
        (b"a", 24),
        (b"b", 24),
        (b"f", 48),
        (b"g", 48),
    )


def test_what_was_encoded_is_known_where_it_was() -> None:
    book, entries = EncoderBook(), [entry("v1"), entry("v2", queued=30)]
    with book.encoding("v1", [(b"a", 24), (b"b", 24)]):
        first, second = book.views(entries)
        assert (first.queued_patches, second.queued_patches) == (48, 30), "what is under way counts at once"
        assert not first.known_units
        with book.encoding("v2", [(b"a", 24)]):
            assert book.views(entries)[1].queued_patches == 30, "what it reported may contain it"
    first, second = book.views(entries)
    assert set(first.known_units) == {b"a", b"b"} and set(second.known_units) == {b"a"}
    assert (first.queued_patches, second.queued_patches) == (0, 30)
    with book.encoding("v1", [(b"a", 24), (b"c", 24)]):
        assert book.views(entries)[0].queued_patches == 24, "of what it has already nothing is computed"


def test_an_encoding_that_failed_leaves_nothing() -> None:
    book = EncoderBook()
    with pytest.raises(RuntimeError), book.encoding("v1", [(b"a", 24)]):
        raise RuntimeError
    (found,) = book.views([entry("v1")])
    assert not found.known_units and found.queued_patches == 0


def test_encoders_that_left_are_forgotten_and_the_oldest_units_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_UNITS", 2)
    book = EncoderBook()
    for key in (b"a", b"b", b"a", b"c"):
        with book.encoding("v1", [(key, 1)]):
            pass
    (found,) = book.views([entry("v1")])
    assert set(found.known_units) == {b"a", b"c"}
    book.views([])
    (found,) = book.views([entry("v1")])
    assert not found.known_units
