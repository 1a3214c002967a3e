"""Checkpoints of the real format: writes random ones, and holds nano, a small trained one."""

from __future__ import annotations

from pathlib import Path

from actors.checkpoint.presets import PRESETS, parse_overrides
from actors.checkpoint.writer import CheckpointSummary, write_random_checkpoint

__all__ = ["PRESETS", "CheckpointSummary", "nano_directory", "parse_overrides", "write_random_checkpoint"]

NANO_FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "Roboto-Regular.ttf",
)


def nano_directory() -> Path:
    """The directory of nano, a trained checkpoint that comes with this package.

    Raises:
        FileNotFoundError: files of it are missing, so the installation is not whole.
    """
    directory = Path(__file__).resolve().parent / "nano"
    if missing := [name for name in NANO_FILES if not (directory / name).is_file()]:
        raise FileNotFoundError(f"nano is not installed whole: {directory} lacks {', '.join(missing)}")
    return directory
