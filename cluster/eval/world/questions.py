"""Questions about one picture, with their answers and what thinking mode writes before it answers."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from cluster.eval.world.things import COLOURS, SHAPES, Box, Scene, Thing

COORDINATE_STEP = 5
"""Thoughts give centres in percent of the sides, rounded to this."""
BOX_SCALE = 1000
BOX_STEP = 10
CLEAR_SIDE = 0.12
"""Least difference of two centres, as a share of the side, for a question of left or above."""
MAX_COUNT = 5


@dataclass(frozen=True, slots=True)
class Question:
    """``thought``: what thinking mode writes; empty for questions that are never thought about."""

    task: str
    text: str
    answer: str
    thought: str = ""


def percent(value: float) -> int:
    return min(100 - COORDINATE_STEP, max(COORDINATE_STEP, COORDINATE_STEP * round(value * 100 / COORDINATE_STEP)))


def at(thing: Thing) -> str:
    x, y = thing.box.centre
    return f"{percent(x)}, {percent(y)}"


def box_json(box: Box) -> str:
    """The answer to a grounding question."""
    corners = [
        min(BOX_SCALE, max(0, BOX_STEP * round(v * BOX_SCALE / BOX_STEP))) for v in (box.x1, box.y1, box.x2, box.y2)
    ]
    return json.dumps({"bbox_2d": corners})


def an(name: str) -> str:
    return f"an {name}" if name[0] in "aeiou" else f"a {name}"


def listing(things: tuple[Thing, ...]) -> str:
    """Things from left to right: ``a red circle, a blue star``."""
    ordered = sorted(things, key=lambda t: t.box.centre[0])
    return ", ".join(f"the number {t.text}" if t.text else an(t.name) for t in ordered)


def colour(scene: Scene, rng: random.Random) -> Iterator[Question]:
    for thing in scene.shapes:
        if scene.only(kind=thing.kind) is thing:
            text = rng.choice(
                (
                    f"What colour is the {thing.kind}?",
                    f"What color is the {thing.kind}?",
                    f"Which colour does the {thing.kind} have?",
                )
            )
            yield Question("colour", text, thing.colour, f"The {thing.kind} is at {at(thing)}.")


def shape(scene: Scene, rng: random.Random) -> Iterator[Question]:
    for thing in scene.shapes:
        if scene.only(colour=thing.colour) is thing:
            text = rng.choice(
                (
                    f"What shape is {thing.colour}?",
                    f"Which shape is {thing.colour}?",
                    f"What is the {thing.colour} shape?",
                )
            )
            yield Question("shape", text, thing.kind, f"The {thing.colour} shape is at {at(thing)}.")


def count(scene: Scene, rng: random.Random) -> Iterator[Question]:
    kinds = {thing.kind for thing in scene.shapes}
    wanted: list[tuple[str, list[Thing]]] = [("shapes", list(scene.shapes))]
    wanted += [(plural(kind), [t for t in scene.shapes if t.kind == kind]) for kind in sorted(kinds)]
    wanted += [
        (f"{name} shapes", [t for t in scene.shapes if t.colour == name])
        for name in sorted({t.colour for t in scene.shapes})
    ]
    absent = [kind for kind in SHAPES if kind not in kinds]
    if rng.random() < 0.4 and absent:
        wanted.append((plural(rng.choice(absent)), []))
    for name, found in wanted:
        if len(found) > MAX_COUNT:
            continue
        text = rng.choice((f"How many {name} are there?", f"How many {name} do you see?", f"Count the {name}."))
        ordered = sorted(found, key=lambda t: t.box.centre[0])
        thought = " ".join(f"{i + 1} at {at(thing)}." for i, thing in enumerate(ordered)) or "I see none."
        yield Question("count", text, str(len(found)), thought)


def region(scene: Scene, rng: random.Random) -> Iterator[Question]:
    for thing, name in unique_names(scene, rng):
        if thing.box.clearly_in_region:
            text = rng.choice(
                (f"Where is the {name}?", f"Where is the {name}?", f"In which part of the picture is the {name}?")
            )
            yield Question("region", text, thing.region, f"The {name} is at {at(thing)}.")


def digits(scene: Scene, rng: random.Random) -> Iterator[Question]:
    for number in scene.numbers:
        texts: tuple[str, ...]
        if len(scene.numbers) == 1:
            texts = (
                "What number is in the picture?",
                "What is the number?",
                "Which number do you see?",
                "Read the number.",
            )
        elif sum(other.colour == number.colour for other in scene.numbers) == 1:
            texts = (f"What is the {number.colour} number?", f"Read the {number.colour} number.")
        else:
            continue
        thought = f"The digits are {' and '.join(number.text)}." if len(number.text) > 1 else "It has one digit."
        yield Question("digits", rng.choice(texts), number.text, thought)


def position(scene: Scene, rng: random.Random) -> Iterator[Question]:
    named = unique_names(scene, rng)
    if len(named) < 2:
        return
    for (first, first_name), (second, second_name) in [rng.sample(named, 2) for _ in range(2)]:
        (x1, y1), (x2, y2) = first.box.centre, second.box.centre
        thought = f"The {first_name} is at {at(first)}. The {second_name} is at {at(second)}."
        asked = []
        if abs(x1 - x2) > CLEAR_SIDE:
            asked.append(("left or right", "left" if x1 < x2 else "right", " of"))
        if abs(y1 - y2) > CLEAR_SIDE:
            asked.append(("above or below", "above" if y1 < y2 else "below", ""))
        if asked:
            words, answer, of = rng.choice(asked)
            yield Question("position", f"Is the {first_name} {words}{of} the {second_name}?", answer, thought)


def odd(scene: Scene, rng: random.Random) -> Iterator[Question]:
    thing = odd_one(scene.shapes)
    if thing is not None:
        text = rng.choice(
            ("Which one is the odd one out?", "Which shape does not belong?", "Which shape is different?")
        )
        other = next(t for t in scene.shapes if t is not thing)
        yield Question("odd", text, f"the {thing.name}", f"The others are all {other.colour} {plural(other.kind)}.")


def odd_one(things: tuple[Thing, ...]) -> Thing | None:
    """The one thing that differs where all others are the same, of at least three."""
    if len(things) < 3:
        return None
    by_name: dict[str, list[Thing]] = {}
    for thing in things:
        by_name.setdefault(thing.name, []).append(thing)
    if len(by_name) != 2:
        return None
    small, large = sorted(by_name.values(), key=len)
    return small[0] if len(small) == 1 and len(large) >= 2 else None


def exist(scene: Scene, rng: random.Random) -> Iterator[Question]:
    for wanted in (True, False):
        if wanted and scene.shapes:
            thing = rng.choice(scene.shapes)
            name = rng.choice((thing.name, thing.kind))
            yield Question("exist", f"Is there {an(name)}?", "yes", f"I see one at {at(thing)}.")
        elif not wanted:
            kind, shade = rng.choice(SHAPES), rng.choice(list(COLOURS))
            name = rng.choice((f"{shade} {kind}", kind))
            if not any(name in (t.name, t.kind) for t in scene.shapes):
                yield Question("exist", f"Is there {an(name)}?", "no", "I see none.")


def describe(scene: Scene, rng: random.Random) -> Iterator[Question]:
    if not scene.things or any(
        abs(a.box.centre[0] - b.box.centre[0]) < 0.04 for a in scene.things for b in scene.things if a is not b
    ):
        return
    text = rng.choice(
        (
            "What is in the picture?",
            "What is in this picture?",
            "What do you see?",
            "Describe the picture.",
            "List what you see.",
        )
    )
    ordered = sorted(scene.things, key=lambda t: t.box.centre[0])
    yield Question("describe", text, listing(scene.things), " ".join(f"One at {at(t)}." for t in ordered))


def grounding(scene: Scene, rng: random.Random) -> Iterator[Question]:
    for thing, name in unique_names(scene, rng):
        text = rng.choice(
            (f"Give the box of the {name} as JSON.", f"Give the bounding box of the {name}.", f"Box of the {name}?")
        )
        yield Question("grounding", text, box_json(thing.box), f"The {name} is at {at(thing)}.")


def unique_names(scene: Scene, rng: random.Random) -> list[tuple[Thing, str]]:
    """Shapes that a name fits alone, each with such a name."""
    found = []
    for thing in scene.shapes:
        if sum(other.name == thing.name for other in scene.shapes) == 1:
            alone = scene.only(kind=thing.kind) is thing
            found.append((thing, thing.kind if alone and rng.random() < 0.6 else thing.name))
    if len(scene.numbers) == 1:
        found.append((scene.numbers[0], "number"))
    return found


def plural(kind: str) -> str:
    return "crosses" if kind == "cross" else f"{kind}s"


Builder = Callable[[Scene, random.Random], Iterator[Question]]
BUILDERS: dict[str, Builder] = {
    "colour": colour,
    "shape": shape,
    "count": count,
    "region": region,
    "digits": digits,
    "position": position,
    "odd": odd,
    "exist": exist,
    "describe": describe,
    "grounding": grounding,
}
"""By task, the questions a scene allows."""
