"""HTTP and gRPC are two spellings of one request and of one reply."""

from __future__ import annotations

import json
from typing import Any

import pytest

from cluster import openai_response
from cluster.client import generate_request
from cluster.generation import GenerateCall, Started
from cluster.grpc_request import generate_call
from cluster.grpc_response import whole_response
from cluster.openai_request import parse_chat_request, to_call
from tests.doubles import FINISHED, SCORED

SCHEMA = {"type": "object", "properties": {"b": {}, "a": {}}}

REQUESTS: list[dict[str, Any]] = [
    {},
    {"n": 3, "seed": 4, "temperature": 0.5, "top_p": 0.5, "top_k": 5, "min_p": 0.25},
    {"repetition_penalty": 1.5, "presence_penalty": -1.0, "frequency_penalty": 0.5},
    {"logit_bias": {9: 1.5, 2: -100.0}, "allowed_token_ids": [2, 9], "bad_words": ["a b", "c"]},
    {"min_tokens": 2, "max_tokens": 9, "stop": ["x"], "stop_token_ids": [7], "ignore_eos": True},
    {"reasoning_max_tokens": 0, "enable_thinking": True, "priority": -3, "cache_salt": "s"},
    {"mm_processor_kwargs": {"image_max_pixels": 3136, "video_fps": 0.5, "video_max_frames": 4}, "request_id": "r"},
    {
        "mm_processor_kwargs": {
            "image_min_pixels": 1,
            "video_min_pixels": 2,
            "video_max_pixels": 3,
            "video_min_frames": 4,
        }
    },
    {"prompt_logprobs": 0, "return_token_ids": True, "return_timings": True, "model": "m"},
]


def over_http(**fields: Any) -> GenerateCall:
    body = {"messages": [{"role": "user", "content": "hello"}], **fields}
    return to_call(parse_chat_request(json.dumps(body).encode()))


@pytest.mark.parametrize("fields", REQUESTS)
def test_requests(fields: dict[str, Any]) -> None:
    assert generate_call(generate_request("hello", **fields)) == over_http(**fields)


@pytest.mark.parametrize(
    ("grpc", "http"),
    [
        ({"logprobs": 0}, {"logprobs": True}),
        ({"logprobs": 5}, {"logprobs": True, "top_logprobs": 5}),
        ({"json_schema": SCHEMA}, {"guided_json": SCHEMA}),
        ({"json_schema": SCHEMA}, {"response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA}}}),
        ({"json_object": True}, {"response_format": {"type": "json_object"}}),
        ({"regex": "a+"}, {"structured_outputs": {"regex": "a+"}}),
        ({"grammar": "start: /a/"}, {"structured_outputs": {"grammar": "start: /a/"}}),
        ({"choice": ["ja", "nö"]}, {"structured_outputs": {"choice": ["ja", "nö"]}}),
    ],
)
def test_requests_spelt_otherwise(grpc: dict[str, Any], http: dict[str, Any]) -> None:
    assert generate_call(generate_request("hello", **grpc)) == over_http(**http)


def test_replies() -> None:
    call = over_http(n=2, logprobs=True, top_logprobs=2, prompt_logprobs=2, return_token_ids=True)
    completion = openai_response.Completion(0, call)
    for event in SCORED[1:-1]:
        completion.add(event)  # type: ignore[arg-type]
    assert isinstance(SCORED[0], Started)
    http = completion.body(SCORED[0], FINISHED)
    grpc = whole_response(2, SCORED)
    assert [choice.text for choice in grpc.choices] == [choice["message"]["content"] for choice in http["choices"]]
    assert [choice.reasoning_text for choice in grpc.choices] == [
        choice["message"].get("reasoning", "") for choice in http["choices"]
    ]
    for ours, theirs in zip(grpc.choices, http["choices"], strict=True):
        assert list(ours.token_ids) == theirs["token_ids"]
        assert [(entry.chosen.token, [score.logprob for score in entry.top][1:]) for entry in ours.logprobs] == [
            (bytes(entry["bytes"]), [score["logprob"] for score in entry["top_logprobs"]][1:])
            for entry in theirs["logprobs"]["content"]
        ]
    assert [
        {score.token_id: score.logprob for score in entry.top} if entry.HasField("chosen") else None
        for entry in grpc.prompt_logprobs
    ] == [
        None if entry is None else {int(token): score["logprob"] for token, score in entry.items()}
        for entry in http["prompt_logprobs"]
    ]
    assert grpc.usage.cached_token_count == http["usage"]["prompt_tokens_details"]["cached_tokens"] == 4


@pytest.mark.parametrize("kwargs", [{"max_pixels": 5}, {"image_max_pixels": "5"}, {"image_max_pixels": 2**70}])
def test_options_of_media_that_have_no_wire_form(kwargs: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="mm_processor_kwargs"):
        generate_request("hello", mm_processor_kwargs=kwargs)
