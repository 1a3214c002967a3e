"""What others hear of a step, read off a sequence after it."""

from __future__ import annotations

from dataclasses import dataclass

from actors.engine.events import ComputedChunk
from actors.engine.plan import ALL_LAYERS, LayerPart, Slice, StepResult
from actors.engine.scheduling.sequence import Sequence
from actors.types import PromptLogprobs, TokenEvent


@dataclass(frozen=True, kw_only=True, slots=True)
class StepOutcome:
    """What a step gave. Log-probabilities of prompts are told before tokens."""

    tokens: list[TokenEvent]
    prompt_logprobs: list[PromptLogprobs]


def next_chunk(
    sequence: Sequence, end: int, token: int | None = None, part: LayerPart = ALL_LAYERS
) -> ComputedChunk | None:
    """What the decode engine lacks of the first ``end`` tokens in a part of the layers, those found in the cache here
    as well; with ``token`` the last chunk, which has no tokens where they were handed over before. None if there is
    nothing to hand over.
    """
    first = sequence.sent_tokens
    count = max(0, end - first)
    if (count == 0 and token is None) or (part.count > 1 and part.index < sequence.sent_parts):
        return None
    assert part.index == sequence.sent_parts, "a part of the layers was not handed over"
    assert sequence.rank is not None, "what is computed lies on a rank"
    chunk = ComputedChunk(
        key=sequence.key,
        rank=sequence.rank,
        index=sequence.chunk_count,
        first_token=first,
        token_count=count,
        part=part,
        block_table=tuple(sequence.blocks),
        last=token is not None,
        first_output_id=token,
        finished=sequence.finished,
    )
    sequence.sent_tokens += count if part.is_last else 0
    sequence.sent_parts = 0 if part.is_last else part.index + 1
    sequence.chunk_count += 1
    return chunk


def next_prompt_logprobs(sequence: Sequence, part: Slice, result: StepResult) -> PromptLogprobs | None:
    """What a slice gave of the prompt, but not what was told before a preemption; None if that was all.

    Raises ValueError if the runner gave another number than there are tokens.
    """
    first = part.first + 1 if part.first else 0
    end = min(part.first + part.count + 1, len(sequence.request.prompt_ids))
    entries = result.prompt_logprobs.get(part.id, ())
    if len(entries) != end - first:
        raise ValueError(f"{len(entries)} prompt log-probabilities for tokens {first} .. {end}")
    told = sequence.prompt_logprobs_told
    if end <= told:
        return None
    sequence.prompt_logprobs_told = end
    return PromptLogprobs(key=sequence.key, first=max(first, told), entries=entries[max(0, told - first) :])
