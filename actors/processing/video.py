"""Encoded videos to units: index the frames, pick them, decode only what is needed, draw times, resize, cut up.

The model's rule counts frames of a steady rate. A video whose frames are not steady is looked at in ticks of one: tick
i shows the frame that is on screen at i / rate seconds, and bears that time. (The original counts its frames as if they
were steady, and so tells wrong times.)
"""

from __future__ import annotations

import io
import math
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import av
import av.container
import av.error
import av.stream
import av.video.frame
from PIL import Image, ImageDraw, ImageFont

from actors.errors import InvalidRequest, MediaTooLarge, MediaUnreadable, ServingError
from actors.processing.config import ProcessingLimits, VideoConfig
from actors.processing.images import PixelBounds, check_aspect, check_bytes, resize, smart_resize
from actors.processing.media_options import with_part
from actors.processing.patches import Pixels, Unit, make_unit
from actors.processing.sampling import Sampling, select_frames, timestamp_text, window
from actors.types import TEMPORAL_MERGE, MediaKind, VideoPart

_SEEK_GAIN = 16
"""Frames a seek must skip to be worth its flush."""
_FONT_SHARE = 0.1
_STEADY_WITHIN_S = 0.1
"""How far a frame may be from its place in a steady video; less where frames are closer."""
_UNSTEADY_TICKS = 30.0
"""Least ticks per second of a video without a steady rate."""

# Containers that hold their own data: no playlists, scripts or image sequences that would open other files or hosts.
_OPEN_OPTIONS = {
    "format_whitelist": "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,flv,mpegts,mpeg,mpegvideo,ogg,gif,asf,ivf,apng",
    "protocol_whitelist": "none",
}

FONT = Path(__file__).parent / "assets" / "Roboto-Regular.ttf"

Check = Callable[[], None]
"""Called between steps of long work; raises to stop it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FrameTable:
    """Frames of a stream in showing order. ``times`` are in stream time base; empty when packets do not tell."""

    count: int
    rate: float
    """Ticks per second."""
    times: tuple[int, ...] = ()
    keyframes: tuple[int, ...] = ()
    """Times at which decoding may start."""
    on_screen: tuple[int, ...] = ()
    """By tick, the index of the frame that is shown; empty where tick i shows frame i."""

    @property
    def ticks(self) -> int:
        return len(self.on_screen) or self.count

    def frame(self, tick: int) -> int:
        """Index of the frame that a tick shows."""
        return self.on_screen[tick] if self.on_screen else tick


class VideoDecoder:
    """Turns one encoded video into units with a checkpoint's rules. Stateless between calls: safe in a thread pool."""

    def __init__(self, model_dir: Path, config: VideoConfig, limits: ProcessingLimits) -> None:
        self._config = config
        self._limits = limits
        self._font = model_dir / config.font
        if config.font == FONT.name and not self._font.is_file():
            self._font = FONT

    def units(
        self, content: bytes, part: VideoPart, field: str, check: Check, config: VideoConfig | None = None
    ) -> list[Unit]:
        """Frame pairs of a video, in order. ``config`` is what the request says of all its videos.

        Raises MediaUnreadable for what does not decode, MediaTooLarge over a limit, InvalidRequest for a bad option,
        each naming ``field``. A checkpoint that names a font it does not have refuses videos, not the start of the
        server; the usual font comes with this package.
        """
        check_bytes(len(content), self._limits.max_video_bytes, "video", field)
        _check_span(part, field)
        config = with_part(config or self._config, part, self._limits, field)
        if self._config.draw_timestamps and not self._font.is_file():
            raise InvalidRequest(
                f"this model takes no videos until its directory holds the timestamp font {self._config.font}",
                reason="VIDEO_UNSUPPORTED",
                field=field,
            )
        try:
            with av.open(
                io.BytesIO(content),
                "r",
                metadata_errors="replace",
                container_options=_OPEN_OPTIONS,
                options=_decoder_options(self._limits),
            ) as container:
                return _Reader(container, config, self._limits, self._font, field, check).units(part)
        except ServingError:
            raise
        except (av.error.FFmpegError, OSError, ValueError, OverflowError) as error:
            # A frame far over the limit that no header announced fails inside the decoder, and so ends here.
            most = self._limits.max_video_pixels
            raise MediaUnreadable(
                f"not a readable video of at most {most} pixels a frame: {_short(error)}", field=field
            ) from error


def _check_span(part: VideoPart, field: str) -> None:
    for name, value in (("start_s", part.start_s), ("end_s", part.end_s)):
        if value is not None and not (math.isfinite(value) and value >= 0):
            raise InvalidRequest(f"{name} must be 0 or more, got {value:g}", field=f"{field}.{name}")
    if part.start_s is not None and part.end_s is not None and part.start_s >= part.end_s:
        raise InvalidRequest(f"end_s {part.end_s:g} is not after start_s {part.start_s:g}", field=f"{field}.end_s")


def _decoder_options(limits: ProcessingLimits) -> dict[str, str]:
    """Bounds what a decoder allocates for a frame larger than the headers say, with room for padded sides."""
    return {"max_pixels": str(2 * limits.max_video_pixels + (1 << 16))}


def draw_timestamp(image: Image.Image, seconds: float, font: Path) -> None:
    """Black text with a white edge in the top left corner, a tenth of the shorter side high."""
    height = max(1, int(min(image.size) * _FONT_SHARE))
    ImageDraw.Draw(image).text(
        (0, 0),
        timestamp_text(seconds),
        font=ImageFont.truetype(str(font), height),
        fill=(0, 0, 0),
        stroke_width=int(height * _FONT_SHARE),
        stroke_fill=(255, 255, 255),
    )


class _WrongTable(Exception):
    """The decoder gave other frames than the packets announced."""


class _Reader:
    """One open container, for one call."""

    def __init__(
        self,
        container: av.container.InputContainer,
        config: VideoConfig,
        limits: ProcessingLimits,
        font: Path,
        field: str,
        check: Check,
    ) -> None:
        self._container = container
        self._config = config
        self._limits = limits
        self._font = font
        self._field = field
        self._check = check
        # The cover of a piece of music is a stream of one picture.
        streams = [s for s in container.streams.video if not s.disposition & av.stream.Disposition.attached_pic]
        if not streams:
            raise MediaUnreadable("no video stream", field=field)
        self._stream = streams[0]
        # Typed as always there; it is None for a codec this build cannot decode.
        context: object = self._stream.codec_context
        if context is None:
            raise MediaUnreadable("the video's codec is unknown", field=field)
        self._stream.thread_type = "AUTO"
        self._stream.codec_context.options = _decoder_options(limits)
        self._fps = self._frame_rate()

    def units(self, part: VideoPart) -> list[Unit]:
        if self._container.duration is not None:
            self._check_length(0, self._container.duration / av.time_base)
        self._check_size(self._stream.codec_context.width, self._stream.codec_context.height)
        table = self._frame_table()
        try:
            return self._units(table, part)
        except _WrongTable:
            # The packets promised frames that the decoder does not give: count what it gives.
            table = FrameTable(count=self._count_frames(), rate=self._fps)
        try:
            return self._units(table, part)
        except _WrongTable:
            raise MediaUnreadable("video frames change from one reading to the next", field=self._field) from None

    def _units(self, table: FrameTable, part: VideoPart) -> list[Unit]:
        """Each frame is finished before the next is decoded, so originals are never held together."""
        ticks = self._ticks(table, part)
        pictures = self._pictures(table, sorted(set(ticks)))
        units: list[Unit] = []
        tick, pixels = next(pictures)
        pair: tuple[Pixels, ...] = ()
        for wanted in ticks:
            if wanted != tick:
                tick, pixels = next(pictures)
            pair += (pixels,)
            if len(pair) == TEMPORAL_MERGE:
                units.append(make_unit(MediaKind.VIDEO, pair))
                pair = ()
        return units

    def _ticks(self, table: FrameTable, part: VideoPart) -> tuple[int, ...]:
        total, rate = table.ticks, table.rate
        if total == 0:
            raise MediaUnreadable("video has no frames", field=self._field)
        first, last = window(total, rate, part.start_s, part.end_s)
        if first >= last:
            raise InvalidRequest(
                f"no frame between start_s and end_s: the video is {total / rate:.2f} s long",
                field=f"{self._field}.start_s",
            )
        sampling = Sampling(
            frames_per_second=self._config.frames_per_second,
            min_frames=self._config.min_frames,
            max_frames=self._config.max_frames,
        )
        return tuple(first + index for index in select_frames(last - first, rate, sampling))

    def _pictures(self, table: FrameTable, ticks: list[int]) -> Iterator[tuple[int, Pixels]]:
        bounds = PixelBounds(low=self._config.min_pixels, high=self._config.max_pixels)
        size: tuple[int, int] | None = None
        decoded = self._decode(table, sorted({table.frame(tick) for tick in ticks}))
        index, frame = next(decoded)
        for tick in ticks:
            if table.frame(tick) != index:
                index, frame = next(decoded)
            image = _upright(frame)
            if self._config.draw_timestamps:
                draw_timestamp(image, tick / table.rate, self._font)
            # A stream may change its frame size; the model's grid is that of the first frame.
            size = size or smart_resize(image.height, image.width, bounds)
            yield tick, resize(image, *size)

    def _frame_table(self) -> FrameTable:
        times: list[int] = []
        keyframes: list[int] = []
        end = 0
        for packet in self._container.demux(self._stream):
            self._check()
            if packet.size == 0 or packet.is_discard:
                continue
            if packet.pts is None:
                keyframes.clear()
                break
            times.append(packet.pts)
            end = max(end, packet.pts + (packet.duration or 0))
            if packet.is_keyframe:
                keyframes.append(packet.pts)
            self._check_length(len(times), len(times) / self._fps)
        # VP8 carries packets that show nothing, and packets without distinct times cannot be told apart: only decoding
        # says how many frames there are.
        if not keyframes or len(set(times)) != len(times) or self._stream.codec_context.name == "vp8":
            return FrameTable(count=self._count_frames(), rate=self._fps)
        times.sort()
        keyframes.sort()
        rate, on_screen = self._on_screen(times, end)
        return FrameTable(
            count=len(times),
            rate=rate,
            times=tuple(times),
            keyframes=tuple(keyframes),
            on_screen=tuple(on_screen),
        )

    def _on_screen(self, times: list[int], end: int) -> tuple[float, list[int]]:
        """Rate and ``on_screen`` of a ``FrameTable``, the latter empty where the frames are steady.

        Some containers tell a rate far over that of their frames: it gives no more ticks than a video may have frames.
        """
        base = self._stream.time_base
        if base is None:
            return self._fps, []
        frame = 1 / (float(base) * self._fps)
        tolerance = min(frame, _STEADY_WITHIN_S / float(base))
        if all(abs(time - times[0] - index * frame) <= tolerance for index, time in enumerate(times)):
            return self._fps, []
        seconds = (max(end, times[-1] + 1) - times[0]) * float(base)
        self._check_length(0, seconds)
        rate = max(_UNSTEADY_TICKS, min(self._fps, self._limits.max_video_frames / seconds))
        tick = 1 / (float(base) * rate)
        # A time that lies on a frame up to rounding belongs to it.
        return rate, [
            max(0, bisect_right(times, times[0] + index * tick + 0.01 * tick) - 1)
            for index in range(max(1, round(seconds * rate)))
        ]

    def _count_frames(self) -> int:
        count = 0
        for _ in self._frames_from_start():
            count += 1
            self._check_length(count, count / self._fps)
        return count

    def _frames_from_start(self) -> Iterator[av.video.frame.VideoFrame]:
        self._container.seek(min(0, self._container.start_time or 0), backward=True)
        return self._frames()

    def _frames(self) -> Iterator[av.video.frame.VideoFrame]:
        for frame in self._container.decode(self._stream):
            self._check()
            self._check_size(frame.width, frame.height)
            yield frame

    def _decode(self, table: FrameTable, wanted: list[int]) -> Iterator[tuple[int, av.video.frame.VideoFrame]]:
        """Frames at ascending indices. Raises _WrongTable when the table does not describe the stream."""
        if table.times:
            yield from self._decode_by_time(table, wanted)
            return
        left = iter(wanted)
        target = next(left, None)
        for index, frame in enumerate(self._frames_from_start()):
            if index == target:
                yield index, frame
                target = next(left, None)
                if target is None:
                    return
        raise _WrongTable

    def _decode_by_time(self, table: FrameTable, wanted: list[int]) -> Iterator[tuple[int, av.video.frame.VideoFrame]]:
        frames = self._frames_from_start()
        position = 0
        for index in wanted:
            target = table.times[index]
            keyframe = table.keyframes[max(0, bisect_right(table.keyframes, target) - 1)]
            if bisect_right(table.times, keyframe) - 1 - position >= _SEEK_GAIN:
                self._container.seek(keyframe, stream=self._stream, backward=True)
                frames = self._frames()
            for frame in frames:
                if frame.pts is None or frame.pts > target:
                    raise _WrongTable
                if frame.pts == target:
                    break
            else:
                raise _WrongTable
            position = index + 1
            yield index, frame

    def _frame_rate(self) -> float:
        for rate in (self._stream.average_rate, self._stream.guessed_rate, self._stream.base_rate):
            if rate is not None and rate > 0:
                return float(rate)
        raise MediaUnreadable("the video's frame rate is unknown", field=self._field)

    def _check_size(self, width: int, height: int) -> None:
        if width * height > self._limits.max_video_pixels:
            raise MediaTooLarge(
                f"video of {width} x {height} pixels is over the limit of {self._limits.max_video_pixels} pixels",
                field=self._field,
            )
        check_aspect(height, width, self._field)

    def _check_length(self, count: int, seconds: float) -> None:
        if count > self._limits.max_video_frames:
            raise MediaTooLarge(f"video is over the limit of {self._limits.max_video_frames} frames", field=self._field)
        if seconds > self._limits.max_video_seconds:
            raise MediaTooLarge(
                f"video of {seconds:.2f} s is over the limit of {self._limits.max_video_seconds:g} s",
                field=self._field,
            )


def _upright(frame: av.video.frame.VideoFrame) -> Image.Image:
    """RGB, turned as the container's display matrix says (quarter turns)."""
    image = Image.fromarray(frame.to_ndarray(format="rgb24"))
    turns = round(frame.rotation / 90) % 4
    return image.rotate(90 * turns, expand=True) if turns else image


def _short(error: Exception) -> str:
    if isinstance(error, av.error.FFmpegError) and error.strerror:
        return str(error.strerror)
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
