"""Asks through instructor, prints as JSON what came: {case: box}. Arguments: base URL, file of {name: picture URL}.

A process of its own: instructor and the present openai ask for different versions of jiter.
"""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Annotated, Any

import instructor
import openai
from pydantic import BaseModel, Field

MODES = {"tools": instructor.Mode.TOOLS, "json_schema": instructor.Mode.JSON_SCHEMA}


class Box(BaseModel):
    """Where a thing is, in thousandths of the sides."""

    bbox_2d: Annotated[list[int], Field(min_length=4, max_length=4)]


def asked(url: str) -> dict[str, Any]:
    parts = [
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "text", "text": "Give the box of the square as JSON."},
    ]
    messages = [{"role": "user", "content": parts}]
    return {"model": "nano", "messages": messages, "response_model": Box, "temperature": 0, "max_retries": 0}


async def main(base_url: str, pictures: dict[str, str]) -> None:
    found: dict[str, list[int]] = {}
    for name, url in pictures.items():
        for mode, chosen in MODES.items():
            client = instructor.from_openai(openai.OpenAI(base_url=base_url, api_key="none"), mode=chosen)
            found[f"{name}, {mode}"] = client.chat.completions.create(**asked(url)).bbox_2d
            other = instructor.from_openai(openai.AsyncOpenAI(base_url=base_url, api_key="none"), mode=chosen)
            found[f"{name}, {mode}, asyncio"] = (await other.chat.completions.create(**asked(url))).bbox_2d
    print(json.dumps(found))


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], json.loads(Path(sys.argv[2]).read_text())))
