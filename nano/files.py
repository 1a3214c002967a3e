"""The documents and the tokenizer of the checkpoint."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

from actors.checkpoint.presets import Documents, build_documents
from nano.frames import BOUNDS

TOKENIZER = Path(__file__).parent / "tokenizer.json"
FONT_PATH = Path(__file__).parent.parent / "actors" / "processing" / "assets" / "Roboto-Regular.ttf"

OVERRIDES = {
    "text_config.vocab_size": 704,
    "text_config.hidden_size": 128,
    "text_config.intermediate_size": 384,
    "text_config.num_hidden_layers": 6,
    "text_config.num_attention_heads": 4,
    "text_config.num_key_value_heads": 2,
    "text_config.max_position_embeddings": 8192,
    "text_config.moe_num_experts": 8,
    "text_config.moe_k": 2,
    "text_config.moe_intermediate_size": [64, 32],
    "text_config.rope_parameters.rope_theta": 500.0,
    "text_config.rope_parameters.mrope_section": [4, 4, 8],
    "vision_config.depth": 4,
    "vision_config.hidden_size": 128,
    "vision_config.num_heads": 4,
    "vision_config.intermediate_size": 512,
    "preprocessor_config.size.shortest_edge": BOUNDS.low,
    "preprocessor_config.size.longest_edge": BOUNDS.high,
    "video_preprocessor_config.size.shortest_edge": BOUNDS.low,
    "video_preprocessor_config.size.longest_edge": BOUNDS.high,
    "video_preprocessor_config.min_frames": 4,
    "video_preprocessor_config.max_frames": 8,
}
"""What makes nano of the tiny preset. A base of 500 for rotary angles, and half of the frequencies for time, suit
prompts of a few hundred positions with up to four frame pairs."""


@functools.cache
def documents() -> Documents:
    """The configuration of the checkpoint; shared, so not to be changed."""
    return build_documents("tiny", OVERRIDES, dtype="bfloat16")


@functools.cache
def tokenizer_document() -> dict[str, Any]:
    """Contents of tokenizer.json. Kept in a file, as the weights hang on every id of it."""
    document: dict[str, Any] = json.loads(TOKENIZER.read_text(encoding="utf-8"))
    return document
