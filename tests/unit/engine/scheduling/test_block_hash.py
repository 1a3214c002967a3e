from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.engine.scheduling.block_hash import HASH_BYTES, BlockHasher, hash_blocks
from actors.reports import KvIdentity
from actors.types import Grid, MediaKind, MediaSpan

IMAGE, VIDEO = 100, 127
IDENTITY = KvIdentity(fingerprint="ab" * 32, dtype="bfloat16", switches="original", block_size=4)


PICTURE = Grid(1, 4, 6)


def span(offset: int, grid: Grid = PICTURE, *, kind: MediaKind = MediaKind.IMAGE, picture: int = 0) -> MediaSpan:
    keys = tuple(bytes([picture, unit]) * 16 for unit in range(grid.units))
    return MediaSpan(kind=kind, offset=offset, grid=grid, embedding_keys=keys, encoder_address="")


Hashes = tuple[bytes, ...]


def hashes(ids: Sequence[int], media: Sequence[MediaSpan] = (), salt: bytes = b"", **identity: Any) -> Hashes:
    return hash_blocks(dataclasses.replace(IDENTITY, **identity), ids, media, salt)


def common(first: Sequence[bytes], second: Sequence[bytes]) -> int:
    """Length of the common prefix; everything behind it must differ, as a set."""
    count = 0
    while count < min(len(first), len(second)) and first[count] == second[count]:
        count += 1
    assert not set(first[count:]) & set(second[count:])
    return count


def test_only_whole_blocks_have_hashes() -> None:
    assert [len(hashes(range(count))) for count in (0, 3, 4, 7, 8, 9)] == [0, 0, 1, 1, 2, 2]
    assert all(len(hash) == HASH_BYTES for hash in hashes(range(40)))


def test_equal_prompts_have_equal_hashes_and_share_up_to_the_first_difference() -> None:
    first = list(range(3, 43))
    assert hashes(first) == hashes(tuple(first))
    for at in range(40):
        second = [*first[:at], 99, *first[at + 1 :]]
        assert common(hashes(first), hashes(second)) == at // 4


def test_a_block_is_another_elsewhere() -> None:
    ids = [5, 6, 7, 8] * 10
    assert len(set(hashes(ids))) == 10


@pytest.mark.parametrize(
    "changes",
    [
        {"fingerprint": "ac" + "ab" * 31},
        {"dtype": "float32"},
        {"switches": "original,other"},
        {"salt": b"tenant"},
        {"fingerprint": "ab" * 31, "dtype": "abbfloat16"},
        {"dtype": "bfloat16o", "switches": "riginal"},
        {"switches": "origina", "salt": b"l"},
    ],
)
def test_another_identity_or_tenant_shares_nothing(changes: dict[str, Any]) -> None:
    ids = range(3, 43)
    assert common(hashes(ids), hashes(ids, **changes)) == 0


def test_block_sizes_share_nothing() -> None:
    ids = range(3, 83)
    names = [set(hashes(ids, block_size=size)) for size in (1, 2, 4, 8, 16)]
    assert len(set.union(*names)) == sum(map(len, names))


def image_prompt(offset: int = 5) -> list[int]:
    return [*range(3, 3 + offset), *[IMAGE] * 6, *range(3, 20)]


def test_another_picture_of_the_same_size_differs_from_the_block_where_it_begins() -> None:
    prompt = image_prompt()
    first, second = hashes(prompt, [span(5)]), hashes(prompt, [span(5, picture=1)])
    assert common(first, second) == 1
    assert first == hashes(prompt, [span(5)])


def test_every_byte_of_the_embedding_key_counts() -> None:
    prompt = image_prompt()
    medium = span(5)
    seen = {hashes(prompt, [medium])}
    for at in range(32):
        key = bytearray(medium.embedding_keys[0])
        key[at] ^= 1
        seen.add(hashes(prompt, [dataclasses.replace(medium, embedding_keys=(bytes(key),))]))
    assert len(seen) == 33


def test_the_same_number_of_tokens_in_another_shape_differs() -> None:
    """Other pixel bounds may give as many tokens, but other positions."""
    prompt = image_prompt()
    grids = [Grid(1, 4, 6), Grid(1, 6, 4), Grid(1, 2, 12), Grid(1, 12, 2)]
    assert len({hashes(prompt, [span(5, grid)])[1] for grid in grids}) == len(grids)


def test_an_image_is_no_video_frame() -> None:
    prompt = image_prompt()
    image, video = span(5), span(5, Grid(2, 4, 6), kind=MediaKind.VIDEO)
    assert image.embedding_keys == video.embedding_keys
    assert common(hashes(prompt, [image]), hashes(prompt, [video])) == 1
    assert common(hashes(prompt, [image]), hashes(prompt, [dataclasses.replace(image, kind=MediaKind.VIDEO)])) == 1


def test_one_picture_moved_by_a_token_differs_although_a_block_of_placeholders_looks_alike() -> None:
    """The second block holds four placeholders of the same picture in both prompts."""
    first = hashes([*range(3, 6), *[IMAGE] * 6, *range(20, 31)], [span(3)])
    second = hashes([*range(3, 7), *[IMAGE] * 6, *range(21, 31)], [span(4)])
    assert common(first, second) == 0


def test_units_of_a_video_in_another_order_differ() -> None:
    video = span(2, Grid(6, 4, 4), kind=MediaKind.VIDEO)
    prompt = [3, 4, *[VIDEO] * 12, *range(5, 11)]
    swapped = dataclasses.replace(video, embedding_keys=(*video.embedding_keys[:1], *video.embedding_keys[:0:-1]))
    assert sorted(swapped.embedding_keys) == sorted(video.embedding_keys)
    # The second unit begins at token 6, in block 1.
    assert common(hashes(prompt, [video]), hashes(prompt, [swapped])) == 1


def test_where_a_unit_begins_and_which_it_is_counts_by_itself() -> None:
    """Not only by what other blocks and tokens tell of it: here all of those are alike."""
    ids = [IMAGE] * 4
    first = {offset: hashes(ids, [span(offset)]) for offset in (-5, -1, 0, 1, 3)}
    assert len(set(first.values())) == len(first)
    assert hashes(ids, [span(4)]) == hashes(ids, [span(-6)]) == hashes(ids)
    video = span(0, Grid(4, 4, 4), kind=MediaKind.VIDEO)
    second_unit = dataclasses.replace(video, offset=-4, embedding_keys=video.embedding_keys[::-1])
    assert hashes(ids, [video]) != hashes(ids, [second_unit])


def test_a_repeated_frame_counts_by_its_place() -> None:
    """All units equal, all ids equal: only the place in the video tells blocks apart even without the chain."""
    video = span(0, Grid(8, 4, 4), kind=MediaKind.VIDEO)
    still = dataclasses.replace(video, embedding_keys=(b"k" * 32,) * 4)
    assert len(set(hashes([VIDEO] * 16, [still]))) == 4


def test_video_and_following_image_are_taken_in_order() -> None:
    media = [span(2, Grid(4, 4, 4), kind=MediaKind.VIDEO), span(12)]
    prompt = [3, 4, *[VIDEO] * 8, 5, 6, *[IMAGE] * 6, *range(7, 20)]
    first = hashes(prompt, media)
    assert common(first, hashes(prompt, [media[0], span(12, picture=9)])) == 3
    assert common(first, hashes(prompt, [span(2, Grid(4, 4, 4), kind=MediaKind.VIDEO, picture=9), media[1]])) == 0
    assert common(first, hashes(prompt, media[:1])) == 3


@given(st.lists(st.integers(0, 9), max_size=40), st.integers(1, 7), st.integers(0, 6))
def test_growing_gives_the_same_as_all_at_once(cuts: list[int], block_size: int, offset: int) -> None:
    identity = dataclasses.replace(IDENTITY, block_size=block_size)
    media = [span(offset), span(offset + 8, Grid(4, 4, 4), kind=MediaKind.VIDEO)]
    ids = [*range(3, 3 + offset), *[IMAGE] * 6, 110, 111, *[VIDEO] * 8, *range(20, 20 + sum(cuts))]
    hasher = BlockHasher(identity, media, b"salt")
    hasher.extend(ids[: offset + 16])
    at = offset + 16
    for cut in cuts:
        before = list(hasher.hashes)
        hasher.extend(ids[at : at + cut])
        at += cut
        assert hasher.hashes[: len(before)] == before
    assert tuple(hasher.hashes) == hash_blocks(identity, ids, media, b"salt")


def test_random_prompts_agree_exactly_when_the_plain_comparison_does() -> None:
    """Against the definition: two blocks are alike if the tokens and units up to their ends are."""
    random_ = random.Random(0)
    prompts = []
    for _ in range(60):
        ids, media = [], []
        for _ in range(3):
            ids += random_.choices((3, 4), k=random_.choice((0, 1, 4)))
            media.append(span(len(ids), Grid(1, 2, 4), picture=random_.randrange(2)))
            ids += [IMAGE] * 2
        prompts.append((ids, media))
    for first, first_media in prompts:
        for second, second_media in prompts:
            names = hashes(first, first_media), hashes(second, second_media)
            for block in range(min(map(len, names))):
                end = 4 * (block + 1)
                units = [[m for m in media if m.offset < end] for media in (first_media, second_media)]
                alike = first[:end] == second[:end] and units[0] == units[1]
                assert (names[0][block] == names[1][block]) == alike


@pytest.mark.parametrize("wrong", [-1, 1 << 32])
def test_refuses_what_is_no_id(wrong: int) -> None:
    with pytest.raises((OverflowError, ValueError)):
        hashes([wrong])


def test_known_value() -> None:
    """Engines of different releases may meet in one cluster: names must not change unnoticed."""
    names = hashes(range(8), [span(4, Grid(1, 2, 4))], b"salt")
    assert [name.hex()[:16] for name in names] == ["c8bb625f3c46da5b", "6b9bdc09a958e334"]
