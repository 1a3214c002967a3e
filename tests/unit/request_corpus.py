"""Requests in both spellings: the body of a chat completion, and a ``GenerateRequest`` in protobuf's JSON form.

``ANSWERED`` get a reply from nano, ``REFUSED`` an error that names a field as its client wrote it.
"""

from __future__ import annotations

import base64
import json
from typing import Any

from actors.checkpoint import nano_directory
from actors.processing.tokenizer import TextTokenizer
from cluster.eval.tasks import samples
from cluster.eval.world import zoom
from tests.nano_model import SEED

Request = dict[str, Any]
Pair = tuple[Request, Request]

_TOKENIZER = TextTokenizer.from_dir(nano_directory())
(_SCENE,) = samples("colour", SEED, 1)
(_ZOOM,) = samples("zoom", SEED, 1)
(_CLIP,) = samples("direction", SEED, 1)
PNG, ZOOM_PNG, MP4 = (
    base64.b64encode(sample.images[0] if sample.images else sample.videos[0]).decode()
    for sample in (_SCENE, _ZOOM, _CLIP)
)

STAR = "What colour is the star?"
MAX_TOKENS = 12
SCHEMA = '{"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": false}'
BOX = (
    '{"type": "object", "properties": {"bbox_2d": {"type": "array", "items": {"type": "integer"}, "minItems": 4, '
    '"maxItems": 4}}, "required": ["bbox_2d"], "additionalProperties": false}'
)


def ids(text: str) -> list[int]:
    return _TOKENIZER.encode(text)


def user(*parts: Any) -> Request:
    return {"role": "user", "content": [{"type": "text", "text": p} if isinstance(p, str) else p for p in parts]}


def grpc_user(*parts: Any) -> Request:
    return {"role": "ROLE_USER", "parts": [{"text": p} if isinstance(p, str) else p for p in parts]}


def picture(data: str = PNG, **options: Any) -> Request:
    detail = options.pop("detail", None)
    url = {"url": f"data:image/png;base64,{data}"} | ({"detail": detail} if detail else {})
    return {"type": "image_url", "image_url": url, **options}


def grpc_picture(data: str = PNG, **options: Any) -> Request:
    return {"image": {"source": {"content": data}, **options}}


def clip(**options: Any) -> Request:
    return {"type": "video_url", "video_url": {"url": f"data:video/mp4;base64,{MP4}"}, **options}


def grpc_clip(**options: Any) -> Request:
    return {"video": {"source": {"content": MP4}, **options}}


def star(http: Request, grpc: Request | None = None, **sampling: Any) -> Pair:
    """About no picture at all, so that prompts are short."""
    fields = dict(grpc or {})
    limit = http.get("max_tokens", MAX_TOKENS)
    params = {"temperature": http.get("temperature", 0), "max_output_token_count": limit, **sampling}
    return (
        {"messages": [user(STAR)], "temperature": 0, "max_tokens": MAX_TOKENS, **http},
        {"messages": [grpc_user(STAR)], "sampling_params": params, **fields},
    )


def seen(
    http_parts: list[Any], grpc_parts: list[Any], http: Request | None = None, grpc: Request | None = None
) -> Pair:
    return star(
        {"messages": [user(*http_parts)], **(http or {})}, {"messages": [grpc_user(*grpc_parts)], **(grpc or {})}
    )


WAIT = {"type": "function", "function": {"name": "wait", "description": "Does nothing."}}
GRPC_WAIT = {"name": "wait", "description": "Does nothing."}


def _tool(schema: str) -> Request:
    return {"type": "function", "function": {"name": zoom.NAME, "description": "d", "parameters": json.loads(schema)}}


def _grpc_tool(schema: str) -> Request:
    return {"name": zoom.NAME, "description": "d", "parameters_json": schema}


TOOLS: Pair = ({"tools": [_tool(BOX), WAIT]}, {"tools": [_grpc_tool(BOX), GRPC_WAIT]})
CALL = {"id": "c1", "type": "function", "function": {"name": zoom.NAME, "arguments": '{"bbox_2d": [0, 0, 500, 500]}'}}
GRPC_CALL = {"id": "c1", "name": zoom.NAME, "arguments_json": '{"bbox_2d": [0, 0, 500, 500]}'}
LOOKED: Pair = (
    {
        "messages": [
            {"role": "developer", "content": "Be brief."},
            user(picture(ZOOM_PNG), "What number is in the picture?"),
            {"role": "assistant", "content": None, "reasoning_content": "Small.", "tool_calls": [CALL]},
            {"role": "tool", "tool_call_id": "c1", "content": [picture()]},
        ],
        **TOOLS[0],
    },
    {
        "messages": [
            {"role": "ROLE_SYSTEM", "parts": [{"text": "Be brief."}]},
            grpc_user(grpc_picture(ZOOM_PNG), "What number is in the picture?"),
            {"role": "ROLE_ASSISTANT", "reasoning_text": "Small.", "tool_calls": [GRPC_CALL]},
            {"role": "ROLE_TOOL", "tool_call_id": "c1", "parts": [grpc_picture()]},
        ],
        **TOOLS[1],
    },
)
WEATHER: Pair = (
    {
        "messages": [
            user("Get the current weather in Beijing"),
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [
                    {"id": "call_1", "type": "function", "function": {"name": "wait", "arguments": {"unit": "c"}}}
                ],
            },
            {"role": "tool", "content": [{"type": "text", "text": "temperature: 23"}]},
        ],
    },
    {
        "messages": [
            grpc_user("Get the current weather in Beijing"),
            {
                "role": "ROLE_ASSISTANT",
                "tool_calls": [{"id": "call_1", "name": "wait", "arguments_json": '{"unit": "c"}'}],
            },
            {"role": "ROLE_TOOL", "parts": [{"text": "temperature: 23"}]},
        ],
    },
)
"""As in FastDeploy's guide: arguments are an object, and the result does not say which call it is of."""
ON, OFF = "THINKING_MODE_ENABLED", "THINKING_MODE_DISABLED"
_DIGITS = [token for digit in "123" for token in ids(digit)]

ANSWERED: dict[str, Pair] = {
    "greedy": star({}),
    "no bound": star({"max_tokens": None, "stop": ["e"]}, stop_sequences=["e"]),
    "sampled": star(
        {"temperature": 0.9, "top_p": 0.9, "top_k": 20, "min_p": 0.01, "seed": 5, "n": 3},
        {"choice_count": 3},
        top_p=0.9,
        top_k=20,
        min_p=0.01,
        seed=5,
    ),
    "penalties": star(
        {"repetition_penalty": 1.5, "presence_penalty": 0.5, "frequency_penalty": -0.5, "seed": 1, "temperature": 1},
        repetition_penalty=1.5,
        presence_penalty=0.5,
        frequency_penalty=-0.5,
        seed=1,
    ),
    "biased": star(
        {"logit_bias": {str(_DIGITS[0]): 50}, "bad_words": ["blue"], "min_tokens": 3},
        logit_bias={_DIGITS[0]: 50},
        bad_words=["blue"],
        min_output_token_count=3,
    ),
    "only some": star(
        {"allowed_token_ids": _DIGITS, "max_tokens": 5, "seed": 3, "temperature": 1},
        allowed_token_ids=_DIGITS,
        seed=3,
    ),
    "on and on": star({"ignore_eos": True, "max_tokens": 12}, ignore_eos=True),
    "stop token": star(
        {"logit_bias": {str(_DIGITS[1]): 100}, "stop_token_ids": [_DIGITS[1]]},
        logit_bias={_DIGITS[1]: 100},
        stop_token_ids=[_DIGITS[1]],
    ),
    "scores": star(
        {"logprobs": True, "top_logprobs": 3, "prompt_logprobs": 1},
        {"top_logprob_count": 3, "prompt_top_logprob_count": 1},
    ),
    "named": star(
        {"priority": -2, "cache_salt": "a", "timeout": 60, "user": "me", "metadata": {"a": "b"}},
        {"priority": -2, "cache_salt": "a", "timeout": "60s"},
    ),
    "thinking": star({"enable_thinking": True}, {"thinking_mode": ON}),
    "thinking by template": star(
        {"chat_template_kwargs": {"enable_thinking": True}, "reasoning_max_tokens": 6},
        {"thinking_mode": ON},
        max_reasoning_token_count=6,
    ),
    "thinking by metadata": star({"metadata": {"enable_thinking": True}}, {"thinking_mode": ON}),
    "thinking by effort": star({"reasoning_effort": "low"}, {"thinking_mode": ON}),
    "not thinking": star({"metadata": {"enable_thinking": False}}, {"thinking_mode": OFF}),
    "tools": seen(
        [picture(ZOOM_PNG), _ZOOM.text],
        [grpc_picture(ZOOM_PNG), _ZOOM.text],
        TOOLS[0] | {"max_tokens": 96},
        TOOLS[1],
    ),
    "tools not seen": star(
        TOOLS[0] | {"tool_choice": "none"}, TOOLS[1] | {"tool_choice": {"mode": "TOOL_CHOICE_MODE_NONE"}}
    ),
    "a call required": star(
        TOOLS[0] | {"tool_choice": "required", "max_tokens": 120},
        TOOLS[1] | {"tool_choice": {"mode": "TOOL_CHOICE_MODE_REQUIRED"}},
    ),
    "one call": star(
        TOOLS[0] | {"tool_choice": {"type": "function", "function": {"name": "wait"}}, "max_tokens": 60},
        TOOLS[1] | {"tool_choice": {"function_name": "wait"}},
    ),
    "calls or a structure": star(
        TOOLS[0] | {"guided_json": SCHEMA, "parallel_tool_calls": False, "max_tokens": 90},
        TOOLS[1] | {"structured_output": {"json_schema": SCHEMA}, "parallel_tool_calls": False},
    ),
    "a look at a tool's picture": star(*LOOKED),
    "a result of the only call": star(*WEATHER),
    "schema": star({"guided_json": SCHEMA}, {"structured_output": {"json_schema": SCHEMA}}),
    "object": star(
        {"response_format": {"type": "json_object"}, "max_tokens": 8}, {"structured_output": {"json_object": {}}}
    ),
    "regex": star({"guided_regex": "[0-9]{2,4}"}, {"structured_output": {"regex": "[0-9]{2,4}"}}),
    "choice": star(
        {"structured_outputs": {"choice": ["red", "orange"]}},
        {"structured_output": {"choices": {"texts": ["red", "orange"]}}},
    ),
    "grammar after thinking": star(
        {"guided_grammar": 'start: "a"+', "enable_thinking": True, "reasoning_max_tokens": 4, "max_tokens": 12},
        {"structured_output": {"grammar": 'start: "a"+'}, "thinking_mode": ON},
        max_reasoning_token_count=4,
    ),
    "picture": seen([picture(), STAR], [grpc_picture(), STAR]),
    "pictures between texts": seen(
        ["Look:", picture(uuid="u"), picture(ZOOM_PNG), STAR], ["Look:", grpc_picture(), grpc_picture(ZOOM_PNG), STAR]
    ),
    "other parts": seen(
        [{"type": "input_image", "image_url": f"data:image/png;base64,{PNG}"}, {"type": "image", "base64": PNG}, STAR],
        [grpc_picture(), {"image": {"source": {"uri": f"data:image/png;base64,{PNG}"}}}, STAR],
    ),
    "few pixels": seen(
        [picture(min_pixels=784, max_pixels=3136), STAR], [grpc_picture(min_pixels=784, max_pixels=3136), STAR]
    ),
    "little detail": seen([picture(detail="low"), STAR], [grpc_picture(low_detail=True), STAR]),
    "few pixels for all": seen(
        [picture(), picture(ZOOM_PNG, max_pixels=7840), STAR],
        [grpc_picture(), grpc_picture(ZOOM_PNG, max_pixels=7840), STAR],
        {"mm_processor_kwargs": {"min_pixels": 784, "max_pixels": 3136}},
        {"media_options": {"image_min_pixels": 784, "image_max_pixels": 3136}},
    ),
    "clip": seen([clip(), _CLIP.text], [grpc_clip(), _CLIP.text]),
    "part of a clip": seen(
        [clip(fps=1, min_frames=2, max_frames=4, video_start=0.5, video_end=2.5), _CLIP.text],
        [
            grpc_clip(
                frames_per_second=1, min_frame_count=2, max_frame_count=4, start_offset="0.5s", end_offset="2.5s"
            ),
            _CLIP.text,
        ],
    ),
    "frames for all": seen(
        [clip(), _CLIP.text, picture()],
        [grpc_clip(), _CLIP.text, grpc_picture()],
        {"mm_processor_kwargs": {"video_target_frames": 4, "video_min_pixels": 784, "video_max_pixels": 3136}},
        {
            "media_options": {
                "video_min_frame_count": 4,
                "video_max_frame_count": 4,
                "video_min_pixels": 784,
                "video_max_pixels": 3136,
            }
        },
    ),
}

NO_TOKEN = 10**6
_BROKEN = base64.b64encode(b"no picture").decode()
_LONG = "star " * 5000

REFUSED: dict[str, tuple[Pair, str, str, str]] = {
    "model": (star({"model": "other"}, {"model": "other"}), "MODEL_NOT_FOUND", "model", "model"),
    "no messages": (star({"messages": []}, {"messages": []}), "", "messages", "messages"),
    "temperature": (star({"temperature": 3}), "", "temperature", "sampling_params.temperature"),
    "seed": (star({"seed": -1}, seed=-1), "", "seed", "sampling_params.seed"),
    "n": (star({"n": 129}, {"choice_count": 129}), "", "n", "choice_count"),
    "stop": (star({"stop": [""]}, stop_sequences=[""]), "", "stop[0]", "sampling_params.stop_sequences[0]"),
    "no such token": (
        star({"logit_bias": {str(NO_TOKEN): 1}}, logit_bias={NO_TOKEN: 1}),
        "",
        "logit_bias",
        "sampling_params.logit_bias",
    ),
    "no word": (star({"bad_words": ["  "]}, bad_words=["  "]), "", "bad_words[0]", "sampling_params.bad_words[0]"),
    "too many tokens": (
        star({"max_tokens": 10**6}),
        "CONTEXT_EXCEEDED",
        "max_tokens",
        "sampling_params.max_output_token_count",
    ),
    "too long a prompt": (
        star({"messages": [user(_LONG)]}, {"messages": [grpc_user(_LONG)]}),
        "CONTEXT_EXCEEDED",
        "messages",
        "messages",
    ),
    "alias": (star({"request_id": "a b"}, {"request_id": "a b"}), "", "request_id", "request_id"),
    "salt": (star({"cache_salt": "x" * 257}, {"cache_salt": "x" * 257}), "", "cache_salt", "cache_salt"),
    "timeout": (star({"timeout": 1e6}, {"timeout": "1000000s"}), "", "timeout", "timeout"),
    "schema": (
        star({"guided_json": '{"type": 3}'}, {"structured_output": {"json_schema": '{"type": 3}'}}),
        "INVALID_STRUCTURE",
        "guided_json",
        "structured_output",
    ),
    "regex": (
        star({"guided_regex": "("}, {"structured_output": {"regex": "("}}),
        "INVALID_STRUCTURE",
        "guided_regex",
        "structured_output",
    ),
    "regex beside tools": (
        star(TOOLS[0] | {"guided_regex": "a"}, TOOLS[1] | {"structured_output": {"regex": "a"}}),
        "",
        "guided_regex",
        "structured_output",
    ),
    "tool's name": (
        star({"tools": [{"type": "function", "function": {"name": "a b"}}]}, {"tools": [{"name": "a b"}]}),
        "",
        "tools[0].function.name",
        "tools[0].name",
    ),
    "no tool to call": (
        star({"tool_choice": "required"}, {"tool_choice": {"mode": "TOOL_CHOICE_MODE_REQUIRED"}}),
        "",
        "tool_choice",
        "tool_choice",
    ),
    "last of the assistant": (
        star(
            {"messages": [user(STAR), {"role": "assistant", "content": "red"}]},
            {"messages": [grpc_user(STAR), {"role": "ROLE_ASSISTANT", "parts": [{"text": "red"}]}]},
        ),
        "",
        "messages[1].role",
        "messages[1].role",
    ),
    "misplaced": (
        star(
            {"messages": [user(STAR) | {"tool_call_id": "c"}]}, {"messages": [grpc_user(STAR) | {"tool_call_id": "c"}]}
        ),
        "",
        "messages[0].tool_call_id",
        "messages[0].tool_call_id",
    ),
    "no picture": (
        seen([picture(_BROKEN)], [grpc_picture(_BROKEN)]),
        "MEDIA_UNREADABLE",
        "messages[0].content[0].image_url",
        "messages[0].parts[0].image",
    ),
    "no picture in another part": (
        seen([{"type": "image", "base64": _BROKEN}], [grpc_picture(_BROKEN)]),
        "MEDIA_UNREADABLE",
        "messages[0].content[0].base64",
        "messages[0].parts[0].image",
    ),
    "no clip": (
        seen(
            [{"type": "video_url", "video_url": {"url": f"data:video/mp4;base64,{_BROKEN}"}}],
            [{"video": {"source": {"content": _BROKEN}}}],
        ),
        "MEDIA_UNREADABLE",
        "messages[0].content[0].video_url",
        "messages[0].parts[0].video",
    ),
    "not fetched": (
        seen(
            [{"type": "image_url", "image_url": {"url": "https://example.com/a.png"}}],
            [{"image": {"source": {"uri": "https://example.com/a.png"}}}],
        ),
        "MEDIA_NOT_ALLOWED",
        "messages[0].content[0].image_url",
        "messages[0].parts[0].image",
    ),
    "few pixels": (
        seen([picture(max_pixels=5)], [grpc_picture(max_pixels=5)]),
        "",
        "messages[0].content[0].max_pixels",
        "messages[0].parts[0].image.max_pixels",
    ),
    "few pixels for all": (
        star({"mm_processor_kwargs": {"max_pixels": 5}}, {"media_options": {"image_max_pixels": 5}}),
        "",
        "mm_processor_kwargs.max_pixels",
        "media_options.image_max_pixels",
    ),
    "fast": (
        star({"mm_processor_kwargs": {"fps": 31}}, {"media_options": {"video_frames_per_second": 31}}),
        "",
        "mm_processor_kwargs.fps",
        "media_options.video_frames_per_second",
    ),
    "many frames": (
        seen([clip(max_frames=181)], [grpc_clip(max_frame_count=181)]),
        "",
        "messages[0].content[0].max_frames",
        "messages[0].parts[0].video.max_frame_count",
    ),
    "outside the clip": (
        seen([clip(video_start=900)], [grpc_clip(start_offset="900s")]),
        "",
        "messages[0].content[0].video_start",
        "messages[0].parts[0].video.start_offset",
    ),
}
"""With the reason ("" is INVALID_FIELD), and the field as HTTP and as gRPC clients write it."""
