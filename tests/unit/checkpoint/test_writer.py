from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import ImageFont
from safetensors.torch import load_file

from actors.checkpoint import parse_overrides, write_random_checkpoint
from actors.checkpoint.presets import mrope_section
from actors.ernie.config import ErnieConfig
from actors.ernie.weights import Checkpoint
from tests.tiny_model import tiny_checkpoint


def test_a_directory_is_complete() -> None:
    directory = tiny_checkpoint()
    assert {path.name for path in directory.iterdir()} == {
        "Roboto-Regular.ttf",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "preprocessor_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "video_preprocessor_config.json",
    }
    ImageFont.truetype(str(directory / "Roboto-Regular.ttf"), 10)
    config = ErnieConfig.from_dir(directory)
    tokenizer = json.loads((directory / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    assert config.image_token_id == vocab["<|IMAGE_PLACEHOLDER|>"]
    assert config.eos_token_ids == (2, vocab["<|end_of_sentence|>"])


def test_the_same_seed_writes_the_same_bytes(tmp_path: Path) -> None:
    write_random_checkpoint(tmp_path / "again")
    for path in tiny_checkpoint().iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes(), path.name
    other = load_file(tiny_checkpoint(seed=1) / "model.safetensors")
    for name, tensor in load_file(tiny_checkpoint() / "model.safetensors").items():
        assert not torch.equal(tensor, other[name]), name


def test_bfloat16_rounds_all_but_routers() -> None:
    rounded = load_file(tiny_checkpoint(dtype="bfloat16") / "model.safetensors")
    for name, tensor in load_file(tiny_checkpoint() / "model.safetensors").items():
        expected = tensor if "moe.gate." in name else tensor.to(torch.bfloat16)
        assert rounded[name].dtype == expected.dtype and torch.equal(rounded[name], expected), name


def test_weights_are_not_trivial() -> None:
    for name, tensor in load_file(tiny_checkpoint() / "model.safetensors").items():
        assert tensor.std() > 0, name
        if tensor.ndim == 1 and name.endswith("weight"):
            assert abs(tensor.mean() - 1) < 0.1 and 0.03 < tensor.std() < 0.3, name


@pytest.mark.parametrize("naming", ["hf", "baidu"])
def test_28b_is_described_without_being_written(tmp_path: Path, naming: Any) -> None:
    summary = write_random_checkpoint(tmp_path / "big", "28b", dtype="bfloat16", naming=naming)
    assert summary.directory is None and not (tmp_path / "big").exists()
    assert summary.parameters == 29_399_294_336 == sum(t.numel() for t in summary.tensors.values())
    assert len(summary.tensors) == {"hf": 872, "baidu": 11_105}[naming]
    assert {t.device.type for t in summary.tensors.values()} == {"meta"}
    assert round(summary.nbytes / 1e9, 2) == 58.82


def test_mid_has_the_sizes_asked_for(tmp_path: Path) -> None:
    summary = write_random_checkpoint(tmp_path / "mid", "mid", write=False)
    config = ErnieConfig.from_dict(summary.config)
    text, vision = config.text, config.vision
    assert (text.hidden_size, text.num_hidden_layers, text.vocab_size) == (1280, 6, 16384)
    assert (text.num_attention_heads, text.num_key_value_heads, text.head_dim) == (10, 2, 128)
    assert (text.moe_num_experts, text.moe_intermediate_size, text.moe_k) == (64, (768, 256), 6)
    assert (text.moe_num_shared_experts, text.mlp_layer_types[0], text.mrope_section) == (2, "dense", (22, 22, 20))
    assert (vision.depth, vision.hidden_size, vision.head_dim) == (8, 640, 80)


def test_overrides_change_what_they_name(tmp_path: Path) -> None:
    overrides = parse_overrides(
        [
            "text_config.hidden_size=192",
            "text_config.num_hidden_layers=3",
            'text_config.mlp_layer_types=["sparse", "dense", "sparse"]',
            "text_config.rope_parameters.rope_theta=10000",
            "preprocessor_config.size.longest_edge=12544",
            "generation_config.eos_token_id=2",
        ]
    )
    write_random_checkpoint(tmp_path / "m", overrides=overrides)
    config = ErnieConfig.from_dir(tmp_path / "m")
    assert (config.text.hidden_size, config.text.head_dim, config.text.rope_theta) == (192, 48, 10000.0)
    assert config.text.mlp_layer_types == ("sparse", "dense", "sparse")
    assert sum(config.text.mrope_section) == 24 and config.eos_token_ids == (2,)
    assert json.loads((tmp_path / "m/preprocessor_config.json").read_text())["size"]["longest_edge"] == 12544
    Checkpoint(tmp_path / "m").close()


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("text_config.hiden_size", 1, "unknown override 'text_config.hiden_size'"),
        ("hidden_size", 1, "unknown override 'hidden_size'"),
        ("text_config", {}, "unknown override 'text_config'"),
        ("text_config.hidden_size.x", 1, "unknown override"),
        ("image_token_id", 5, "image_token_id cannot be set"),
        ("text_config.hidden_size", "wide", "text_config.hidden_size = 'wide' is not a int"),
        ("text_config.hidden_size", 97, "num_attention_heads = 4"),
        ("text_config.moe_k", 9, "moe_k = 9"),
        ("text_config.use_bias", 1, "use_bias = 1"),
        ("text_config.vocab_size", 100, "vocab_size = 100"),
        ("vision_config.num_heads", 3, "num_heads = 3"),
        ("generation_config.eos_token_id", 1023, "1023"),
    ],
)
def test_wrong_overrides_are_refused(tmp_path: Path, key: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        write_random_checkpoint(tmp_path / "m", overrides={key: value})
    assert not (tmp_path / "m").exists()


def test_parse_overrides() -> None:
    parsed = parse_overrides(["a.b=1", "c=true", "d=[1, 2]", "e=text", "f=x=y"])
    assert parsed == {"a.b": 1, "c": True, "d": [1, 2], "e": "text", "f": "x=y"}
    with pytest.raises(ValueError, match="'a' is not of the form KEY=VALUE"):
        parse_overrides(["a"])
    with pytest.raises(ValueError, match="a is given twice"):
        parse_overrides(["a=1", "a=2"])


@pytest.mark.parametrize("wrong", [{"preset": "huge"}, {"dtype": "float16"}, {"naming": "paddle"}, {"style": "chat"}])
def test_wrong_arguments_are_refused(tmp_path: Path, wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong.values()))):
        write_random_checkpoint(tmp_path / "m", **wrong)


def test_a_filled_directory_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(FileExistsError, match="is not empty"):
        write_random_checkpoint(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_styles_write_their_templates() -> None:
    pt = (tiny_checkpoint() / "chat_template.jinja").read_text()
    thinking = (tiny_checkpoint(style="thinking") / "chat_template.jinja").read_text()
    assert "-PT" in pt and "-Thinking" in thinking


@pytest.mark.parametrize("head_dim", [8, 16, 24, 48, 64, 128])
def test_rotary_sections_fill_the_head(head_dim: int) -> None:
    h, w, t = mrope_section(head_dim)
    assert h == w and h + w + t == head_dim // 2 and t > 0
    assert mrope_section(128) == [22, 22, 20]


def test_shards_keep_to_their_size_unless_one_tensor_is_larger() -> None:
    limit = 300_000
    shards = list(tiny_checkpoint(shard_bytes=limit).glob("model-*.safetensors"))
    assert len(shards) > 3
    for shard in shards:
        sizes = [tensor.nbytes for tensor in load_file(shard).values()]
        assert sum(sizes) <= limit or len(sizes) == 1
