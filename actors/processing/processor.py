"""A conversation, or a raw prompt, to token ids and media units: the whole work of a preprocessor on one request."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from actors.errors import ContextExceeded, InvalidRequest
from actors.processing.config import (
    ImageConfig,
    ModelTokens,
    ProcessingLimits,
    VideoConfig,
    load_image_config,
    load_video_config,
)
from actors.processing.conversation import (
    check_conversation,
    check_unicode,
    media_parts,
    part_kind,
    protect_json,
    to_chat,
)
from actors.processing.fetch import MediaFetcher
from actors.processing.images import image_unit, pixel_bounds
from actors.processing.media_options import with_options
from actors.processing.patches import Unit
from actors.processing.template import ChatTemplate, opens_thinking
from actors.processing.tokenizer import ORIGINAL_PLACEHOLDERS, TextTokenizer, media_strings, without_marks
from actors.processing.video import VideoDecoder
from actors.types import (
    LOW_DETAIL_PIXELS,
    Grid,
    ImagePart,
    MediaKind,
    MediaOptions,
    PreprocessRequest,
    PromptMedia,
    VideoPart,
)

_PLACEHOLDERS = {
    MediaKind.IMAGE: ("<|IMAGE_PLACEHOLDER|>", ORIGINAL_PLACEHOLDERS[0]),
    MediaKind.VIDEO: ("<|VIDEO_PLACEHOLDER|>", ORIGINAL_PLACEHOLDERS[1]),
}

_ALWAYS_ENCODED = 1 << 20
"""Bytes of text that are cheap enough to see how many tokens they give."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Processed:
    """A prompt. ``units`` holds each distinct unit once, by content key; empty when patches were not to be kept."""

    prompt_ids: tuple[int, ...]
    media: tuple[PromptMedia, ...]
    units: dict[bytes, Unit]
    starts_thinking: bool
    """The prompt ends inside an open think block."""


class Processor:
    """Everything processing needs of one model directory. Safe for use from many threads."""

    def __init__(
        self,
        model_dir: Path | str,
        limits: ProcessingLimits | None = None,
        *,
        media: MediaOptions | None = None,
        built_in_template: str | None = None,
        fetcher: MediaFetcher | None = None,
    ) -> None:
        """``media`` goes over the directory's own settings. ``built_in_template`` is used when it has no template; by
        default the one of -Thinking where the directory, or the repository it is a snapshot of, is named so.

        Raises ValueError naming the file for a directory that cannot be served.
        """
        model_dir = Path(model_dir)
        self.limits = limits or ProcessingLimits()
        self.tokens = ModelTokens.from_dir(model_dir)
        self.tokenizer = TextTokenizer.from_dir(model_dir)
        self._longest_token = self.tokenizer.longest_token()
        self.image_config: ImageConfig
        self.video_config: VideoConfig
        try:
            self.image_config, self.video_config = with_options(
                load_image_config(model_dir),
                load_video_config(model_dir),
                media or MediaOptions(),
                self.limits,
                "media",
            )
        except InvalidRequest as error:
            raise ValueError(error.message) from None
        self._placeholder_text = {
            MediaKind.IMAGE: self._single_token(self.tokens.image, "image_token_id"),
            MediaKind.VIDEO: self._single_token(self.tokens.video, "video_token_id"),
        }
        kinds: dict[str, MediaKind] = {}
        for kind in (MediaKind.VIDEO, MediaKind.IMAGE):
            # Where both kinds share a token, its string means an image: a template writes videos by another name.
            kinds |= dict.fromkeys((*_PLACEHOLDERS[kind], self._placeholder_text[kind]), kind)
        self._kinds = kinds
        self._placeholder_pattern = re.compile("|".join(map(re.escape, kinds)))
        self.template = ChatTemplate.from_dir(
            model_dir,
            placeholders={kind: [text for text, k in kinds.items() if k is kind] for kind in MediaKind},
            built_in=built_in_template or ("thinking" if _named_thinking(model_dir) else "pt"),
        )
        self._forbidden = media_strings(self.tokenizer, self.tokens)
        self._videos = VideoDecoder(model_dir, self.video_config, self.limits)
        self._fetcher = fetcher or MediaFetcher(
            self.limits.allowed_media_domains, self.limits.media_timeout_s, self.limits.allowed_media_networks
        )

    def close(self) -> None:
        """Closes connections to media hosts."""
        self._fetcher.close()

    def process(self, request: PreprocessRequest, check: Callable[[], None] = lambda: None) -> Processed:
        """Ids, media and units of a request.

        ``check`` is called between steps of long work (fetched chunks, decoded frames) and may raise to stop it.
        Raises InvalidRequest and its kinds, naming the field; ContextExceeded over ``max_prompt_tokens``.
        """
        if request.prompt is not None:
            return self._raw(request.prompt, request)
        support = self.template.support
        check_conversation(
            request.messages, request.tools, support=support, limits=self.limits, forbidden=self._forbidden
        )
        protect = self.tokenizer.protect
        prompt = self.template.render(
            to_chat(request.messages, support, protect),
            [protect_json(tool, protect) for tool in request.tools],
            request.thinking,
        )
        parts = media_parts(request.messages)
        self._check_bytes(without_marks(prompt), request.max_prompt_tokens, "messages")
        ids = self._prompt_ids(prompt, [part_kind(part) for _, part in parts])
        length = len(ids)
        _check_length(length, request.max_prompt_tokens)

        configs = with_options(
            self.image_config, self.video_config, request.media_options, self.limits, "media_options"
        )
        items: list[tuple[Grid, tuple[bytes, ...]]] = []
        kept: dict[bytes, Unit] = {}
        for field, part in parts:
            check()
            units = self._units(part, field, check, *configs)
            grid = Grid(sum(unit.grid.frames for unit in units), *units[0].grid[1:])
            length += grid.tokens - 1
            _check_length(length, request.max_prompt_tokens)
            if request.keep_patches:
                for unit in units:
                    kept.setdefault(unit.key, unit)
            items.append((grid, tuple(unit.key for unit in units)))
        prompt_ids, media = self._expand(ids, [part_kind(part) for _, part in parts], items)
        return Processed(prompt_ids=prompt_ids, media=media, units=kept, starts_thinking=opens_thinking(prompt))

    def _raw(self, prompt: str | tuple[int, ...], request: PreprocessRequest) -> Processed:
        """A prompt as it stands. It has no media, so no token of it may stand for some."""
        if isinstance(prompt, str):
            check_unicode(prompt, "prompt")
            self._check_bytes(prompt, request.max_prompt_tokens, "prompt")
            prompt = tuple(self.tokenizer.encode_raw(prompt, add_special_tokens=request.add_special_tokens))
        if not prompt:
            raise InvalidRequest("the prompt gives no tokens", field="prompt")
        for index, token_id in enumerate(prompt):
            if token_id in self.tokens.placeholders:
                message = f"token {index} of the prompt is a media placeholder: pictures and videos come in messages"
                raise InvalidRequest(message, field="prompt")
        _check_length(len(prompt), request.max_prompt_tokens, "prompt")
        return Processed(prompt_ids=prompt, media=(), units={}, starts_thinking=False)

    def _units(
        self,
        part: ImagePart | VideoPart,
        field: str,
        check: Callable[[], None],
        images: ImageConfig,
        videos: VideoConfig,
    ) -> list[Unit]:
        if isinstance(part, ImagePart):
            most = part.max_pixels
            if most is None and part.low_detail and images.max_pixels > LOW_DETAIL_PIXELS:
                most = LOW_DETAIL_PIXELS
            bounds = pixel_bounds(images, self.limits, part.min_pixels, most, field)
            content = self._fetcher.read(part.source, self.limits.max_image_bytes, field, check)
            return [image_unit(content, bounds, self.limits, field)]
        content = self._fetcher.read(part.source, self.limits.max_video_bytes, field, check)
        return self._videos.units(content, part, field, check, videos)

    def _check_bytes(self, text: str, limit: int, field: str) -> None:
        """Refuses what is too long for so few tokens before it is encoded, which takes eighty times its size."""
        size = len(text.encode(errors="surrogatepass"))
        if size > max(limit * self._longest_token, _ALWAYS_ENCODED):
            raise ContextExceeded(f"prompt of {size} bytes is over the limit of {limit} tokens", field=field)

    def _prompt_ids(self, prompt: str, kinds: Sequence[MediaKind]) -> list[int]:
        """Ids of a rendered prompt, one placeholder per media item, of the kinds expected."""
        found = [self._kinds[text] for text in self._placeholder_pattern.findall(prompt)]
        if found != list(kinds):
            raise InvalidRequest(
                f"the chat template shows {len(found)} of {len(kinds)} pictures and videos, or not in order",
                field="messages",
            )
        prompt = self._placeholder_pattern.sub(lambda m: self._placeholder_text[self._kinds[m.group()]], prompt)
        ids = self.tokenizer.encode(prompt)
        if sum(token_id in self.tokens.placeholders for token_id in ids) != len(kinds):
            raise InvalidRequest("text must not spell media tokens", field="messages")
        return ids

    def _expand(
        self, ids: Sequence[int], kinds: Sequence[MediaKind], items: Sequence[tuple[Grid, tuple[bytes, ...]]]
    ) -> tuple[tuple[int, ...], tuple[PromptMedia, ...]]:
        """Repeats each placeholder once per token of its media item."""
        expanded: list[int] = []
        media: list[PromptMedia] = []
        left = iter(zip(kinds, items, strict=True))
        for token_id in ids:
            if token_id not in self.tokens.placeholders:
                expanded.append(token_id)
                continue
            kind, (grid, keys) = next(left)
            media.append(PromptMedia(kind=kind, offset=len(expanded), grid=grid, content_keys=keys))
            expanded += [token_id] * grid.tokens
        return tuple(expanded), tuple(media)

    def _single_token(self, token_id: int, key: str) -> str:
        text = self.tokenizer.token_text(token_id)
        if text is None or self.tokenizer.encode(text) != [token_id]:
            raise ValueError(f"config.json: {key} {token_id} is not a token of its own in the tokenizer")
        return text


def _named_thinking(model_dir: Path) -> bool:
    """A snapshot in the hub's cache lies two folders below that of its repository."""
    path = model_dir.resolve()
    repository = path.parents[1].name if path.parent.name == "snapshots" else path.name
    return "thinking" in repository.lower()


def _check_length(length: int, limit: int, field: str = "messages") -> None:
    if length > limit:
        raise ContextExceeded(f"prompt of {length} tokens or more is over the limit of {limit} tokens", field=field)
