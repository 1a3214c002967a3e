from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest

from actors.engine.validation import check_request
from actors.errors import ContextExceeded, InvalidRequest, ServingError, Unavailable
from actors.types import AttemptMode, EngineRequest, EngineRole, Grid, MediaKind, Structure, StructureKind
from tests.unit.engine.harness import IMAGE, VIDEO, ernie_config, media_request, request, span

CONFIG = ernie_config()
IMAGE_SPAN = span(MediaKind.IMAGE, 1, Grid(1, 2, 4))
PROMPT = (5, IMAGE, IMAGE, 6)


def check(
    wanted: EngineRequest,
    mode: AttemptMode = AttemptMode.COLOCATED,
    role: EngineRole = EngineRole.COLOCATED,
) -> None:
    check_request(wanted, mode, role=role, model=CONFIG, max_model_len=100)


def refusal(wanted: EngineRequest, **options: Any) -> ServingError:
    with pytest.raises(ServingError) as caught:
        check(wanted, **options)
    return caught.value


def test_good_requests_pass() -> None:
    check(request([1]))
    check(request(range(99)))
    check(
        request([99, 101, 126], outputs=[99], max_tokens=2, temperature=0.3, top_k=4, top_p=1.0, stop_token_ids=(127,))
    )
    check(
        request(
            [1],
            max_tokens=5,
            min_p=1.0,
            repetition_penalty=1e-9,
            presence_penalty=-2.0,
            frequency_penalty=2.0,
            logit_bias=((99, -100.0), (0, 100.0), (1, -math.inf)),
            allowed_token_ids=(0, 99),
            bad_words_ids=((1, 2), (127,)),
            min_tokens=5,
            logprobs=0,
            prompt_logprobs=20,
            reasoning_max_tokens=0,
            structure=Structure(kind=StructureKind.JSON_OBJECT),
            ignore_eos=False,
        )
    )
    check(media_request(0)[0])
    check(request(PROMPT, media=[IMAGE_SPAN]))
    video = Grid(2, 2, 4)
    for token in (IMAGE, VIDEO):
        check(request([5, token, token, 6], media=[span(MediaKind.VIDEO, 1, video)]))


@pytest.mark.parametrize(
    ("wanted", "field"),
    [
        (request([]), "messages"),
        (request([128]), "prompt_ids"),
        (request([-1]), "prompt_ids"),
        (request([2**63]), "prompt_ids"),
        (request([1], outputs=[IMAGE]), "output_ids"),
        (request([1], outputs=[3, 4], max_tokens=2), "max_tokens"),
        (request([1], max_tokens=0), "max_tokens"),
        (request([1], temperature=-0.1), "temperature"),
        (request([1], temperature=math.nan), "temperature"),
        (request([1], temperature=math.inf), "temperature"),
        (request([1], top_p=0.0), "top_p"),
        (request([1], top_p=1.01), "top_p"),
        (request([1], top_p=math.nan), "top_p"),
        (request([1], top_k=-1), "top_k"),
        (request([1], stop_token_ids=(128,)), "stop_token_ids"),
        (request([1], stop_token_ids=(-1,)), "stop_token_ids"),
        (request([1], min_p=-0.1), "min_p"),
        (request([1], min_p=1.1), "min_p"),
        (request([1], min_p=math.nan), "min_p"),
        (request([1], repetition_penalty=0.0), "repetition_penalty"),
        (request([1], repetition_penalty=math.inf), "repetition_penalty"),
        (request([1], repetition_penalty=math.nan), "repetition_penalty"),
        (request([1], presence_penalty=2.1), "presence_penalty"),
        (request([1], presence_penalty=math.nan), "presence_penalty"),
        (request([1], frequency_penalty=-2.1), "frequency_penalty"),
        (request([1], logit_bias=((100, 1.0),)), "logit_bias"),
        (request([1], logit_bias=((-1, 1.0),)), "logit_bias"),
        (request([1], logit_bias=((2**70, 1.0),)), "logit_bias"),
        (request([1], logit_bias=((1, 100.5),)), "logit_bias"),
        (request([1], logit_bias=((1, math.inf),)), "logit_bias"),
        (request([1], logit_bias=((1, math.nan),)), "logit_bias"),
        (request([1], allowed_token_ids=()), "allowed_token_ids"),
        (request([1], allowed_token_ids=(1, 100)), "allowed_token_ids"),
        (request([1], allowed_token_ids=(-1,)), "allowed_token_ids"),
        (request([1], bad_words_ids=((1,), ())), "bad_words"),
        (request([1], bad_words_ids=((1, 128),)), "bad_words"),
        (request([1], min_tokens=-1), "min_tokens"),
        (request([1], min_tokens=6, max_tokens=5), "min_tokens"),
        (request([1], logprobs=-1), "logprobs"),
        (request([1], logprobs=21), "logprobs"),
        (request([1], prompt_logprobs=21), "prompt_logprobs"),
        (request([1], prompt_logprobs=-1), "prompt_logprobs"),
        (request([1], reasoning_max_tokens=-1), "reasoning_max_tokens"),
        (request([1], structure=Structure(kind=StructureKind.JSON_OBJECT), ignore_eos=True), "ignore_eos"),
        (request([1], seed=-1), "seed"),
        (request([1], seed=2**64), "seed"),
        (request([1], deadline_s=math.nan), "timeout"),
        (request([1], arrival_s=math.inf), "timeout"),
    ],
)
def test_bad_fields_are_named(wanted: EngineRequest, field: str) -> None:
    error = refusal(wanted)
    assert isinstance(error, InvalidRequest)
    assert error.field == field


@pytest.mark.parametrize(
    ("prompt", "media", "field"),
    [
        (PROMPT, [], "prompt_ids"),
        ((5, IMAGE, 6, IMAGE), [IMAGE_SPAN], "media[0]"),
        ((5, IMAGE, IMAGE, IMAGE), [IMAGE_SPAN], "prompt_ids"),
        ((5, VIDEO, VIDEO, 6), [IMAGE_SPAN], "media[0]"),
        ((5, VIDEO, 6), [], "prompt_ids"),
        (PROMPT, [span(MediaKind.IMAGE, 3, Grid(1, 2, 4))], "media[0]"),
        (PROMPT, [span(MediaKind.IMAGE, -1, Grid(1, 2, 4))], "media[0]"),
        (PROMPT, [IMAGE_SPAN, IMAGE_SPAN], "media[1]"),
        ((*PROMPT, IMAGE, IMAGE), [span(MediaKind.IMAGE, 4, Grid(1, 2, 4)), IMAGE_SPAN], "media[1]"),
        (PROMPT, [span(MediaKind.IMAGE, 1, Grid(1, 3, 4))], "media[0]"),
        (PROMPT, [span(MediaKind.IMAGE, 1, Grid(1, 2, 0))], "media[0]"),
        (PROMPT, [span(MediaKind.IMAGE, 1, Grid(2, 2, 4))], "media[0]"),
        (PROMPT, [span(MediaKind.VIDEO, 1, Grid(1, 2, 4))], "media[0]"),
        (PROMPT, [span(MediaKind.VIDEO, 1, Grid(3, 2, 4))], "media[0]"),
        (PROMPT, [dataclasses.replace(IMAGE_SPAN, embedding_keys=())], "media[0]"),
    ],
)
def test_media_must_lie_exactly_on_their_placeholders(prompt: Any, media: Any, field: str) -> None:
    error = refusal(request(prompt, media=media))
    assert isinstance(error, InvalidRequest)
    assert error.field == field


def test_context_counts_earlier_outputs_and_one_more() -> None:
    for wanted in (request([1] * 100), request([1] * 90, outputs=[1] * 10, max_tokens=50)):
        assert isinstance(refusal(wanted), ContextExceeded)
    check(request([1] * 90, outputs=[1] * 9, max_tokens=50))


@pytest.mark.parametrize("mode", list(AttemptMode))
@pytest.mark.parametrize("role", list(EngineRole))
def test_roles(role: EngineRole, mode: AttemptMode) -> None:
    """Whether a decode engine has cached what it cannot compute shows when it begins."""
    wanted = request(PROMPT, media=[IMAGE_SPAN])
    allowed = {
        (EngineRole.PREFILL, AttemptMode.PREFILL),
        (EngineRole.DECODE, AttemptMode.DECODE),
        (EngineRole.DECODE, AttemptMode.COLOCATED),
        *((EngineRole.COLOCATED, any_mode) for any_mode in AttemptMode),
    }
    if (role, mode) in allowed:
        check(wanted, mode=mode, role=role)
    else:
        error = refusal(wanted, mode=mode, role=role)
        assert isinstance(error, Unavailable)
        assert error.reason == "WRONG_ROLE"
