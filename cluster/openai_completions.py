"""OpenAI completion requests, with raw prompts: what a body may hold, and its translation into ``GenerateCall``.

A prompt is used as it stands: no chat template touches it. In a text, special tokens that are spelled out are special
tokens, and with ``add_special_tokens`` (true unless given) the tokenizer's own post-processor adds what it puts around
a text, both as vLLM does it; ERNIE's adds nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from actors.errors import InvalidRequest
from cluster.generation import GenerateCall
from cluster.openai_neutral import DecodingFields
from cluster.openai_request import SPELLING, StreamOptions
from cluster.openai_sampling import SamplingBody, sampling_fields
from cluster.openai_structure import StructureFields, find_structure
from cluster.request_checks import MAX_CHOICES, MAX_LOGPROBS, check_call

DEFAULT_MAX_TOKENS = 16
"""OpenAI's."""
MAX_PROMPTS = 128

_Listed = Field(min_length=1, json_schema_extra={"maxItems": MAX_PROMPTS})
_Ids = Annotated[list[int], Field(min_length=1)]


def _prompt_tag(value: Any) -> str | None:
    # The parentheses tell tags from field names in error locations.
    match value:
        case str():
            return "(text)"
        case [str(), *_]:
            return "(texts)"
        case [int(), *_]:
            return "(ids)"
        case [list(), *_]:
            return "(lists)"
    return None


Prompt = Annotated[
    Annotated[str, Tag("(text)")]
    | Annotated[list[str], _Listed, Tag("(texts)")]
    | Annotated[_Ids, Tag("(ids)")]
    | Annotated[list[_Ids], _Listed, Tag("(lists)")],
    Discriminator(
        _prompt_tag,
        custom_error_type="part_type",
        custom_error_message="must be a text, a list of texts, a list of token ids or a list of such lists",
    ),
]


class CompletionRequest(DecodingFields, SamplingBody, StructureFields):
    """Body of ``POST /v1/completions``. ``suffix`` must be null and ``best_of`` 1 where they are given."""

    prompt: Prompt
    suffix: None = None
    best_of: Literal[1] | None = None
    stream_options: StreamOptions | None = None
    n: int | None = None
    max_tokens: int | None = None
    echo: bool | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    add_special_tokens: bool | None = None
    return_token_ids: bool | None = None

    @property
    def wants_stream_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def prompts(self) -> Sequence[str | tuple[int, ...]]:
        if isinstance(self.prompt, str):
            return (self.prompt,)
        several = [one for one in self.prompt if not isinstance(one, int)]
        if not several:
            return (tuple(one for one in self.prompt if isinstance(one, int)),)
        return tuple(one if isinstance(one, str) else tuple(one) for one in several)

    @property
    def prompt_names(self) -> Sequence[str]:
        """The field of each prompt."""
        if isinstance(self.prompt, str) or isinstance(self.prompt[0], int):
            return ("prompt",)
        return tuple(f"prompt[{index}]" for index in range(len(self.prompt)))

    @property
    def only_scores(self) -> bool:
        """Nothing is wanted but the prompt, with its log-probabilities: a token is drawn and not told."""
        return self.max_tokens == 0 and bool(self.echo)

    @property
    def scores_prompt(self) -> bool:
        return bool(self.echo) and self.logprobs is not None


def to_calls(body: CompletionRequest) -> tuple[GenerateCall, ...]:
    """One call per prompt. Raises InvalidRequest for values out of bounds or at odds with each other."""
    names = body.prompt_names
    _check(body, len(names))
    max_tokens = DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens
    common: Mapping[str, Any] = {
        **sampling_fields(body),
        "add_special_tokens": body.add_special_tokens is not False,
        "n": 1 if body.n is None else body.n,
        "max_tokens": 1 if body.only_scores else max_tokens,
        "logprobs": body.logprobs,
        "prompt_logprobs": body.logprobs if body.scores_prompt else body.prompt_logprobs,
        "structure": find_structure(body)[1],
        "return_token_ids": bool(body.return_token_ids) or bool(body.echo),
    }
    calls = tuple(GenerateCall(prompt=prompt, **common) for prompt in body.prompts)
    for call, name in zip(calls, names, strict=True):
        check_call(call, {**completion_spelling(body), "prompt": name})
    return calls


def _check(body: CompletionRequest, prompts: int) -> None:
    if body.logprobs is not None and not 0 <= body.logprobs <= MAX_LOGPROBS:
        raise _wrong("logprobs", f"must be between 0 and {MAX_LOGPROBS}, not {body.logprobs}")
    if prompts > MAX_PROMPTS:
        raise _wrong("prompt", f"has {prompts} prompts, the limit is {MAX_PROMPTS}")
    if prompts * (body.n or 1) > MAX_CHOICES:
        raise _wrong("n", f"makes {prompts * (body.n or 1)} choices of {prompts} prompts, the limit is {MAX_CHOICES}")
    if body.stream_options is not None and not body.stream:
        raise _wrong("stream_options", "belongs to requests with stream")
    if body.max_tokens == 0 and not body.echo:
        raise _wrong("max_tokens", "must be at least 1 unless echo is set")
    if body.only_scores and body.min_tokens:
        raise _wrong("min_tokens", "must not be above max_tokens, which is 0")
    if body.scores_prompt and body.prompt_logprobs is not None:
        raise _wrong("prompt_logprobs", "does not go together with echo and logprobs, which tell the same")
    for name in ("request_id", "return_timings"):
        if getattr(body, name) and prompts > 1:
            raise _wrong(name, f"needs a single prompt, not {prompts}")


def completion_spelling(body: CompletionRequest) -> Mapping[str, str]:
    """The names this client used, for errors of ``to_calls`` and of later stages."""
    names = dict(SPELLING)
    if body.scores_prompt:
        names["prompt_logprobs"] = "logprobs"
    names["structure"] = find_structure(body)[0] or "response_format"
    return names


def _wrong(field: str, rule: str) -> InvalidRequest:
    return InvalidRequest(f"{field} {rule}", field=field)
