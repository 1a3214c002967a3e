"""What a benchmark is told, read from the command line. Pure."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol
from urllib.parse import urlsplit

KINDS = ("text", "image", "video")
SLO_METRICS = ("ttft", "tpot", "e2e")
MAX_TOKENS = 10_000_000
MAX_SIDE = 8192


class Distribution(Protocol):
    """Token counts to draw."""

    def draw(self, random_: random.Random) -> int: ...


@dataclass(frozen=True, slots=True)
class Fixed:
    count: int

    def draw(self, random_: random.Random) -> int:
        return self.count

    def __str__(self) -> str:
        return str(self.count)


@dataclass(frozen=True, slots=True)
class Uniform:
    """Both ends included."""

    low: int
    high: int

    def draw(self, random_: random.Random) -> int:
        return random_.randint(self.low, self.high)

    def __str__(self) -> str:
        return f"uniform:{self.low},{self.high}"


@dataclass(frozen=True, slots=True)
class Normal:
    """Rounded, and never below 1."""

    mean: float
    deviation: float

    def draw(self, random_: random.Random) -> int:
        return max(1, round(random_.normalvariate(self.mean, self.deviation)))

    def __str__(self) -> str:
        return f"normal:{self.mean:g},{self.deviation:g}"


@dataclass(frozen=True, slots=True)
class Exponential:
    """Rounded, and never below 1."""

    mean: float

    def draw(self, random_: random.Random) -> int:
        return max(1, round(random_.expovariate(1 / self.mean)))

    def __str__(self) -> str:
        return f"exponential:{self.mean:g}"


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchSettings:
    """One benchmark. Times in seconds, SLO bounds in seconds by metric."""

    url: str
    model: str | None = None
    num_requests: int = 100
    rate: float | None = None
    """Conversations a second, Poisson; infinity sends all at once. None: closed loop."""
    concurrency: int | None = None
    """Closed loop: so many conversations at a time."""
    mix: Mapping[str, float] = field(default_factory=lambda: {"text": 1.0})
    input_tokens: Distribution = Fixed(256)
    output_tokens: Distribution = Fixed(64)
    ignore_eos: bool = False
    temperature: float | None = None
    turns: int = 1
    shared_prefix_tokens: int = 0
    prefix_groups: int = 1
    images_per_request: int = 1
    image_size: tuple[int, int] = (448, 448)
    video_size: tuple[int, int] = (224, 224)
    video_seconds: float = 2.0
    video_fps: int = 4
    distinct_media: int | None = None
    """So many different pictures and videos, used in turn; None: every request has its own."""
    seed: int = 0
    warmup: int = 2
    timeout_s: float = 600.0
    slo: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if (self.rate is None) == (self.concurrency is None):
            raise ValueError("give --rate (open loop) or --concurrency (closed loop)")
        if not _is_url(self.url):
            raise ValueError(f"--url: {self.url!r} is none of http://HOST:PORT, https://HOST:PORT, grpc://HOST:PORT")


def parse_distribution(text: str, option: str) -> Distribution:
    """Reads ``512``, ``uniform:LOW,HIGH``, ``normal:MEAN,DEVIATION`` or ``exponential:MEAN``.

    Raises:
        ValueError: names the option.
    """
    name, colon, rest = text.partition(":")
    try:
        match name, [float(number) for number in (rest if colon else name).split(",")]:
            case "uniform", [low, high] if 1 <= low <= high <= MAX_TOKENS and low == int(low) and high == int(high):
                return Uniform(int(low), int(high))
            case "normal", [mean, deviation] if 1 <= mean <= MAX_TOKENS and 0 <= deviation <= MAX_TOKENS:
                return Normal(mean, deviation)
            case "exponential", [mean] if 1 <= mean <= MAX_TOKENS:
                return Exponential(mean)
            case _, [count] if not colon and 1 <= count <= MAX_TOKENS and count == int(count):
                return Fixed(int(count))
    except ValueError:
        pass
    raise ValueError(f"{option}: {text!r} is none of COUNT, uniform:LOW,HIGH, normal:MEAN,DEVIATION, exponential:MEAN")


def parse_mix(text: str) -> dict[str, float]:
    """Reads ``text=0.5,image=0.4,video=0.1`` as shares that need not sum to 1."""
    shares: dict[str, float] = {}
    for item in text.split(","):
        kind, equals, number = item.partition("=")
        share = _number(number) if equals else 1.0
        if kind not in KINDS or kind in shares or share is None or share < 0:
            raise ValueError(f"--mix: {item!r} is no KIND=SHARE with a new kind of {', '.join(KINDS)}")
        shares[kind] = share
    if not 0 < sum(shares.values()) < math.inf:
        raise ValueError("--mix: the shares must sum to more than 0")
    return shares


_SPAN = re.compile(r"([0-9.]+)(ms|s|)")


def parse_slo(text: str) -> dict[str, float]:
    """Reads ``ttft=500ms,tpot=50,e2e=5s`` into seconds; a number without a unit is milliseconds."""
    bounds: dict[str, float] = {}
    for item in text.split(","):
        metric, _, span = item.partition("=")
        found = _SPAN.fullmatch(span)
        number = _number(found[1]) if found else None
        if metric not in SLO_METRICS or metric in bounds or found is None or not number:
            raise ValueError(f"--slo: {item!r} is no METRIC=TIME with a new metric of {', '.join(SLO_METRICS)}")
        bounds[metric] = number if found[2] == "s" else number / 1000
    return bounds


def parse_size(text: str, option: str) -> tuple[int, int]:
    """Reads ``WIDTHxHEIGHT`` in pixels."""
    width, _, height = text.partition("x")
    if width.isdecimal() and height.isdecimal() and 16 <= int(width) <= MAX_SIDE and 16 <= int(height) <= MAX_SIDE:
        return int(width), int(height)
    raise ValueError(f"{option}: {text!r} is no WIDTHxHEIGHT between 16 and {MAX_SIDE} pixels")


def _is_url(text: str) -> bool:
    try:
        parts = urlsplit(text)
        port = parts.port
    except ValueError:
        return False
    if not parts.hostname or port == 0:
        return False
    return parts.scheme in ("http", "https") or (parts.scheme == "grpc" and port is not None)


def _number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None
