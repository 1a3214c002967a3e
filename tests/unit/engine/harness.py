"""Builds engines on small models and drives them in tests."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch

from actors.engine.config import EngineConfig
from actors.engine.constraints.compiler import ConstraintCompiler
from actors.engine.engine import Engine
from actors.engine.events import ComputedChunk
from actors.engine.execution.forms import AttentionForm
from actors.engine.execution.kv_cache import KvCache, KvLayout
from actors.engine.execution.runner import Runner
from actors.engine.group.group_runner import GroupRunner
from actors.ernie.config import ErnieConfig, Rules, TextConfig
from actors.ernie.text import LanguageModel
from actors.errors import ServingError
from actors.reports import KvIdentity
from actors.types import (
    AttemptMode,
    EngineRequest,
    EngineRole,
    FinishReason,
    MilestoneKind,
    PromptLogprobs,
    SequenceKey,
    TokenEvent,
)
from tests.small_models import language_model, text_config, vision_config
from tests.unit.engine.engine_requests import EOS as EOS
from tests.unit.engine.engine_requests import IMAGE as IMAGE
from tests.unit.engine.engine_requests import VIDEO as VIDEO
from tests.unit.engine.engine_requests import key as key
from tests.unit.engine.engine_requests import media_request as media_request
from tests.unit.engine.engine_requests import request as request
from tests.unit.engine.engine_requests import span as span


def ernie_config(text: TextConfig | None = None, **changes: Any) -> ErnieConfig:
    fields: dict[str, Any] = {
        "text": text or text_config(),
        "vision": vision_config(),
        "image_token_id": IMAGE,
        "video_token_id": VIDEO,
        "image_start_token_id": 110,
        "image_end_token_id": 111,
        "video_start_token_id": 112,
        "video_end_token_id": 113,
        "eos_token_ids": (EOS,),
    }
    return ErnieConfig(**(fields | changes))


class Recorder:
    """A sink that remembers everything and answers what it was told to answer."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.tokens: dict[SequenceKey, list[TokenEvent]] = defaultdict(list)
        self.steps: list[list[TokenEvent]] = []
        self.ended: dict[SequenceKey, ServingError] = {}
        self.released: list[SequenceKey] = []
        self.milestones: list[tuple[SequenceKey, MilestoneKind, float]] = []
        self.cached: dict[SequenceKey, int] = {}
        self.prompt_logprobs: dict[SequenceKey, list[PromptLogprobs]] = defaultdict(list)
        self.preempted: list[SequenceKey] = []
        self.findable: set[bytes] = set()
        self.calls: list[tuple[Any, ...]] = []
        self.chunks: dict[SequenceKey, list[ComputedChunk]] = defaultdict(list)
        self.fatal: BaseException | None = None
        self.engine: Engine | None = None
        self.embeddings: dict[SequenceKey, dict[tuple[int, int], torch.Tensor]] = {}

    def on_tokens(self, tokens: list[TokenEvent]) -> None:
        with self.changed:
            self.steps.append(list(tokens))
            for token in tokens:
                self.tokens[token.key].append(token)
            self.changed.notify_all()

    def on_ended(self, key: SequenceKey, error: ServingError) -> None:
        with self.changed:
            assert key not in self.ended, f"{key} ended twice"
            self.ended[key] = error
            self.changed.notify_all()

    def on_prompt_logprobs(self, piece: PromptLogprobs) -> None:
        with self.changed:
            assert not self.tokens[piece.key], "a prompt's log-probabilities come before its first token"
            self.prompt_logprobs[piece.key].append(piece)
            self.changed.notify_all()

    def on_milestone(self, key: SequenceKey, kind: MilestoneKind, busy_s: float, token_count: int) -> None:
        with self.changed:
            self.milestones.append((key, kind, busy_s))
            if kind is MilestoneKind.PREFILL_STARTED:
                assert key not in self.cached, f"{key} started twice"
                self.cached[key] = token_count
            if kind is MilestoneKind.RELEASED:
                assert key not in self.released, f"{key} released twice"
                self.released.append(key)
            self.changed.notify_all()

    def on_admitted(self, key: SequenceKey, cached_tokens: int) -> None:
        self.note("admitted", key)
        assert self.engine is not None
        for (media, unit), embedding in self.embeddings.get(key, {}).items():
            self.engine.supply_embedding(key, media, unit, embedding)

    def on_media_consumed(self, key: SequenceKey, media_index: int, unit_index: int) -> None:
        self.note("consumed", key, media_index, unit_index)

    def on_preempted(self, key: SequenceKey) -> None:
        with self.changed:
            self.preempted.append(key)
            self.changed.notify_all()

    def on_blocks_changed(self, stored: tuple[bytes, ...], removed: tuple[bytes, ...]) -> None:
        with self.changed:
            assert not self.findable & set(stored) and self.findable >= set(removed)
            self.findable |= set(stored)
            self.findable -= set(removed)

    def on_reserve_needed(self, key: SequenceKey, token_count: int) -> None:
        self.note("reserve_needed", key, token_count)

    def on_chunk(self, chunk: ComputedChunk) -> None:
        with self.changed:
            self.chunks[chunk.key].append(chunk)
            self.changed.notify_all()

    def on_transfer_cancelled(self, key: SequenceKey) -> None:
        self.note("transfer_cancelled", key)

    def on_reservation_dropped(self, key: SequenceKey) -> None:
        self.note("reservation_dropped", key)

    def on_fatal(self, error: BaseException) -> None:
        with self.changed:
            self.fatal = error
            self.changed.notify_all()

    def note(self, *call: Any) -> None:
        with self.changed:
            self.calls.append(call)
            self.changed.notify_all()

    def wait(self, condition: Any, timeout_s: float = 60.0) -> None:
        """Until ``condition()`` holds; fails the test on a fatal error or after a time that only a hang takes."""
        with self.changed:
            assert self.changed.wait_for(lambda: self.fatal is not None or condition(), timeout_s), "nothing happened"
        if self.fatal is not None:
            raise self.fatal

    def ids(self, key: SequenceKey) -> list[int]:
        events = self.tokens[key]
        first = events[0].index if events else 0
        assert [event.index for event in events] == list(range(first, first + len(events)))
        return [event.token_id for event in events]

    def finish(self, key: SequenceKey) -> FinishReason | None:
        return self.tokens[key][-1].finish if self.tokens[key] else None


def kv_layout(model: LanguageModel, block_size: int) -> KvLayout:
    config = model.config
    return KvLayout(
        num_layers=config.num_hidden_layers,
        block_size=block_size,
        num_kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        dtype=model.dtype,
    )


class Rig:
    """An engine with a real model, its cache and a recorder; use as a context manager."""

    def __init__(
        self,
        model: LanguageModel | None = None,
        *,
        config: ErnieConfig | None = None,
        rules: Rules | None = None,
        blocks: int = 64,
        cache: KvCache | None = None,
        sink: Recorder | None = None,
        batched_decode: bool = True,
        compiler: ConstraintCompiler | None = None,
        group: Callable[[Runner], GroupRunner] = GroupRunner,
        **options: Any,
    ) -> None:
        fields: dict[str, Any] = {
            "role": EngineRole.COLOCATED,
            "block_size": 4,
            "max_model_len": 200,
            "max_num_seqs": 8,
        }
        engine_config = EngineConfig(**(fields | options))
        self.model = model or language_model(text_config())
        self.config = config or ernie_config(self.model.config)
        self.rules = rules or Rules.original()
        self.cache = cache or KvCache.allocate(
            kv_layout(self.model, engine_config.block_size), blocks, self.model.device
        )
        attention = AttentionForm.PAGED if batched_decode else AttentionForm.PLAIN
        self.runner = Runner(self.model, self.config, self.rules, self.cache, attention=attention)
        self.sink = sink or Recorder()
        self.group = group(self.runner)
        identity = KvIdentity(
            fingerprint="00", dtype="float64", block_size=engine_config.block_size, switches=self.rules.switches
        )
        self.engine = Engine(
            engine_config,
            self.config,
            self.rules,
            self.group,
            self.sink,
            identity=identity,
            compiler=compiler,
        )
        self.sink.engine = self.engine

    def __enter__(self) -> Rig:
        self.engine.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None and self.sink.fatal is None:
            self.assert_empty()
        self.engine.stop()

    def assert_empty(self) -> None:
        """Everything is free; true once all attempts have been released."""
        self.engine.check_integrity()
        load = self.engine.load()
        assert (load.running, load.waiting, load.reserved, load.queued_tokens) == (0, 0, 0, 0)
        assert load.free_blocks == load.total_blocks
        assert self.runner.resident_count == self.group.tracked_count == 0

    def submit(
        self,
        name: str | int,
        wanted: EngineRequest,
        embeddings: dict[tuple[int, int], torch.Tensor] | None = None,
        mode: AttemptMode = AttemptMode.COLOCATED,
    ) -> SequenceKey:
        if embeddings:
            self.sink.embeddings[key(name)] = embeddings
        self.engine.submit(key(name), wanted, mode)
        return key(name)

    def wait_released(self, *keys: SequenceKey) -> None:
        self.sink.wait(lambda: all(key in self.sink.released for key in keys))

    def run(self, *wanted: Any) -> list[list[int]]:
        """Submits requests, or pairs of request and embeddings; returns the output ids of each once all ended."""
        keys = []
        for number, item in enumerate(wanted):
            pair = item if isinstance(item, tuple) else (item, None)
            keys.append(self.submit(number, *pair))
        self.wait_released(*keys)
        for name in keys:
            assert name not in self.sink.ended, self.sink.ended[name].message
        return [self.sink.ids(name) for name in keys]
