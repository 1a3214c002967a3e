from __future__ import annotations

import numpy as np
import pytest
import torch

from actors.wire.tensors import CHUNK_BYTES, Patches, TensorAssembler, TensorMismatch, chunks_of, header_of
from ernie_serving.internal.v1 import media_pb2


def travel(value: Patches | torch.Tensor) -> Patches | torch.Tensor:
    header = media_pb2.TensorHeader.FromString(header_of(value).SerializeToString())
    assembler = TensorAssembler(header, value.nbytes)
    for chunk in chunks_of(value):
        assert 0 < len(chunk) <= 1_000_000
        assembler.add(chunk)
    return assembler.finish()


@pytest.mark.parametrize("size", [0, 1, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1, 3_200_000])
def test_bytes_survive_at_chunk_boundaries(size: int) -> None:
    patches = np.random.default_rng(0).integers(0, 256, (size, 1), dtype=np.uint8)
    assert len(list(chunks_of(patches))) == -(-size // CHUNK_BYTES)
    received = travel(patches)
    assert isinstance(received, np.ndarray) and received.dtype == np.uint8
    np.testing.assert_array_equal(received, patches)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(7, 33), (0, 4), (), (400, 1000)])
def test_embeddings_survive_bit_for_bit(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    embedding = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    received = travel(embedding)
    assert isinstance(received, torch.Tensor) and received.dtype == dtype and received.shape == embedding.shape
    assert torch.equal(received, embedding)


@pytest.mark.parametrize("at", [0, 999_999, 1_000_000, 1_599_999])
def test_a_bit_of_an_embedding_that_flips_is_noticed(at: int) -> None:
    embedding = torch.randn(400, 1000, generator=torch.Generator().manual_seed(0))
    assembler = TensorAssembler(header_of(embedding), embedding.nbytes)
    content = bytearray(b"".join(chunks_of(embedding)))
    content[at] ^= 1 << at % 8
    assembler.add(bytes(content))
    with pytest.raises(TensorMismatch, match="other bytes"):
        assembler.finish()


def test_views_travel_in_row_major_order() -> None:
    patches = np.arange(12, dtype=np.uint8).reshape(3, 4).T
    np.testing.assert_array_equal(travel(patches), patches)
    embedding = torch.arange(12.0).reshape(3, 4).T
    assert torch.equal(torch.as_tensor(travel(embedding)), embedding)


def test_other_element_types_do_not_travel() -> None:
    with pytest.raises(ValueError, match="int16"):
        header_of(np.zeros(3, dtype=np.int16))
    with pytest.raises(ValueError, match="float16"):
        header_of(torch.zeros(3, dtype=torch.float16))


def test_what_was_not_announced_is_refused() -> None:
    header = media_pb2.TensorHeader(dtype="uint8", shape=[10])
    with pytest.raises(TensorMismatch, match="at most 9"):
        TensorAssembler(header, 9)
    with pytest.raises(TensorMismatch, match="int4"):
        TensorAssembler(media_pb2.TensorHeader(dtype="int4", shape=[1]), 9)
    assembler = TensorAssembler(header, 10)
    assembler.add(b"12345")
    with pytest.raises(TensorMismatch, match="5 of 10"):
        assembler.finish()
    with pytest.raises(TensorMismatch, match="more than"):
        assembler.add(b"123456")
