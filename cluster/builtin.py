"""Checkpoints asked for by name: nano, which comes with the package, and a random one that is made on first use."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tempfile
from pathlib import Path

import actors.checkpoint
import actors.processing
from actors.checkpoint import nano_directory, write_random_checkpoint
from cluster.config import NANO, RANDOM, ClusterConfig


def locate(config: ClusterConfig) -> ClusterConfig:
    """The description with the directory in place of a built-in model's name, which clients still ask for.

    On several nodes nano needs the package at the same path on each; the random checkpoint is on this machine only.

    Raises:
        ValueError: a revision is asked for, nano is not installed whole, or the random checkpoint cannot be written.
    """
    if config.model not in (NANO, RANDOM):
        return config
    if config.revision is not None:
        raise ValueError(f"revision: {config.model} is built in and has none")
    try:
        directory = nano_directory() if config.model == NANO else random_directory()
    except OSError as error:
        raise ValueError(f"model: {error}") from None
    return config.model_copy(update={"model": str(directory), "served_model_name": config.model_name})


def random_directory() -> Path:
    """A small random checkpoint, written on first use to the user's cache folder and used again afterwards.

    Its folder is named after the sources it is made by, so that a changed generator or template is seen.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ernie-serving" / _generator_digest()
    target = cache / "random-tiny"
    if not target.exists():
        cache.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix="random-tiny-", dir=cache))
        try:
            write_random_checkpoint(draft, preset="tiny", seed=0)
            draft.chmod(0o755)
            with contextlib.suppress(OSError):
                draft.rename(target)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
    return target


def _generator_digest() -> str:
    digest = hashlib.blake2b(digest_size=8)
    for package in (actors.checkpoint, actors.processing):
        for file in sorted(Path(package.__path__[0]).rglob("*")):
            if file.suffix in (".py", ".jinja", ".ttf"):
                digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()
