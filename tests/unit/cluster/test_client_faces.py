"""Both faces of the client - threads and asyncio - do the same: plain values, retries, ends."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field
from typing import Any

import grpc
import pytest

from actors.errors import AlreadyExists, InvalidRequest, Overloaded, Unavailable
from actors.types import MessageRole, TextPart, ThinkingMode
from actors.types import ToolCall as ServedCall
from cluster.client import (
    AsyncClient,
    ChoiceFinished,
    Client,
    ClientError,
    Delta,
    Event,
    Finished,
    FinishReason,
    InvalidRequestError,
    RefusedError,
    Reply,
    Started,
    ToolCall,
    assistant_message,
    generate_request,
    reply_message,
    system_message,
    tool_message,
    user_message,
)
from cluster.client.attempts import Attempts
from cluster.generation import GenerateCall
from tests.doubles import SCORED, SCRIPT, Pause, ScriptedService
from tests.doubles import grpc_serving_in_a_thread as running
from tests.waiting import eventually, wait_until

BUSY = Overloaded("queue full", retry_after_s=0.05)
Ask = Callable[..., tuple[list[Event], Reply | None]]


def in_threads(address: str, *args: Any, retries: int = 2, **options: Any) -> tuple[list[Event], Reply | None]:
    with Client(address, retries=retries) as client, client.stream(*args, **options) as stream:
        return list(stream), stream.reply


def in_a_loop(address: str, *args: Any, retries: int = 2, **options: Any) -> tuple[list[Event], Reply | None]:
    async def run() -> tuple[list[Event], Reply | None]:
        async with AsyncClient(address, retries=retries) as client, client.stream(*args, **options) as stream:
            return [event async for event in stream], stream.reply

    return asyncio.run(run())


def whole_in_threads(address: str, *args: Any, retries: int = 2, **options: Any) -> Reply:
    with Client(address, retries=retries) as client:
        return client.chat(*args, **options)


def whole_in_a_loop(address: str, *args: Any, retries: int = 2, **options: Any) -> Reply:
    async def run() -> Reply:
        async with AsyncClient(address, retries=retries) as client:
            return await client.chat(*args, **options)

    return asyncio.run(run())


streams = pytest.mark.parametrize("ask", [in_threads, in_a_loop])
wholes = pytest.mark.parametrize("chat", [whole_in_threads, whole_in_a_loop])


@dataclass
class Refusing(ScriptedService):
    """Fails its first requests with these errors, after the given number of events."""

    errors: list[Exception] = field(default_factory=list)
    events_before: int = 0

    async def generate(self, call: GenerateCall) -> AsyncGenerator[Any, None]:
        if not self.errors:
            async for event in super().generate(call):
                yield event
            return
        self.calls.append(call)
        for step in self.script[: self.events_before]:
            yield step
        raise self.errors.pop(0)


@streams
def test_events_are_plain_values(ask: Ask) -> None:
    with running(ScriptedService) as (address, service):
        events, reply = ask(address, "Why?", enable_thinking=True, return_token_ids=True, return_timings=True)
    assert events[0] == Started(request_id="r-1", model="ernie", prompt_tokens=12, prompt_token_ids=(1, 2, 3))
    assert events[2] == Delta(reasoning="m.", text="A ", token_ids=(11, 12))
    assert events[-2] == ChoiceFinished(reason=FinishReason.STOP, stop="END")
    assert isinstance(events[-1], Finished) and len(events) == len(SCRIPT)
    assert reply is not None and (reply.reasoning, reply.text) == ("hmm.", "A cät")
    assert reply.choices[0].token_ids == (10, 11, 12, 13, 14)
    assert reply.usage.time_to_first_token_s == 0.25 and reply.usage.reasoning_tokens == 2
    assert reply.timings is not None
    assert reply.timings.exposed == {"queued": 0.001, "encode": 0, "prefill": 0.2, "decode": 1.5}
    assert reply.timings.busy == {"encode": 0.125, "prefill": 0.19}
    assert service.calls[0].thinking is ThinkingMode.ON


@wholes
@streams
def test_a_stream_put_together_is_the_whole_reply(ask: Ask, chat: Callable[..., Reply]) -> None:
    for script in (SCRIPT, SCORED):
        count = 2 if script is SCORED else 1
        with running(lambda script=script: ScriptedService(script=script)) as (address, _):  # type: ignore[misc]
            options: dict[str, Any] = {"n": count, "logprobs": 1, "prompt_logprobs": 1, "return_timings": True}
            assert chat(address, "hi", **options) == ask(address, "hi", **options)[1]


@streams
@pytest.mark.parametrize("events_before", [0, 2])
def test_refusals_are_tried_again_until_an_event_has_come(ask: Ask, events_before: int) -> None:
    errors: list[Exception] = [BUSY, Unavailable("starting", reason="NO_ENGINE", retry_after_s=0.05)]
    service = Refusing(errors=errors, events_before=events_before)
    with running(lambda: service) as (address, _):
        if events_before:
            with pytest.raises(RefusedError) as caught:
                ask(address, "hi")
            assert (caught.value.retry_after_s, caught.value.reason) == (0.05, "QUEUE_FULL")
            assert len(service.calls) == 1
        else:
            assert len(ask(address, "hi")[0]) == len(SCRIPT)
            assert len(service.calls) == 3


@wholes
def test_whole_replies_are_tried_again_too(chat: Callable[..., Reply]) -> None:
    service = Refusing(errors=[BUSY, BUSY, BUSY])
    with running(lambda: service) as (address, _):
        with pytest.raises(RefusedError):
            chat(address, "hi")
        assert len(service.calls) == 3
        assert chat(address, "hi").text == "A cät"
        service.errors = [BUSY]
        with pytest.raises(RefusedError):
            chat(address, "hi", retries=0)


@wholes
@pytest.mark.parametrize("error", [InvalidRequest("no", field="stop"), AlreadyExists("taken")])
def test_other_errors_are_final(chat: Callable[..., Reply], error: Exception) -> None:
    service = Refusing(errors=[error])
    with running(lambda: service) as (address, _), pytest.raises(ClientError) as caught:
        chat(address, "hi")
    assert len(service.calls) == 1
    if isinstance(error, InvalidRequest):
        assert isinstance(caught.value, InvalidRequestError)
        assert caught.value.field == "sampling_params.stop_sequences"


@wholes
def test_retries_stay_within_the_deadline_and_tell_the_cluster_what_is_left(chat: Callable[..., Reply]) -> None:
    service = Refusing(errors=[Overloaded("busy", retry_after_s=0.3), Overloaded("busy", retry_after_s=60)])
    with running(lambda: service) as (address, _), pytest.raises(RefusedError) as caught:
        chat(address, "hi", timeout_s=30, retries=9)
    assert caught.value.retry_after_s == 60
    first, second = (call.timeout_s for call in service.calls)
    assert first is not None and second is not None and second <= first - 0.3


def refusal(code: grpc.StatusCode = grpc.StatusCode.UNAVAILABLE) -> Any:
    class Broken(grpc.RpcError):
        def code(self) -> grpc.StatusCode:
            return code

        def details(self) -> str:
            return "broken"

        def trailing_metadata(self) -> None:
            return None

    return Broken()


@pytest.mark.parametrize("code", [grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED])
def test_what_the_service_did_not_say_is_not_tried_again(code: grpc.StatusCode) -> None:
    with pytest.raises(ClientError) as caught:
        Attempts(5, None).again_after_s(refusal(code))
    assert not isinstance(caught.value, RefusedError)
    assert caught.value.unreachable == (code is grpc.StatusCode.UNAVAILABLE)


async def test_a_cancelled_task_cancels_its_request() -> None:
    service = ScriptedService(script=(*SCRIPT[:2], Pause()))
    with running(lambda: service) as (address, _):
        async with AsyncClient(address) as client:
            for waiting in (client.chat("hi"), client.stream("hi").rest()):
                task = asyncio.ensure_future(waiting)
                await eventually(lambda: bool(service.calls))
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
                await eventually(lambda: not service.ended.empty())
                assert service.ended.get_nowait() == "closed"
                service.calls.clear()


@pytest.mark.parametrize("elsewhere", [False, True])
def test_a_closed_stream_cancels_its_request(elsewhere: bool) -> None:
    service = ScriptedService(script=(*SCRIPT[:2], Pause()))
    with running(lambda: service) as (address, _), Client(address) as client:
        stream = client.stream("hi")
        seen = [next(stream), next(stream)]
        if elsewhere:
            closing = threading.Timer(0.1, stream.close)
            closing.start()
            seen += stream
            closing.join()
        else:
            stream.close()
        assert len(seen) == 2 and stream.reply is None and list(stream) == []
        wait_until(lambda: not service.ended.empty())
        assert service.ended.get_nowait() == "closed"
        responses = client.stream_generate(generate_request("hi"))
        next(responses)
        responses.close()
        wait_until(lambda: not service.ended.empty())


def test_a_stream_closed_while_it_waits_to_try_again_ends_at_once() -> None:
    service = Refusing(errors=[Overloaded("busy", retry_after_s=3600)])
    with running(lambda: service) as (address, _), Client(address) as client:
        stream = client.stream("hi")
        closing = threading.Timer(0.2, stream.close)
        closing.start()
        assert list(stream) == []
        closing.join()


def test_the_small_calls_of_the_sync_client() -> None:
    with running(ScriptedService) as (address, service), Client(address) as client:
        client.cancel("r-1")
        assert [model.name for model in client.models()] == ["ernie"]
        counted = client.count_tokens("hi", images=[b"png"], enable_thinking=False)
        assert (counted.tokens, counted.media_tokens) == (12, 6)
        assert client.generate(generate_request("hi")).choices[0].text == "A cät"
    assert service.cancelled == ["r-1"]
    (counting,) = service.tokenized
    assert counting.thinking is ThinkingMode.OFF and len(counting.messages[0].parts) == 2


def test_a_conversation_goes_on() -> None:
    call = ToolCall(id="c1", name="look", arguments='{"at": 1}')
    with running(ScriptedService) as (address, service), Client(address) as client:
        first = client.chat([system_message("Be brief."), user_message("Why?")])
        asked = [user_message("Why?"), reply_message(first), user_message("And?")]
        client.chat(asked)
        asked = [user_message("?"), assistant_message("", tool_calls=[call])]
        client.chat([*asked, tool_message(call, "seen", images=[b"png"])])
    assert [message.role for message in service.calls[0].messages] == [MessageRole.SYSTEM, MessageRole.USER]
    answered = service.calls[1].messages[1]
    assert (answered.reasoning, answered.parts) == ("hmm.", (TextPart(text="A cät"),))
    _, assistant, tool = service.calls[2].messages
    assert assistant.tool_calls == (ServedCall(id="c1", name="look", arguments='{"at": 1}'),)
    assert (tool.role, tool.tool_call_id, len(tool.parts)) == (MessageRole.TOOL, "c1", 2)


@pytest.mark.parametrize(("arguments", "wrong"), [("[1]", "no JSON object"), ("{", "Expecting"), ("[" * 10**5, "deep")])
def test_arguments_that_are_no_object(arguments: str, wrong: str) -> None:
    with pytest.raises(ValueError, match=wrong):
        ToolCall(id="c", name="f", arguments=arguments).parsed()


def test_files_belong_to_plain_text() -> None:
    with Client() as client, pytest.raises(ValueError, match="user_message"):
        client.chat([user_message("hi")], images=[b"png"])
