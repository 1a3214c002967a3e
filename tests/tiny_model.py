"""Tiny checkpoints on disk, written once per argument set and test session."""

from __future__ import annotations

import atexit
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from actors.checkpoint import write_random_checkpoint

_written: dict[str, Path] = {}


def tiny_checkpoint(**kwargs: Any) -> Path:
    """Directory of a random checkpoint; ``kwargs`` as of ``write_random_checkpoint`` (preset "tiny" unless given).

    Shared by all tests of the session: copy it before changing anything in it.
    """
    key = json.dumps(kwargs, sort_keys=True)
    if key not in _written:
        directory = Path(tempfile.mkdtemp(prefix="ernie-tiny-"))
        atexit.register(shutil.rmtree, directory, ignore_errors=True)
        write_random_checkpoint(directory, **kwargs)
        _written[key] = directory
    return _written[key]
