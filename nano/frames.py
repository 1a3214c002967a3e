"""Pictures and frames as the model sees them: resized and cut up by the server's own code, padded to one shape."""

from __future__ import annotations

import dataclasses
import io
import math
import random
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from PIL import Image

from actors.processing.images import PixelBounds, resize, smart_resize
from actors.processing.patches import Pixels, patchify
from cluster.eval.world.clips import Clip
from cluster.eval.world.things import Scene

MIN_TOKENS, MAX_TOKENS = 12, 21
"""Tokens of a picture, or of a frame pair. With these bounds usual pictures become 4 x 4, 5 x 4, 6 x 3 ... tokens; very
long ones may get a few more."""
BOUNDS = PixelBounds(low=MIN_TOKENS * 784, high=MAX_TOKENS * 784 + 392)
"""The half token lets 4 : 3 pictures have 5 x 4."""

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Frame:
    """uint8 ``pixels`` of sides that are multiples of 28; its grid in tokens."""

    pixels: Pixels

    @property
    def grid(self) -> tuple[int, int]:
        return self.pixels.shape[0] // 28, self.pixels.shape[1] // 28


def frame(image: Image.Image) -> Frame:
    return Frame(resize(image, *smart_resize(image.height, image.width, BOUNDS)))


Drawn = TypeVar("Drawn", Scene, Clip)


def smaller(scene: Drawn, rng: random.Random) -> Drawn:
    """The same scene or clip in fewer pixels, for speed; now and then as it is."""
    shrink = 240 / math.sqrt(scene.width * scene.height)
    if shrink >= 1 or rng.random() < 0.1:
        return scene
    return dataclasses.replace(scene, width=round(scene.width * shrink), height=round(scene.height * shrink))


def spoil(image: Image.Image, rng: random.Random) -> Image.Image:
    """What files and codecs do to pictures, now and then."""
    if rng.random() < 0.25:
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=rng.randint(60, 95))
        return Image.open(buffer).convert("RGB")
    return image


def places(rows: int, columns: int) -> npt.NDArray[np.int32]:
    """Row and column of the patches of a grid of tokens, in the order of ``patchify``: int [4 * rows * columns, 2]."""
    r, c, dr, dc = np.meshgrid(np.arange(rows), np.arange(columns), np.arange(2), np.arange(2), indexing="ij")
    return np.stack((2 * r + dr, 2 * c + dc), axis=-1).reshape(-1, 2).astype(np.int32)


@dataclass(frozen=True, slots=True)
class FrameBatch:
    """Frames padded to the largest; ``pairs`` int [U, 2] are the frames of each unit (a picture comes twice)."""

    patches: Pixels
    places: npt.NDArray[np.int32]
    valid: npt.NDArray[np.bool_]
    pairs: Ints

    @property
    def arrays(self) -> tuple[npt.NDArray[Any], ...]:
        """What ``Nano.see`` takes, in its order."""
        return self.patches, self.places, self.valid, self.pairs

    @property
    def tokens(self) -> int:
        """Rows of each unit in the resampler's output, padding included."""
        return int(self.valid.shape[1]) // 4


def batch_frames(frames: list[Frame], pairs: list[tuple[int, int]]) -> FrameBatch:
    most = max((4 * item.grid[0] * item.grid[1] for item in frames), default=4)
    patches = np.zeros((len(frames), most, 588), dtype=np.uint8)
    where = np.zeros((len(frames), most, 2), dtype=np.int32)
    valid = np.zeros((len(frames), most), dtype=bool)
    for i, item in enumerate(frames):
        rows, columns = item.grid
        n = 4 * rows * columns
        patches[i, :n] = patchify(item.pixels)
        where[i, :n] = places(rows, columns)
        valid[i, :n] = True
    return FrameBatch(patches, where, valid, np.array(pairs, dtype=np.int64))
