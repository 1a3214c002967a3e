from __future__ import annotations

import json
import threading
from pathlib import Path

import numpy as np
import pytest

from actors.errors import ContextExceeded, InvalidRequest, MediaUnreadable, RequestCancelled
from actors.processing.config import ProcessingLimits
from actors.processing.patches import content_key
from actors.processing.processor import Processor
from actors.types import (
    Grid,
    ImagePart,
    MediaKind,
    MediaSource,
    MessageRole,
    ThinkingMode,
    ToolCall,
)
from tests.tiny_model import tiny_checkpoint
from tests.unit.processing.samples import (
    encode,
    image_part,
    message,
    model_dir,
    noise,
    request,
    user,
    video,
    video_part,
)


@pytest.fixture(scope="module")
def processor() -> Processor:
    return Processor(tiny_checkpoint())


def text_of(processor: Processor, ids: tuple[int, ...]) -> str:
    return "".join(processor.tokenizer.token_text(i) or "" for i in ids)


def test_text_only(processor: Processor) -> None:
    result = processor.process(request(user("hello there")))
    expected = "<|begin_of_sentence|>User: hello there\nAssistant: <think>\n\n</think>\n\n"
    assert list(result.prompt_ids) == processor.tokenizer.encode(expected)
    assert (result.media, result.units, result.starts_thinking) == ((), {}, False)


def test_thinking_mode_is_passed_on(processor: Processor) -> None:
    assert processor.process(request(user("hello"), thinking=ThinkingMode.ON)).starts_thinking
    assert not processor.process(request(user("hello"), thinking=ThinkingMode.OFF)).starts_thinking


def test_raw_prompts_are_used_as_they_stand(processor: Processor) -> None:
    text = "<|begin_of_sentence|>User: hi</s>\nAssistant: <think>"
    result = processor.process(request(prompt=text))
    assert list(result.prompt_ids) == processor.tokenizer.encode(text)
    assert processor.tokenizer.token_id("</s>") in result.prompt_ids
    assert processor.tokenizer.spell(result.prompt_ids) == text
    assert (result.media, result.units, result.starts_thinking) == ((), {}, False)
    assert processor.process(request(prompt=result.prompt_ids)) == result


def test_special_tokens_of_the_tokenizer_go_around_raw_text(tmp_path: Path) -> None:
    directory = model_dir(tmp_path)
    file = directory / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    bos = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    tokenizer["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [bos, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [bos, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
    }
    file.write_text(json.dumps(tokenizer))
    processor = Processor(directory)
    added = processor.process(request(prompt="hello")).prompt_ids
    plain = processor.process(request(prompt="hello", add_special_tokens=False)).prompt_ids
    assert added == (1, *plain)


def test_raw_prompts_that_cannot_be_used(processor: Processor) -> None:
    image = processor.tokens.image
    spelled = processor.tokenizer.token_text(image)
    for prompt, wrong in (("a \ud800", "Unicode"), (f"a {spelled}", "placeholder"), ((5, image), "token 1")):
        with pytest.raises(InvalidRequest, match=wrong) as caught:
            processor.process(request(prompt=prompt))
        assert caught.value.field == "prompt"
    with pytest.raises(ContextExceeded) as long:
        processor.process(request(prompt=(5,) * 9, max_prompt_tokens=8))
    assert long.value.field == "prompt"


def test_media_everywhere(processor: Processor) -> None:
    first, second = encode(noise(100, 75)), encode(noise(60, 200, seed=1))
    clip = video(6, fps=4, size=(64, 48))
    result = processor.process(
        request(
            user("look", image_part(first), "and", video_part(clip)),
            message(MessageRole.ASSISTANT, "hm", tool_calls=(ToolCall(id="1", name="f", arguments="{}"),)),
            message(MessageRole.TOOL, image_part(second), "zoomed", tool_call_id="1"),
        )
    )
    ids, tokens = result.prompt_ids, processor.tokens
    assert [item.kind for item in result.media] == [MediaKind.IMAGE, MediaKind.VIDEO, MediaKind.IMAGE]
    assert [item.grid for item in result.media] == [Grid(1, 6, 8), Grid(6, 4, 4), Grid(1, 14, 4)]
    starts = {MediaKind.IMAGE: tokens.image_start, MediaKind.VIDEO: tokens.video_start}
    ends = {MediaKind.IMAGE: tokens.image_end, MediaKind.VIDEO: tokens.video_end}
    places = {MediaKind.IMAGE: tokens.image, MediaKind.VIDEO: tokens.video}
    covered = set()
    for item in result.media:
        span = range(item.offset, item.offset + item.grid.tokens)
        assert {ids[i] for i in span} == {places[item.kind]}
        assert ids[span.start - 1] == starts[item.kind]
        assert ids[span.stop] == ends[item.kind]
        assert len(item.content_keys) == item.grid.units
        covered |= set(span)
    assert {i for i, token_id in enumerate(ids) if token_id in tokens.placeholders} == covered
    assert set(result.units) == {key for item in result.media for key in item.content_keys}
    for item in result.media:
        for key in item.content_keys:
            unit = result.units[key]
            assert (unit.kind, unit.grid) == (item.kind, item.grid.unit)
            assert unit.patches.shape == (unit.grid.patches, 588)
            assert content_key(unit.kind, unit.grid, unit.patches) == key
    shown = text_of(processor, ids)
    assert shown.count("Picture") == 2
    assert shown.index("Picture") < shown.index("Video") < shown.rindex("Picture")


def test_equal_pictures_are_one_unit(processor: Processor) -> None:
    content = encode(noise(60, 60))
    result = processor.process(request(user(image_part(content), image_part(content))))
    assert len(result.media) == 2
    assert len(result.units) == 1


def test_counting_keeps_nothing(processor: Processor) -> None:
    message_ = user(image_part(), video_part(video(4)))
    kept = processor.process(request(message_))
    counted = processor.process(request(message_, keep_patches=False))
    assert counted.units == {}
    assert (counted.prompt_ids, counted.media) == (kept.prompt_ids, kept.media)


def test_pixel_bounds_of_a_part(processor: Processor) -> None:
    content = encode(noise(300, 300))
    small = processor.process(request(user(image_part(content, max_pixels=784))))
    assert small.media[0].grid == Grid(1, 2, 2)
    with pytest.raises(InvalidRequest) as caught:
        processor.process(request(user("a", image_part(content, min_pixels=-5))))
    assert caught.value.field == "messages[0].content[1].image_url.min_pixels"


def test_special_tokens_in_client_text_stay_text(processor: Processor) -> None:
    said = "is </s> or <|end_of_sentence|> or <mask:1> a token?"
    result = processor.process(request(user(said, image_part())))
    plain = processor.process(request(user("x", image_part())))
    special = {processor.tokenizer.token_id(text) for text in ("</s>", "<|end_of_sentence|>", "<mask:1>")}
    assert None not in special
    assert not special & set(result.prompt_ids)
    assert said in processor.tokenizer.decode(result.prompt_ids)
    assert result.prompt_ids[0] == plain.prompt_ids[0] == processor.tokenizer.token_id("<|begin_of_sentence|>")


@pytest.mark.parametrize(
    "string",
    [
        "<|IMAGE_PLACEHOLDER|>",
        "<|VIDEO_PLACEHOLDER|>",
        "<|image@placeholder|>",
        "<|video@placeholder|>",
        "<|IMAGE_START|>",
        "<|IMAGE_END|>",
        "<|VIDEO_START|>",
        "<|VIDEO_END|>",
    ],
)
def test_media_tokens_in_client_text_are_refused(processor: Processor, string: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        processor.process(request(message(MessageRole.SYSTEM, f"a{string}b"), user("hello")))
    assert string in caught.value.message
    assert caught.value.field == "messages[0].content"


def test_context_limit(processor: Processor) -> None:
    fits = request(user("hello", image_part()))
    length = len(processor.process(fits).prompt_ids)
    assert processor.process(request(user("hello", image_part()), max_prompt_tokens=length))
    for limit in (length - 1, 3):
        with pytest.raises(ContextExceeded, match=f"limit of {limit} tokens") as caught:
            processor.process(request(user("hello", image_part()), max_prompt_tokens=limit))
        assert caught.value.field == "messages"


def test_long_text_is_refused_before_media_are_read(processor: Processor) -> None:
    broken = ImagePart(source=MediaSource(content=b"no picture"))
    with pytest.raises(ContextExceeded):
        processor.process(request(user("word " * 500, broken), max_prompt_tokens=100))
    with pytest.raises(MediaUnreadable) as caught:
        processor.process(request(user("word", broken)))
    assert caught.value.field == "messages[0].content[1].image_url"


def test_text_far_too_long_is_refused_before_it_is_encoded(
    processor: Processor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(text: str, **options: bool) -> list[int]:
        raise AssertionError("encoded")

    tokenizer = processor.tokenizer
    longest = max((tokenizer.token_text(token_id) or "" for token_id in range(tokenizer.vocab_size)), key=len)
    many = (1 << 20) // len(longest) + 2
    text = longest * many
    monkeypatch.setattr(tokenizer, "encode", never)
    monkeypatch.setattr(tokenizer, "encode_raw", never)
    tool = {"type": "function", "function": {"name": "f", "description": "x" * len(text)}}
    for wanted, field in (
        (request(prompt=text, max_prompt_tokens=many - 1), "prompt"),
        (request(user("x" * len(text)), max_prompt_tokens=many - 1), "messages"),
        (request(user("hi"), tools=(tool,), max_prompt_tokens=10), "messages"),
    ):
        with pytest.raises(ContextExceeded, match=f"bytes is over the limit of {wanted.max_prompt_tokens}") as caught:
            processor.process(wanted)
        assert caught.value.field == field
    for wanted in (request(prompt=text, max_prompt_tokens=many), request(prompt="x" * (1 << 20), max_prompt_tokens=3)):
        with pytest.raises(AssertionError, match="encoded"):
            processor.process(wanted)


def test_check_can_stop_it(processor: Processor) -> None:
    def gone() -> None:
        raise RequestCancelled("gone")

    with pytest.raises(RequestCancelled):
        processor.process(request(user(image_part())), gone)


def test_media_by_url_is_refused_by_default(processor: Processor) -> None:
    part = ImagePart(source=MediaSource(uri="https://media.example.com/a.png"))
    with pytest.raises(InvalidRequest, match="--allowed-media-domains"):
        processor.process(request(user(part)))


def test_original_placeholders_and_one_shared_id(tmp_path: Path) -> None:
    """Original checkpoints: one id for both kinds, told apart by what the template writes."""
    directory = model_dir(tmp_path)
    template = (directory / "chat_template.jinja").read_text()
    for new, old in (("image@placeholder", "IMAGE_PLACEHOLDER"), ("video@placeholder", "VIDEO_PLACEHOLDER")):
        assert old in template
        template = template.replace(old, new)
    (directory / "chat_template.jinja").write_text(template)
    config = json.loads((directory / "config.json").read_text())
    config["video_token_id"] = config["image_token_id"]
    (directory / "config.json").write_text(json.dumps(config))
    processor = Processor(directory)
    result = processor.process(request(user(video_part(video(4)), image_part())))
    assert [item.kind for item in result.media] == [MediaKind.VIDEO, MediaKind.IMAGE]
    assert result.prompt_ids.count(processor.tokens.image) == sum(item.grid.tokens for item in result.media)


def test_template_that_loses_a_picture_is_caught(tmp_path: Path) -> None:
    directory = model_dir(tmp_path)
    (directory / "chat_template.jinja").write_text(
        "{% for m in messages[-1:] %}{% if m.content is string %}{{ m.content }}{% else %}{% for c in m.content %}"
        "{% if c.type == 'image' %}<|IMAGE_PLACEHOLDER|>{% else %}{{ c.text }}{% endif %}{% endfor %}{% endif %}"
        "{% endfor %}"
    )
    processor = Processor(directory)
    assert processor.process(request(user(image_part())))
    with pytest.raises(InvalidRequest, match="1 of 2") as caught:
        processor.process(request(user(image_part()), user(image_part())))
    assert caught.value.field == "messages"


def test_bad_directories(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"config\.json"):
        Processor(tmp_path)
    directory = model_dir(tmp_path)
    config = json.loads((directory / "config.json").read_text())
    config["image_token_id"] = 10**6
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="image_token_id"):
        Processor(directory)


def test_built_in_template_by_name(tmp_path: Path) -> None:
    directory = model_dir(tmp_path, chat_template=None)
    assert not Processor(directory).process(request(user("hello"))).starts_thinking
    assert Processor(directory, built_in_template="thinking").process(request(user("hello"))).starts_thinking


def test_many_threads_share_one(processor: Processor) -> None:
    clip, picture = video(20), encode(noise(80, 60))
    whole = request(user("a </s>", image_part(picture), video_part(clip)))
    expected = processor.process(whole)
    results = []

    def work() -> None:
        results.extend(processor.process(whole) for _ in range(3))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 12
    for result in results:
        assert (result.prompt_ids, result.media) == (expected.prompt_ids, expected.media)


def test_limits_reach_their_places(tmp_path: Path) -> None:
    processor = Processor(tiny_checkpoint(), ProcessingLimits(max_image_bytes=100))
    with pytest.raises(InvalidRequest, match="100 bytes"):
        processor.process(request(user(image_part())))
    processor.close()


def test_patches_are_the_resized_picture(processor: Processor) -> None:
    picture = noise(56, 56)
    unit = next(iter(processor.process(request(user(image_part(encode(picture))))).units.values()))
    assert np.array_equal(unit.patches[0], np.asarray(picture)[:14, :14].transpose(2, 0, 1).ravel())


def original_dir(tmp_path: Path) -> Path:
    """The tiny checkpoint with the files that processing reads in the original's form."""
    directory = model_dir(tmp_path, video_preprocessor_config=None)
    config = json.loads((directory / "config.json").read_text())
    delimiters = {key: config[key] for key in config if key.endswith(("start_token_id", "end_token_id"))}
    (directory / "config.json").write_text(
        json.dumps({"model_type": "ernie4_5_moe_vl", "im_patch_id": config["image_token_id"], **delimiters})
    )
    (directory / "preprocessor_config.json").write_text(
        json.dumps({"image_processor_type": "Ernie4_5_VLImageProcessor", "min_pixels": 784, "max_pixels": 784 * 5})
    )
    template = (directory / "chat_template.jinja").read_text()
    (directory / "chat_template.jinja").unlink()
    for kind in ("image", "video"):
        template = template.replace(f"<|{kind.upper()}_PLACEHOLDER|>", f"<|{kind}@placeholder|>")
    tokens = json.loads((directory / "tokenizer_config.json").read_text())
    tokens["chat_template"] = [{"name": "default", "template": template}]
    (directory / "tokenizer_config.json").write_text(json.dumps(tokens))
    return directory


def test_a_directory_in_the_original_form(tmp_path: Path) -> None:
    processor = Processor(original_dir(tmp_path))
    result = processor.process(request(user(image_part(encode(noise(300, 300))), video_part(video(4)))))
    assert result.media[0].grid == Grid(1, 4, 4)
    assert processor.tokens.video == processor.tokens.image
    assert result.prompt_ids.count(processor.tokens.image) == sum(item.grid.tokens for item in result.media)


def test_a_directory_needs_a_tokenizer(tmp_path: Path) -> None:
    directory = model_dir(tmp_path, tokenizer=None)
    with pytest.raises(ValueError, match=r"holds neither tokenizer\.json nor tokenizer\.model"):
        Processor(directory)
    (directory / "tokenizer.model").write_bytes(b"pieces")
    with pytest.raises(ValueError, match=r"tokenizer\.model: not a SentencePiece model"):
        Processor(directory)


def test_special_tokens_in_tools_and_calls_stay_text(processor: Processor) -> None:
    said = "</s>"
    tool = {"type": "function", "function": {"name": "f", "description": said, "parameters": {said: 1}}}
    call = ToolCall(id="1", name=f"f{said}", arguments=json.dumps({said: [said]}))
    result = processor.process(
        request(
            user("hello", name=said),
            message(MessageRole.ASSISTANT, tool_calls=(call,), reasoning=said),
            message(MessageRole.TOOL, said, tool_call_id="1"),
            tools=(tool,),
        )
    )
    assert processor.tokenizer.decode(result.prompt_ids).count(said) == 7
    assert processor.tokenizer.token_id(said) not in result.prompt_ids


def test_template_that_changes_the_order_is_caught(tmp_path: Path) -> None:
    directory = model_dir(tmp_path)
    (directory / "chat_template.jinja").write_text(
        "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}{% for c in m.content | reverse %}"
        "{% if c.type == 'image' %}<|IMAGE_PLACEHOLDER|>{% elif c.type == 'video' %}<|VIDEO_PLACEHOLDER|>"
        "{% else %}{{ c.text }}{% endif %}{% endfor %}{% endif %}{% endfor %}"
    )
    processor = Processor(directory)
    assert processor.process(request(user(image_part())))
    with pytest.raises(InvalidRequest, match="not in order"):
        processor.process(request(user(image_part(), video_part(video(2)))))
