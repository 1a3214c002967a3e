"""Checks a model directory by its headers before anything starts.

A broken checkpoint would else be found by every worker apart, and Serve would start each of them again and again.
"""

from __future__ import annotations

from pathlib import Path

from actors.ernie.weights import Checkpoint
from actors.processing.processor import Processor
from cluster.config import ClusterConfig
from cluster.router.sampling import SamplingDefaults


def check_model(config: ClusterConfig) -> None:
    """Reads all that workers read of ``config.model`` except the weights themselves.

    Raises:
        ValueError: begins with the field at fault and names what is wrong in the directory.
    """
    directory = Path(config.model)
    if not (directory / "config.json").is_file():
        raise ValueError(f"model: {directory} is not a checkpoint directory: it has no config.json")
    try:
        with Checkpoint(directory) as checkpoint:
            longest = checkpoint.config.text.max_position_embeddings
        Processor(directory, config.preprocessor.limits, media=config.preprocessor.media).close()
        SamplingDefaults.from_dir(directory)
    except (ValueError, OSError) as error:
        raise ValueError(f"model: {error}") from None
    if config.max_model_len is not None and config.max_model_len > longest:
        raise ValueError(f"max_model_len: {config.max_model_len} is over the {longest} of {directory}")
