"""What the metrics of an engine are made of."""

from __future__ import annotations

from dataclasses import dataclass

from actors.engine.step_tallies import StepTallies
from actors.reports import EngineInfo, GroupReport, LoadReport
from actors.wire.embedding_puller import EmbeddingPuller
from actors.wire.kv_receiver import KvReceiver
from actors.wire.kv_sender import KvSender


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineStats:
    """The parts that count, to be read at once."""

    info: EngineInfo
    pool: str
    load: LoadReport
    tail_blocks: int
    """KV blocks of the leader that lie where the vision experts would be."""
    steps: StepTallies
    sender: KvSender
    receiver: KvReceiver
    embeddings: EmbeddingPuller
    group: GroupReport | None
