"""Pulls embeddings of admitted sequences into a prefill engine, within a byte window.

Units of a sequence are pulled in prompt order, one at a time; sequences share the window first come, first served. It
never deadlocks if a sequence that was started computes whatever it is given. A unit larger than the window travels
alone.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

import torch

from actors.errors import InternalError, ServingError, Unavailable
from actors.log_context import about
from actors.types import MediaSpan, SequenceKey
from actors.wire.byte_budget import ByteBudget
from actors.wire.media import MediaMiss

log = logging.getLogger(__name__)

PULL_TRIES = 3
"""How often one unit is pulled, made again in between, before its sequence fails."""

Pull = Callable[[MediaSpan, bytes, SequenceKey], Awaitable[torch.Tensor]]
"""(span, embedding key, reader) -> [tokens_per_unit, D] from the span's encoder; raises MediaMiss."""


class _Pulling:
    def __init__(self, media: tuple[MediaSpan, ...]) -> None:
        self.media = media
        self.held: dict[tuple[int, int], int] = {}
        self.consumed: set[tuple[int, int]] = set()
        self.resupplied = asyncio.Event()
        self.task: asyncio.Task[None] | None = None


class EmbeddingPuller:
    """Lives on the replica's event loop; ``supply`` hands tensors to the engine, ``fail`` ends a sequence there."""

    def __init__(
        self,
        pull: Pull,
        *,
        supply: Callable[[SequenceKey, int, int, torch.Tensor], None],
        need: Callable[[SequenceKey, tuple[bytes, ...]], None],
        fail: Callable[[SequenceKey, ServingError], None],
        bytes_per_token: int,
        window_bytes: int,
    ) -> None:
        self._pull = pull
        self._supply = supply
        self._need = need
        self._fail = fail
        self._bytes_per_token = bytes_per_token
        self._window = ByteBudget(window_bytes)
        self._active: dict[SequenceKey, _Pulling] = {}
        self.pulled_units = 0
        self.pulled_bytes = 0
        self.misses = 0

    @property
    def held_bytes(self) -> int:
        return self._window.used

    def start(self, key: SequenceKey, media: tuple[MediaSpan, ...], cached_tokens: int = 0) -> None:
        """Pulls what an admitted sequence needs: not units that end by ``cached_tokens`` of its prompt."""
        state = self._active[key] = _Pulling(media)
        with about(key.request_id):
            state.task = asyncio.get_running_loop().create_task(self._run(key, state, cached_tokens))

    def resupply(self, key: SequenceKey, media: tuple[MediaSpan, ...]) -> None:
        """Media that were gone were made again."""
        if (state := self._active.get(key)) is not None:
            state.media = media
            state.resupplied.set()

    def consumed(self, key: SequenceKey, media_index: int, unit_index: int) -> None:
        """The engine dropped a unit's embedding."""
        if (state := self._active.get(key)) is None:
            return
        size = state.held.pop((media_index, unit_index), None)
        if size is None:  # It came from before a preemption, and need not be pulled again.
            state.consumed.add((media_index, unit_index))
        else:
            self._window.give(size)

    def stop(self, key: SequenceKey) -> None:
        """The sequence ended, or lost its blocks and the embeddings with them. Idempotent."""
        state = self._active.pop(key, None)
        if state is not None:
            if state.task is not None:
                state.task.cancel()
            for size in state.held.values():
                self._window.give(size)

    def check_integrity(self) -> None:
        held = sum(sum(state.held.values()) for state in self._active.values())
        if not self._active and self._window.used:
            raise RuntimeError(f"{self._window.used} bytes of embeddings held for no sequence")
        if held > self._window.used:
            raise RuntimeError(f"{held} bytes held but {self._window.used} taken from the window")

    async def _run(self, key: SequenceKey, state: _Pulling, cached_tokens: int) -> None:
        """Whatever goes wrong here must end the sequence: it would wait for its embeddings until its deadline."""
        try:
            await self._pull_all(key, state, cached_tokens)
        except ServingError as error:
            self._fail(key, error)
        except Exception:
            log.exception("%s: pulling embeddings failed", key)
            self._fail(key, InternalError("pulling embeddings failed"))

    async def _pull_all(self, key: SequenceKey, state: _Pulling, cached_tokens: int) -> None:
        for media_index, first_span in enumerate(state.media):
            unit_tokens = first_span.grid.tokens_per_unit
            size = min(unit_tokens * self._bytes_per_token, self._window.limit)
            for unit_index in range(first_span.grid.units):
                if first_span.offset + (unit_index + 1) * unit_tokens <= cached_tokens:
                    continue
                await self._window.take(size)
                if (media_index, unit_index) in state.consumed:
                    self._window.give(size)
                    continue
                state.held[media_index, unit_index] = size
                tensor = await self._fetch(key, state, media_index, unit_index)
                self._supply(key, media_index, unit_index, tensor)

    async def _fetch(self, key: SequenceKey, state: _Pulling, media_index: int, unit_index: int) -> torch.Tensor:
        misses = 0
        while True:
            span = state.media[media_index]
            embedding_key = span.embedding_keys[unit_index]
            state.resupplied.clear()
            try:
                embedding = await self._pull(span, embedding_key, key)
                self.pulled_units += 1
                self.pulled_bytes += embedding.nbytes
                return embedding
            except MediaMiss as error:
                self.misses += 1
                misses += 1
                if misses == PULL_TRIES:
                    message = "embeddings were lost again and again"
                    raise Unavailable(message, reason="STAGE_LOST", retry_after_s=1.0) from None
                log.warning("%s: embedding %s is gone (%s): asking for it again", key, embedding_key.hex()[:12], error)
            self._need(key, (embedding_key,))
            await state.resupplied.wait()
