"""The text the tokenizer is made from: what is asked and said in the world, so that its words are single tokens.

    python -m nano.corpus

writes ``tokenizer.json`` anew. Weights trained with another one are of no use with it.
"""

from __future__ import annotations

import json
import random

from actors.checkpoint.tokenizer import build_tokenizer
from cluster.eval.world.chat import SMALL_TALK, SYSTEM_PROMPTS, UNKNOWN, absent, outside, small_talk, without_picture
from cluster.eval.world.clips import clip
from cluster.eval.world.pairs import compare, in_either, pair
from cluster.eval.world.questions import BUILDERS, Question
from cluster.eval.world.scenes import scene
from cluster.eval.world.zoom import OFFER, call
from nano.files import TOKENIZER, documents

REPEATS = 60


def corpus() -> list[str]:
    """Lines of text; always the same."""
    rng = random.Random("corpus")
    found: list[Question] = []
    for _ in range(REPEATS):
        for task, build in BUILDERS.items():
            found += build(scene(rng, task), rng)
        for task in ("moving", "event_time", "timestamp"):
            found += clip(rng, task).questions(rng)
        both = pair(rng)
        found += [*compare(both, rng), *in_either(both, rng), small_talk(rng), outside(rng), without_picture(rng)]
        missing = absent(scene(rng, "colour"), rng)
        if missing is not None:
            found.append(missing)
    lines = [f"User: Picture 1:\nUser: Video 1:\n{q.text}\nAssistant: \n{q.thought}\n{q.answer}" for q in found]
    lines += [*SYSTEM_PROMPTS, UNKNOWN, *SMALL_TALK] * 20
    lines += [
        f"{OFFER}\nUser: \n<tool_output>\n",
        call([1, 2, 3, 4]),
        "\n\n",
    ] * 40
    return lines


if __name__ == "__main__":
    made = build_tokenizer(documents().layout, corpus())
    TOKENIZER.write_text(json.dumps(made, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
