"""Our engine, as a replica runs it but for the network."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import torch
from scenarios import Outcome, Prompt, Scenario
from torch import Tensor

from actors.engine.config import EngineConfig
from actors.engine.engine import Engine
from actors.engine.events import EngineSink
from actors.engine.execution.kv_cache import KvCache, KvLayout
from actors.engine.execution.runner import Runner
from actors.engine.group.group_runner import GroupRunner
from actors.ernie.bank import empty_bank_buffer
from actors.ernie.config import Rules
from actors.ernie.text import LanguageModel
from actors.ernie.vision import VisionModel
from actors.ernie.weights import Checkpoint, load_language, load_vision
from actors.reports import KvIdentity
from actors.types import (
    AttemptMode,
    EngineRequest,
    EngineRole,
    Grid,
    MediaKind,
    MediaSpan,
    MilestoneKind,
    SamplingParams,
    SequenceKey,
    TokenEvent,
)

BLOCK_SIZE = 16
BLOCKS = 1024


class StepLog(EngineSink):
    """Notes when each step's tokens came."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.engine: Engine | None = None
        self.embeddings: dict[SequenceKey, list[Tensor]] = {}
        self.clear()

    def clear(self) -> None:
        self.steps: list[tuple[float, list[TokenEvent]]] = []
        self.released = 0
        self.failure: BaseException | None = None

    def on_tokens(self, tokens: list[TokenEvent]) -> None:
        self.steps.append((time.perf_counter(), tokens))

    def on_admitted(self, key: SequenceKey, cached_tokens: int) -> None:
        assert self.engine is not None
        for unit, embedding in enumerate(self.embeddings.pop(key, [])):
            self.engine.supply_embedding(key, 0, unit, embedding)

    def on_milestone(self, key: SequenceKey, kind: MilestoneKind, busy_s: float, token_count: int) -> None:
        if kind is MilestoneKind.RELEASED:
            with self.changed:
                self.released += 1
                self.changed.notify_all()

    def on_ended(self, key: SequenceKey, error: Exception) -> None:
        self.on_fatal(error)

    def on_fatal(self, error: BaseException) -> None:
        with self.changed:
            self.failure = error
            self.changed.notify_all()

    def wait(self, count: int) -> None:
        with self.changed:
            self.changed.wait_for(lambda: self.failure is not None or self.released == count)
        if self.failure is not None:
            raise self.failure


class Ours:
    """The engine as a replica runs it, without its network."""

    def __init__(self, directory: Path, dtype: torch.dtype) -> None:
        with Checkpoint(directory) as checkpoint:
            self.config = checkpoint.config
            text = self.config.text
            bank = empty_bank_buffer(text, dtype)
            self.model: LanguageModel = load_language(checkpoint, self.config, dtype=dtype, bank_storage=bank)
            self.vision: VisionModel = load_vision(checkpoint, self.config, dtype=dtype)
        layout = KvLayout(
            num_layers=text.num_hidden_layers,
            block_size=BLOCK_SIZE,
            num_kv_heads=text.num_key_value_heads,
            head_dim=text.head_dim,
            dtype=dtype,
        )
        rules = Rules.transformers()
        runner = Runner(self.model, self.config, rules, KvCache.allocate(layout, BLOCKS))
        # Every prompt is to be computed, whatever an earlier run left behind.
        settings = EngineConfig(
            role=EngineRole.COLOCATED, max_model_len=4096, block_size=BLOCK_SIZE, prefix_caching=False
        )
        identity = KvIdentity(fingerprint="", dtype=str(dtype), block_size=BLOCK_SIZE, switches=rules.switches)
        self.token_bytes = layout.token_bytes
        self.sink = StepLog()
        self.engine = Engine(settings, self.config, rules, GroupRunner(runner), self.sink, identity=identity)
        self.sink.engine = self.engine
        self.engine.start()
        self._runs = 0

    def run(self, scenario: Scenario, prompts: Sequence[Prompt], tokens: int) -> Outcome:
        """``tokens`` outputs of each sequence."""
        self._runs += 1
        self.sink.clear()
        sampling = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)
        started = time.perf_counter()
        for index, prompt in enumerate(prompts):
            key = SequenceKey(f"{self._runs}-{index}", 0, 0)
            media: tuple[MediaSpan, ...] = ()
            if prompt.patches is not None and scenario.grid is not None:
                media = (self._encode(key, prompt, scenario.grid),)
            request = EngineRequest(
                prompt_ids=prompt.ids,
                media=media,
                sampling=sampling,
                seed=0,
                arrival_s=time.time(),
                deadline_s=time.time() + 3600,
            )
            self.engine.submit(key, request, AttemptMode.COLOCATED)
        self.sink.wait(len(prompts))
        firsts = {e.key.request_id: (e.token_id, at) for at, events in self.sink.steps for e in events if e.index == 0}
        first = [firsts[f"{self._runs}-{index}"][0] for index in range(len(prompts))]
        if scenario.decode:
            return Outcome(tokens_per_s=len(prompts) / statistics.median(self._decode_steps(len(prompts))), first=first)
        seconds = max(at for _, at in firsts.values()) - started
        return Outcome(tokens_per_s=sum(len(prompt.ids) for prompt in prompts) / seconds, first=first)

    def _encode(self, key: SequenceKey, prompt: Prompt, grid: Grid) -> MediaSpan:
        assert prompt.patches is not None
        with torch.inference_mode():
            self.sink.embeddings[key] = self.vision.encode(torch.from_numpy(prompt.patches), [grid])
        keys = (str(key).encode().ljust(32, b"."),)
        return MediaSpan(
            kind=MediaKind.IMAGE, offset=prompt.offset, grid=grid, embedding_keys=keys, encoder_address="here"
        )

    def _decode_steps(self, batch: int) -> Iterator[float]:
        """Seconds of the steps that only decoded, for all sequences."""
        for (before, _), (at, events) in pairwise(self.sink.steps):
            if len(events) == batch and all(event.index > 0 for event in events):
                yield at - before

    @property
    def forms(self) -> dict[str, str]:
        """Which form of each part was chosen."""
        kernels = self.model.kernels
        return {
            "experts": str(self.model.experts_form),
            "kernels": "none" if kernels is None else kernels.name,
            "vision": "plain" if self.vision.kernels is None else "compiled",
        }

    def close(self) -> None:
        self.engine.stop()
