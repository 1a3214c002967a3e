"""Python client of ``ernie_serving.v1.InferenceService``, for threads and for asyncio. Needs grpc and the stubs only.

with Client("127.0.0.1:9000") as client:
    print(client.chat("What is this?", images=["cat.png"], temperature=0).text)

``chat`` and ``stream`` take plain Python and return plain values; ``generate`` and ``stream_generate`` speak protobuf.
``cluster.client.looking`` carries out the tools with which a model looks closer at pictures (needs pillow).
"""

from cluster.client.aio import AsyncClient, AsyncStream
from cluster.client.attempts import DEFAULT_ADDRESS
from cluster.client.errors import (
    CancelledError,
    ClientError,
    DeadlineError,
    InvalidRequestError,
    NotFoundError,
    RefusedError,
    UnreachableError,
)
from cluster.client.events import (
    Choice,
    ChoiceFinished,
    Delta,
    Event,
    Finished,
    FinishReason,
    Model,
    PositionLogprobs,
    PromptScored,
    Reply,
    ReplyBuilder,
    Started,
    Timings,
    TokenCount,
    TokenLogprob,
    ToolCall,
    ToolCallDelta,
    Usage,
    event_of,
    reply_of,
)
from cluster.client.media import Media, media_source
from cluster.client.requests import (
    assistant_message,
    count_request,
    generate_request,
    reply_message,
    system_message,
    tool_message,
    user_message,
)
from cluster.client.sync import Client, Stream

__all__ = [
    "DEFAULT_ADDRESS",
    "AsyncClient",
    "AsyncStream",
    "CancelledError",
    "Choice",
    "ChoiceFinished",
    "Client",
    "ClientError",
    "DeadlineError",
    "Delta",
    "Event",
    "FinishReason",
    "Finished",
    "InvalidRequestError",
    "Media",
    "Model",
    "NotFoundError",
    "PositionLogprobs",
    "PromptScored",
    "RefusedError",
    "Reply",
    "ReplyBuilder",
    "Started",
    "Stream",
    "Timings",
    "TokenCount",
    "TokenLogprob",
    "ToolCall",
    "ToolCallDelta",
    "UnreachableError",
    "Usage",
    "assistant_message",
    "count_request",
    "event_of",
    "generate_request",
    "media_source",
    "reply_message",
    "reply_of",
    "system_message",
    "tool_message",
    "user_message",
]
