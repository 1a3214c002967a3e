"""What gRPC clients get for events and errors."""

from __future__ import annotations

import math
from typing import Any

import pytest
from google.protobuf import json_format
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2  # type: ignore[import-untyped]
from grpc import StatusCode

from actors.errors import InternalError, InvalidRequest, Overloaded, ServingError, Status
from actors.types import FinishReason, Stage
from cluster import grpc_response
from cluster.generation import ChoiceFinished, Finished, ModelCard
from cluster.grpc_request import seconds
from ernie_serving.v1 import inference_pb2
from tests.doubles import ENDED, FINISHED, SCORED, SCRIPT, STARTED, USAGE


@pytest.mark.parametrize(("script", "count"), [(SCRIPT, 1), (SCORED, 2)], ids=["one choice", "two choices"])
def test_a_stream_says_what_a_whole_response_says(script: Any, count: int) -> None:
    whole = grpc_response.whole_response(count, script)
    stream = [grpc_response.stream_response(event) for event in script]
    assert [choice.index for choice in whole.choices] == list(range(count))
    for choice in whole.choices:
        deltas = [
            event.delta for event in stream if event.HasField("delta") and event.delta.choice_index == choice.index
        ]
        assert "".join(delta.text for delta in deltas) == choice.text
        assert "".join(delta.reasoning_text for delta in deltas) == choice.reasoning_text
        assert [token for delta in deltas for token in delta.token_ids] == list(choice.token_ids)
        assert [entry for delta in deltas for entry in delta.logprobs] == list(choice.logprobs)
        (ending,) = [
            event.choice_finished
            for event in stream
            if event.HasField("choice_finished") and event.choice_finished.choice_index == choice.index
        ]
        assert (ending.finish_reason, ending.stop_cause) == (choice.finish_reason, choice.stop_cause)
    started, finished = stream[0].started, stream[-1].finished
    assert list(started.prompt_token_ids) == list(whole.prompt_token_ids) == [1, 2, 3]
    assert (started.request_id, started.model) == (whole.request_id, whole.model) == ("r-1", "ernie")
    assert finished.usage == whole.usage and finished.timings == whole.timings
    scored = [entry for event in stream for entry in event.prompt_scored.logprobs]
    assert scored == list(whole.prompt_logprobs)


def test_two_choices_with_log_probabilities() -> None:
    whole = grpc_response.whole_response(2, SCORED)
    first, second = whole.choices
    assert (first.text, first.reasoning_text, list(first.token_ids)) == ("cät", "h", [10, 11, 12, 13])
    assert (second.text, list(second.token_ids)) == ("no", [20])
    assert first.finish_reason == inference_pb2.FINISH_REASON_STOP and first.stop_cause.stop_token_id == 7
    assert second.finish_reason == inference_pb2.FINISH_REASON_LENGTH and not second.HasField("stop_cause")
    assert b"".join(entry.chosen.token for entry in first.logprobs) == "hcät".encode()
    assert [(score.token, score.logprob, score.rank) for score in second.logprobs[0].top] == [
        (b"no", -0.5, 1),
        (b"na", -1.5, 2),
    ]
    assert first.logprobs[-1].chosen.logprob == -math.inf
    assert [entry.HasField("chosen") for entry in whole.prompt_logprobs] == [False, True, False]


def test_events_keep_their_order() -> None:
    kinds = [grpc_response.stream_response(event).WhichOneof("event") for event in SCORED]
    assert kinds[:3] == ["started", "prompt_scored", "delta"]
    assert kinds[-4:] == ["choice_finished", "delta", "choice_finished", "finished"]


def test_a_choice_that_never_ended_is_our_defect() -> None:
    with pytest.raises(InternalError, match="choice 1"):
        grpc_response.whole_response(2, SCRIPT)


def test_accounting() -> None:
    whole = grpc_response.whole_response(1, (STARTED, ENDED, FINISHED))
    usage = whole.usage
    assert (usage.prompt_token_count, usage.media_token_count, usage.cached_token_count) == (12, 6, 4)
    assert (usage.output_token_count, usage.reasoning_token_count) == (5, 2)
    assert usage.time_to_first_token == Duration(nanos=250_000_000)
    assert [
        (stage.stage, seconds(stage.exposed_duration), stage.HasField("busy_duration"))
        for stage in whole.timings.stages
    ] == [
        (inference_pb2.STAGE_QUEUED, 0.001, False),
        (inference_pb2.STAGE_ENCODE, 0.0, True),
        (inference_pb2.STAGE_PREFILL, 0.2, True),
        (inference_pb2.STAGE_DECODE, 1.5, False),
    ]


@pytest.mark.parametrize(
    ("reason", "expected"),
    [(None, inference_pb2.StopCause()), ("END", inference_pb2.StopCause(stop_sequence="END")),
     (0, inference_pb2.StopCause(stop_token_id=0))],
)  # fmt: skip
def test_stop_causes(reason: str | int | None, expected: inference_pb2.StopCause) -> None:
    ended = ChoiceFinished(reason=FinishReason.STOP, stop_reason=reason)
    whole = grpc_response.whole_response(1, (STARTED, ended, Finished(usage=USAGE)))
    (choice,) = whole.choices
    assert choice.stop_cause == expected
    assert choice.HasField("stop_cause") == (reason is not None)
    assert not whole.HasField("timings")


def test_every_enum_value_has_a_translation() -> None:
    assert set(grpc_response._FINISH) == set(FinishReason)
    assert set(grpc_response._STAGE) == set(Stage)
    assert set(grpc_response.STATUS_CODE.values()) == {StatusCode[status.name] for status in Status}
    assert {0, *grpc_response._FINISH.values()} == set(inference_pb2.FinishReason.values())


@pytest.mark.parametrize("value", [0, 1e-9, 0.1, 1.999999999, 600, 3600.25])
def test_durations_keep_nanoseconds(value: float) -> None:
    assert seconds(grpc_response.duration(value)) == pytest.approx(value, abs=1e-9)


def test_models() -> None:
    card = ModelCard(name="m", source="/w", max_model_len=10, created=5)
    assert json_format.MessageToDict(grpc_response.model(card), preserving_proto_field_name=True) == {
        "name": "m",
        "source_uri": "/w",
        "context_token_limit": 10,
        "input_modalities": ["MODALITY_TEXT", "MODALITY_IMAGE", "MODALITY_VIDEO"],
        "create_time": "1970-01-01T00:00:05Z",
    }


def details(error: ServingError) -> tuple[Any, Any, Any]:
    status = grpc_response.status(error)
    info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
    assert status.details[0].Unpack(info)
    has_retry = len(status.details) > 1 and status.details[1].Unpack(retry)
    return status, info, retry if has_retry else None


def test_errors_become_status_details() -> None:
    status, info, retry = details(Overloaded("full", retry_after_s=1.5))
    assert (status.code, status.message) == (8, "full")
    assert (info.reason, info.domain, dict(info.metadata)) == ("QUEUE_FULL", "ernie-serving", {})
    assert retry.retry_delay == Duration(seconds=1, nanos=500_000_000)


def test_fields_are_named_in_the_protos_terms() -> None:
    status, info, retry = details(InvalidRequest("no", field="stop[1]"))
    assert info.metadata["field"] == "sampling_params.stop_sequences[1]"
    assert status.message == "sampling_params.stop_sequences[1]: no"
    assert retry is None


def test_long_messages_fit_into_trailers() -> None:
    status, info, _ = details(InvalidRequest("f" * 5000 + "\u00e4" * 5000, field="f" * 5000))
    assert status.message.startswith("fff") and status.message.endswith("...")
    assert status.ByteSize() < 2500 and info.metadata["field"].endswith("...")
