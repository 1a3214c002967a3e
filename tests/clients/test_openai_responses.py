"""The responses API of OpenAI's SDK. A server without it fails here."""

from __future__ import annotations

from typing import Any

import openai
import pytest

from cluster.demo import Sample
from tests.clients.conftest import data_url


@pytest.fixture
def client(base_url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=base_url, api_key="none", max_retries=0)


def asked(sample: Sample) -> list[Any]:
    parts = [
        {"type": "input_image", "image_url": data_url(sample), "detail": "auto"},
        {"type": "input_text", "text": sample.question.text},
    ]
    return [{"role": "user", "content": parts}]


def test_a_response(client: openai.OpenAI, samples: dict[str, Sample]) -> None:
    sample = samples["picture"]
    response = client.responses.create(model="nano", input=asked(sample), temperature=0, store=False)
    assert response.output_text.strip() == sample.question.answer
    assert response.status == "completed" and response.usage is not None and response.usage.output_tokens > 0


def test_a_streamed_response(client: openai.OpenAI, samples: dict[str, Sample]) -> None:
    sample = samples["picture"]
    with client.responses.stream(model="nano", input=asked(sample), temperature=0, store=False) as stream:
        text = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
        final = stream.get_final_response()
    assert text == final.output_text and text.strip() == sample.question.answer
