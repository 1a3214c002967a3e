"""Where the bytes of pictures and videos come from."""

from __future__ import annotations

import base64
import os
from pathlib import Path
from urllib.parse import unquote_to_bytes

from ernie_serving.v1 import content_pb2

Media = str | os.PathLike[str] | bytes
"""A file's path, an http, https or data URI, or the encoded file itself."""


def media_source(media: Media) -> content_pb2.MediaSource:
    """The source of a picture or video. Files are read at once (OSError when they cannot be)."""
    if isinstance(media, bytes):
        return content_pb2.MediaSource(content=media)
    if isinstance(media, str) and media.startswith(("http://", "https://", "data:")):
        return content_pb2.MediaSource(uri=media)
    return content_pb2.MediaSource(content=Path(media).read_bytes())


def picture_bytes(source: content_pb2.MediaSource, where: str) -> bytes:
    """The encoded picture itself. Raises ValueError, naming ``where``, when its bytes are not in the source."""
    if source.WhichOneof("source") == "content":
        return source.content
    head, comma, body = source.uri.partition(",")
    if not head.startswith("data:") or not comma:
        raise ValueError(f"{where}: the picture is given by its URL, give the picture itself")
    if not head.lower().endswith(";base64"):
        return unquote_to_bytes(body)
    try:
        return base64.b64decode("".join(body.split()), validate=True)
    except ValueError as error:
        raise ValueError(f"{where}: the data URI is not valid base64") from error
