"""What goes out over gRPC and HTTP, and what comes back, against the real facades and a scripted service."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest

from actors.errors import Overloaded, Unavailable
from actors.types import FinishReason, ImagePart, MediaSource, MessageRole, TextPart, VideoPart
from cluster.bench.load import Ask, Reply, SendFailed
from cluster.bench.senders import GrpcSender, HttpSender, Unreachable, make_sender
from cluster.bench.settings import BenchSettings
from cluster.bench.workload import Medium, Turn
from cluster.generation import ChoiceFinished, Delta
from cluster.http_api import build_api
from tests.doubles import FINISHED, SCRIPT, STARTED, ScriptedService, grpc_serving

PICTURE = Medium(kind="image", mime_type="image/jpeg", content=b"jpeg")
VIDEO = Medium(kind="video", mime_type="video/mp4", content=b"mp4")
ASK = Ask(
    system="be brief",
    history=((Turn(text="one", media=(PICTURE,), output_tokens=3), "first"),),
    turn=Turn(text="two", media=(VIDEO,), output_tokens=5),
)


def settings(**fields: Any) -> BenchSettings:
    return BenchSettings(**{"url": "http://h", "num_requests": 1, "concurrency": 1} | fields)


@asynccontextmanager
async def grpc_sender(service: ScriptedService, wanted: BenchSettings) -> AsyncIterator[GrpcSender]:
    async with grpc_serving(service) as address:
        sender = GrpcSender(address, wanted)
        try:
            yield sender
        finally:
            await sender.close()


@asynccontextmanager
async def http_sender(service: ScriptedService, wanted: BenchSettings) -> AsyncIterator[HttpSender]:
    sender = HttpSender("http://h", wanted, transport=httpx.ASGITransport(app=build_api(lambda: service)))
    try:
        yield sender
    finally:
        await sender.close()


SENDERS = pytest.mark.parametrize("sending", [grpc_sender, http_sender])


@SENDERS
async def test_a_request_and_its_reply(sending: Any) -> None:
    service = ScriptedService()
    wanted = settings(model="ernie", ignore_eos=True, temperature=0.5)
    async with sending(service, wanted) as sender:
        reply: Reply = await sender.send(sender.prepare(ASK))
    # Four of the scripted deltas carry tokens, one of them no text.
    assert (reply.text, len(reply.chunk_s)) == ("A cät", 4)
    assert list(reply.chunk_s) == sorted(reply.chunk_s) and reply.end_s >= reply.chunk_s[-1]
    assert (reply.prompt_tokens, reply.cached_tokens, reply.output_tokens) == (12, 4, 5)
    (call,) = service.calls
    assert (call.model, call.max_tokens, call.ignore_eos, call.temperature) == ("ernie", 5, True, 0.5)
    assert [(message.role, message.parts) for message in call.messages] == [
        (MessageRole.SYSTEM, (TextPart(text="be brief"),)),
        (MessageRole.USER, (ImagePart(source=MediaSource(content=b"jpeg")), TextPart(text="one"))),
        (MessageRole.ASSISTANT, (TextPart(text="first"),)),
        (MessageRole.USER, (VideoPart(source=MediaSource(content=b"mp4")), TextPart(text="two"))),
    ]


@SENDERS
async def test_unset_options_are_left_to_the_server(sending: Any) -> None:
    service = ScriptedService()
    async with sending(service, settings()) as sender:
        await sender.send(sender.prepare(Ask(system=None, history=(), turn=Turn(text="hi", output_tokens=1))))
    (call,) = service.calls
    assert (call.model, call.temperature, call.ignore_eos, len(call.messages)) == (None, None, False, 1)


@SENDERS
@pytest.mark.parametrize("at", [0, 1, 3])
async def test_failures_are_short_and_alike(sending: Any, at: int) -> None:
    script = (*SCRIPT[:at], Overloaded("queue full", retry_after_s=1))
    async with sending(ScriptedService(script=script), settings()) as sender:
        with pytest.raises(SendFailed, match="queue full") as caught:
            await sender.send(sender.prepare(ASK))
    assert not isinstance(caught.value, Unreachable)


@SENDERS
async def test_overlong_messages_are_cut(sending: Any) -> None:
    async with sending(ScriptedService(script=(Unavailable("x" * 900),)), settings()) as sender:
        with pytest.raises(SendFailed) as caught:
            await sender.send(sender.prepare(ASK))
    assert len(str(caught.value)) == 300


@SENDERS
async def test_thinking_counts_as_tokens_and_is_not_repeated(sending: Any) -> None:
    script = (STARTED, Delta(reasoning="hm"), ChoiceFinished(reason=FinishReason.LENGTH), FINISHED)
    async with sending(ScriptedService(script=script), settings()) as sender:
        reply = await sender.send(sender.prepare(ASK))
    assert (reply.text, len(reply.chunk_s)) == ("", 1)


@pytest.mark.parametrize("scheme", ["grpc", "http"])
async def test_nobody_listens(scheme: str) -> None:
    sender = make_sender(settings(url=f"{scheme}://127.0.0.1:1"))
    with pytest.raises(Unreachable):
        await sender.send(sender.prepare(ASK))
    await sender.close()


@pytest.mark.parametrize(
    ("answer", "wrong"),
    [
        (httpx.Response(502, text="bad gateway"), "HTTP 502: bad gateway"),
        (httpx.Response(400, json={"error": {"message": "no such field"}}), "HTTP 400: no such field"),
        (httpx.Response(200, text="data: {\n\n"), "form"),
        (httpx.Response(200, text="data: []\n\n"), "form"),
        (httpx.Response(200, text="data: {}\n\n"), "form"),
        (httpx.Response(200, text='data: {"choices": [{"delta": {"content": "x"}}]}\n\n'), "ended early"),
        (httpx.Response(200, text="data: [DONE]\n\n"), "no usage"),
        (httpx.Response(200, text='data: {"choices": [], "usage": {"a": 1}}\n\ndata: [DONE]\n\n'), "usage"),
        (httpx.ReadError("reset"), "ReadError: reset"),
        (httpx.ConnectError("refused"), "cannot connect: refused"),
    ],
)
async def test_other_servers(answer: httpx.Response | Exception, wrong: str) -> None:
    def respond(request: httpx.Request) -> httpx.Response:
        if isinstance(answer, Exception):
            raise answer
        return answer

    sender = HttpSender("http://h", settings(), transport=httpx.MockTransport(respond))
    with pytest.raises(SendFailed, match=wrong):
        await sender.send(sender.prepare(ASK))
    await sender.close()


async def test_a_server_without_token_ids_is_measured_by_its_text() -> None:
    events = [
        '{"choices": [{"delta": {"role": "assistant", "content": ""}}]}',
        '{"choices": [{"delta": {"content": "a"}}]}',
        '{"choices": [{"delta": {"content": "b"}, "finish_reason": null}], "usage": null}',
        '{"choices": [{"delta": {}, "finish_reason": "stop"}]}',
        '{"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 2}}',
        "[DONE]",
    ]
    text = ": comment\n\n" + "".join(f"data: {event}\n\n" for event in events)
    sender = HttpSender("http://h", settings(), transport=httpx.MockTransport(lambda _: httpx.Response(200, text=text)))
    reply = await sender.send(sender.prepare(ASK))
    await sender.close()
    assert (reply.text, len(reply.chunk_s), reply.prompt_tokens, reply.cached_tokens) == ("ab", 2, 3, 0)


async def test_one_connection_per_sixty_four_requests() -> None:
    for fields, count in (({"concurrency": 64}, 1), ({"concurrency": 65}, 2), ({"concurrency": 10**6}, 64),
                          ({"concurrency": None, "rate": 1.0, "num_requests": 200}, 4)):  # fmt: skip
        sender = GrpcSender("127.0.0.1:1", settings(**fields))
        assert len(sender._clients) == count
        await sender.close()
