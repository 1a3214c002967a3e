"""What the leader and the other ranks of a group tell each other. Pickled between processes that share a random key."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from actors.engine.group.kv_messages import KvAnswer, KvOrder
from actors.engine.plan import LayerPart, RankPlan, StepResult
from actors.parallel.layout import ExpertPlacement
from actors.types import EngineRole


@dataclass(frozen=True, slots=True)
class Tick:
    """Either side, when it had nothing else to say: it is alive."""


@dataclass(frozen=True, slots=True)
class Hello:
    """Rank, first of all."""

    rank: int


@dataclass(frozen=True, slots=True)
class Loading:
    """Rank, now and then before it is ready."""

    bytes_done: int
    bytes_total: int


@dataclass(frozen=True, slots=True)
class Ready:
    """Rank, once: it is loaded."""

    block_count: int
    process: int
    """Its id."""
    kv_address: str
    """``host:port`` where KV for this rank is brought."""
    notes: tuple[str, ...]
    """What it says of itself, for people."""


@dataclass(frozen=True, slots=True)
class Part:
    """Leader: a rank's part of a step."""

    number: int
    """Of the message; counts up by one."""
    plan: RankPlan
    masks: Mapping[int, bytes | None]
    """By sequence that samples and is bound by a constraint: the packed row of ids that may come, None for all."""


@dataclass(frozen=True, slots=True)
class Written:
    """Rank, in the midst of a part with prompts: keys and values of its tokens are in the cache, in those layers."""

    layers: LayerPart


@dataclass(frozen=True, slots=True)
class Done:
    """Rank: the result of the part of that number."""

    number: int
    result: StepResult
    seconds: float
    """What computing took."""


@dataclass(frozen=True, slots=True)
class AskHeld:
    """Leader, between two parts: what is kept there?"""


@dataclass(frozen=True, slots=True)
class Held:
    """Rank: counts by name, of what it keeps for sequences; all 0 when idle."""

    counts: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class TakeLoad:
    """Leader, between two parts: all ranks take the load of the experts. No answer."""


@dataclass(frozen=True, slots=True)
class MoveExperts:
    """Leader, between two parts: all ranks exchange experts. No answer."""

    wanted: ExpertPlacement


@dataclass(frozen=True, slots=True)
class SetRole:
    """Leader, between two parts: see ``Runner.set_role``."""

    role: EngineRole


@dataclass(frozen=True, slots=True)
class RoleSet:
    """Rank: it is done, and has so many KV blocks."""

    block_count: int


@dataclass(frozen=True, slots=True)
class Failed:
    """Rank, last of all: its process ends because of this."""

    reason: str
    silent: tuple[int, ...] = ()
    """Ranks that gave no word when the group's world broke: not this one is to blame, but they."""


@dataclass(frozen=True, slots=True)
class End:
    """Leader, last of all: the rank's process may end in peace."""


@dataclass(frozen=True, slots=True)
class Embedding:
    """Leader: an embedding [tokens of the unit, D], as bytes."""

    id: int
    media_index: int
    unit_index: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    content: bytes

    @classmethod
    def of(cls, id: int, media_index: int, unit_index: int, embedding: Tensor) -> Embedding:
        content = embedding.detach().contiguous().cpu().view(torch.uint8).numpy().tobytes()
        return cls(id, media_index, unit_index, tuple(embedding.shape), embedding.dtype, content)

    def tensor(self) -> Tensor:
        """On the CPU."""
        return torch.frombuffer(bytearray(self.content), dtype=torch.uint8).view(self.dtype).view(self.shape)


ToRank = Part | Embedding | TakeLoad | MoveExperts | SetRole | AskHeld | KvOrder | End | Tick
FromRank = Hello | Loading | Ready | Written | Done | Held | RoleSet | KvAnswer | Failed | Tick
