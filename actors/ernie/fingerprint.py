"""Weights fingerprints: two places that hold equal weights of the same files have equal fingerprints.

blake2b-256 over every tensor of a class in the order of stored names: name, dtype, shape, first and last 4 KiB of data.
It is over the files as they are: the same weights under other names or in another dtype have another fingerprint; how
they are cut into shards makes no difference. Only the sampled bytes are read, never whole tensors, so a place can name
the weights of a class it does not load.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO, Literal

from actors.ernie.files import StoredTensor
from actors.ernie.names import Group

WeightsClass = Literal["language", "vision"]
"""Language includes the vision experts: they are part of what makes a KV block."""

SAMPLE_BYTES = 4096


def weights_class(group: Group) -> WeightsClass:
    """The class a group of tensors counts to."""
    return "vision" if group == "vision" else "language"


def fingerprint(tensors: Iterable[StoredTensor]) -> bytes:
    """32 bytes naming these tensors. Raises OSError if a file cannot be read."""
    digest = hashlib.blake2b(digest_size=32)
    with ExitStack() as stack:
        files: dict[Path, BinaryIO] = {}
        for tensor in sorted(tensors, key=lambda t: t.name):
            if tensor.path not in files:
                files[tensor.path] = stack.enter_context(tensor.path.open("rb"))
            _update(digest, tensor, files[tensor.path])
    return digest.digest()


def _update(digest: hashlib.blake2b, tensor: StoredTensor, file: BinaryIO) -> None:
    for text in (tensor.name, tensor.dtype):
        encoded = text.encode()
        digest.update(struct.pack("<I", len(encoded)) + encoded)
    digest.update(struct.pack(f"<I{len(tensor.shape)}Q", len(tensor.shape), *tensor.shape))
    size = min(SAMPLE_BYTES, tensor.nbytes)
    for start in (tensor.offset, tensor.offset + tensor.nbytes - size):
        file.seek(start)
        digest.update(file.read(size))
