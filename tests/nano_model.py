"""The trained model that comes with the package, and questions it was not trained on."""

from __future__ import annotations

from pathlib import Path

from actors.checkpoint import nano_directory
from actors.types import ContentPart, ImagePart, MediaSource, TextPart, VideoPart
from cluster.eval.tasks import Sample

SEED = 4242
"""Of the samples tests take."""


def nano_checkpoint() -> Path:
    """Its directory. Raises FileNotFoundError when it is not there: a test without it says nothing."""
    return nano_directory()


def parts_of(sample: Sample) -> tuple[ContentPart, ...]:
    """A sample as the parts of a user's message."""
    media: list[ContentPart] = [ImagePart(source=MediaSource(content=image)) for image in sample.images]
    media += [VideoPart(source=MediaSource(content=video)) for video in sample.videos]
    text = TextPart(text=sample.text)
    return (text, *media) if sample.question_first else (*media, text)
