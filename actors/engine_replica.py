"""The engine as a Serve replica: one expert-parallel group, whose leader serves routers and other engines over gRPC.

    routers  == EngineLink ==>  EngineReplica -- commands -->  Engine (step thread)
    encoders == Media =======>  EmbeddingPuller ------------->    |
    engines  == KvControl ===>  KvSender, KvReceiver <--------  EngineSink

The event loop owns links, pulls and transfers; the step thread owns the engine's state. What the engine tells reaches
the loop in order. A failed step ends the process at once: Serve replaces it.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from actors.config import EngineReplicaConfig
from actors.engine.config import EngineConfig
from actors.engine.constraints.compiler import ConstraintCompiler
from actors.engine.engine import Engine
from actors.engine.events import ComputedChunk
from actors.engine.group.group_runner import GroupRunner
from actors.engine_group import EngineGroup, start_processes
from actors.engine_rank import Rank, kv_rank, load_rank
from actors.engine_stats import EngineStats
from actors.errors import AlreadyExists, InternalError, ServingError
from actors.parallel.kv_ends import KvRank
from actors.parallel.kv_transfer import KvTransferConfig
from actors.reports import EngineInfo, GroupReport, KvIdentity, LoadReport, RoleOrder
from actors.types import (
    AttemptMode,
    EngineRequest,
    EngineRole,
    MediaSpan,
    MilestoneKind,
    PromptLogprobs,
    SequenceKey,
    TokenEvent,
)
from actors.wire.audit import Audit, AuditServicer, take_audit
from actors.wire.channels import bind, make_server, node_address
from actors.wire.embedding_puller import EmbeddingPuller
from actors.wire.engine_link import EngineLinkServicer
from actors.wire.kv_receiver import KvReceiver
from actors.wire.kv_sender import KvSender
from actors.wire.media_client import MediaClient
from actors.wire.renewal import Registration, renew_for_ever
from actors.wire.unit_store import UnitStore
from ernie_serving.internal.v1 import audit_pb2_grpc, engine_link_pb2_grpc, kv_control_pb2_grpc

log = logging.getLogger(__name__)

StartGroup = Callable[[EngineReplicaConfig, EngineRole, str], EngineGroup]
"""Starts the further ranks of an engine whose leader, this process, listens on the given address. Blocks."""
MOVE_S = 2.0
"""For attempts that move to let go of their blocks, transfers included."""
STEP_LIMIT_S = 120.0
"""A step that takes longer hangs, as in a group."""
SUCCESSOR_S = 20.0
"""Longest wait of the last engine of a role for another one to take it."""
LAST_WORDS_S = 0.05
"""For what was told before a step failed to reach the routers: it names what the step computed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Attempt:
    """What the surroundings of the engine need to know of an attempt."""

    media: tuple[MediaSpan, ...]
    peer: tuple[str, str] | None


class EngineReplica:
    """One replica. Serve builds it with ``await``: ``__init__`` is a coroutine.

    Args:
        config: what to load and how much to hold.
        planner: Serve handle of the planner, which gives the role before anything is loaded.
        engine_id: stable name; this process's when None.
        host: address to listen on; the node's, as Ray knows it, when None.
        start_group: how further ranks are started, where the configuration asks for some.
        page: its metrics, in the text format of Prometheus.
    """

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self,
        config: EngineReplicaConfig,
        planner: Any,
        engine_id: str | None = None,
        host: str | None = None,
        start_group: StartGroup = start_processes,
        page: Callable[[EngineStats], bytes] = lambda _: b"",
    ) -> None:
        self._config = config
        self._page = page
        self._planner = planner
        self._group: EngineGroup | None = None
        self._incarnation = uuid.uuid4().hex
        self._loop = asyncio.get_running_loop()
        self._loop_thread = threading.get_ident()
        role: EngineRole = await planner.assign_role.remote(self._incarnation, config.pool)
        self._progress = (0, 0)
        host = host or node_address()
        self._leaves = False
        self._closing = False
        self._term = 0
        """The highest a planner had that ordered anything."""
        self._role_change: asyncio.Task[None] | None = None

        async def say_loading() -> None:
            ranks = (self._progress, *(() if self._group is None else self._group.loading))
            await planner.still_loading.remote(self._incarnation, config.pool, role, ranks)

        loading = asyncio.create_task(renew_for_ever(say_loading))
        try:
            rank, runner = await asyncio.to_thread(self._load, role, host, start_group)
        finally:
            loading.cancel()
        self._build(rank, runner, role, engine_id or f"{config.pool}-{self._incarnation[:8]}", host)
        await self._server.start()
        self._engine.start()
        self._registration = Registration(planner, self._incarnation, self._renew)
        log.info("engine %s serves as %s at %s", self._info.engine_id, role, self._info.address)

    def _load(self, role: EngineRole, host: str, start_group: StartGroup) -> tuple[Rank, GroupRunner]:
        if self._config.ranks == 1:
            rank = load_rank(self._config, role, self._note_progress)
            return rank, GroupRunner(rank.runner)
        self._group = start_group(self._config, role, host)
        return self._group.load(self._config, role, self._note_progress)

    def _build(self, rank: Rank, runner: GroupRunner, role: EngineRole, engine_id: str, host: str) -> None:
        config, text, cache = self._config, rank.config.text, rank.runner.cache
        self._runner = runner
        self._tail = None if rank.runner.roles is None else rank.runner.roles.tail
        self._attempts: dict[SequenceKey, _Attempt] = {}
        self._hidden_size = text.hidden_size
        self._dtype = rank.runner.model.dtype
        self._identity = KvIdentity(
            fingerprint=rank.fingerprint.hex(),
            dtype=config.dtype,
            block_size=config.block_size,
            switches=rank.rules.switches,
        )
        self._engine = Engine(
            EngineConfig(
                role=role,
                max_model_len=config.max_model_len or text.max_position_embeddings,
                block_size=config.block_size,
                max_num_seqs=config.max_num_seqs,
                max_batched_tokens=config.max_batched_tokens,
                max_waiting=config.max_waiting,
                prefix_caching=config.prefix_caching,
            ),
            rank.config,
            rank.rules,
            runner,
            _Sink(self),
            identity=self._identity,
            compiler=None if rank.vocabulary is None else ConstraintCompiler(rank.vocabulary),
        )
        self._server = make_server()
        self._info = EngineInfo(
            engine_id=engine_id,
            incarnation=self._incarnation,
            address=bind(self._server, host),
            role=role,
            epoch=1,
            fingerprint=self._identity.fingerprint,
            dtype=self._identity.dtype,
            block_size=self._identity.block_size,
            switches=self._identity.switches,
            max_model_len=self._engine.max_model_len,
            notes=(*rank.notes, *(() if self._group is None else self._group.notes)),
        )
        self._media = MediaClient()
        self._embeddings: UnitStore[torch.Tensor] = UnitStore(
            limit_bytes=config.media_cache_bytes,
            limit_name="media_cache_bytes",
            cache_bytes=config.media_cache_bytes,
        )
        self._puller = EmbeddingPuller(
            self._pull,
            supply=self._engine.supply_embedding,
            need=lambda key, keys: self._links.deliver_need(key, keys),
            fail=self._engine.fail,
            bytes_per_token=self._hidden_size * self._dtype.itemsize,
            window_bytes=config.media_window_bytes,
        )
        transfer = KvTransferConfig()
        self._kv_rank = kv_rank(cache, host, transfer)
        kv_ranks: list[KvRank] = [self._kv_rank, *self._runner.kv_ranks]
        self._sender = KvSender(
            engine=self._engine,
            ranks=kv_ranks,
            geometry=self._kv_rank.geometry,
            incarnation=self._incarnation,
            loop=self._loop,
            config=transfer,
        )
        self._receiver = KvReceiver(
            engine=self._engine,
            ranks=kv_ranks,
            geometry=self._kv_rank.geometry,
            incarnation=self._incarnation,
            identity=self._identity,
            loop=self._loop,
            config=transfer,
            on_transferred=lambda key, busy_s: self._links.deliver_milestone(key, MilestoneKind.TRANSFERRED, busy_s),
        )
        self._links = EngineLinkServicer(self, lambda: self._info)
        engine_link_pb2_grpc.add_EngineLinkServiceServicer_to_server(self._links, self._server)
        kv_control_pb2_grpc.add_KvControlServiceServicer_to_server(self._receiver, self._server)
        audit_pb2_grpc.add_AuditServiceServicer_to_server(
            AuditServicer(self.audit, lambda: self._page(self.stats())), self._server
        )

    # What links ask for (AttemptHost), on the event loop.

    def submit(self, key: SequenceKey, request: EngineRequest, mode: AttemptMode, peer: tuple[str, str] | None) -> None:
        if mode is AttemptMode.PREFILL and peer is None:
            raise InternalError("a prefill attempt needs the engine that decodes")
        if key in self._attempts:
            raise AlreadyExists(f"attempt {key} is active already")
        self._attempts[key] = _Attempt(media=request.media, peer=peer)
        try:
            self._engine.submit(key, request, mode)
        except Exception:
            del self._attempts[key]
            raise

    def cancel(self, key: SequenceKey) -> None:
        self._engine.cancel(key)

    def supply_media(self, key: SequenceKey, media: tuple[MediaSpan, ...]) -> None:
        if (attempt := self._attempts.get(key)) is not None:
            self._attempts[key] = replace(attempt, media=media)
        self._puller.resupply(key, media)

    def load(self) -> LoadReport:
        return replace(self._engine.load(), draining=self._leaves)

    # What the engine tells, on the event loop.

    def deliver_tokens(self, tokens: list[TokenEvent]) -> None:
        self._links.deliver_tokens(tokens)

    def deliver_end(self, key: SequenceKey, error: ServingError) -> None:
        self._links.deliver_end(key, error)

    def deliver_prompt_logprobs(self, piece: PromptLogprobs) -> None:
        self._links.deliver_prompt_logprobs(piece)

    def deliver_blocks_changed(self, stored: tuple[bytes, ...], removed: tuple[bytes, ...]) -> None:
        self._links.deliver_blocks_changed(stored, removed)

    def pass_milestone(self, key: SequenceKey, kind: MilestoneKind, busy_s: float, token_count: int) -> None:
        if kind is MilestoneKind.RELEASED:
            self._puller.stop(key)
            self._attempts.pop(key, None)
            self._links.forget(key)
        else:
            self._links.deliver_milestone(key, kind, busy_s, token_count)

    def admit(self, key: SequenceKey, cached_tokens: int) -> None:
        if (attempt := self._attempts.get(key)) is not None:
            self._puller.start(key, attempt.media, cached_tokens)

    def preempt(self, key: SequenceKey) -> None:
        self._puller.stop(key)

    def consume(self, key: SequenceKey, media_index: int, unit_index: int) -> None:
        self._puller.consumed(key, media_index, unit_index)

    # What the engine tells the transfer, on the step thread.

    def ask_for_blocks(self, key: SequenceKey, token_count: int) -> None:
        attempt = self._attempts.get(key)
        if attempt is not None and attempt.peer is not None:
            self._sender.reserve(key, *attempt.peer, token_count, self._identity)

    def push(self, chunk: ComputedChunk) -> None:
        self._sender.push(chunk)

    def give_up_transfer(self, key: SequenceKey) -> None:
        self._sender.cancel(key)

    def drop_reservation(self, key: SequenceKey) -> None:
        self._receiver.drop(key)

    async def _pull(self, span: MediaSpan, embedding_key: bytes, reader: SequenceKey) -> torch.Tensor:
        embedding = self._embeddings.get(embedding_key)
        if embedding is None:
            shape = (span.grid.tokens_per_unit, self._hidden_size)
            embedding = await self._media.pull_embedding(
                span.encoder_address, embedding_key, str(reader), shape=shape, dtype=self._dtype
            )
            self._embeddings.cache(embedding_key, embedding)
        return embedding

    # Registry, health, end.

    def _note_progress(self, bytes_done: int, bytes_total: int) -> None:
        log.info("loading: %.2f of %.2f GB", bytes_done / 1e9, bytes_total / 1e9)
        self._progress = (bytes_done, bytes_total)

    async def _renew(self) -> None:
        order: RoleOrder | None = await self._planner.renew_engine.remote(
            self._info, self._config.pool, True, self.load(), self.group_report()
        )
        if order is not None and self._role_change is None and not self._closing:
            self._role_change = asyncio.create_task(self._take_role(order))

    async def _take_role(self, order: RoleOrder) -> None:
        """Finishes or moves what is here, and serves in the other role. A checkpoint that cannot be read again ends the
        process, as a failed step does.
        """
        info = self._info
        try:
            if order.term < self._term or order.epoch != info.epoch or order.role is info.role:
                return
            if not order.substitutes:
                log.error("the planner's order to be %s names nobody who does without: refused", order.role)
                return
            self._term = order.term
            log.warning("becoming %s instead of %s", order.role, info.role)
            started = time.monotonic()
            await self._empty(self._config.role_drain_s)
            while not self._closing and not await asyncio.to_thread(self._engine.wait_idle, MOVE_S):
                log.warning("attempts still hold blocks after %.0f s", time.monotonic() - started)
            if self._closing:
                return
            await asyncio.wrap_future(self._engine.set_role(order.role))
            self._info = replace(info, role=order.role, epoch=info.epoch + 1, max_model_len=self._engine.max_model_len)
            if self._closing:
                return
            self._leaves = False
            self._links.tell_load()
            log.warning("%s since epoch %d, after %.2f s", order.role, self._info.epoch, time.monotonic() - started)
        finally:
            self._role_change = None

    async def _empty(self, timeout_s: float) -> None:
        """Takes nothing new; what is here may finish until the timeout, and then its routers move it."""
        self._leaves = True
        self._engine.drain()
        self._links.tell_load()
        if not await asyncio.to_thread(self._engine.wait_idle, timeout_s):
            self._engine.move()
            await asyncio.to_thread(self._engine.wait_idle, MOVE_S)

    def stats(self) -> EngineStats:
        """For its metrics."""
        return EngineStats(
            info=self._info,
            pool=self._config.pool,
            load=self.load(),
            tail_blocks=0 if self._tail is None else self._tail.tail_block_count,
            steps=self._engine.steps,
            sender=self._sender,
            receiver=self._receiver,
            embeddings=self._puller,
            group=self.group_report(),
        )

    def group_report(self) -> GroupReport | None:
        """None with one rank."""
        return self._runner.report()

    async def audit(self) -> Audit:
        """What is held for requests. The engine is checked between two steps: a long one must not stop the loop."""
        engine = await asyncio.to_thread(take_audit, dict, self._engine.check_integrity)
        ranks = await asyncio.to_thread(self._runner.held)
        around = take_audit(lambda: {**self._held(), **ranks}, self._check_surroundings)
        return replace(around, problem=engine.problem or around.problem)

    def _held(self) -> dict[str, int]:
        load = self._engine.load()
        return {
            "attempts": len(self._attempts),
            "linked_attempts": self._links.attempt_count,
            "blocks": load.total_blocks - load.free_blocks,
            "reservations": load.reserved,
            "embedding_bytes": self._puller.held_bytes,
        }

    def _check_surroundings(self) -> None:
        self._puller.check_integrity()
        if not self._attempts:
            self._sender.check_integrity()
            self._receiver.check_integrity()

    async def check_health(self) -> None:
        """Serve replaces a replica whose check raises. One whose step hangs ends here: its links would live on."""
        self._registration.check()
        self._engine.check_step(STEP_LIMIT_S)

    async def close(self) -> None:
        """Drains: no new attempts, running ones may finish until the drain timeout; then their routers move them. The
        last engine of a role first waits for another one to take it."""
        await self._registration.wait_for_leave(SUCCESSOR_S)
        self._closing = True
        self._leaves = True
        self._links.tell_load()
        await self._registration.end()
        if self._role_change is not None:
            await asyncio.wait([self._role_change])
        await self._empty(self._config.drain_timeout_s)
        await self._sender.close()
        await self._receiver.close()
        await self._server.stop(0.5)
        await asyncio.to_thread(self._engine.stop)
        if self._group is not None:
            await asyncio.to_thread(self._group.close)
        await self._media.close()
        self._kv_rank.close()


class _Sink:
    """EngineSink: from the step thread to the event loop, in order; transfers are told at once."""

    def __init__(self, replica: EngineReplica) -> None:
        self._replica = replica
        self._post = replica._loop.call_soon_threadsafe

    def on_tokens(self, tokens: Sequence[TokenEvent]) -> None:
        self._post(self._replica.deliver_tokens, list(tokens))

    def on_ended(self, key: SequenceKey, error: ServingError) -> None:
        self._post(self._replica.deliver_end, key, error)

    def on_prompt_logprobs(self, piece: PromptLogprobs) -> None:
        self._post(self._replica.deliver_prompt_logprobs, piece)

    def on_milestone(self, key: SequenceKey, kind: MilestoneKind, busy_s: float, token_count: int) -> None:
        self._post(self._replica.pass_milestone, key, kind, busy_s, token_count)

    def on_admitted(self, key: SequenceKey, cached_tokens: int) -> None:
        self._post(self._replica.admit, key, cached_tokens)

    def on_preempted(self, key: SequenceKey) -> None:
        self._post(self._replica.preempt, key)

    def on_blocks_changed(self, stored: tuple[bytes, ...], removed: tuple[bytes, ...]) -> None:
        self._post(self._replica.deliver_blocks_changed, stored, removed)

    def on_media_consumed(self, key: SequenceKey, media_index: int, unit_index: int) -> None:
        self._post(self._replica.consume, key, media_index, unit_index)

    def on_reserve_needed(self, key: SequenceKey, token_count: int) -> None:
        self._replica.ask_for_blocks(key, token_count)

    def on_chunk(self, chunk: ComputedChunk) -> None:
        self._replica.push(chunk)

    def on_transfer_cancelled(self, key: SequenceKey) -> None:
        self._replica.give_up_transfer(key)

    def on_reservation_dropped(self, key: SequenceKey) -> None:
        self._replica.drop_reservation(key)

    def on_fatal(self, error: BaseException) -> None:
        log.critical("a step failed: the engine ends", exc_info=error)
        if threading.get_ident() == self._replica._loop_thread:  # The loop has the last words to say.
            threading.Thread(target=_exit_soon, name="engine-end", daemon=True).start()
        else:
            _exit_soon()


def _exit_soon() -> None:
    time.sleep(LAST_WORDS_S)
    logging.shutdown()
    os._exit(1)
