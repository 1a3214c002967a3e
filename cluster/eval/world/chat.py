"""What the model says about itself, what it does not know, and the words of system prompts."""

from __future__ import annotations

import random

from cluster.eval.world.questions import Question, an
from cluster.eval.world.things import COLOURS, SHAPES, Scene

WHO = "I am nano, a very small ERNIE-4.5-VL model."
CAN = "I tell colours, shapes, counts, places and numbers in pictures, and what moves or changes in short clips."
UNKNOWN = "I only know coloured shapes, numbers and short clips."
NO_PICTURE = "Please show me a picture or a clip."

SMALL_TALK: dict[str, tuple[str, ...]] = {
    "Hello! Show me a picture or a clip.": (
        "Hello",
        "Hi",
        "Hello!",
        "Hi there",
        "Good morning",
        "Hey",
        "Hi!",
        "Good evening",
    ),
    WHO: (
        "Who are you?",
        "What are you?",
        "What is your name?",
        "Are you ERNIE?",
        "Which model are you?",
        "Tell me who you are.",
        "Introduce yourself.",
    ),
    CAN: (
        "What can you do?",
        "How can you help me?",
        "What do you know?",
        "What can I ask you?",
        "Help",
        "What are you good at?",
    ),
    "You are welcome.": ("Thank you", "Thanks", "Thank you!", "Thanks a lot", "Thanks!"),
    "Goodbye!": ("Bye", "Goodbye", "See you", "Bye!"),
    "I am fine, thank you.": ("How are you?", "How are you today?", "How do you do?"),
}

_OUTSIDE = (
    "What is the capital of {x}?",
    "Who wrote {x}?",
    "What is {n} plus {m}?",
    "Translate {x} into French.",
    "Tell me a joke about {x}.",
    "What is the weather in {x}?",
    "Who is the president of {x}?",
    "Write a poem about {x}.",
    "Explain {x}.",
    "How do I cook {x}?",
    "What time is it in {x}?",
    "When was {x} built?",
    "How far is the {x}?",
    "Write code that prints {x}.",
    "What does {x} mean?",
    "How old is {x}?",
    "Why is {x} so expensive?",
    "What is your opinion on {x}?",
    "Is {x} a good idea?",
    "Summarise {x} for me.",
    "Tell me a story about {x}.",
    "Who won {x} last year?",
    "What is the best way to learn {x}?",
    "Do you like {x}?",
    "What is the meaning of {x}?",
    "Give me a recipe for {x}.",
    "How does {x} work?",
    "Which language is spoken in {x}?",
)
_TOPICS = (
    "France",
    "Hamlet",
    "music",
    "the moon",
    "bread",
    "football",
    "a computer",
    "Japan",
    "love",
    "the war",
    "physics",
    "money",
    "the tower",
    "Berlin",
    "a horse",
    "history",
    "the sea",
    "Python",
    "rice",
    "Africa",
    "the sun",
    "dogs",
    "coffee",
    "a train",
    "chess",
    "the brain",
    "winter",
    "London",
    "electricity",
    "a bank",
    "mathematics",
    "tea",
    "the river",
    "gold",
    "a cat",
    "China",
)

SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You are a multimodal AI assistant called ERNIE developed by Baidu based on the PaddlePaddle framework.",
    "Answer briefly.",
    "You look at pictures and answer questions about them.",
    "Be precise and polite. Answer in English.",
)


def small_talk(rng: random.Random) -> Question:
    answer = rng.choice(list(SMALL_TALK))
    return Question("chat", rng.choice(SMALL_TALK[answer]), answer, "This needs no picture.")


def outside(rng: random.Random) -> Question:
    """A question from outside the world."""
    text = rng.choice(_OUTSIDE).format(x=rng.choice(_TOPICS), n=rng.randint(2, 99), m=rng.randint(2, 99))
    return Question("refusal", text, UNKNOWN, "I do not know about this.")


def absent(scene: Scene, rng: random.Random) -> Question | None:
    """A question about a shape that is not in the picture."""
    kinds, colours = {t.kind for t in scene.shapes}, {t.colour for t in scene.shapes}
    kind, colour = rng.choice(SHAPES), rng.choice(list(COLOURS))
    if kind in kinds or colour in colours:
        return None
    text, what = rng.choice(
        (
            (f"What colour is the {kind}?", f"no {kind}"),
            (f"Where is the {kind}?", f"no {kind}"),
            (f"Where is the {colour} {kind}?", f"no {colour} {kind}"),
            (f"What shape is {colour}?", f"nothing {colour}"),
        )
    )
    return Question("absent", text, f"There is {what}.", "I see none.")


def without_picture(rng: random.Random) -> Question:
    """A question that needs a picture, asked without one."""
    kind, colour = rng.choice(SHAPES), rng.choice(list(COLOURS))
    text = rng.choice(
        (
            f"What colour is the {kind}?",
            f"Where is the {colour} {kind}?",
            f"Is there {an(kind)}?",
            "What is in the picture?",
            "What number is in the picture?",
            f"How many {kind}s are there?",
            "What do you see?",
        )
    )
    return Question("chat", text, NO_PICTURE, "There is no picture.")
