from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from actors.ernie.files import stored_tensors
from actors.ernie.fingerprint import SAMPLE_BYTES, fingerprint
from actors.ernie.weights import Checkpoint
from tests.tiny_model import tiny_checkpoint


def prints(directory: Path) -> tuple[bytes, bytes]:
    with Checkpoint(directory) as checkpoint:
        return checkpoint.fingerprint("language"), checkpoint.fingerprint("vision")


def flip(directory: Path, name: str, byte: int) -> None:
    """Invert one byte of a tensor's data; negative counts from its end."""
    tensor = stored_tensors(directory)[name]
    with tensor.path.open("r+b") as file:
        file.seek(tensor.offset + byte % tensor.nbytes)
        old = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([old ^ 255]))


def test_equal_for_equal_files_and_for_any_sharding() -> None:
    language, vision = prints(tiny_checkpoint())
    assert len(language) == len(vision) == 32 and language != vision
    assert prints(tiny_checkpoint(shard_bytes=300_000)) == (language, vision)


@pytest.mark.parametrize("kwargs", [{"seed": 1}, {"dtype": "bfloat16"}, {"naming": "baidu"}])
def test_another_seed_dtype_or_naming_is_another_fingerprint(kwargs: dict[str, object]) -> None:
    base, other = prints(tiny_checkpoint()), prints(tiny_checkpoint(**kwargs))
    assert base[0] != other[0] and base[1] != other[1]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("model.language_model.embed_tokens.weight", 0),
        ("model.language_model.layers.1.mlp.vision_moe.experts.down_proj", 0),
        ("model.vision_tower.blocks.1.attn.qkv.weight", 1),
    ],
)
def test_a_changed_byte_at_either_end_of_a_tensor_shows_in_its_class_only(tmp_path: Path, name: str, kind: int) -> None:
    base = prints(tiny_checkpoint())
    for byte in (0, SAMPLE_BYTES - 1, -1, -SAMPLE_BYTES):
        directory = Path(shutil.copytree(tiny_checkpoint(), tmp_path / str(byte)))
        flip(directory, name, byte)
        changed = prints(directory)
        assert changed[kind] != base[kind] and changed[1 - kind] == base[1 - kind]


def test_only_the_ends_are_sampled(tmp_path: Path) -> None:
    directory = Path(shutil.copytree(tiny_checkpoint(), tmp_path / "copy"))
    flip(directory, "model.language_model.embed_tokens.weight", SAMPLE_BYTES)
    assert prints(directory) == prints(tiny_checkpoint())


def test_order_of_tensors_does_not_matter() -> None:
    tensors = list(stored_tensors(tiny_checkpoint()).values())
    assert fingerprint(tensors) == fingerprint(reversed(tensors))


def test_the_same_bytes_in_another_dtype_are_other_weights() -> None:
    tensor = next(iter(stored_tensors(tiny_checkpoint()).values()))
    assert fingerprint([tensor]) != fingerprint([replace(tensor, dtype="other")])
