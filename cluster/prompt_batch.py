"""One HTTP request of several prompts: a generation each, all at once, read as one stream of events."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import cast

from actors.errors import InternalError, ServingError
from cluster.generation import Event, Finished, GenerateCall, GenerationService, Usage
from cluster.openai_request import client_field

READ_AHEAD = 64
"""Events held of all prompts together before they wait."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptEvent:
    """An event of one prompt. The last one is ``Finished`` of all prompts together."""

    prompt: int
    event: Event


async def generate_all(
    service: GenerationService, calls: Sequence[GenerateCall], names: Sequence[str]
) -> AsyncGenerator[PromptEvent, None]:
    """Yields the events of each call in their order. The first error of any ends all, and names its prompt's field by
    ``names``. Closing it cancels all.
    """
    queue: asyncio.Queue[PromptEvent | Exception] = asyncio.Queue(READ_AHEAD)

    async def run(index: int, call: GenerateCall) -> None:
        try:
            events = cast("AsyncGenerator[Event, None]", service.generate(call))
            async with contextlib.aclosing(events):
                async for event in events:
                    await queue.put(PromptEvent(prompt=index, event=event))
                    if isinstance(event, Finished):
                        return
            raise InternalError("the request ended without a last event")
        except ServingError as error:
            if error.field is not None:
                error.field = client_field(error.field, {"prompt": names[index]})
            await queue.put(error)
        except Exception as error:
            await queue.put(error)

    tasks = [asyncio.ensure_future(run(index, call)) for index, call in enumerate(calls)]
    finished: list[Finished] = []
    try:
        while len(finished) < len(calls):
            match await queue.get():
                case PromptEvent(event=Finished() as event):
                    finished.append(event)
                case PromptEvent() as told:
                    yield told
                case error:
                    raise error
        yield PromptEvent(prompt=0, event=_together(finished))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _together(finished: Sequence[Finished]) -> Finished:
    """Usage sums over prompts. Where the time went is told of one prompt only."""
    if len(finished) == 1:
        return finished[0]
    usages = [event.usage for event in finished]
    first_tokens = [usage.time_to_first_token_s for usage in usages if usage.time_to_first_token_s is not None]
    total = Usage(
        prompt_tokens=sum(usage.prompt_tokens for usage in usages),
        media_tokens=sum(usage.media_tokens for usage in usages),
        video_tokens=sum(usage.video_tokens for usage in usages),
        cached_tokens=sum(usage.cached_tokens for usage in usages),
        output_tokens=sum(usage.output_tokens for usage in usages),
        reasoning_tokens=sum(usage.reasoning_tokens for usage in usages),
        time_to_first_token_s=min(first_tokens, default=None),
    )
    return Finished(usage=total)
