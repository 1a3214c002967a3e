"""Between ``actors.types`` and the internal protobuf messages. Pure; every pair round-trips."""

from __future__ import annotations

from actors.errors import ServingError, Status
from actors.reports import LoadReport
from actors.types import (
    AttemptMode,
    EngineRequest,
    EngineRole,
    FinishReason,
    Grid,
    MediaKind,
    MediaSpan,
    MilestoneKind,
    PromptLogprobs,
    SamplingParams,
    SequenceKey,
    Structure,
    StructureKind,
    TokenEvent,
    TokenLogprobs,
)
from actors.wire.status import KINDS
from ernie_serving.internal.v1 import common_pb2, engine_link_pb2

PROTOCOL_VERSION = 3
"""First field of every hello between our own parts; a mismatch is refused."""

ROLES = {
    EngineRole.PREFILL: common_pb2.ENGINE_ROLE_PREFILL,
    EngineRole.DECODE: common_pb2.ENGINE_ROLE_DECODE,
    EngineRole.COLOCATED: common_pb2.ENGINE_ROLE_COLOCATED,
}
ROLE_OF = {wire: role for role, wire in ROLES.items()}
MODES = {
    AttemptMode.COLOCATED: engine_link_pb2.ATTEMPT_MODE_COLOCATED,
    AttemptMode.PREFILL: engine_link_pb2.ATTEMPT_MODE_PREFILL,
    AttemptMode.DECODE: engine_link_pb2.ATTEMPT_MODE_DECODE,
}
MILESTONES = {
    MilestoneKind.PREFILL_STARTED: engine_link_pb2.MILESTONE_KIND_PREFILL_STARTED,
    MilestoneKind.TRANSFERRED: engine_link_pb2.MILESTONE_KIND_TRANSFERRED,
    MilestoneKind.MEDIA_AWAITED: engine_link_pb2.MILESTONE_KIND_MEDIA_AWAITED,
}
_FINISH = {
    None: engine_link_pb2.FINISH_REASON_UNSPECIFIED,
    FinishReason.STOP: engine_link_pb2.FINISH_REASON_STOP,
    FinishReason.LENGTH: engine_link_pb2.FINISH_REASON_LENGTH,
}
MODE_OF = {value: mode for mode, value in MODES.items()}
MILESTONE_OF = {value: kind for kind, value in MILESTONES.items()}
_FINISH_OF = {value: reason for reason, value in _FINISH.items()}


def key_to_proto(key: SequenceKey) -> common_pb2.SequenceKey:
    return common_pb2.SequenceKey(request_id=key.request_id, attempt=key.attempt, choice=key.choice)


def key_from_proto(message: common_pb2.SequenceKey) -> SequenceKey:
    return SequenceKey(message.request_id, message.attempt, message.choice)


def grid_to_proto(grid: Grid) -> common_pb2.Grid:
    return common_pb2.Grid(frames=grid.frames, height=grid.height, width=grid.width)


def grid_from_proto(message: common_pb2.Grid) -> Grid:
    return Grid(message.frames, message.height, message.width)


def span_to_proto(span: MediaSpan) -> engine_link_pb2.MediaSpan:
    return engine_link_pb2.MediaSpan(
        video=span.kind is MediaKind.VIDEO,
        offset=span.offset,
        grid=grid_to_proto(span.grid),
        embedding_keys=span.embedding_keys,
        encoder_address=span.encoder_address,
    )


def span_from_proto(message: engine_link_pb2.MediaSpan) -> MediaSpan:
    return MediaSpan(
        kind=MediaKind.VIDEO if message.video else MediaKind.IMAGE,
        offset=message.offset,
        grid=grid_from_proto(message.grid),
        embedding_keys=tuple(message.embedding_keys),
        encoder_address=message.encoder_address,
    )


def sampling_to_proto(sampling: SamplingParams) -> engine_link_pb2.Sampling:
    allowed, structure = sampling.allowed_token_ids, sampling.structure
    return engine_link_pb2.Sampling(
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        min_p=sampling.min_p,
        repetition_penalty=sampling.repetition_penalty,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        logit_bias=[engine_link_pb2.LogitBias(token_id=token, bias=bias) for token, bias in sampling.logit_bias],
        allowed_token_ids=None if allowed is None else engine_link_pb2.TokenIds(ids=allowed),
        bad_words=[engine_link_pb2.TokenIds(ids=ids) for ids in sampling.bad_words_ids],
        min_tokens=sampling.min_tokens,
        max_tokens=sampling.max_tokens,
        stop_token_ids=sampling.stop_token_ids,
        ignore_eos=sampling.ignore_eos,
        logprobs=sampling.logprobs,
        prompt_logprobs=sampling.prompt_logprobs,
        structure=None
        if structure is None
        else engine_link_pb2.Structure(kind=structure.kind.value, text=structure.text),
        starts_thinking=sampling.starts_thinking,
        reasoning_max_tokens=sampling.reasoning_max_tokens,
    )


def sampling_from_proto(message: engine_link_pb2.Sampling) -> SamplingParams:
    structure = message.structure
    return SamplingParams(
        temperature=message.temperature,
        top_p=message.top_p,
        top_k=message.top_k,
        min_p=message.min_p,
        repetition_penalty=message.repetition_penalty,
        presence_penalty=message.presence_penalty,
        frequency_penalty=message.frequency_penalty,
        logit_bias=tuple((entry.token_id, entry.bias) for entry in message.logit_bias),
        allowed_token_ids=tuple(message.allowed_token_ids.ids) if message.HasField("allowed_token_ids") else None,
        bad_words_ids=tuple(tuple(word.ids) for word in message.bad_words),
        min_tokens=message.min_tokens,
        max_tokens=message.max_tokens,
        stop_token_ids=tuple(message.stop_token_ids),
        ignore_eos=message.ignore_eos,
        logprobs=message.logprobs if message.HasField("logprobs") else None,
        prompt_logprobs=message.prompt_logprobs if message.HasField("prompt_logprobs") else None,
        structure=Structure(kind=StructureKind(structure.kind), text=structure.text)
        if message.HasField("structure")
        else None,
        starts_thinking=message.starts_thinking,
        reasoning_max_tokens=message.reasoning_max_tokens if message.HasField("reasoning_max_tokens") else None,
    )


def request_to_proto(request: EngineRequest) -> engine_link_pb2.EngineRequest:
    return engine_link_pb2.EngineRequest(
        prompt_ids=request.prompt_ids,
        media=[span_to_proto(span) for span in request.media],
        output_ids=request.output_ids,
        sampling=sampling_to_proto(request.sampling),
        seed=request.seed,
        salt=request.salt,
        arrival_time_seconds=request.arrival_s,
        deadline_time_seconds=request.deadline_s,
        priority=request.priority,
    )


def request_from_proto(message: engine_link_pb2.EngineRequest) -> EngineRequest:
    return EngineRequest(
        prompt_ids=tuple(message.prompt_ids),
        media=tuple(span_from_proto(span) for span in message.media),
        output_ids=tuple(message.output_ids),
        sampling=sampling_from_proto(message.sampling),
        seed=message.seed,
        salt=message.salt,
        arrival_s=message.arrival_time_seconds,
        deadline_s=message.deadline_time_seconds,
        priority=message.priority,
    )


def logprobs_to_proto(entry: TokenLogprobs | None) -> engine_link_pb2.TokenLogprobs:
    if entry is None:
        return engine_link_pb2.TokenLogprobs()
    return engine_link_pb2.TokenLogprobs(
        token_id=entry.token_id,
        logprob=entry.logprob,
        rank=entry.rank,
        top_ids=[token for token, _ in entry.top],
        top_logprobs=[logprob for _, logprob in entry.top],
    )


def logprobs_from_proto(message: engine_link_pb2.TokenLogprobs) -> TokenLogprobs | None:
    if not message.rank:
        return None
    return TokenLogprobs(
        token_id=message.token_id,
        logprob=message.logprob,
        rank=message.rank,
        top=tuple(zip(message.top_ids, message.top_logprobs, strict=True)),
    )


def prompt_logprobs_to_proto(piece: PromptLogprobs) -> engine_link_pb2.PromptLogprobs:
    return engine_link_pb2.PromptLogprobs(
        key=key_to_proto(piece.key), first=piece.first, entries=[logprobs_to_proto(entry) for entry in piece.entries]
    )


def prompt_logprobs_from_proto(message: engine_link_pb2.PromptLogprobs) -> PromptLogprobs:
    return PromptLogprobs(
        key=key_from_proto(message.key),
        first=message.first,
        entries=tuple(logprobs_from_proto(entry) for entry in message.entries),
    )


def token_to_proto(event: TokenEvent) -> engine_link_pb2.Token:
    return engine_link_pb2.Token(
        key=key_to_proto(event.key),
        index=event.index,
        token_id=event.token_id,
        finish_reason=_FINISH[event.finish],
        busy_seconds=event.busy_s,
        logprobs=None if event.logprobs is None else logprobs_to_proto(event.logprobs),
    )


def token_from_proto(message: engine_link_pb2.Token) -> TokenEvent:
    return TokenEvent(
        key=key_from_proto(message.key),
        index=message.index,
        token_id=message.token_id,
        finish=_FINISH_OF[message.finish_reason],
        busy_s=message.busy_seconds,
        logprobs=logprobs_from_proto(message.logprobs),
    )


def ended_to_proto(key: SequenceKey, error: ServingError) -> engine_link_pb2.AttemptEnded:
    return engine_link_pb2.AttemptEnded(
        key=key_to_proto(key),
        status=error.status,
        reason=error.reason,
        message=error.message,
        field=error.field or "",
        retry_after_seconds=error.retry_after_s or 0.0,
    )


def error_from_proto(message: engine_link_pb2.AttemptEnded) -> ServingError:
    return KINDS[Status(message.status)](
        message.message,
        reason=message.reason,
        field=message.field or None,
        retry_after_s=message.retry_after_seconds or None,
    )


def load_to_proto(report: LoadReport, role: EngineRole, epoch: int) -> engine_link_pb2.Load:
    return engine_link_pb2.Load(
        step=report.step,
        running_count=report.running,
        waiting_count=report.waiting,
        free_block_count=report.free_blocks,
        total_block_count=report.total_blocks,
        block_size=report.block_size,
        queued_token_count=report.queued_tokens,
        reserved_count=report.reserved,
        cached_block_count=report.cached_blocks,
        prefix_queried_token_count=report.prefix_queried_tokens,
        prefix_hit_token_count=report.prefix_hit_tokens,
        preemption_count=report.preemptions,
        draining=report.draining,
        role=ROLES[role],
        epoch=epoch,
    )


def load_from_proto(message: engine_link_pb2.Load) -> LoadReport:
    return LoadReport(
        step=message.step,
        running=message.running_count,
        waiting=message.waiting_count,
        free_blocks=message.free_block_count,
        total_blocks=message.total_block_count,
        block_size=message.block_size,
        queued_tokens=message.queued_token_count,
        reserved=message.reserved_count,
        cached_blocks=message.cached_block_count,
        prefix_queried_tokens=message.prefix_queried_token_count,
        prefix_hit_tokens=message.prefix_hit_token_count,
        preemptions=message.preemption_count,
        draining=message.draining,
    )
