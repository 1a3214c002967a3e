"""OpenAI-shaped text completions, whole and in chunks, and the exchange of ``POST /v1/completions``.

Choices are numbered prompt by prompt: choice ``c`` of prompt ``p`` has the index ``p * n + c``. Extensions are vLLM's:
``choices[].token_ids``, ``prompt_token_ids`` and ``prompt_logprobs``, in a stream with the first chunk of a choice. The
text is all the model writes: thinking and calls are not told apart. Errors inside a stream are told as chat tells them.
"""

from __future__ import annotations

import codecs
import time
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from actors.errors import InternalError, ServingError
from actors.types import FinishReason
from cluster.generation import (
    ChoiceFinished,
    Delta,
    Finished,
    GenerationService,
    PositionScores,
    PromptScored,
    Started,
    TokenScore,
    Vocabulary,
)
from cluster.openai_completions import CompletionRequest, completion_spelling, to_calls
from cluster.openai_logprobs import LOWEST, prompt_logprobs_body
from cluster.openai_request import client_field
from cluster.openai_response import SSE_DONE, ending, error_body, sse, timings_body, usage_body
from cluster.prompt_batch import PromptEvent, generate_all
from cluster.request_checks import TEXT_COMPLETION_PREFIX


class LegacyLogprobs:
    """Writes ``choices[].logprobs`` of completions piece by piece: parallel lists, one entry per token.

    Offsets count characters of the text; a token that the text leaves out adds none, and one that is part of a
    character stands at that character and is spelled ``bytes:\\xe2\\x80``, as OpenAI does it.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._offset = 0

    def prompt(self, ids: Iterable[int], entries: Iterable[PositionScores | None]) -> dict[str, Any]:
        """Of a prompt that is echoed, special tokens included."""
        body = _empty()
        for token_id, entry in zip(ids, entries, strict=True):
            token = self._vocabulary.token_bytes(token_id)
            self._add(body, token, entry, shown=token)
        return body

    def reply(self, positions: Iterable[PositionScores]) -> dict[str, Any]:
        """Of more of the reply."""
        body = _empty()
        for position in positions:
            hidden = self._vocabulary.is_hidden(position.chosen.token_id)
            self._add(body, position.chosen.token, position, shown=b"" if hidden else position.chosen.token)
        return body

    def _add(self, body: dict[str, Any], token: bytes, scores: PositionScores | None, *, shown: bytes) -> None:
        body["tokens"].append(_spelling(token))
        body["text_offset"].append(self._offset)
        self._offset += len(self._decoder.decode(shown))
        body["token_logprobs"].append(None if scores is None else _finite(scores.chosen))
        top = None if scores is None else {_spelling(score.token): _finite(score) for score in scores.top}
        if top is not None and scores is not None:
            top.setdefault(_spelling(scores.chosen.token), _finite(scores.chosen))
        body["top_logprobs"].append(top)


def _empty() -> dict[str, Any]:
    return {"text_offset": [], "token_logprobs": [], "tokens": [], "top_logprobs": []}


def _spelling(token: bytes) -> str:
    try:
        return token.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token)


def _finite(score: TokenScore) -> float:
    return max(score.logprob, LOWEST)


@dataclass(kw_only=True, slots=True)
class _Prompt:
    started: Started | None = None
    scored: PromptScored | None = None


@dataclass(kw_only=True, slots=True)
class _Choice:
    scores: LegacyLogprobs
    begun: bool = False
    pieces: list[dict[str, Any]] = field(default_factory=list)


class CompletionExchange:
    """A completion request and its reply. A whole reply is its chunks put together."""

    def __init__(self, body: CompletionRequest) -> None:
        """Raises InvalidRequest for values out of bounds or at odds with each other."""
        self.stream = bool(body.stream)
        self._body = body
        self._calls = to_calls(body)
        self._n = self._calls[0].n
        self._created = int(time.time())
        self._vocabulary: Vocabulary
        self._prompts = [_Prompt() for _ in self._calls]
        self._choices: list[_Choice] = []
        self._finished: Finished | None = None

    def events(self, service: GenerationService) -> AsyncIterator[PromptEvent]:
        self._vocabulary = service.vocabulary
        count = len(self._calls) * self._n
        self._choices = [_Choice(scores=LegacyLogprobs(service.vocabulary)) for _ in range(count)]
        return generate_all(service, self._calls, self._body.prompt_names)

    def begins(self, event: PromptEvent) -> bool:
        return isinstance(event.event, Started)

    def is_last(self, event: PromptEvent) -> bool:
        return isinstance(event.event, Finished)

    def add(self, event: PromptEvent) -> None:
        for piece in self._pieces(event):
            self._choices[piece["index"]].pieces.append(piece)
        if isinstance(event.event, Finished):
            self._finished = event.event

    def whole(self) -> dict[str, Any]:
        if self._finished is None:
            raise InternalError("the request ended without a last event")
        body = self._envelope([self._together(index, choice) for index, choice in enumerate(self._choices)])
        return body | self._ending(self._finished)

    def frames(self, event: PromptEvent) -> Iterable[bytes]:
        usage = {"usage": None} if self._body.wants_stream_usage else {}
        for piece in self._pieces(event):
            yield sse(self._envelope([piece]) | usage)
        if isinstance(event.event, Finished):
            last = self._ending(event.event)
            if not self._body.wants_stream_usage:
                del last["usage"]
            if last:
                yield sse(self._envelope([]) | last)

    def end(self) -> bytes:
        return SSE_DONE

    def failed(self, error: ServingError) -> bytes:
        return sse(error_body(error))

    def name_field(self, error: ServingError) -> None:
        if error.field is not None:
            error.field = client_field(error.field, completion_spelling(self._body))

    def _pieces(self, told: PromptEvent) -> Iterable[dict[str, Any]]:
        """What one event adds to choices."""
        prompt, first = self._prompts[told.prompt], told.prompt * self._n
        match told.event:
            case Started() as event:
                prompt.started = event
                if self._calls[0].prompt_logprobs is None:
                    yield from self._begin(told.prompt)
            case PromptScored() as event:
                prompt.scored = event
                yield from self._begin(told.prompt)
            case Delta() as event if not self._body.only_scores:
                yield from self._begin(told.prompt)
                yield self._piece(first + event.choice, event)
            case ChoiceFinished() as event:
                yield from self._begin(told.prompt)
                if self._body.only_scores and event.reason is not FinishReason.CANCELLED:
                    event = ChoiceFinished(reason=FinishReason.LENGTH)
                yield self._piece(first + told.event.choice, Delta()) | ending(event)

    def _begin(self, prompt: int) -> Iterable[dict[str, Any]]:
        """The first piece of each choice of a prompt, where it says something: what was asked for of the prompt."""
        started, scored = self._prompts[prompt].started, self._prompts[prompt].scored
        if started is None:
            raise InternalError("the request did not begin with its first event")
        ids = started.prompt_token_ids or ()
        for index in range(prompt * self._n, (prompt + 1) * self._n):
            choice = self._choices[index]
            if choice.begun:
                continue
            choice.begun = True
            piece = self._piece(index, Delta())
            if self._body.echo:
                given = self._calls[prompt].prompt
                piece["text"] = given if isinstance(given, str) else self._vocabulary.spell(ids)
                if self._body.scores_prompt and scored is not None:
                    piece["logprobs"] = choice.scores.prompt(ids, scored.entries)
            if self._body.prompt_logprobs is not None and scored is not None:
                piece["prompt_logprobs"] = prompt_logprobs_body(scored.entries)
            if self._body.return_token_ids:
                piece["prompt_token_ids"] = list(ids)
            if self._body.echo or self._body.return_token_ids or scored is not None:
                yield piece

    def _piece(self, index: int, delta: Delta) -> dict[str, Any]:
        told = self._body.logprobs is not None and delta.logprobs
        scores = self._choices[index].scores.reply(delta.logprobs) if told else None
        piece: dict[str, Any] = {
            "index": index,
            "text": delta.text,
            "logprobs": scores,
            "finish_reason": None,
            "stop_reason": None,
        }
        if self._body.return_token_ids:
            piece["token_ids"] = list(delta.token_ids)
        return piece

    def _together(self, index: int, choice: _Choice) -> dict[str, Any]:
        whole = self._piece(index, Delta())
        if self._body.logprobs is not None:
            whole["logprobs"] = _empty()
        for piece in choice.pieces:
            whole["text"] += piece.pop("text")
            for name, values in (piece.pop("logprobs") or {}).items():
                whole["logprobs"][name] += values
            if "token_ids" in piece:
                whole["token_ids"] += piece.pop("token_ids")
            whole |= piece
        if whole["finish_reason"] is None:
            raise InternalError(f"the request ended before its choice {index}")
        return whole

    def _envelope(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        started = next((prompt.started for prompt in self._prompts if prompt.started is not None), None)
        if started is None:
            raise InternalError("the request did not begin with its first event")
        return {
            "id": TEXT_COMPLETION_PREFIX + started.request_id,
            "object": "text_completion",
            "created": self._created,
            "model": started.model,
            "choices": choices,
        }

    def _ending(self, finished: Finished) -> dict[str, Any]:
        usage = finished.usage
        if self._body.only_scores:
            usage = replace(usage, output_tokens=0)
        body: dict[str, Any] = {"usage": usage_body(usage)}
        if finished.timings is not None:
            body["timings"] = timings_body(finished.timings, finished.usage)
        return body
