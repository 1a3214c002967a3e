from __future__ import annotations

import io
from fractions import Fraction
from pathlib import Path

import av
import av.stream
import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from actors.errors import InvalidRequest, MediaTooLarge, MediaUnreadable, RequestCancelled
from actors.processing.config import ProcessingLimits, VideoConfig
from actors.processing.images import resize
from actors.processing.patches import Unit, patchify
from actors.processing.sampling import Sampling, select_frames
from actors.processing.video import VideoDecoder, draw_timestamp
from actors.types import Grid, VideoPart
from tests.tiny_model import tiny_checkpoint
from tests.unit.processing.samples import encode, noise, video, video_part

FIELD = "messages[0].content[0].video_url"
PLAIN = VideoConfig(draw_timestamps=False, min_pixels=784, max_pixels=784 * 4)
FONT = tiny_checkpoint() / "Roboto-Regular.ttf"


def decode(content: bytes, part: VideoPart | None = None, config: VideoConfig = PLAIN, **limits: float) -> list[Unit]:
    decoder = VideoDecoder(tiny_checkpoint(), config, ProcessingLimits(**limits))  # type: ignore[arg-type]
    return decoder.units(content, part or video_part(content), FIELD, lambda: None)


def shown(units: list[Unit]) -> list[int]:
    """Frame indices, read off the grey levels that ``video`` paints."""
    return [round((float(half.mean()) - 4) / 6) for unit in units for half in np.split(unit.patches, 2)]


@pytest.mark.parametrize(
    ("codec", "form"),
    [
        ("libx264", "mp4"),
        ("libx264", "matroska"),
        ("libvpx", "webm"),
        ("libvpx-vp9", "webm"),
        ("mpeg4", "avi"),
        ("mpeg2video", "mpegts"),
    ],
)
@pytest.mark.parametrize("gop", [3, 100])
def test_frames_are_those_of_the_rule(codec: str, form: str, gop: int) -> None:
    units = decode(video(40, fps=10, codec=codec, form=form, gop=gop))
    assert shown(units) == list(select_frames(40, 10.0, Sampling()))
    assert {unit.grid for unit in units} == {Grid(2, 4, 4)}


def test_seeking_gives_the_same_frames_as_decoding_through(monkeypatch: pytest.MonkeyPatch) -> None:
    content = video(400, fps=10, gop=8)
    part = video_part(content, max_frames=4)
    with_seeks = decode(content, part)
    monkeypatch.setattr("actors.processing.video._SEEK_GAIN", 10**9)
    assert [unit.key for unit in with_seeks] == [unit.key for unit in decode(content, part)]
    assert shown(with_seeks) == [0, 100 % 40, 200 % 40, 300 % 40]


def test_odd_count_repeats_the_last_frame() -> None:
    units = decode(video(5, fps=10))
    assert shown(units) == [0, 1, 2, 3, 4, 4]


def test_one_frame() -> None:
    assert shown(decode(video(1))) == [0, 0]


def unsteady_times() -> list[float]:
    """40 frames in 14 s: ten a second for two seconds, then two a second for eight, then one that stays for two."""
    return [*(i / 10 for i in range(20)), *(2 + i / 2 for i in range(19)), 11.5]


@pytest.mark.parametrize(("codec", "form"), [("libx264", "mp4"), ("libx264", "matroska"), ("libvpx-vp9", "webm")])
def test_unsteady_frames_are_those_on_screen_at_steady_times(codec: str, form: str) -> None:
    times = unsteady_times()
    content = video(40, codec=codec, form=form, times=times)
    wanted = [at / 2 for at in range(23)]
    expected = [max(i for i, time in enumerate(times) if time <= at + 1e-6) for at in wanted]
    assert shown(decode(content))[:23] == expected
    assert shown(decode(content, video_part(content, start_s=5.0, end_s=5.5))) == [26] * 16


def test_unsteady_frames_bear_the_time_at_which_they_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[float] = []
    monkeypatch.setattr("actors.processing.video.draw_timestamp", lambda image, seconds, font: drawn.append(seconds))
    content = video(40, times=unsteady_times())
    decode(content, config=VideoConfig(min_pixels=784, max_pixels=784 * 4))
    assert len(drawn) >= 23 and drawn == pytest.approx([at / 2 for at in range(len(drawn))])


def test_long_unsteady_videos_are_bounded() -> None:
    content = video(3, times=[0.0, 0.1, 500.0])
    with pytest.raises(MediaTooLarge, match="over the limit of 100 s"):
        decode(content, max_video_seconds=100.0)
    assert len(shown(decode(content))) == 180


@pytest.mark.parametrize("fps", [1000, 29999])
def test_a_rate_far_over_that_of_the_frames_gives_no_more_ticks_than_frames_allowed(
    fps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    ticks: list[int] = []

    def watched(total: int, rate: float, sampling: Sampling) -> tuple[int, ...]:
        ticks.append(total)
        return select_frames(total, rate, sampling)

    monkeypatch.setattr("actors.processing.video.select_frames", watched)
    content = video(3, fps=fps, form="matroska", times=[0.0, 0.1, 500.0])
    with av.open(io.BytesIO(content)) as container:
        assert container.streams.video[0].average_rate == fps
    assert shown(decode(content, max_video_frames=20_000)) == [0, *[1] * 179]
    assert ticks == [20_000]


def sound(cover: bytes | None = None) -> bytes:
    """Half a second of silence, mp4; ``cover``: a JPEG, as a stream of one picture."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=44100)
        pictures = container.add_stream("mjpeg", rate=1) if cover else None
        if pictures is not None:
            pictures.width, pictures.height, pictures.pix_fmt = 64, 64, "yuvj420p"
            pictures.disposition = av.stream.Disposition.attached_pic
        frame = av.AudioFrame.from_ndarray(np.zeros((2, 1024), np.float32), format="fltp", layout="stereo")
        frame.sample_rate = 44100
        for index in range(20):
            frame.pts = 1024 * index
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
        if cover is not None and pictures is not None:
            packet = av.Packet(cover)
            packet.stream, packet.pts, packet.dts, packet.time_base = pictures, 0, 0, Fraction(1, 1)
            packet.is_keyframe = True
            container.mux(packet)
    return buffer.getvalue()


@pytest.mark.parametrize("cover", [None, encode(noise(64, 64), "JPEG")], ids=["plain", "cover"])
def test_sound_alone_is_refused(cover: bytes | None) -> None:
    content = sound(cover)
    with av.open(io.BytesIO(content)) as container:
        assert len(container.streams.video) == (cover is not None)
    with pytest.raises(MediaUnreadable, match="no video stream") as caught:
        decode(content)
    assert caught.value.field == FIELD


@pytest.mark.parametrize(("codec", "form"), [("libx264", "matroska"), ("mpeg2video", "mpegts"), ("mpeg4", "avi")])
def test_a_video_cut_off_gives_the_frames_there_are(codec: str, form: str) -> None:
    content = video(40, codec=codec, form=form, gop=5)
    seen = shown(decode(content[: len(content) * 6 // 10]))
    assert 1 < len(set(seen)) < 40 and seen == sorted(seen)


def test_an_mp4_without_its_index_is_refused() -> None:
    content = video(40)
    with pytest.raises(MediaUnreadable, match="not a readable video") as caught:
        decode(content[: len(content) // 2])
    assert caught.value.field == FIELD


def test_portrait_grid() -> None:
    assert {unit.grid for unit in decode(video(4, size=(32, 64)))} == {Grid(2, 4, 2)}


def test_part_options() -> None:
    content = video(40, fps=10)
    assert shown(decode(content, video_part(content, start_s=1.0, end_s=1.4))) == [10, 11, 12, 13]
    fast = video_part(content, frames_per_second=10.0)
    assert shown(decode(content, fast)) == list(range(40))
    few = video_part(content, max_frames=4)
    assert shown(decode(content, few)) == [0, 10, 20, 30]


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"frames_per_second": 0.0}, "frames_per_second"),
        ({"frames_per_second": float("nan")}, "frames_per_second"),
        ({"frames_per_second": 1000.0}, "frames_per_second"),
        ({"max_frames": 0}, "max_frames"),
        ({"max_frames": 181}, "max_frames"),
        ({"start_s": -1.0}, "start_s"),
        ({"end_s": float("inf")}, "end_s"),
        ({"start_s": 2.0, "end_s": 2.0}, "end_s"),
        ({"start_s": 100.0}, "start_s"),
    ],
)
def test_bad_options(options: dict[str, float], name: str) -> None:
    content = video(10)
    with pytest.raises(InvalidRequest) as caught:
        decode(content, video_part(content, **options))
    assert caught.value.field == f"{FIELD}.{name}"


@pytest.mark.parametrize(
    "content",
    [
        b"hello",
        b"",
        b"\0" * 5000,
        video(10)[:400],
        encode(noise(20, 20), "JPEG"),
        b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nfile:///etc/passwd\n#EXT-X-ENDLIST\n",
        b"ffconcat version 1.0\nfile /etc/passwd\n",
    ],
)
def test_unreadable(content: bytes) -> None:
    with pytest.raises(MediaUnreadable) as caught:
        decode(content, VideoPart(source=video_part(b"x").source))
    assert caught.value.field == FIELD


def test_no_frames() -> None:
    with pytest.raises(MediaUnreadable):
        decode(video(0, form="matroska"))


@pytest.mark.parametrize(
    ("limits", "said"),
    [
        ({"max_video_bytes": 100}, "100 bytes"),
        ({"max_video_seconds": 3.0}, "limit of 3 s"),
        ({"max_video_frames": 39}, "39 frames"),
        ({"max_video_pixels": 64 * 48 - 1}, "3071 pixels"),
    ],
)
def test_limits(limits: dict[str, float], said: str) -> None:
    with pytest.raises(MediaTooLarge, match=said) as caught:
        decode(video(40, fps=10), **limits)
    assert caught.value.field == FIELD


def test_the_usual_font_comes_with_the_package(tmp_path: Path) -> None:
    content, config = video(4), VideoConfig(min_pixels=784, max_pixels=784 * 4)
    units = VideoDecoder(tmp_path, config, ProcessingLimits()).units(content, video_part(content), FIELD, lambda: None)
    assert [unit.key for unit in units] == [unit.key for unit in decode(content, config=config)]


def test_missing_font_refuses_videos_only_when_times_are_drawn(tmp_path: Path) -> None:
    content = video(4)
    for config, fails in ((VideoConfig(font="Own.ttf"), True), (PLAIN, False)):
        decoder = VideoDecoder(tmp_path, config, ProcessingLimits())
        if fails:
            with pytest.raises(InvalidRequest, match=r"Own\.ttf") as caught:
                decoder.units(content, video_part(content), FIELD, lambda: None)
            assert caught.value.reason == "VIDEO_UNSUPPORTED"
        else:
            assert decoder.units(content, video_part(content), FIELD, lambda: None)


def test_overlay_is_drawn_as_described() -> None:
    image, expected = noise(200, 120), noise(200, 120)
    draw_timestamp(image, 61.5, FONT)
    ImageDraw.Draw(expected).text(
        (0, 0),
        "time: 00:01:01.50",
        font=ImageFont.truetype(str(FONT), 12),
        fill=(0, 0, 0),
        stroke_width=1,
        stroke_fill=(255, 255, 255),
    )
    assert np.array_equal(np.asarray(image), np.asarray(expected))
    assert not np.array_equal(np.asarray(image), np.asarray(noise(200, 120)))


def test_overlay_comes_before_the_resize_with_the_frame_time() -> None:
    content = video(8, fps=4, size=(160, 120))
    config = VideoConfig(min_pixels=784, max_pixels=784 * 8)
    drawn = decode(content, config=config)
    bare = decode(content, config=VideoConfig(draw_timestamps=False, min_pixels=784, max_pixels=168 * 140))
    assert bare[0].grid == Grid(2, 8, 12)
    level = round(float(np.median(np.split(bare[1].patches, 2)[1])))
    image = Image.new("RGB", (160, 120), (level,) * 3)
    draw_timestamp(image, 3 / 4, FONT)
    expected = patchify(resize(image, 56, 84))
    difference = np.abs(np.split(drawn[1].patches, 2)[1].astype(int) - expected.astype(int))
    assert difference.max() <= 2


def test_tiny_frames_can_be_drawn_on() -> None:
    assert decode(video(2, size=(8, 8)), config=VideoConfig())


def rotated(content: bytes) -> bytes:
    """Sets the display matrix of the track header to a quarter turn."""
    at = content.index(b"tkhd") + 4 + 4 + 5 * 4 + 8 + 8
    one = 1 << 16
    matrix = [0, one, 0, -one, 0, 0, 0, 0, 1 << 30]
    data = b"".join(value.to_bytes(4, "big", signed=True) for value in matrix)
    return content[:at] + data + content[at + 36 :]


def test_rotation_of_the_container_is_applied() -> None:
    """Matrix (0 1, -1 0) means a clockwise turn when shown: the left edge ends up on top."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 112, 56, "yuv420p"
        pixels = np.zeros((56, 112, 3), np.uint8)
        pixels[:, :56] = 250
        container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    unit = decode(rotated(buffer.getvalue()), config=VideoConfig(draw_timestamps=False, min_pixels=784))[0]
    assert unit.grid == Grid(2, 8, 4)
    first = np.split(unit.patches, 2)[0]
    top, bottom = np.split(first, 2)
    assert top.mean() > 240
    assert bottom.mean() < 10


def test_check_stops_the_work() -> None:
    calls = 0

    def check() -> None:
        nonlocal calls
        calls += 1
        if calls > 5:
            raise RequestCancelled("gone")

    content = video(40)
    with pytest.raises(RequestCancelled):
        VideoDecoder(tiny_checkpoint(), PLAIN, ProcessingLimits()).units(content, video_part(content), FIELD, check)
    assert calls == 6


@pytest.mark.parametrize(
    ("size", "error", "said"),
    [((96, 64), MediaTooLarge, "limit of 3072 pixels"), ((640, 480), MediaUnreadable, "at most 3072 pixels a frame")],
)
def test_frames_that_outgrow_the_header(size: tuple[int, int], error: type[Exception], said: str) -> None:
    """The decoder itself refuses a frame far over the limit: it would have been in memory before we see its size."""
    codec = "mpeg2video"
    content = video(6, codec=codec, form=codec) + video(6, codec=codec, form=codec, size=size)
    assert decode(content)
    with pytest.raises(error, match=said):
        decode(content, max_video_pixels=64 * 48)
