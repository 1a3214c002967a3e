"""Nouns shared by every part. Standard library only.

Sizes: an image or a video frame of ``height x width`` patches of 14 x 14 pixels gives ``height * width / 4`` tokens
(2 x 2 spatial merge); two frames share their tokens (temporal merge). The *unit* of media is one image or one frame
pair: nothing in the vision tower or the resampler crosses units, so keys, transfers and caches are per unit.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

SPATIAL_MERGE = 2
TEMPORAL_MERGE = 2


class EngineRole(enum.StrEnum):
    """What an engine does at present. COLOCATED counts as both."""

    PREFILL = "prefill"
    DECODE = "decode"
    COLOCATED = "colocated"

    @property
    def prefills(self) -> bool:
        return self is not EngineRole.DECODE

    @property
    def decodes(self) -> bool:
        return self is not EngineRole.PREFILL


class AttemptMode(enum.StrEnum):
    """How an engine takes part in an attempt."""

    COLOCATED = "colocated"
    """Prefills and decodes."""
    PREFILL = "prefill"
    """Prefills, sends token 0 to the router and the KV to its peer."""
    DECODE = "decode"
    """Receives the KV from its peer and decodes."""


class Stage(enum.StrEnum):
    """Where a request is. One enum for logs, metrics, timings and dashboards."""

    QUEUED = "queued"
    PREPROCESS = "preprocess"
    ENCODE = "encode"
    PREFILL = "prefill"
    TRANSFER = "transfer"
    DECODE = "decode"
    FINISHED = "finished"


class FinishReason(enum.StrEnum):
    """Why generation ended normally."""

    STOP = "stop"
    LENGTH = "length"
    TOOL_CALLS = "tool_calls"
    """STOP of a reply that calls tools: what the router makes of it, never said by an engine."""
    CANCELLED = "cancelled"


class MediaKind(enum.StrEnum):
    """What a media part is."""

    IMAGE = "image"
    VIDEO = "video"


class ThinkingMode(enum.StrEnum):
    """AUTO leaves the choice to the checkpoint's template."""

    AUTO = "auto"
    ON = "on"
    OFF = "off"


class MessageRole(enum.StrEnum):
    """Authors of a message."""

    SYSTEM = "system"
    USER = "user"
    ASSISTANT = "assistant"
    TOOL = "tool"


class Grid(NamedTuple):
    """Patches of one media item: ``frames`` is 1 for an image and even for a video."""

    frames: int
    height: int
    width: int

    @property
    def patches(self) -> int:
        return self.frames * self.height * self.width

    @property
    def units(self) -> int:
        """Images or frame pairs."""
        return max(1, self.frames // TEMPORAL_MERGE)

    @property
    def tokens_per_unit(self) -> int:
        return self.height * self.width // SPATIAL_MERGE**2

    @property
    def tokens(self) -> int:
        return self.units * self.tokens_per_unit

    @property
    def unit(self) -> Grid:
        """Grid of one of its units."""
        return Grid(min(self.frames, TEMPORAL_MERGE), self.height, self.width)


@dataclass(frozen=True, kw_only=True, slots=True)
class MediaSource:
    """Encoded media: exactly one of ``content`` and ``uri`` is set (by the facade)."""

    content: bytes | None = None
    uri: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class TextPart:
    text: str


@dataclass(frozen=True, kw_only=True, slots=True)
class ImagePart:
    """A picture; pixel bounds default to the deployment's or else the checkpoint's."""

    source: MediaSource
    min_pixels: int | None = None
    max_pixels: int | None = None
    low_detail: bool = False
    """At most ``LOW_DETAIL_PIXELS``, unless ``max_pixels`` says otherwise."""


LOW_DETAIL_PIXELS = 512 * 512


@dataclass(frozen=True, kw_only=True, slots=True)
class VideoPart:
    """A video; sampling, and the pixel bounds of its frames, default to the deployment's or else the checkpoint's."""

    source: MediaSource
    frames_per_second: float | None = None
    min_frames: int | None = None
    max_frames: int | None = None
    min_pixels: int | None = None
    max_pixels: int | None = None
    start_s: float | None = None
    end_s: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class MediaOptions:
    """How pictures and videos are prepared where their parts do not say: for one request, or for a whole deployment.

    ``None`` leaves an option to the deployment, and there to the checkpoint.
    """

    image_min_pixels: int | None = None
    image_max_pixels: int | None = None
    video_min_pixels: int | None = None
    """Of one frame, as the next."""
    video_max_pixels: int | None = None
    video_fps: float | None = None
    video_min_frames: int | None = None
    video_max_frames: int | None = None


ContentPart = TextPart | ImagePart | VideoPart


@dataclass(frozen=True, kw_only=True, slots=True)
class ToolCall:
    """A call an assistant turn made. ``arguments`` is JSON text."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True, kw_only=True, slots=True)
class ToolCallDelta:
    """More of a call that a reply makes. ``id`` and ``name`` come with the first of its deltas alone."""

    index: int
    """Counts the calls of a reply from 0."""
    id: str = ""
    name: str = ""
    arguments: str = ""
    """As the model writes them; may be no JSON in the end."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Message:
    """One turn of a conversation, parts in the order they appear."""

    role: MessageRole
    parts: tuple[ContentPart, ...]
    reasoning: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None
    name: str | None = None

    @property
    def has_media(self) -> bool:
        return any(not isinstance(part, TextPart) for part in self.parts)


@dataclass(frozen=True, kw_only=True, slots=True)
class PreprocessRequest:
    """What the router asks of a preprocessor. ``lease`` owns the patches it keeps."""

    lease: str
    messages: tuple[Message, ...] = ()
    prompt: str | tuple[int, ...] | None = None
    """In place of messages: text or token ids that no chat template touches."""
    add_special_tokens: bool = True
    """Adds what the tokenizer's own post-processor puts around a text. Only for a ``prompt`` that is text."""
    thinking: ThinkingMode = ThinkingMode.AUTO
    tools: tuple[dict[str, Any], ...] = ()
    max_prompt_tokens: int
    keep_patches: bool = True
    """False only counts tokens: nothing is kept for pulling."""
    media_options: MediaOptions = field(default_factory=MediaOptions)


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptMedia:
    """One media item inside a prompt. ``offset`` is the index of its first placeholder token."""

    kind: MediaKind
    offset: int
    grid: Grid
    content_keys: tuple[bytes, ...]
    """One per unit, 32 bytes each."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PreprocessReply:
    """Token ids and media of a prompt. Patches wait under the lease at ``media_address`` (host:port)."""

    prompt_ids: tuple[int, ...]
    media: tuple[PromptMedia, ...]
    starts_thinking: bool
    """The prompt ends inside an open think block."""
    media_address: str
    incarnation: str
    busy_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class MediaSpan:
    """One media item as an engine sees it: embeddings are pulled by key from ``encoder_address`` (host:port)."""

    kind: MediaKind
    offset: int
    grid: Grid
    embedding_keys: tuple[bytes, ...]
    encoder_address: str

    @property
    def end(self) -> int:
        return self.offset + self.grid.tokens


def vision_end(token_ids: Sequence[int], im_patch_id: int) -> int:
    """Leading tokens that hold every id which may need the vision experts; 0 without any."""
    if not token_ids or max(token_ids) < im_patch_id:
        return 0
    return next(end for end in range(len(token_ids), 0, -1) if token_ids[end - 1] >= im_patch_id)


class StructureKind(enum.StrEnum):
    """What constrains the answer."""

    JSON_SCHEMA = "json_schema"
    JSON_OBJECT = "json_object"
    REGEX = "regex"
    GRAMMAR = "grammar"
    CHOICE = "choice"
    TOOL_CALLS = "tool_calls"


@dataclass(frozen=True, kw_only=True, slots=True)
class Structure:
    """Structured output: the answer, after any thinking, matches ``text``.

    ``text`` is a JSON schema, nothing (JSON_OBJECT), a regular expression, a grammar in Lark syntax, a JSON list of
    strings (CHOICE), or for TOOL_CALLS the JSON object ``{"functions": [{"name": ..., "parameters": a JSON schema or
    null}], "several": whether more than one call may be made}``, with ``"answer": a JSON schema`` of what may stand in
    place of calls.
    """

    kind: StructureKind
    text: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """How tokens are drawn and when an engine stops. Stop strings are the router's."""

    temperature: float = 1.0
    """0 is greedy."""
    top_p: float = 1.0
    """Nucleus mass in (0, 1]."""
    top_k: int = 0
    """0 keeps the whole vocabulary."""
    min_p: float = 0.0
    """Keeps tokens at least this fraction as likely as the most likely one, in [0, 1]."""
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of tokens in prompt or output; above 0."""
    presence_penalty: float = 0.0
    """Subtracted once from logits of tokens in the output."""
    frequency_penalty: float = 0.0
    """Subtracted from logits once per occurrence in the output."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """(token id, added to its logit)."""
    allowed_token_ids: tuple[int, ...] | None = None
    """Only these may be drawn; None allows all."""
    bad_words_ids: tuple[tuple[int, ...], ...] = ()
    """Token sequences that must not be completed."""
    min_tokens: int = 0
    """End and stop tokens cannot be drawn before so many outputs."""
    max_tokens: int
    stop_token_ids: tuple[int, ...] = ()
    """Besides the checkpoint's own end tokens."""
    ignore_eos: bool = False
    logprobs: int | None = None
    """Report the drawn token's log-probability and those of so many most likely tokens; None reports nothing."""
    prompt_logprobs: int | None = None
    """The same for every prompt token but the first."""
    structure: Structure | None = None
    starts_thinking: bool = False
    """The prompt ends inside an open think block."""
    reasoning_max_tokens: int | None = None
    """Thinking is closed after so many tokens; None leaves it to the model."""


class SequenceKey(NamedTuple):
    """Names one attempt at one choice of a request on every wire."""

    request_id: str
    attempt: int
    choice: int

    def __str__(self) -> str:
        return f"{self.request_id}/{self.attempt}/{self.choice}"


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineRequest:
    """Enough to start or continue a sequence anywhere with the same positions, hashes, randomness and bounds."""

    prompt_ids: tuple[int, ...]
    media: tuple[MediaSpan, ...] = ()
    output_ids: tuple[int, ...] = ()
    """Tokens of earlier attempts."""
    sampling: SamplingParams
    seed: int
    """Unsigned 64 bits, chosen by the router when the client gave none. ``SequenceKey.choice`` is the other part of the
    key of randomness: every choice of a request is a sequence of its own."""
    salt: bytes = b""
    """Separates tenants in block hashes."""
    arrival_s: float
    """Router's wall clock, seconds since the epoch."""
    deadline_s: float
    priority: int = 0
    """Higher goes first, see ``service_rank``."""


PRIORITY_STEP_S = 60.0
"""What a level of priority is worth in seconds of waiting: whatever comes later, nobody waits for ever."""


def service_rank(arrival_s: float, priority: int, step_s: float = PRIORITY_STEP_S) -> float:
    """Sort key of every queue, at routers and engines: lower goes first. Arrival and priority as in EngineRequest."""
    return arrival_s - priority * step_s


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenLogprobs:
    """Log-probabilities at one position, before penalties, masks, biases and temperature.

    Taken over the ids that can be generated (below ``im_patch_id``), natural logarithm.
    """

    token_id: int
    logprob: float
    rank: int
    """1 for the most likely token."""
    top: tuple[tuple[int, float], ...]
    """(id, log-probability) of the most likely tokens, descending, ties by id."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptLogprobs:
    """Of prompt tokens ``first`` .. ``first + len(entries)``; a prompt's come in order, in pieces, before token 0.

    An entry is None where the token cannot be generated (media placeholders) or has no predecessor (token 0).
    """

    key: SequenceKey
    first: int
    entries: tuple[TokenLogprobs | None, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenEvent:
    """One generated token. ``index`` counts from 0 over all attempts; ``finish`` is set on the last."""

    key: SequenceKey
    index: int
    token_id: int
    finish: FinishReason | None = None
    busy_s: float = 0.0
    """Share of engine step time spent on the sequence since its last token."""
    logprobs: TokenLogprobs | None = None


class MilestoneKind(enum.StrEnum):
    """A point an attempt passes inside an engine."""

    PREFILL_STARTED = "prefill_started"
    """Its first chunk enters a step."""
    TRANSFERRED = "transferred"
    """Its KV arrived whole; told by the transfer, not by the engine."""
    MEDIA_AWAITED = "media_awaited"
    """All of its prompt is computed up to a unit whose embedding is not here; once for each such unit."""
    RELEASED = "released"
    """Nothing of it is held any more; stays inside its replica."""


@dataclass(kw_only=True, slots=True)
class Timings:
    """Seconds per stage on the router's clock (``exposed`` sums to wall time) and work that ran beside (``busy``)."""

    exposed: dict[Stage, float] = field(default_factory=dict)
    busy: dict[Stage, float] = field(default_factory=dict)
