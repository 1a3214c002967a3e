from __future__ import annotations

import pytest

from actors.parallel.layout import ExpertLayout, ExpertPlacement, ExpertShare, even_layout, even_placement


def test_the_even_layout_gives_every_rank_neighbours() -> None:
    layout = even_layout(8, 4)
    assert layout.text == layout.vision == ((0, 1), (2, 3), (4, 5), (6, 7))
    assert even_layout(7, 3).text == ((0, 1, 2), (3, 4), (5, 6))
    assert even_layout(2, 4).text == ((0,), (1,), (), ())
    assert even_layout(8, 1).held(0) == tuple(range(16))


def test_local_indices_count_text_experts_first() -> None:
    layout = ExpertLayout(text=((3, 0), (1, 2)), vision=((1,), (2, 0, 3)))
    assert layout.held(0) == (3, 0, 5) and layout.held(1) == (1, 2, 6, 4, 7)
    assert layout.places() == ((0, 1), (1, 0), (1, 1), (0, 0), (1, 3), (0, 2), (1, 2), (1, 4))
    assert (layout.ranks, layout.num_experts) == (2, 4)


@pytest.mark.parametrize(
    ("text", "vision"),
    [
        (((0, 1), (1, 2)), ((0, 1), (2,))),
        (((0,), (2,)), ((0,), (1,))),
        (((0, 1),), ((0,), (1,))),
        (((0, 1), ()), ((0, 1, 2), ())),
        ((), ()),
    ],
    ids=["twice", "missing", "other ranks", "other number", "no ranks"],
)
def test_every_expert_is_held_exactly_once(
    text: tuple[tuple[int, ...], ...], vision: tuple[tuple[int, ...], ...]
) -> None:
    with pytest.raises(ValueError, match="experts"):
        ExpertLayout(text=text, vision=vision)


def test_shares() -> None:
    placement = even_placement(3, (1, 2), 4, 2)
    assert placement.layers[0] is None and placement.sparse_layers == (1, 2) and placement.ranks == 2
    share = ExpertShare(placement, 1)
    assert share.text(2) == share.vision(1) == (2, 3)
    with pytest.raises(ValueError, match="layer 0 has no experts"):
        share.text(0)
    with pytest.raises(ValueError, match="rank 2"):
        ExpertShare(placement, 2)
    with pytest.raises(ValueError, match="disagree"):
        ExpertPlacement((even_layout(4, 2), even_layout(4, 4)))
