"""Where the special tokens of a random checkpoint lie, laid out like the published vocabulary.

Text tokens and everything that a model may generate come first; from ``im_patch_id`` up there are media tokens only.
The published size (103,424 rows) gets the published ids; smaller vocabularies get the same order, closer together.
"""

from __future__ import annotations

from dataclasses import dataclass

PUBLISHED_SIZE = 103424
PUBLISHED_IM_PATCH = 100295
PUBLISHED_LOCATIONS = 1001
PUBLISHED_VIDEO = 103367
SMALLEST_SIZE = 600
COMPACT_LOCATIONS = 4

HEAD = ("<unk>", "<s>", "</s>")
END_OF_SENTENCE = "<|end_of_sentence|>"
BEGIN_OF_SENTENCE = "<|begin_of_sentence|>"
GENERATED = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<response>", "</response>")
"""Structure a model writes: single tokens, but not special ones, so that decoding shows them."""
MASKS = ("<mask:1>", "<mask:4>", "<mask:5>", "<mask:6>", "<mask:7>")
IMAGE_PLACEHOLDER = "<|IMAGE_PLACEHOLDER|>"
VIDEO_PLACEHOLDER = "<|VIDEO_PLACEHOLDER|>"
AUDIO_PLACEHOLDER = "<|AUDIO_PLACEHOLDER|>"
BETWEEN = (
    "<|LOC_BEGIN|>",
    "<|LOC_END|>",
    "<|LOC_SEP|>",
    "<|CROP_COL_SEP|>",
    "<|CROP_ROW_SEP|>",
    "<|IMAGE_SEP|>",
)
DELIMITERS = ("<|IMAGE_START|>", "<|IMAGE_END|>", "<|VIDEO_START|>", "<|VIDEO_END|>")


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenLayout:
    """Ids by token string (``special``), and the half-open range of ids left for text (``text``)."""

    special: dict[str, int]
    text: range

    @property
    def im_patch_id(self) -> int:
        return self.special[IMAGE_PLACEHOLDER]

    def config_ids(self) -> dict[str, int]:
        """The token ids of config.json by its keys."""
        return {
            "image_token_id": self.special[IMAGE_PLACEHOLDER],
            "video_token_id": self.special[VIDEO_PLACEHOLDER],
            "image_start_token_id": self.special["<|IMAGE_START|>"],
            "image_end_token_id": self.special["<|IMAGE_END|>"],
            "video_start_token_id": self.special["<|VIDEO_START|>"],
            "video_end_token_id": self.special["<|VIDEO_END|>"],
        }


def token_layout(vocab_size: int) -> TokenLayout:
    """Layout for so many embedding rows. Raises ValueError below ``SMALLEST_SIZE``."""
    if vocab_size < SMALLEST_SIZE:
        raise ValueError(f"text_config.vocab_size = {vocab_size} is too small; need at least {SMALLEST_SIZE}")
    published = vocab_size >= PUBLISHED_SIZE
    media = _media_tokens(PUBLISHED_LOCATIONS if published else COMPACT_LOCATIONS)
    im_patch = PUBLISHED_IM_PATCH if published else vocab_size - len(media) - 1
    last_text = (*MASKS, *GENERATED, END_OF_SENTENCE, BEGIN_OF_SENTENCE)
    # The published vocabulary has 21 more tokens after begin_of_sentence (100273), which are plain text here.
    first_special = (100273 if published else im_patch - 1) - len(last_text) + 1
    special = {token: i for i, token in enumerate(HEAD)}
    special |= {token: first_special + i for i, token in enumerate(last_text)}
    special |= {token: im_patch + i for i, token in enumerate(media)}
    video = PUBLISHED_VIDEO if published else vocab_size - 1
    unused = range(im_patch + len(media), video)
    special |= {f"<|UNUSED_{i}|>": token for i, token in enumerate(unused)}
    special[VIDEO_PLACEHOLDER] = video
    return TokenLayout(special=special, text=range(len(HEAD), im_patch))


def _media_tokens(locations: int) -> tuple[str, ...]:
    """Consecutive from im_patch_id; the video placeholder comes apart, last."""
    return (
        IMAGE_PLACEHOLDER,
        AUDIO_PLACEHOLDER,
        *(f"<|LOC_{i}|>" for i in range(locations)),
        *BETWEEN,
        *DELIMITERS,
    )
