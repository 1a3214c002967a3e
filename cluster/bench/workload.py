"""What is asked: conversations drawn from a seed, before the clock starts. Pure but for encoding media."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from cluster.bench.media import jpeg, mp4
from cluster.bench.settings import BenchSettings

WORDS = (
    "time year people way day man thing woman life child world school state family student group country problem hand "
    "part place case week company system program question work night point home water room mother area money story "
    "fact month lot right study book eye job word business issue side kind head house service friend father power hour "
    "game line end member law car city name team minute idea body back parent face level office door health person "
    "art war history party result change morning reason research girl guy moment air teacher force education foot boy "
    "age policy music market sense nation plan college interest death experience effect use class control field rule"
).split()


@dataclass(frozen=True, kw_only=True, slots=True)
class Medium:
    """An encoded picture or video."""

    kind: Literal["image", "video"]
    mime_type: str
    content: bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class Turn:
    """One question. ``media`` come before ``text``."""

    text: str
    media: tuple[Medium, ...] = ()
    output_tokens: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Conversation:
    """Turns that follow each other, each after the reply to the one before."""

    index: int
    kind: str
    system: str | None = None
    turns: tuple[Turn, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenScale:
    """How a server counts our words: ``overhead`` tokens for a prompt without any, then so many per word."""

    overhead: float = 0.0
    per_word: float = 1.0

    def words(self, tokens: float, *, whole_prompt: bool) -> int:
        """Words that make about ``tokens`` tokens."""
        return max(1, round((tokens - (self.overhead if whole_prompt else 0.0)) / self.per_word))


def text_of(words: int, random_: random.Random) -> str:
    """So many words."""
    return " ".join(random_.choices(WORDS, k=words))


def make_conversations(settings: BenchSettings, scale: TokenScale) -> list[Conversation]:
    """Draws the conversations; together they have ``num_requests`` turns, the last one perhaps fewer than others.

    Kinds, lengths, texts and media depend on the seed and on the place in the list only. Media are in the first turn.
    """
    random_ = random.Random(f"{settings.seed}/workload")
    prefixes = _prefixes(settings, scale)
    make_media = _media_maker(settings)
    conversations: list[Conversation] = []
    left = settings.num_requests
    while left > 0:
        index = len(conversations)
        (kind,) = random_.choices(list(settings.mix), weights=list(settings.mix.values()))
        turns = [_turn(settings, scale, random_, whole_prompt=at == 0) for at in range(min(settings.turns, left))]
        turns[0] = replace(turns[0], media=make_media(kind, index))
        system = prefixes[index % len(prefixes)] if prefixes else None
        conversations.append(Conversation(index=index, kind=kind, system=system, turns=tuple(turns)))
        left -= len(turns)
    return conversations


def warmup_settings(settings: BenchSettings) -> BenchSettings:
    """Of the same kinds and lengths, but with other texts, prefixes and media, so that nothing measured is cached."""
    return replace(settings, num_requests=settings.warmup, turns=1, seed=settings.seed + 1_000_003)


def _prefixes(settings: BenchSettings, scale: TokenScale) -> list[str]:
    if not settings.shared_prefix_tokens:
        return []
    random_ = random.Random(f"{settings.seed}/prefixes")
    words = scale.words(settings.shared_prefix_tokens, whole_prompt=False)
    return [text_of(words, random_) for _ in range(settings.prefix_groups)]


def _turn(settings: BenchSettings, scale: TokenScale, random_: random.Random, *, whole_prompt: bool) -> Turn:
    words = scale.words(settings.input_tokens.draw(random_), whole_prompt=whole_prompt)
    return Turn(text=text_of(words, random_), output_tokens=settings.output_tokens.draw(random_))


def _media_maker(settings: BenchSettings) -> Callable[[str, int], tuple[Medium, ...]]:
    known: dict[str, Medium] = {}

    def make(kind: str, conversation: int) -> tuple[Medium, ...]:
        count = {"text": 0, "image": settings.images_per_request, "video": 1}[kind]
        found = []
        for place in range(count):
            number = conversation * count + place
            if settings.distinct_media is not None:
                number %= settings.distinct_media
            name = f"{settings.seed}/{kind}/{number}"
            if name not in known:
                known[name] = _medium(settings, kind, name)
            found.append(known[name])
        return tuple(found)

    return make


def _medium(settings: BenchSettings, kind: str, seed: str) -> Medium:
    if kind == "image":
        return Medium(kind="image", mime_type="image/jpeg", content=jpeg(settings.image_size, seed))
    content = mp4(settings.video_size, settings.video_seconds, settings.video_fps, seed)
    return Medium(kind="video", mime_type="video/mp4", content=content)
