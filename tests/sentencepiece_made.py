"""SentencePiece models trained on a small varied corpus, and tiny checkpoints in the files of original repositories."""

from __future__ import annotations

import functools
import io
import json
import shutil
from pathlib import Path
from typing import Any

import sentencepiece

from actors.checkpoint.corpus import TEXT
from actors.checkpoint.tokens import GENERATED, MASKS, token_layout
from tests.tiny_model import tiny_checkpoint

LINES = (
    *TEXT.splitlines(),
    *["今天天气很好。我们去公园散步。图片里有一只红色的猫和两只狗。请描述这张图片的内容。视频开始时街道是空的。"] * 5,
    *["😀 😃 👩‍👩‍👧 🇩🇪 ❤️ ☕ naïve café Ünïcödé ﬁ \uff11\uff12\uff13 ① ㌔ ｶﾞ"] * 3,
    *["def f(x):", "    if x > 10:", "        return x  *  2", "\treturn [1, 2, 345]", ""] * 8,
    *[" " * width + "xxx" for width in range(1, 12)] * 4,
)
"""English, Chinese, emoji, compatibility characters, code, runs of spaces."""

ERNIE_LIKE: dict[str, Any] = {
    "model_type": "bpe",
    "byte_fallback": True,
    "add_dummy_prefix": False,
    "remove_extra_whitespaces": False,
    "normalization_rule_name": "identity",
    "allow_whitespace_only_pieces": True,
}
"""How the published model cuts text: bytes for what has no piece, spaces as they are, nothing rewritten."""


@functools.cache
def _trained(options: str) -> bytes:
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(LINES), model_writer=written, minloglevel=2, num_threads=1, **json.loads(options)
    )
    return written.getvalue()


def train(**options: Any) -> bytes:
    """Contents of a tokenizer.model; ``options`` as of the sentencepiece trainer."""
    return _trained(json.dumps(options, sort_keys=True))


def original_tokenizer(directory: Path, vocab_size: int) -> None:
    """Writes tokenizer.model and the JSON files that add the media tokens, as in Baidu's repositories."""
    layout = token_layout(vocab_size)
    model = train(
        **ERNIE_LIKE,
        vocab_size=layout.im_patch_id,
        control_symbols=["<|end_of_sentence|>", "<|begin_of_sentence|>"],
        user_defined_symbols=[*MASKS, *GENERATED, *"0123456789"],
    )
    (directory / "tokenizer.model").write_bytes(model)
    media = {text: token for text, token in layout.special.items() if token >= layout.im_patch_id}
    special = {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "cls_token": "<|begin_of_sentence|>",
        "sep_token": "<|end_of_sentence|>",
        "pad_token": "<unk>",
        "unk_token": "<unk>",
        "mask_token": "<mask:1>",
        "additional_special_tokens": [text for text in media if "VIDEO_PLACEHOLDER" not in text],
    }
    (directory / "added_tokens.json").write_text(json.dumps(media))
    (directory / "special_tokens_map.json").write_text(json.dumps(special))
    (directory / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "Ernie4_5_VLTokenizer"}))
    (directory / "tokenizer.json").unlink(missing_ok=True)


def original_checkpoint(directory: Path, **options: Any) -> Path:
    """A tiny checkpoint as Baidu publishes it: its tensor names, flat config.json and SentencePiece model."""
    shutil.copytree(tiny_checkpoint(naming="baidu", **options), directory)
    original_tokenizer(directory, 1024)
    converted = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(flat_config(converted)))
    (directory / "generation_config.json").write_text('{"bos_token_id": 1, "eos_token_id": 2, "top_p": 0.8}')
    return directory


def flat_config(converted: dict[str, Any]) -> dict[str, Any]:
    """The original's config.json of a converted one."""
    text, vision = converted["text_config"], converted["vision_config"]
    rope, layers, experts = text["rope_parameters"], text["num_hidden_layers"], text["moe_num_experts"]
    same = (
        "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads "
        "max_position_embeddings rms_norm_eps moe_intermediate_size moe_k moe_num_shared_experts use_bias"
    )
    return {
        "architectures": ["Ernie4_5_VLMoeForConditionalGeneration"],
        "model_type": "ernie4_5_moe_vl",
        "torch_dtype": converted["dtype"],
        **{key: text[key] for key in same.split()},
        "rope_theta": rope["rope_theta"],
        "rope_3d": True,
        "freq_allocation": rope["mrope_section"][2],
        "rope_scaling": {"type": "default", "mrope_section": rope["mrope_section"]},
        "moe_num_experts": [experts, experts],
        "moe_layer_start_index": [1, 1],
        "moe_layer_end_index": [layers + 1, layers],
        "moe_layer_interval": 1,
        "moe_use_aux_free": True,
        "tie_word_embeddings": True,
        "spatial_conv_size": 2,
        "temporal_conv_size": 2,
        "im_patch_id": converted["image_token_id"],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "vision_config": {
            "depth": vision["depth"],
            "embed_dim": vision["hidden_size"],
            "hidden_size": vision["hidden_size"],
            "hidden_act": "quick_gelu",
            "mlp_ratio": vision["intermediate_size"] / vision["hidden_size"],
            "num_heads": vision["num_heads"],
            "patch_size": 14,
            "in_channels": 3,
            "spatial_merge_size": 2,
        },
    }
