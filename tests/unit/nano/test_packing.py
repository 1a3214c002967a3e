"""Packed training rows hold exactly the tokens, positions and pictures the server makes of the same conversations."""

from __future__ import annotations

import io
import json
import random
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from actors.checkpoint.writer import CONFIG, write_json, write_neighbours
from actors.ernie.positions import prompt_positions
from actors.processing.patches import patchify
from actors.processing.processor import Processed, Processor
from actors.types import MessageRole, TextPart, ThinkingMode, ToolCall
from cluster.eval.world.clips import clip, encode
from cluster.eval.world.draw import draw_scene
from cluster.eval.world.scenes import scene
from cluster.eval.world.zoom import NAME, TOOL, call
from nano.files import FONT_PATH, documents, tokenizer_document
from nano.frames import frame
from nano.language_data import LENGTH, Album, _opening, language_batch
from nano.packing import ASSISTANT, BEGIN, NOT_THINKING, SEP, Answer, Media, Piece, Row, piece
from tests.unit.processing.samples import image_part, message, request, user, video_part


@pytest.fixture(scope="module")
def processor(tmp_path_factory: pytest.TempPathFactory) -> Processor:
    root = tmp_path_factory.mktemp("nano")
    write_neighbours(root, documents(), tokenizer_document(), "pt")
    write_json(root / CONFIG, documents().config)
    return Processor(root)


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def picture(seed: int = 0) -> tuple[bytes, Media]:
    image = draw_scene(scene(random.Random(seed), "colour"))
    return png(image), Media((0,), frame(image).grid)


def assert_same(made: Piece, processed: Processed) -> None:
    assert tuple(made.ids) == processed.prompt_ids
    spans = [(item.offset, item.grid) for item in processed.media]
    positions, _ = prompt_positions(len(made.ids), spans, "original")
    assert np.array_equal(np.array(made.positions).T, positions)


@pytest.mark.parametrize("thinking", [False, True])
def test_a_picture_and_a_question(processor: Processor, thinking: bool) -> None:
    content, media = picture()
    mode = ThinkingMode.ON if thinking else ThinkingMode.OFF
    served = processor.process(request(user(image_part(content), "What colour is the star?"), thinking=mode))
    tail = "<think>" if thinking else NOT_THINKING
    assert_same(piece([f"{BEGIN}User: Picture 1:", media, f"What colour is the star?{ASSISTANT}{tail}"]), served)


def test_a_branch_goes_on_from_the_beginning(processor: Processor) -> None:
    content, media = picture(1)
    served = processor.process(request(user(image_part(content), "Where is it?")))
    begin = piece([f"{BEGIN}User: Picture 1:", media])
    branch = piece([f"Where is it?{ASSISTANT}{NOT_THINKING}"], begin.end)
    assert_same(Piece(begin.ids + branch.ids, begin.positions + branch.positions), served)


def test_question_first_system_prompt_and_earlier_turn(processor: Processor) -> None:
    content, media = picture(2)
    served = processor.process(
        request(
            message(MessageRole.SYSTEM, "Answer briefly."),
            user("What is it?", image_part(content)),
            message(MessageRole.ASSISTANT, "a red star"),
            user("How many shapes are there?"),
        )
    )
    turn = f"{ASSISTANT}a red star{SEP}User: How many shapes are there?{ASSISTANT}{NOT_THINKING}"
    assert_same(piece([f"{BEGIN}Answer briefly.\nUser: What is it?Picture 1:", media, turn]), served)


def test_the_zoom_tool_and_its_result(processor: Processor) -> None:
    (first, first_media), (second, second_media) = picture(3), picture(4)
    corners = [20, 40, 260, 280]
    arguments = json.dumps({"bbox_2d": corners})
    served = processor.process(
        request(
            user(image_part(first), "What is the number?"),
            message(MessageRole.ASSISTANT, tool_calls=(ToolCall(id="1", name=NAME, arguments=arguments),)),
            message(MessageRole.TOOL, image_part(second), tool_call_id="1"),
            tools=(TOOL,),
        )
    )
    opening = next(o for seed in range(99) if SYSTEMLESS in (o := _opening(random.Random(seed), tools=True)))
    history = f"What is the number?{ASSISTANT}{call(corners)}\n{SEP}User: \n<tool_output>\nPicture 2:"
    answer = f"\n</tool_output>\n{ASSISTANT}{NOT_THINKING}"
    assert_same(piece([f"{opening}Picture 1:", first_media, history, second_media, answer]), served)


SYSTEMLESS = f"{BEGIN}\n<tool_list>"


def test_a_clip_has_the_frames_and_times_the_server_draws(processor: Processor) -> None:
    film = clip(random.Random(5), "timestamp")
    served = processor.process(request(user(video_part(encode(film)), "When?")))
    album = Album(random.Random(0))
    media = album.clip(film)
    assert_same(piece([f"{BEGIN}User: Video 1:", media, f"When?{ASSISTANT}{NOT_THINKING}"]), served)
    batch = album.batch([Row.begin(LENGTH, [media])]).frames
    for pair, key in zip(batch.pairs, served.media[0].content_keys, strict=True):
        unit = served.units[key]
        mine = np.concatenate([batch.patches[f][batch.valid[f]] for f in pair])
        # The file is compressed, so pixels are near, not equal.
        assert np.abs(mine.astype(int) - unit.patches.astype(int)).mean() < 3


def test_pictures_are_cut_up_as_by_the_server(processor: Processor) -> None:
    content, _ = picture(6)
    served = processor.process(request(user(image_part(content), "?")))
    with Image.open(io.BytesIO(content)) as image:
        item = frame(image.convert("RGB"))
    assert np.array_equal(patchify(item.pixels), next(iter(served.units.values())).patches)


def test_answers_weigh_and_nothing_else_does() -> None:
    made = piece(["User: ", Answer("red", 8.0, "colour"), "more"])
    weighed = [i for i, weight in enumerate(made.weights) if weight]
    ((first, last, task),) = made.answers
    assert (weighed, task) == (list(range(first, last)), "colour")
    assert made.ids[last - 1] == 2


def test_batches_are_filled_and_shaped_alike() -> None:
    rng = random.Random("packing")
    for _ in range(5):
        batch = language_batch(rng, 4)
        rows = batch.rows
        assert rows.ids.shape == rows.branch.shape == rows.weights.shape
        assert (rows.branch >= 0).mean() > 0.5
        assert (rows.weights > 0).any(axis=1).all()
        used = rows.source[rows.source >= 0]
        assert used.size == 0 or used.max() < len(batch.frames.pairs) * batch.frames.tokens
        assert (rows.ids.reshape(-1)[rows.slot] >= documents().model.im_patch_id).all()


def test_kinds_of_media_are_told_apart() -> None:
    ids = piece([Media((0, 1), (3, 4), video=True)]).ids
    assert ids[1] == documents().model.video_token_id
    assert ids.count(documents().model.video_token_id) == 2 * 3 * 4


def test_text_parts_and_questions_are_one_text(processor: Processor) -> None:
    served = processor.process(request(user(TextPart(text="Hello"))))
    assert_same(piece([f"{BEGIN}User: ", f"Hello{ASSISTANT}{NOT_THINKING}"]), served)


def test_the_font_is_the_checkpoints(processor: Processor, tmp_path: Path) -> None:
    write_neighbours(tmp_path, documents(), tokenizer_document(), "pt")
    assert (tmp_path / processor.video_config.font).read_bytes() == FONT_PATH.read_bytes()


def test_the_token_where_something_changes_is_told() -> None:
    album = Album(random.Random(0))
    film = clip(random.Random(9), "event_time")
    media = album.clip(film)
    events = album.batch([Row.begin(LENGTH, [media])]).events
    ((unit, token),) = np.argwhere(events)
    k = film.first_sample_after_change()
    x, y = film.things[0].box.centre
    rows, columns = media.grid
    assert (unit, token, events[unit, token]) == (k // 2, int(y * rows) * columns + int(x * columns), 1 + k % 2)
    assert film.at(film.sampled()[k]).things[0].colour == film.change.colour  # type: ignore[union-attr]
    assert film.at(film.sampled()[k - 1]).things[0].colour != film.change.colour  # type: ignore[union-attr]
