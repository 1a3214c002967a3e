"""A prompt about a picture in the ids of the published vocabulary, of which a few words are known."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from actors.processing.processor import Processor
from actors.types import MediaKind, MessageRole
from tests.unit.processing.samples import encode, image_part, message, model_dir, noise, request, user, video_part

WORDS = {
    "<unk>": 0, "1": 4, "\u2581of": 315, "\u2581is": 357, "\u2581this": 501, "\u2581What": 1912, "User": 2969,
    "\u2581kind": 3836, "\u2581dog": 9159, "Picture": 39082, "\u2581": 93919, ":": 93963, "?": 94009,
}  # fmt: skip
SPECIAL = {
    "<|end_of_sentence|>": 100272,
    "<|begin_of_sentence|>": 100273,
    "<|IMAGE_PLACEHOLDER|>": 100295,
    "<|IMAGE_START|>": 101304,
    "<|IMAGE_END|>": 101305,
    "<|VIDEO_START|>": 101306,
    "<|VIDEO_END|>": 101307,
}
ASKED = [100273, 2969, 93963, 1912, 3836, 315, 9159, 357, 501, 94009, 39082, 93919, 4, 93963, 101304]
"""Up to the picture, as transformers' integration test has them: "User: What kind of dog is this?Picture 1:"."""


def vocabulary(shared: bool) -> str:
    """The known words in their places. ``shared``: one placeholder for pictures and videos, as the original has it."""
    special = dict(SPECIAL) if shared else SPECIAL | {"<|VIDEO_PLACEHOLDER|>": 103367}
    tokenizer = Tokenizer(models.WordLevel(vocab=WORDS | special, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(prepend_scheme="never"), pre_tokenizers.Punctuation()]
    )
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="never")
    tokenizer.add_special_tokens([AddedToken(text, normalized=False) for text in special])
    tokenizer.add_tokens([AddedToken("1", normalized=False, special=False)])
    assert all(tokenizer.token_to_id(text) == token for text, token in (WORDS | special).items())
    return tokenizer.to_str()


@pytest.mark.parametrize("original", [True, False])
def test_a_picture_and_a_clip(tmp_path: Path, original: bool) -> None:
    config = {"model_type": "ernie4_5_moe_vl", "im_patch_id": 100295} if original else {"model_type": "ernie4_5_vl_moe"}
    directory = model_dir(tmp_path, tokenizer=vocabulary(original), config=json.dumps(config))
    processor = Processor(directory)
    picture = image_part(encode(noise(84, 56)))
    result = processor.process(request(user("What kind of dog is this?", picture, video_part())))
    image, clip = result.media
    assert (image.kind, image.offset, image.grid.tokens) == (MediaKind.IMAGE, len(ASKED), 6)
    ids = list(result.prompt_ids)
    assert ids[: len(ASKED)] == ASKED
    assert ids[len(ASKED) : len(ASKED) + 7] == [100295] * 6 + [101305]
    placeholder = 100295 if original else 103367
    end = clip.offset + clip.grid.tokens
    assert ids[clip.offset - 1 : end + 1] == [101306, *[placeholder] * clip.grid.tokens, 101307]
    later = processor.process(
        request(
            user("What kind of dog is this?", picture), message(MessageRole.ASSISTANT, "this"), user("What is this?")
        )
    ).prompt_ids
    # The turn of the assistant ends as in training, also where a conversion misspells the token.
    assert list(later).count(100272) == 1 and list(later)[: len(ASKED)] == ASKED
    assert later[list(later).index(100272) + 1 :][:3] == (2969, 93963, 1912)
