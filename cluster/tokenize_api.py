"""POST /tokenize and POST /detokenize, in vLLM's form: token ids of what a request would have as its prompt, and back.

``/tokenize`` takes a raw ``prompt`` or a conversation as ``/v1/chat/completions`` does, whose pictures count with a
placeholder per token. Prompts that continue the final message or lack the assistant's opening do not exist here: of
``continue_final_message`` and ``add_generation_prompt`` only the values that ask for neither are taken.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any, Literal

from fastapi import Request, Response
from fastapi.responses import JSONResponse

from actors.errors import InvalidRequest, NotFound, ServingError
from cluster.generation import GenerateCall, GenerationService, Vocabulary
from cluster.http_exchange import guarded, read_body, trace_id
from cluster.openai_media import ProcessorKwargs, to_media_options
from cluster.openai_messages import MessageBody, part_names, to_messages
from cluster.openai_request import SPELLING, client_field, parse_body
from cluster.openai_structure import Strict
from cluster.openai_thinking import ChatTemplateKwargs, Effort, find_thinking
from cluster.openai_tools import ToolBody, to_tools
from cluster.request_checks import MAX_INT32, check_call

MAX_DETOKENIZED = 2**20

_OF_CONVERSATIONS = (
    "tools",
    "enable_thinking",
    "chat_template_kwargs",
    "metadata",
    "reasoning_effort",
    "mm_processor_kwargs",
)


class TokenizeRequest(Strict):
    """Body of ``POST /tokenize``: a prompt or messages. ``add_special_tokens`` belongs to prompts."""

    model: str | None = None
    prompt: str | None = None
    add_special_tokens: bool | None = None
    messages: list[MessageBody] | None = None
    tools: list[ToolBody] | None = None
    enable_thinking: bool | None = None
    chat_template_kwargs: ChatTemplateKwargs | None = None
    metadata: dict[str, Any] | None = None
    reasoning_effort: Effort | None = None
    mm_processor_kwargs: ProcessorKwargs | None = None
    add_generation_prompt: Literal[True] | None = None
    continue_final_message: Literal[False] | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(Strict):
    """Body of ``POST /detokenize``."""

    model: str | None = None
    tokens: list[int]


async def tokenize(service: GenerationService, request: Request) -> Response:
    """POST /tokenize."""

    async def answer() -> Response:
        body = parse_body(TokenizeRequest, await read_body(request))
        call, names = _call(body), _names(body)
        check_call(call, names)
        try:
            ids = (await service.tokenize(call)).ids
        except ServingError as error:
            if error.field is not None:
                error.field = client_field(error.field, names)
            raise
        limit = max(card.max_model_len for card in service.models())
        reply = {"count": len(ids), "max_model_len": limit, "tokens": list(ids), "token_strs": None}
        if body.return_token_strs:
            reply["token_strs"] = [service.vocabulary.token_text(token_id) or "" for token_id in ids]
        return JSONResponse(reply)

    return await guarded(answer(), trace_id(request))


async def detokenize(service: GenerationService, request: Request) -> Response:
    """POST /detokenize."""

    async def answer() -> Response:
        body = parse_body(DetokenizeRequest, await read_body(request))
        if body.model is not None and all(card.name != body.model for card in service.models()):
            raise NotFound(f"the model {body.model!r} does not exist", field="model")
        if len(body.tokens) > MAX_DETOKENIZED:
            raise _wrong("tokens", f"has {len(body.tokens)} ids, the limit is {MAX_DETOKENIZED}")
        return JSONResponse({"prompt": await asyncio.to_thread(_spell, service.vocabulary, body.tokens)})

    return await guarded(answer(), trace_id(request))


def _call(body: TokenizeRequest) -> GenerateCall:
    if (body.prompt is None) == (body.messages is None):
        raise _wrong("prompt", "or messages must be given, and not both")
    if body.messages is None:
        for name in _OF_CONVERSATIONS:
            if getattr(body, name) is not None:
                raise _wrong(name, "does not go together with prompt, which is used as it stands")
        return GenerateCall(
            model=body.model, prompt=body.prompt, add_special_tokens=body.add_special_tokens is not False
        )
    if body.add_special_tokens:
        raise _wrong("add_special_tokens", "does not go together with messages: the chat template says what is added")
    return GenerateCall(
        model=body.model,
        messages=to_messages(body.messages),
        tools=to_tools(body.tools),
        thinking=find_thinking(body)[1],
        media_options=to_media_options(body.mm_processor_kwargs)[0],
    )


def _names(body: TokenizeRequest) -> Mapping[str, str]:
    """The names this client used, as of a chat request."""
    names = SPELLING | part_names(body.messages or ()) | to_media_options(body.mm_processor_kwargs)[1]
    return names | {"enable_thinking": find_thinking(body)[0] or "enable_thinking"}


def _spell(vocabulary: Vocabulary, ids: list[int]) -> str:
    for index, token_id in enumerate(ids):
        if not 0 <= token_id <= MAX_INT32 or vocabulary.token_text(token_id) is None:
            raise _wrong(f"tokens[{index}]", f"is {token_id}, which is no token")
    return vocabulary.spell(ids)


def _wrong(field: str, rule: str) -> InvalidRequest:
    return InvalidRequest(f"{field} {rule}", field=field)
