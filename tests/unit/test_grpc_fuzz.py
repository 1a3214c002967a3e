"""Whatever a gRPC client writes into any field of any request: an answer or an error of the caller's, soon.

Requests come from the descriptors, so that a field that is added to the API is tried without a word here.
"""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import Iterator
from contextlib import AsyncExitStack
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from google.rpc import error_details_pb2, status_pb2  # type: ignore[import-untyped]
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from actors.types import EngineRole
from cluster.grpc_service import DETAILS_KEY
from ernie_serving.v1 import content_pb2, inference_pb2, inference_pb2_grpc
from tests.doubles import grpc_serving
from tests.in_process import in_process_cluster
from tests.media import mp4, png
from tests.tiny_model import tiny_checkpoint

DEADLINE_S = 30.0
"""A call that takes longer hangs: each is given the time below to generate."""
GENERATION_S = 0.2
ALLOWED = {
    grpc.StatusCode.OK,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.ALREADY_EXISTS,
    grpc.StatusCode.DEADLINE_EXCEEDED,
}

_INTEGERS = [0, 1, -1, 2, 700, 10**6]
_TEXTS = [
    "",
    "a",
    "\0",
    "é漢😀",
    "x" * 3000,
    "<|IMAGE_PLACEHOLDER|>",
    "</s><think></think><tool_call>",
    "\U000f1e00</s>\U000f1e01",
    "{",
    '{"type": "object", "properties": {"a": {"type": "integer"}}}',
    '{"type": 3}',
    "[" * 3000,
    "(a|b)*",
    'start: "a"+',
    "data:image/png;base64,AAAA",
    "http://127.0.0.1:1/a.png",
    "file:///etc/passwd",
    "chatcmpl-",
]
_FLOATS = [0.0, -0.0, 1.0, 0.5, -1.0, 1e308, 5e-324, float("nan"), float("inf"), float("-inf")]
_BYTES = [b"", b"\0", b"\xff" * 100, png(40, 40), mp4(40, 40, 4, 2)]


def scalars(field: FieldDescriptor) -> list[Any]:
    """Values worth trying."""
    match field.cpp_type:
        case FieldDescriptor.CPPTYPE_INT32:
            return [*_INTEGERS, 2**31 - 1, -(2**31)]
        case FieldDescriptor.CPPTYPE_INT64:
            return [*_INTEGERS, 2**63 - 1, -(2**63)]
        case FieldDescriptor.CPPTYPE_DOUBLE:
            return _FLOATS
        case FieldDescriptor.CPPTYPE_BOOL:
            return [False, True]
        case FieldDescriptor.CPPTYPE_ENUM:
            return [*(value.number for value in field.enum_type.values), 99, -1]
        case FieldDescriptor.CPPTYPE_STRING if field.type == FieldDescriptor.TYPE_BYTES:
            return _BYTES
        case FieldDescriptor.CPPTYPE_STRING:
            return _TEXTS
    raise AssertionError(f"{field.full_name}: a type that is not tried")


def values(field: FieldDescriptor, depth: int) -> st.SearchStrategy[Any]:
    if field.message_type is not None:
        return messages(field.message_type, depth - 1)
    free = {
        FieldDescriptor.CPPTYPE_INT32: st.integers(-(2**31), 2**31 - 1),
        FieldDescriptor.CPPTYPE_INT64: st.integers(-(2**63), 2**63 - 1),
        FieldDescriptor.CPPTYPE_DOUBLE: st.floats(),
    }.get(field.cpp_type)
    known = st.sampled_from(scalars(field))
    return known if free is None else known | free


def is_map(field: FieldDescriptor) -> bool:
    return field.message_type is not None and field.message_type.GetOptions().map_entry


@st.composite
def messages(draw: st.DrawFn, descriptor: Descriptor, depth: int = 5) -> Message:
    message = GetMessageClass(descriptor)()
    fields = [field for field in descriptor.fields if depth > 0 or field.message_type is None]
    for field in draw(st.lists(st.sampled_from(fields), max_size=4, unique_by=lambda f: f.name)) if fields else ():
        put(message, field, draw(many(field, depth)))
    return message


def many(field: FieldDescriptor, depth: int) -> st.SearchStrategy[Any]:
    if is_map(field):
        key, value = field.message_type.fields
        return st.dictionaries(values(key, depth), values(value, depth), max_size=3)
    return st.lists(values(field, depth), max_size=3) if field.is_repeated else values(field, depth)


def put(message: Message, field: FieldDescriptor, value: Any) -> None:
    if is_map(field):
        getattr(message, field.name).update(value)
    elif field.is_repeated:
        getattr(message, field.name).extend(value)
    elif field.message_type is not None:
        getattr(message, field.name).CopyFrom(value)
    else:
        setattr(message, field.name, value)


USER = content_pb2.ChatMessage(role=content_pb2.ROLE_USER, parts=[content_pb2.ContentPart(text="hello")])
SEEING = content_pb2.ChatMessage(
    role=content_pb2.ROLE_USER,
    parts=[
        content_pb2.ContentPart(image=content_pb2.ImagePart(source=content_pb2.MediaSource(content=png(60, 60)))),
        content_pb2.ContentPart(video=content_pb2.VideoPart(source=content_pb2.MediaSource(content=mp4(60, 60, 8, 4)))),
    ],
)
TOOL = content_pb2.Tool(name="f", parameters_json='{"type": "object"}')


def requests() -> list[inference_pb2.GenerateRequest]:
    """Good ones, to be spoilt in one place."""
    params = inference_pb2.SamplingParams(max_output_token_count=2)
    called = content_pb2.ChatMessage(
        role=content_pb2.ROLE_ASSISTANT, tool_calls=[content_pb2.ToolCall(id="c", name="f", arguments_json="{}")]
    )
    result = content_pb2.ChatMessage(
        role=content_pb2.ROLE_TOOL, tool_call_id="c", parts=[content_pb2.ContentPart(text="1")]
    )
    return [
        inference_pb2.GenerateRequest(messages=[USER], sampling_params=params),
        inference_pb2.GenerateRequest(messages=[SEEING], sampling_params=params),
        inference_pb2.GenerateRequest(messages=[USER, called, result], tools=[TOOL], sampling_params=params),
    ]


class Calls:
    """The service over a real connection."""

    def __init__(self, address: str) -> None:
        self._channel = grpc.insecure_channel(address)
        self._stub = inference_pb2_grpc.InferenceServiceStub(self._channel)
        self._turn = itertools.count()
        self.seen: set[grpc.StatusCode] = set()

    def generate(self, request: inference_pb2.GenerateRequest) -> None:
        span = request.timeout.seconds + request.timeout.nanos / 1e9
        if not request.HasField("timeout") or GENERATION_S < span <= 86_400:
            request.timeout.FromMilliseconds(int(GENERATION_S * 1000))
        if next(self._turn) % 2:
            self.call("Generate", request)
        else:
            self.call("StreamGenerate", inference_pb2.StreamGenerateRequest(request=request))

    def call(self, method: str, request: Message) -> None:
        """Fails the test unless the call ends in time, with a status that is the caller's affair and says why."""
        call = getattr(self._stub, method)
        try:
            reply = call(request, timeout=DEADLINE_S)
            if method.startswith("Stream"):
                list(reply)
            code = grpc.StatusCode.OK
        except grpc.RpcError as error:
            assert isinstance(error, grpc.Call)
            code = error.code()
            assert code in ALLOWED, f"{method} of {request}: {code} {error.details()}"
            assert _reason(error), f"{method} of {request}: {code} without a reason: {error.details()}"
        self.seen.add(code)

    def close(self) -> None:
        self._channel.close()


def _reason(error: grpc.Call) -> str:
    for key, value in error.trailing_metadata() or ():
        if key == DETAILS_KEY:
            for packed in status_pb2.Status.FromString(value).details:
                info = error_details_pb2.ErrorInfo()
                if packed.Unpack(info):
                    return str(info.reason)
    return ""


@pytest.fixture(scope="module")
def calls() -> Iterator[Calls]:
    """A cluster on a loop of its own. Everything must be free at its end."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    stack = AsyncExitStack()

    async def start() -> tuple[str, Any]:
        cluster = await stack.enter_async_context(
            in_process_cluster(tiny_checkpoint(), EngineRole.COLOCATED, dtype="float32")
        )
        return await stack.enter_async_context(grpc_serving(cluster.parts.router)), cluster  # type: ignore[arg-type]

    def run(work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, loop).result(60)

    address, cluster = run(start())
    made = Calls(address)
    try:
        yield made
        run(cluster.wait_clean(timeout_s=20))
    finally:
        made.close()
        run(stack.aclose())
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


def spoilt(message: Message) -> Iterator[tuple[str, Any]]:
    """Every field below a message, with every value worth trying; the message is as it was after each."""
    for field in message.DESCRIPTOR.fields:
        before = type(message)()
        before.CopyFrom(message)
        if field.message_type is not None and not is_map(field):
            for inner in _inner(message, field):
                yield from ((f"{field.name}.{path}", value) for path, value in spoilt(inner))
        else:
            key = field.message_type.fields[0] if is_map(field) else None
            of = field.message_type.fields[1] if is_map(field) else field
            for value in scalars(of):
                if key is not None:
                    put(message, field, dict.fromkeys(scalars(key), value))
                else:
                    put(message, field, [value] if field.is_repeated else value)
                yield field.name, value
                message.CopyFrom(before)
        message.CopyFrom(before)


def _inner(message: Message, field: FieldDescriptor) -> Iterator[Message]:
    """What stands in a field, or one that is put there."""
    if field.is_repeated:
        found = getattr(message, field.name)
        if not found:
            found.add()
        yield found[0]
    else:
        inner = getattr(message, field.name)
        inner.SetInParent()
        yield inner


def test_every_field_with_every_hostile_value(calls: Calls) -> None:
    paths = set()
    request = requests()[0]
    for path, _ in spoilt(request):
        paths.add(path)
        tried = inference_pb2.GenerateRequest()
        tried.CopyFrom(request)
        calls.generate(tried)
    assert len(paths) > 60 and {"media_options.video_frames_per_second", "messages.parts.image.low_detail"} <= paths
    assert {grpc.StatusCode.OK, grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND} <= calls.seen


@pytest.mark.parametrize("method", ["CountTokens", "CancelGeneration", "GetModel", "ListModels"])
def test_every_field_of_the_other_methods(calls: Calls, method: str) -> None:
    request = getattr(inference_pb2, f"{method}Request")()
    if method == "CountTokens":
        request.messages.add().CopyFrom(SEEING)
    for _ in spoilt(request):
        tried = type(request)()
        tried.CopyFrom(request)
        calls.call(method, tried)


@settings(max_examples=100, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(messages(inference_pb2.GenerateRequest.DESCRIPTOR), st.integers(0, 2), st.data())
def test_whole_requests(calls: Calls, free: Message, base: int, data: st.DataObject) -> None:
    """At random, and as parts of a good one."""
    assert isinstance(free, inference_pb2.GenerateRequest)
    good = requests()[base]
    name = data.draw(st.sampled_from([field.name for field in free.DESCRIPTOR.fields]))
    field = free.DESCRIPTOR.fields_by_name[name]
    if not field.is_repeated or data.draw(st.booleans()):
        good.ClearField(name)
    put(good, field, data.draw(many(field, 4)))
    for request in (free, good):
        calls.generate(request)


@settings(max_examples=20, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(messages(inference_pb2.CountTokensRequest.DESCRIPTOR), messages(inference_pb2.ListModelsRequest.DESCRIPTOR))
def test_whole_requests_of_the_other_methods(calls: Calls, counted: Message, listed: Message) -> None:
    calls.call("CountTokens", counted)
    calls.call("ListModels", listed)


def test_bytes_that_are_no_message(calls: Calls) -> None:
    """gRPC itself refuses them, before any of our code."""
    send = calls._channel.unary_unary("/ernie_serving.v1.InferenceService/Generate")
    with pytest.raises(grpc.RpcError):
        send(b"\xff\xff\xff", timeout=DEADLINE_S)
