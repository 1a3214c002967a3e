"""A repository as Baidu publishes it - flat config, its names, a SentencePiece model - behind a whole cluster."""

from __future__ import annotations

from pathlib import Path

from actors.types import EngineRole, Message, MessageRole, Structure, StructureKind, TextPart, ThinkingMode
from cluster.generation import Delta, Finished, GenerateCall
from tests.in_process import in_process_cluster
from tests.media import image_part, video_part
from tests.sentencepiece_made import original_checkpoint


async def test_it_answers_about_media_and_in_a_wanted_form(tmp_path: Path) -> None:
    model = original_checkpoint(tmp_path / "ERNIE-4.5-VL-tiny-PT")
    parts = (image_part(150, 100, 1), video_part(96, 64, 16, 4, 4), TextPart(text="Größer: 42 or 猫 </s>?"))
    async with in_process_cluster(model, EngineRole.PREFILL, EngineRole.DECODE) as cluster:
        tokenizer = cluster.preprocessor._processor.tokenizer

        async def ask(structure: Structure | None) -> tuple[str, tuple[int, ...], int]:
            call = GenerateCall(
                messages=(Message(role=MessageRole.USER, parts=parts),),
                temperature=0.0,
                max_tokens=24,
                thinking=ThinkingMode.OFF,
                structure=structure,
                return_token_ids=True,
            )
            text, ids, media = "", (), 0
            async for event in cluster.parts.router.generate(call):
                if isinstance(event, Delta):
                    text, ids = text + event.text, ids + event.token_ids
                elif isinstance(event, Finished):
                    media = event.usage.media_tokens
            return text, ids, media

        text, ids, media = await ask(None)
        assert media > 20 and len(ids) == 24
        decoded = tokenizer.decode(ids)
        assert "\ufffd" in decoded or text == decoded
        choice = Structure(kind=StructureKind.CHOICE, text='["größer 漢", "kleiner"]')
        assert (await ask(choice))[0] in ("größer 漢", "kleiner")
        number = Structure(kind=StructureKind.REGEX, text="[0-9]{3}-[0-9]{2}")
        answer, _, _ = await ask(number)
        assert len(answer) == 6 and answer[3] == "-" and (answer[:3] + answer[4:]).isdecimal()
        await cluster.wait_clean()
