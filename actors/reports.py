"""What engines and encoders say of themselves, and what the planner says to them: identity, load, roles."""

from __future__ import annotations

from dataclasses import dataclass, fields

from actors.types import EngineRole


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadReport:
    """What an engine says of itself every heartbeat. ``step`` only grows while the step thread is alive."""

    step: int
    running: int
    waiting: int
    free_blocks: int
    total_blocks: int
    block_size: int
    queued_tokens: int
    reserved: int = 0
    """Sequences that hold blocks for a transfer."""
    cached_blocks: int = 0
    """Of the free blocks, those that still hold a known prefix."""
    prefix_queried_tokens: int = 0
    """Prompt tokens looked up in the prefix cache since start."""
    prefix_hit_tokens: int = 0
    """Of these, found in the prefix cache."""
    preemptions: int = 0
    """Sequences that lost their blocks to another since start."""
    draining: bool = False
    """It leaves: what it has may finish, nothing new is taken."""
    prefill_busy: float = 0.0
    """Share of the last seconds that prompts took of its steps. The planner's: routers are not told."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupReport:
    """What the ranks of an engine did together. Counts and seconds since the start, but for the skews."""

    ranks: int
    processes: tuple[int, ...]
    """Their ids by rank, each on its own node."""
    steps: int
    """Plans that were run, those without tokens among them."""
    plan_s: float
    """From a plan to its last part on its way."""
    own_s: float
    """The leader's own parts."""
    gather_s: float
    """Waiting for the others' results behind the own part."""
    text_skew: float
    """Rows of the busiest rank over the mean of ranks when the load was last taken, mean of layers. 1 is even."""
    vision_skew: float
    loads: int
    """Times the load of the experts was taken."""
    moves: int
    """Times experts changed ranks."""
    moved_experts: int
    """Of all layers."""
    move_s: float
    """The time steps waited for loads and moves."""


@dataclass(frozen=True, kw_only=True, slots=True)
class KvIdentity:
    """What the KV of equal prompts depends on besides them: the same for engines that may exchange blocks."""

    fingerprint: str
    """Language-weights fingerprint, hexadecimal."""
    dtype: str
    block_size: int
    switches: str
    """Routing and position rules in one string."""

    def differences(self, other: KvIdentity) -> list[str]:
        """Names of fields that differ."""
        return [f.name for f in fields(self) if getattr(self, f.name) != getattr(other, f.name)]


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineInfo:
    """Identity of an engine, for the registry and for pairing."""

    engine_id: str
    incarnation: str
    address: str
    role: EngineRole
    epoch: int
    fingerprint: str
    """Language-weights fingerprint, hexadecimal."""
    dtype: str
    block_size: int
    switches: str
    """Routing and position rules in one string; engines pair only when equal."""
    max_model_len: int
    notes: tuple[str, ...] = ()
    """What it says of itself at start, for people: memory and the forms it computes with."""

    @property
    def kv_identity(self) -> KvIdentity:
        return KvIdentity(
            fingerprint=self.fingerprint, dtype=self.dtype, block_size=self.block_size, switches=self.switches
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class RoleOrder:
    """The planner's word that an engine is to take another role."""

    term: int
    """Of the planner. Engines heed no lower one than they know."""
    epoch: int
    """Of the engine when this was decided: in any other the order is void."""
    former: EngineRole
    role: EngineRole
    substitutes: tuple[str, ...]
    """Incarnations of engines that together do without it what is to be done: prefill and decode."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EncoderInfo:
    """Identity of a vision encoder, for the registry."""

    encoder_id: str
    incarnation: str
    address: str
    fingerprint: str
    """Vision-weights fingerprint, hexadecimal."""
    dtype: str
