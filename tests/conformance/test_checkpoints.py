"""Checkpoints and transformers: it loads ours in both namings, we load what it writes, and both see the same values."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, Ernie4_5_VLMoeForConditionalGeneration, PreTrainedTokenizerFast
from transformers.models.ernie4_5_vl_moe.image_processing_pil_ernie4_5_vl_moe import Ernie4_5_VLMoeImageProcessorPil

from actors.checkpoint import write_random_checkpoint
from actors.ernie.bank import empty_bank_buffer
from actors.ernie.config import ErnieConfig
from actors.ernie.names import LM_HEAD, tensor_shapes
from actors.ernie.weights import Checkpoint, load_language, load_vision
from tests.tiny_model import tiny_checkpoint

NAMINGS = ["hf", "baidu"]
SHAPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "all sparse, no shared, one key head": {
        "text_config.mlp_layer_types": ["sparse"] * 4,
        "text_config.moe_num_shared_experts": 0,
        "text_config.num_key_value_heads": 1,
    },
    "dense between, wide vision bank, own head width": {
        "text_config.mlp_layer_types": ["sparse", "dense", "sparse", "dense"],
        "text_config.moe_intermediate_size": [16, 40],
        "text_config.moe_num_experts": 5,
        "text_config.head_dim": 32,
        "vision_config.depth": 1,
    },
    "biases, untied head, one layer": {
        "text_config.num_hidden_layers": 2,
        "text_config.use_bias": True,
        "text_config.num_key_value_heads": 4,
        "tie_word_embeddings": False,
    },
}


def peer(directory: Path, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
    """transformers' model of a directory and what its loader complained about."""
    model, info = Ernie4_5_VLMoeForConditionalGeneration.from_pretrained(directory, output_loading_info=True, **kwargs)
    return model, {key: value for key, value in info.items() if value}


def fresh_peer(directory: Path) -> Any:
    """The same model built in memory: one that was loaded remembers the naming it came from and saves in that."""
    model, _ = peer(directory)
    fresh = Ernie4_5_VLMoeForConditionalGeneration(model.config)
    fresh.load_state_dict(model.state_dict())
    return fresh


def our_tensors(directory: Path, dtype: torch.dtype) -> dict[str, Tensor]:
    """Everything our models hold after loading, by canonical name."""
    with Checkpoint(directory) as checkpoint:
        storage = empty_bank_buffer(checkpoint.config.text, dtype)
        language = load_language(checkpoint, checkpoint.config, dtype=dtype, bank_storage=storage)
        vision = load_vision(checkpoint, checkpoint.config, dtype=dtype)
    assert language.vision_bank is not None
    views = language.parameters_by_name() | vision.parameters_by_name()
    return views | language.vision_bank.parameters_by_name()


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    missing = theirs.keys() ^ ours.keys()
    assert missing <= {LM_HEAD}, missing
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype and torch.equal(tensor, theirs[name]), name


@pytest.mark.parametrize("naming", NAMINGS)
@pytest.mark.parametrize("shape", SHAPES)
def test_transformers_loads_ours_whole_and_both_hold_the_same(naming: str, shape: str) -> None:
    directory = tiny_checkpoint(naming=naming, overrides=SHAPES[shape], seed=3)
    model, complaints = peer(directory)
    assert not complaints
    assert_same(our_tensors(directory, torch.float32), model.state_dict())


@pytest.mark.parametrize("naming", NAMINGS)
def test_bfloat16_keeps_routers_in_float32_on_both_sides(naming: str) -> None:
    directory = tiny_checkpoint(naming=naming, dtype="bfloat16")
    model, complaints = peer(directory, dtype=torch.bfloat16)
    assert not complaints
    assert_same(our_tensors(directory, torch.bfloat16), model.state_dict())


def test_transformers_loads_our_shards() -> None:
    model, complaints = peer(tiny_checkpoint(shard_bytes=300_000))
    assert not complaints
    assert_same(our_tensors(tiny_checkpoint(), torch.float32), model.state_dict())


@pytest.mark.parametrize("original", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("shard_size", ["5GB", "400KB"])
def test_we_load_what_transformers_saves(tmp_path: Path, original: bool, shape: str, shard_size: str) -> None:
    model = fresh_peer(tiny_checkpoint(overrides=SHAPES[shape], seed=4))
    model.save_pretrained(tmp_path, save_original_format=original, max_shard_size=shard_size)
    assert (tmp_path / "model.safetensors.index.json").exists() == (shard_size != "5GB")
    with Checkpoint(tmp_path) as checkpoint:
        assert checkpoint.naming == ("baidu" if original else "hf")
    assert_same(our_tensors(tmp_path, torch.float32), model.state_dict())


def test_inventory_is_that_of_the_28b_model(tmp_path: Path) -> None:
    summary = write_random_checkpoint(tmp_path / "none", "28b", dtype="bfloat16")
    config = AutoConfig.for_model(**summary.config)
    with torch.device("meta"):
        model = Ernie4_5_VLMoeForConditionalGeneration(config)
    theirs = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name != LM_HEAD}
    ours = {name: spec.shape for name, spec in tensor_shapes(ErnieConfig.from_dict(summary.config)).items()}
    assert ours == theirs


@pytest.mark.parametrize("shape", SHAPES)
def test_config_survives_transformers(tmp_path: Path, shape: str) -> None:
    directory = tiny_checkpoint(overrides=SHAPES[shape], seed=3)
    AutoConfig.from_pretrained(directory).save_pretrained(tmp_path)
    shutil.copy(directory / "generation_config.json", tmp_path)
    assert ErnieConfig.from_dir(tmp_path) == ErnieConfig.from_dir(directory)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda t: t.pop("model.norm.weight"), r"missing \(1\): model\.norm\.weight"),
        (lambda t: t.update({"model.layers.9.x": torch.zeros(2)}), r"unexpected \(1\): model\.layers\.9\.x"),
        (
            lambda t: t.update({"model.layers.1.mlp.gate.weight": torch.zeros(8, 96)}),
            r"misshaped \(1\): model\.layers\.1\.mlp\.gate\.weight \[8, 96\] instead of \[96, 8\]",
        ),
    ],
)
def test_spoiled_tensors_are_refused_by_name(
    tmp_path: Path, spoil: Callable[[dict[str, Tensor]], object], message: str
) -> None:
    fresh_peer(tiny_checkpoint()).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    spoil(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=message):
        Checkpoint(tmp_path)


def test_an_end_token_among_media_tokens_is_refused(tmp_path: Path) -> None:
    model, _ = peer(tiny_checkpoint())
    model.generation_config.eos_token_id = [2, model.config.image_token_id]
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"eos_token_id\[1\] = 1007: not in 0\.\.1006"):
        Checkpoint(tmp_path)


def test_transformers_reads_the_tokenizer() -> None:
    directory = tiny_checkpoint()
    auto = AutoTokenizer.from_pretrained(directory)
    bare = PreTrainedTokenizerFast(tokenizer_file=str(directory / "tokenizer.json"))
    text = (
        "<|begin_of_sentence|>User: Picture 1:<|IMAGE_START|><|IMAGE_PLACEHOLDER|><|IMAGE_END|> caf\u00e9 2024\n<think>"
    )
    assert auto(text).input_ids == bare(text).input_ids
    assert auto.decode(auto(text).input_ids) == text
    config = AutoConfig.from_pretrained(directory)
    assert (auto.image_token_id, auto.image_start_token_id) == (config.image_token_id, config.image_start_token_id)
    assert (auto.video_token_id, auto.video_end_token_id) == (config.video_token_id, config.video_end_token_id)
    assert (auto.bos_token_id, auto.eos_token_id, auto.pad_token_id) == (1, 2, 0)
    assert auto.sep_token == "<|end_of_sentence|>"
    messages = [{"role": "user", "content": "Hello"}]
    prompt = auto.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert prompt == "<|begin_of_sentence|>User: Hello\nAssistant: <think>\n\n</think>\n\n"


def test_transformers_reads_the_image_processor() -> None:
    processor = Ernie4_5_VLMoeImageProcessorPil.from_pretrained(tiny_checkpoint())
    assert dict(processor.size) == {"shortest_edge": 4 * 784, "longest_edge": 64 * 784}
    default = Ernie4_5_VLMoeImageProcessorPil()
    for key in ("image_mean", "image_std", "rescale_factor", "patch_size", "merge_size", "resample"):
        ours, theirs = getattr(processor, key), getattr(default, key)
        assert tuple(ours) == tuple(theirs) if isinstance(ours, list) else ours == theirs, key


@torch.no_grad()
def test_random_models_write_varied_text_with_logits_of_order_one() -> None:
    model, _ = peer(tiny_checkpoint())
    tokenizer = AutoTokenizer.from_pretrained(tiny_checkpoint())
    ids = tokenizer("User: What is shown in this picture?\nAssistant: ", return_tensors="pt").input_ids
    mask = torch.ones_like(ids)
    logits = model(input_ids=ids, attention_mask=mask).logits
    assert 0.5 < logits.std() < 2.0
    media = list(range(model.config.image_token_id, model.config.text_config.vocab_size))
    model.generation_config.eos_token_id = None
    out = model.generate(ids, attention_mask=mask, max_new_tokens=40, do_sample=False, suppress_tokens=media)
    assert len(set(out[0, ids.shape[1] :].tolist())) > 20
