"""Two pictures to compare."""

from __future__ import annotations

import random
from collections.abc import Iterator

from cluster.eval.world.questions import Question, plural
from cluster.eval.world.scenes import scene
from cluster.eval.world.things import Scene

MOST = 4


def pair(rng: random.Random) -> tuple[Scene, Scene]:
    """Two scenes that differ in some count."""
    while True:
        both = scene(rng, "count"), scene(rng, "count")
        if max(len(s.shapes) for s in both) <= MOST and any(True for _ in compare(both, random.Random(0))):
            return both


def compare(scenes: tuple[Scene, Scene], rng: random.Random) -> Iterator[Question]:
    """Which of the two has more of something."""
    first, second = scenes
    seen = [*first.shapes, *second.shapes]
    names = ["shapes", *sorted({plural(t.kind) for t in seen}), *sorted({f"{t.colour} shapes" for t in seen})]
    rng.shuffle(names)
    for name in names:
        counts = [sum(name in ("shapes", plural(t.kind), f"{t.colour} shapes") for t in s.shapes) for s in scenes]
        if counts[0] == counts[1]:
            continue
        thought = f"Picture 1 has {counts[0]}. Picture 2 has {counts[1]}."
        answer = "Picture 1" if counts[0] > counts[1] else "Picture 2"
        yield Question("compare", f"Which picture has more {name}?", answer, thought)


def in_either(scenes: tuple[Scene, Scene], rng: random.Random) -> Iterator[Question]:
    """Colours and kinds in one of the two."""
    for number, shown in enumerate(scenes, 1):
        for thing in shown.shapes:
            if shown.only(kind=thing.kind) is thing:
                yield Question("colour", f"What colour is the {thing.kind} in picture {number}?", thing.colour)
            if shown.only(colour=thing.colour) is thing:
                yield Question("shape", f"What shape is {thing.colour} in picture {number}?", thing.kind)
        yield Question("count", f"How many shapes are there in picture {number}?", str(len(shown.shapes)))
