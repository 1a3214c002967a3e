"""What travels from a prefill to a decode engine is what the model's arithmetic says, for the blocks that it lacks."""

from __future__ import annotations

import pytest

from actors.ernie.config import ErnieConfig
from actors.types import EngineRole, Message, MessageRole, TextPart
from cluster.generation import Delta, Finished, GenerateCall, Started
from tests.in_process import ALWAYS_PAIRS, InProcessCluster, in_process_cluster
from tests.media import image_part
from tests.tiny_model import tiny_checkpoint

BLOCK = 16
FLOAT64_BYTES = 8


def token_bytes() -> int:
    text = ErnieConfig.from_dir(tiny_checkpoint()).text
    return text.num_hidden_layers * 2 * text.num_key_value_heads * text.head_dim * FLOAT64_BYTES


def ask(*texts: str) -> GenerateCall:
    """A picture and a text, and turns after it that keep the prompt's beginning as it was."""
    first, *more = texts
    messages = [Message(role=MessageRole.USER, parts=(image_part(150, 100, 1), TextPart(text=first)))]
    for text in more:
        messages += [
            Message(role=role, parts=(TextPart(text=text),)) for role in (MessageRole.ASSISTANT, MessageRole.USER)
        ]
    return GenerateCall(messages=tuple(messages), temperature=0.0, max_tokens=2, ignore_eos=True, return_token_ids=True)


async def prompt_of(cluster: InProcessCluster, call: GenerateCall) -> tuple[int, ...]:
    """The ids of its prompt, once it is answered and nothing of it is held."""
    events = [event async for event in cluster.parts.router.generate(call)]
    assert isinstance(events[-1], Finished)
    assert sum(len(event.token_ids) for event in events if isinstance(event, Delta)) == 2
    (started,) = [event for event in events if isinstance(event, Started)]
    await cluster.wait_clean()
    assert started.prompt_token_ids is not None
    return started.prompt_token_ids


def common(left: tuple[int, ...], right: tuple[int, ...]) -> int:
    return next((at for at, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))


@pytest.mark.parametrize("budget", [24, 2048])
async def test_bytes_on_the_wire_are_those_of_the_tokens_that_are_lacked(budget: int) -> None:
    roles = (EngineRole.PREFILL, EngineRole.DECODE)
    async with in_process_cluster(
        tiny_checkpoint(), *roles, max_num_seqs=8, max_batched_tokens=budget, block_size=BLOCK, described=ALWAYS_PAIRS
    ) as cluster:
        sent, received = cluster.engines[0]._sender.counters, cluster.engines[1]._receiver.counters
        first = await prompt_of(cluster, ask("What is this? " * 8))
        assert sent.sent_bytes == received.received_bytes == len(first) * token_bytes()
        again = await prompt_of(cluster, ask("What is this? " * 8, "A picture.", "Of what?"))
        held = common(first, again) // BLOCK * BLOCK
        assert held >= 4 * BLOCK
        assert sent.sent_bytes == received.received_bytes == (len(first) + len(again) - held) * token_bytes()
        assert sent.resent_bytes == sent.streamed_bytes == 0
