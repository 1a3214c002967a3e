"""What both sides are given and what they give back."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from actors.ernie.config import ErnieConfig
from actors.types import Grid


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """One line of the report. ``decode`` measures steps after the first token, otherwise the time to the first."""

    batch: int = 1
    prompt: int
    """Text tokens of each prompt."""
    grid: Grid | None = None
    """A picture in front of the text."""
    decode: bool = False


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """Token ids, and of an image prompt the uint8 patches and the index of the first placeholder."""

    ids: tuple[int, ...]
    patches: npt.NDArray[np.uint8] | None = None
    offset: int = 0


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Of one run of one side."""

    tokens_per_s: float
    first: list[int]
    """First token of each sequence."""
    logits_BV: npt.NDArray[np.float32] | None = None
    """Theirs: the logits the first tokens came from. B sequences, V vocabulary."""


def make_prompts(scenario: Scenario, config: ErnieConfig, seed: int) -> list[Prompt]:
    """Other prompts for every seed, so that no prefix or media cache can help."""
    rng = np.random.default_rng(seed)
    prompts = []
    for _ in range(scenario.batch):
        ids: list[int] = []
        patches = None
        grid = scenario.grid
        if grid is not None:
            ids = [config.image_start_token_id, *[config.image_token_id] * grid.tokens, config.image_end_token_id]
            patches = rng.integers(0, 256, (grid.patches, config.vision.patch_values), dtype=np.uint8)
        ids += rng.integers(3, config.im_patch_id, scenario.prompt).tolist()
        prompts.append(Prompt(ids=tuple(ids), patches=patches, offset=1 if grid is not None else 0))
    return prompts
