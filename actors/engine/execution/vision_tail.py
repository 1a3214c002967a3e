"""The tail of a rank's arena: the vision experts, or KV blocks. What a role change changes on a rank is this."""

from __future__ import annotations

from collections.abc import Callable

from actors.engine.execution.arena import Arena
from actors.ernie.bank import VisionBank, empty_bank_buffer
from actors.ernie.text import LanguageModel

FillBank = Callable[[VisionBank], object]
"""Reads the experts of a bank into it."""


class VisionTail:
    """Owns the tail. It begins as blocks. Between steps; who uses which block is the BlockPool's business."""

    def __init__(self, arena: Arena, model: LanguageModel) -> None:
        self._arena = arena
        self._model = model

    @property
    def block_count(self) -> int:
        """Blocks there are at present."""
        plan = self._arena.plan
        return plan.blocks_without_bank if self._model.vision_bank is None else plan.blocks_beside_bank

    @property
    def tail_block_count(self) -> int:
        """Of the blocks, those that lie in the tail."""
        return self.block_count - self._arena.plan.blocks_beside_bank

    def hold_bank(self, fill: FillBank) -> None:
        """The tail holds the vision experts; its blocks must be out of use. No effect where it does already."""
        model, arena = self._model, self._arena
        if model.vision_bank is not None:
            return
        # A model without sparse layers has a bank all the same, of no bytes.
        has_bytes = arena.plan.bank_bytes > 0
        storage = (
            arena.bank_storage()
            if has_bytes
            else empty_bank_buffer(model.config, model.dtype, model.device, model.share)
        )
        bank = VisionBank(model.config, model.dtype, storage, model.share)
        fill(bank)
        model.attach_vision_bank(bank)

    def hold_blocks(self) -> None:
        """The tail holds KV blocks, empty ones. No effect where it does already."""
        if self._model.vision_bank is None:
            return
        self._model.detach_vision_bank()
        if self._arena.plan.bank_bytes:
            self._arena.bank_storage().zero_()
