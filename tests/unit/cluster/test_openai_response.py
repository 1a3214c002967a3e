"""Replies as OpenAI's clients read them: what no other test sees of the frames."""

from __future__ import annotations

import json

import pytest

from cluster.openai_response import sse


@pytest.mark.parametrize("event", ["", "response.output_text.delta"])
def test_the_data_of_an_event_is_one_line_whatever_a_client_takes_for_the_end_of_one(event: str) -> None:
    body = {"text": "a\u2028b\u2029c\x85d\x0b\x0c\x1ce\r\nf \u00e9 \u65e5", "type": event}
    frame = sse(body, event).decode()
    *named, data, empty = frame.splitlines()
    assert (named, empty) == ([f"event: {event}"] if event else [], "")
    assert json.loads(data.removeprefix("data: ")) == body
    assert "\u00e9 \u65e5" in data  # the rest is not made longer
