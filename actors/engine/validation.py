"""All a request can get wrong, checked before it can enter a plan: a step must never fail because of a caller."""

from __future__ import annotations

import itertools
import math
import sys

import numpy as np
import numpy.typing as npt

from actors.ernie.config import ErnieConfig
from actors.errors import ContextExceeded, InvalidRequest, Unavailable
from actors.types import (
    SPATIAL_MERGE,
    TEMPORAL_MERGE,
    AttemptMode,
    EngineRequest,
    EngineRole,
    MediaKind,
    MediaSpan,
    SamplingParams,
)

UINT64 = 1 << 64
MAX_PENALTY = 2.0
MAX_LOGIT_BIAS = 100.0
MAX_LOGPROBS = 20


def check_request(
    request: EngineRequest,
    mode: AttemptMode,
    *,
    role: EngineRole,
    model: ErnieConfig,
    max_model_len: int,
) -> None:
    """Raises InvalidRequest (with ``field``) or ContextExceeded for what the caller must change, Unavailable with
    reason WRONG_ROLE for an attempt that an engine of this role does not take.
    """
    prompt = _ids("prompt_ids", request.prompt_ids, model.text.vocab_size)
    outputs = _ids("output_ids", request.output_ids, model.im_patch_id)
    if not prompt.size:
        raise InvalidRequest("the prompt is empty", field="messages")
    length = prompt.size + outputs.size
    if length + 1 > max_model_len:
        raise ContextExceeded(
            f"{length} tokens and a reply do not fit the context of {max_model_len} tokens", field="messages"
        )
    _check_media(request.media, prompt, model)
    _check_sampling(request.sampling, model)
    if outputs.size >= request.sampling.max_tokens:
        raise InvalidRequest(
            f"max_tokens = {request.sampling.max_tokens} is reached by {outputs.size} earlier tokens",
            field="max_tokens",
        )
    if not 0 <= request.seed < UINT64:
        raise InvalidRequest(f"seed = {request.seed} is not an unsigned 64-bit number", field="seed")
    if not (math.isfinite(request.arrival_s) and math.isfinite(request.deadline_s)):
        raise InvalidRequest("arrival and deadline must be finite", field="timeout")
    _check_role(role, mode)


def _check_role(role: EngineRole, mode: AttemptMode) -> None:
    """A decode engine lacks the vision experts: admission sees to it that it computes only what needs none."""
    if not (role.prefills if mode is AttemptMode.PREFILL else role.decodes):
        raise Unavailable(f"this engine's role is {role.value}; it takes no {mode.value} attempt", reason="WRONG_ROLE")


def _ids(field: str, ids: tuple[int, ...], limit: int) -> npt.NDArray[np.int64]:
    try:
        array = np.array(ids, dtype=np.int64).reshape(-1)
    except (OverflowError, ValueError, TypeError):
        raise InvalidRequest(f"{field} holds something that is no token id", field=field) from None
    if array.size and not (0 <= array.min() and array.max() < limit):
        wrong = int(array.max()) if array.max() >= limit else int(array.min())
        raise InvalidRequest(f"{field} holds {wrong}, which is not in 0..{limit - 1}", field=field)
    return array


def _check_media(media: tuple[MediaSpan, ...], prompt: npt.NDArray[np.int64], model: ErnieConfig) -> None:
    """Spans in order, inside the prompt, of proper grids, and exactly on the placeholders."""
    expected = np.zeros(prompt.size, dtype=bool)
    done = 0
    for index, span in enumerate(media):
        field = f"media[{index}]"
        _check_grid(field, span)
        if span.offset < done or span.end > prompt.size:
            raise InvalidRequest(
                f"tokens {span.offset}..{span.end} do not lie between {done} and {prompt.size}", field=field
            )
        if len(span.embedding_keys) != span.grid.units:
            raise InvalidRequest(f"{len(span.embedding_keys)} keys for {span.grid.units} units", field=field)
        done = span.end
        ids = prompt[span.offset : span.end]
        is_image = ids == model.image_token_id
        # Baidu's own tokenizer uses the image placeholder inside videos too.
        valid = is_image if span.kind is MediaKind.IMAGE else is_image | (ids == model.video_token_id)
        if not valid.all():
            raise InvalidRequest(f"tokens {span.offset}..{span.end} are not all placeholders", field=field)
        expected[span.offset : span.end] = True
    placeholders = (prompt == model.image_token_id) | (prompt == model.video_token_id)
    if (placeholders & ~expected).any():
        at = int((placeholders & ~expected).argmax())
        raise InvalidRequest(f"the placeholder at token {at} belongs to no medium", field="prompt_ids")


def _check_grid(field: str, span: MediaSpan) -> None:
    frames, height, width = span.grid
    if min(frames, height, width) < 1 or height % SPATIAL_MERGE or width % SPATIAL_MERGE:
        raise InvalidRequest(f"grid {tuple(span.grid)} is not a multiple of {SPATIAL_MERGE} patches", field=field)
    if frames != 1 if span.kind is MediaKind.IMAGE else frames % TEMPORAL_MERGE:
        raise InvalidRequest(f"{frames} frames do not make {span.kind.value} units", field=field)


def _check_sampling(params: SamplingParams, model: ErnieConfig) -> None:
    _check_between("temperature", params.temperature, 0, sys.float_info.max)
    if not 0 < params.top_p <= 1:
        raise InvalidRequest(f"top_p = {params.top_p} must be in (0, 1]", field="top_p")
    if params.top_k < 0:
        raise InvalidRequest(f"top_k = {params.top_k} must be 0 (all) or more", field="top_k")
    _check_between("min_p", params.min_p, 0, 1)
    if not 0 < params.repetition_penalty < math.inf:
        message = f"repetition_penalty = {params.repetition_penalty} must be above 0 and finite"
        raise InvalidRequest(message, field="repetition_penalty")
    _check_between("presence_penalty", params.presence_penalty, -MAX_PENALTY, MAX_PENALTY)
    _check_between("frequency_penalty", params.frequency_penalty, -MAX_PENALTY, MAX_PENALTY)
    _check_generable("logit_bias", tuple(token for token, _ in params.logit_bias), model)
    for token, bias in params.logit_bias:
        if not (abs(bias) <= MAX_LOGIT_BIAS or bias == -math.inf):
            message = f"the bias {bias} of token {token} is not in -{MAX_LOGIT_BIAS:g}..{MAX_LOGIT_BIAS:g}"
            raise InvalidRequest(message, field="logit_bias")
    if params.allowed_token_ids is not None:
        if not params.allowed_token_ids:
            raise InvalidRequest("allowed_token_ids is empty: nothing could be generated", field="allowed_token_ids")
        _check_generable("allowed_token_ids", params.allowed_token_ids, model)
    for word in params.bad_words_ids:
        if not word:
            raise InvalidRequest("bad_words holds one without tokens", field="bad_words")
    _ids("bad_words", tuple(itertools.chain.from_iterable(params.bad_words_ids)), model.text.vocab_size)
    _ids("stop_token_ids", params.stop_token_ids, model.text.vocab_size)
    _check_lengths(params)
    for field, count in (("logprobs", params.logprobs), ("prompt_logprobs", params.prompt_logprobs)):
        if count is not None:
            _check_between(field, count, 0, MAX_LOGPROBS)
    if params.structure is not None and params.ignore_eos:
        message = "a structured reply ends where its structure does: ignore_eos cannot be set"
        raise InvalidRequest(message, field="ignore_eos")


def _check_lengths(params: SamplingParams) -> None:
    if params.max_tokens < 1:
        raise InvalidRequest(f"max_tokens = {params.max_tokens} must be at least 1", field="max_tokens")
    if not 0 <= params.min_tokens <= params.max_tokens:
        message = f"min_tokens = {params.min_tokens} is not in 0..{params.max_tokens} (max_tokens)"
        raise InvalidRequest(message, field="min_tokens")
    if params.reasoning_max_tokens is not None and params.reasoning_max_tokens < 0:
        message = f"reasoning_max_tokens = {params.reasoning_max_tokens} must be 0 or more"
        raise InvalidRequest(message, field="reasoning_max_tokens")


def _check_between(field: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:  # NaN too
        raise InvalidRequest(f"{field} = {value} is not in {low:g}..{high:g}", field=field)


def _check_generable(field: str, ids: tuple[int, ...], model: ErnieConfig) -> None:
    array = _ids(field, ids, model.text.vocab_size)
    if array.size and array.max() >= model.im_patch_id:
        message = f"{field} names {array.max()}: ids from {model.im_patch_id} up are of media and never generated"
        raise InvalidRequest(message, field=field)
