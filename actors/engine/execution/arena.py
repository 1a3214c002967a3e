"""One run of bytes per rank: KV blocks from the front, the vision expert bank in the tail.

    0                       bank_offset                          size
    | block 0 | block 1 | ... |     vision bank                   |     prefill, colocated
    | block 0 | block 1 | ... | block k | ...               | rest |     decode: the tail holds blocks too

Addresses never change, so an engine can change its role by giving the tail from one use to the other.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

ALIGNMENT = 4096


@dataclass(frozen=True, kw_only=True, slots=True)
class ArenaPlan:
    """How many blocks fit, with and without the vision bank in the tail."""

    size_bytes: int
    block_bytes: int
    bank_bytes: int
    """0 when this engine never holds the bank."""

    def __post_init__(self) -> None:
        if self.block_bytes < 1 or self.bank_bytes < 0:
            raise ValueError(f"block_bytes = {self.block_bytes}, bank_bytes = {self.bank_bytes}")
        if self.bank_offset < self.block_bytes:
            raise ValueError(
                f"an arena of {self.size_bytes} bytes holds no KV block of {self.block_bytes} bytes "
                f"beside a vision bank of {self.bank_bytes} bytes"
            )

    @property
    def bank_offset(self) -> int:
        return (self.size_bytes - self.bank_bytes) // ALIGNMENT * ALIGNMENT if self.bank_bytes else self.size_bytes

    @property
    def blocks_beside_bank(self) -> int:
        return self.bank_offset // self.block_bytes

    @property
    def blocks_without_bank(self) -> int:
        return self.size_bytes // self.block_bytes


def arena_bytes(block_count: int, block_bytes: int, bank_bytes: int = 0) -> int:
    """Size of the smallest arena with ``block_count`` blocks beside a bank of ``bank_bytes``."""
    blocks = block_count * block_bytes
    if not bank_bytes:
        return blocks
    return -(-blocks // ALIGNMENT) * ALIGNMENT + -(-bank_bytes // ALIGNMENT) * ALIGNMENT


class Arena:
    """Owns the bytes. They start as zeros: attention multiplies unused slots by zero, which must not be NaN."""

    def __init__(self, plan: ArenaPlan, device: torch.device | str = "cpu") -> None:
        self.plan = plan
        self.bytes = torch.zeros(plan.size_bytes, dtype=torch.uint8, device=device)

    def bank_storage(self) -> Tensor:
        """uint8 view of the tail, for a VisionBank. Raises ValueError if none was planned."""
        if not self.plan.bank_bytes:
            raise ValueError("this arena was planned without a vision bank")
        return self.bytes[self.plan.bank_offset : self.plan.bank_offset + self.plan.bank_bytes]

    def block_storage(self) -> Tensor:
        """uint8 view of all KV blocks, those of the tail among them."""
        return self.bytes[: self.plan.blocks_without_bank * self.plan.block_bytes]
