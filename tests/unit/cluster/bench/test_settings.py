"""What the command line may say."""

from __future__ import annotations

import random
from typing import Any

import pytest

from cluster.bench.settings import (
    BenchSettings,
    Exponential,
    Fixed,
    Normal,
    Uniform,
    parse_distribution,
    parse_mix,
    parse_size,
    parse_slo,
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("512", Fixed(512)),
        ("uniform:1,9", Uniform(1, 9)),
        ("normal:100,10.5", Normal(100, 10.5)),
        ("exponential:64", Exponential(64)),
    ],
)
def test_distributions(text: str, expected: object) -> None:
    found = parse_distribution(text, "--x")
    assert found == expected and str(found) == text


@pytest.mark.parametrize(
    "text",
    ["", "0", "-1", "1.5", "nan", "1e99", "uniform:9,1", "uniform:1", "uniform:1.5,2", "normal:5", "normal:5,-1",
     "exponential:0", "zipf:3", "fixed:3", "512:", "1,2"],
)  # fmt: skip
def test_distributions_that_make_no_sense(text: str) -> None:
    with pytest.raises(ValueError, match="--x"):
        parse_distribution(text, "--x")


@pytest.mark.parametrize("distribution", [Uniform(3, 5), Normal(2, 5), Exponential(1), Fixed(7)])
def test_draws_are_counts(distribution: Any) -> None:
    random_ = random.Random(0)
    drawn = [distribution.draw(random_) for _ in range(2000)]
    assert all(isinstance(count, int) and count >= 1 for count in drawn)
    if isinstance(distribution, Uniform):
        assert set(drawn) == {3, 4, 5}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("text", {"text": 1.0}),
        ("text=0.5,image=0.25,video=0.25", {"text": 0.5, "image": 0.25, "video": 0.25}),
        ("image=3,text=0", {"image": 3.0, "text": 0.0}),
    ],
)
def test_mixes(text: str, expected: dict[str, float]) -> None:
    assert parse_mix(text) == expected


@pytest.mark.parametrize("text", ["", "audio", "text=x", "text=-1", "text=nan", "text=0", "text,text", "text=inf"])
def test_mixes_that_make_no_sense(text: str) -> None:
    with pytest.raises(ValueError, match="--mix"):
        parse_mix(text)


def test_slo_times_have_units() -> None:
    assert parse_slo("ttft=500ms,tpot=50,e2e=2.5s") == {"ttft": 0.5, "tpot": 0.05, "e2e": 2.5}


@pytest.mark.parametrize("text", ["", "ttft", "ttft=", "ttft=0", "itl=5", "ttft=5m", "ttft=-5", "ttft=1,ttft=2"])
def test_slos_that_make_no_sense(text: str) -> None:
    with pytest.raises(ValueError, match="--slo"):
        parse_slo(text)


def test_sizes() -> None:
    assert parse_size("640x480", "--x") == (640, 480)
    for text in ("640", "640x", "x480", "8x480", "640x9999", "-640x480", "640*480"):
        with pytest.raises(ValueError, match="--x"):
            parse_size(text, "--x")


@pytest.mark.parametrize(
    "url", ["http://h:1", "https://h", "http://127.0.0.1:8000/v1", "grpc://h:9000", "grpc://[::1]:9000"]
)
def test_urls(url: str) -> None:
    assert BenchSettings(url=url, concurrency=1).url == url


@pytest.mark.parametrize("url", ["", "h:1", "ftp://h", "http://", "grpc://h", "http://h:x", "grpc://:1", "http://h:0"])
def test_urls_that_make_no_sense(url: str) -> None:
    with pytest.raises(ValueError, match="--url"):
        BenchSettings(url=url, concurrency=1)


@pytest.mark.parametrize("load", [{}, {"rate": 1.0, "concurrency": 1}])
def test_a_loop_is_open_or_closed(load: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="--rate"):
        BenchSettings(url="http://h", **load)
