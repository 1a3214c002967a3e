"""instructor: replies as pydantic models, by schema and by call, sync and async."""

from __future__ import annotations

from typing import Annotated, Any

import instructor
import openai
import pytest
from pydantic import BaseModel, Field

from cluster.demo import Sample
from tests.clients.conftest import data_url
from tests.clients.site import FOLDER, HOST


class Box(BaseModel):
    """Where a thing is, in thousandths of the sides."""

    bbox_2d: Annotated[list[int], Field(min_length=4, max_length=4)]


def asked(url: str, text: str = "Give the box of the square as JSON.") -> list[Any]:
    return [
        {
            "role": "user",
            "content": [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": text}],
        }
    ]


MODES = pytest.mark.parametrize("mode", [instructor.Mode.TOOLS, instructor.Mode.JSON_SCHEMA])


@MODES
def test_sync(base_url: str, samples: dict[str, Sample], mode: instructor.Mode) -> None:
    client = instructor.from_openai(openai.OpenAI(base_url=base_url, api_key="none"), mode=mode)
    box = client.chat.completions.create(
        model="nano", messages=asked(data_url(samples["thought"])), response_model=Box, temperature=0, max_retries=0
    )
    assert len(box.bbox_2d) == 4


@MODES
async def test_asyncio(base_url: str, samples: dict[str, Sample], mode: instructor.Mode) -> None:
    client = instructor.from_openai(openai.AsyncOpenAI(base_url=base_url, api_key="none"), mode=mode)
    box = await client.chat.completions.create(
        model="nano", messages=asked(data_url(samples["thought"])), response_model=Box, temperature=0, max_retries=0
    )
    assert len(box.bbox_2d) == 4


@MODES
def test_the_picture_of_the_model_card(base_url: str, mode: instructor.Mode) -> None:
    client = instructor.from_openai(openai.OpenAI(base_url=base_url, api_key="none"), mode=mode)
    box = client.chat.completions.create(
        model="nano",
        messages=asked(f"https://{HOST}{FOLDER}example1.jpg", "Give the box of the star as JSON."),
        response_model=Box,
        temperature=0,
        max_retries=0,
    )
    assert len(box.bbox_2d) == 4
