"""Attempts of all kinds, drawn by hypothesis."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import strategies as st

from actors.types import AttemptMode, EngineRequest, Grid, MediaKind, MediaSpan
from tests.unit.engine.engine_requests import IMAGE, request

LONG_S = 1e6


@dataclass(frozen=True, kw_only=True)
class Spec:
    """An attempt to be submitted. Prompts of a family begin alike."""

    mode: AttemptMode
    family: int
    length: int
    outputs: int = 0
    max_tokens: int
    picture: int | None = None
    arrival_s: float = 0.0
    priority: int = 0
    life_s: float = LONG_S
    salt: bytes = b""
    scored: int | None = None
    bound: bool = False

    def request(self) -> EngineRequest:
        prompt = list(range(10 + 40 * self.family, 10 + 40 * self.family + self.length))
        media: list[MediaSpan] = []
        if self.picture is not None:
            # Two frame pairs, at a place that is no block's border; two such videos, alike in size.
            at, grid = self.length // 2, Grid(4, 4, 4)
            prompt[at:at] = [IMAGE] * grid.tokens
            keys = tuple(bytes([self.picture, unit]).ljust(32) for unit in range(grid.units))
            media = [MediaSpan(kind=MediaKind.VIDEO, offset=at, grid=grid, embedding_keys=keys, encoder_address="")]
        return request(
            prompt,
            media=media,
            outputs=[9] * self.outputs,
            max_tokens=self.max_tokens,
            arrival_s=self.arrival_s,
            priority=self.priority,
            ignore_eos=False,
            prompt_logprobs=self.scored,
            salt=self.salt,
        )


SPECS = st.builds(
    Spec,
    mode=st.sampled_from(list(AttemptMode)),
    family=st.integers(0, 1),
    length=st.integers(1, 20),
    outputs=st.sampled_from([0, 0, 1, 3]),
    max_tokens=st.integers(4, 40),
    picture=st.sampled_from([None, None, None, 0, 1]),
    arrival_s=st.integers(0, 8).map(float),
    priority=st.sampled_from([0, 0, 0, 1, 2]),
    life_s=st.sampled_from([5.0, LONG_S, LONG_S]),
    salt=st.sampled_from([b"", b"", b"tenant"]),
    scored=st.sampled_from([None, None, None, 1]),
    bound=st.sampled_from([False, False, True]),
)
