"""Patches of one resized picture or frame pair, and the key that names them.

A patch row is 3 x 14 x 14 bytes, channel first. Rows follow 2 x 2 merge blocks: block row, block column, row in block,
column in block. Values stay uint8: mean and standard deviation are applied on the encoder, in float.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from actors.processing.config import MERGE_SIZE, PATCH_SIZE, RESIZE_FACTOR
from actors.types import Grid, MediaKind

PATCH_BYTES = 3 * PATCH_SIZE * PATCH_SIZE

Pixels = npt.NDArray[np.uint8]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Unit:
    """One picture or one frame pair. ``patches`` is uint8 [grid.patches, 588]."""

    key: bytes
    kind: MediaKind
    grid: Grid
    patches: Pixels


def patchify(pixels: Pixels) -> Pixels:
    """uint8 [height, width, 3], sides multiples of 28 -> uint8 [patches, 588]."""
    height, width, channels = pixels.shape
    if channels != 3 or height % RESIZE_FACTOR or width % RESIZE_FACTOR:
        raise ValueError(f"expected [28n, 28m, 3] pixels, got {pixels.shape}")
    blocks = pixels.reshape(
        height // RESIZE_FACTOR, MERGE_SIZE, PATCH_SIZE, width // RESIZE_FACTOR, MERGE_SIZE, PATCH_SIZE, 3
    )
    return np.ascontiguousarray(blocks.transpose(0, 3, 1, 4, 6, 2, 5)).reshape(-1, PATCH_BYTES)


def make_unit(kind: MediaKind, frames: tuple[Pixels, ...]) -> Unit:
    """One resized picture, or the two resized frames of a pair, as a unit with its key."""
    height, width, _ = frames[0].shape
    grid = Grid(len(frames), height // PATCH_SIZE, width // PATCH_SIZE)
    patches = np.concatenate([patchify(frame) for frame in frames]) if len(frames) > 1 else patchify(frames[0])
    patches.flags.writeable = False
    return Unit(key=content_key(kind, grid, patches), kind=kind, grid=grid, patches=patches)


def content_key(kind: MediaKind, grid: Grid, patches: Pixels) -> bytes:
    """blake2b-256 over kind, unit grid and patch bytes: equal keys mean equal encoder input."""
    digest = hashlib.blake2b(digest_size=32)
    digest.update(f"{kind.value} {grid.frames} {grid.height} {grid.width}\n".encode())
    digest.update(np.ascontiguousarray(patches).data)
    return digest.digest()
