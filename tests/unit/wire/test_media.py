from __future__ import annotations

from actors.types import Grid, MediaKind, PromptMedia
from actors.wire.media import MediaUnit, embedding_key, units_of


def test_units_of_a_prompt_come_in_order_with_their_own_grids() -> None:
    media = (
        PromptMedia(kind=MediaKind.VIDEO, offset=3, grid=Grid(4, 4, 6), content_keys=(b"a", b"b")),
        PromptMedia(kind=MediaKind.IMAGE, offset=30, grid=Grid(1, 2, 2), content_keys=(b"c",)),
    )
    assert units_of(media) == (
        MediaUnit(content_key=b"a", grid=Grid(2, 4, 6)),
        MediaUnit(content_key=b"b", grid=Grid(2, 4, 6)),
        MediaUnit(content_key=b"c", grid=Grid(1, 2, 2)),
    )


def test_embedding_keys_differ_by_content_weights_and_dtype() -> None:
    keys = {
        embedding_key(content, weights, dtype)
        for content in (b"1" * 32, b"2" * 32)
        for weights in (b"v" * 32, b"w" * 32)
        for dtype in ("float32", "bfloat16")
    }
    assert len(keys) == 8 and {len(key) for key in keys} == {32}
    assert embedding_key(b"ab", b"c", "d") != embedding_key(b"a", b"bc", "d")
