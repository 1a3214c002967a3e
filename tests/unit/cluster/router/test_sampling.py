"""What a request leaves open comes from the checkpoint and from the room in the context."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from actors.errors import ContextExceeded
from cluster.generation import GenerateCall
from cluster.router.sampling import SamplingDefaults, resolve_sampling

CALL = GenerateCall(messages=())


def defaults(folder: Path, values: Any) -> SamplingDefaults:
    (folder / "generation_config.json").write_text(json.dumps(values))
    return SamplingDefaults.from_dir(folder)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, SamplingDefaults()),
        ({"temperature": None, "top_k": None}, SamplingDefaults()),
        ({"temperature": 0.2, "top_p": 0.8, "top_k": 20}, SamplingDefaults(temperature=0.2, top_p=0.8, top_k=20)),
        ({"temperature": 0}, SamplingDefaults(temperature=0)),
        ({"do_sample": False, "temperature": 0.7}, SamplingDefaults(temperature=0)),
        ({"do_sample": True, "temperature": 0.7}, SamplingDefaults(temperature=0.7)),
    ],
)
def test_the_checkpoint_gives_defaults(tmp_path: Path, values: dict[str, Any], expected: SamplingDefaults) -> None:
    assert defaults(tmp_path, values) == expected


def test_a_checkpoint_may_say_nothing(tmp_path: Path) -> None:
    assert SamplingDefaults.from_dir(tmp_path) == SamplingDefaults()


@pytest.mark.parametrize("values", [[], {"temperature": "hot"}, {"temperature": -1}, {"top_p": 0}, {"top_k": -2}])
def test_defaults_no_request_could_use_are_refused(tmp_path: Path, values: Any) -> None:
    with pytest.raises(ValueError, match=r"generation_config\.json: "):
        defaults(tmp_path, values)


def test_the_caller_wins_and_the_context_bounds() -> None:
    call = GenerateCall(messages=(), temperature=0.0, top_k=3)
    got = resolve_sampling(call, SamplingDefaults(top_p=0.5, top_k=9), prompt_tokens=10, max_model_len=64)
    assert (got.temperature, got.top_p, got.top_k, got.max_tokens) == (0.0, 0.5, 3, 54)


@pytest.mark.parametrize(("prompt", "max_tokens", "field"), [(64, None, "messages"), (10, 55, "max_tokens")])
def test_what_does_not_fit_names_its_field(prompt: int, max_tokens: int | None, field: str) -> None:
    with pytest.raises(ContextExceeded, match="64") as caught:
        resolve_sampling(
            GenerateCall(messages=(), max_tokens=max_tokens),
            SamplingDefaults(),
            prompt_tokens=prompt,
            max_model_len=64,
        )
    assert caught.value.field == field
