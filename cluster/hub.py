"""Checkpoints named as on a model hub: ``baidu/ERNIE-4.5-VL-28B-A3B-Thinking``.

What exists as a path here is a path. Else OWNER/NAME is a repository, whose files go to the cache of huggingface_hub
(``HF_HOME``, ``HF_ENDPOINT``, ``HF_TOKEN`` and its other settings apply): the small ones first, so that what cannot be
served is refused before its weights are fetched, then the weights that its index names, and nothing else.

A cluster of several nodes is given a *reference*, ``hub:OWNER/NAME@COMMIT``: every node keeps a cache of its own,
filled when the first of its workers starts, and all serve the same commit.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from actors.ernie.config import ErnieConfig
from actors.ernie.files import INDEX_FILE, SINGLE_FILE
from cluster.config import ClusterConfig

Say = Callable[[str], None]

SMALL_FILES = (
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.json",
    "chat_template.jinja",
    INDEX_FILE,
    "*.ttf",
)
"""All that a model directory is read for but the weights."""

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_REFERENCE = "hub:"
_PADDLE, _TORCH = "-Paddle", "-PT"


@dataclass(frozen=True, kw_only=True, slots=True)
class Snapshot:
    """The files of one commit in the cache."""

    name: str
    directory: Path
    commit: str | None
    """None in a directory of the caller's choice."""

    @property
    def reference(self) -> str:
        """What every node can resolve by itself."""
        return f"{_REFERENCE}{self.name}@{self.commit}"


def repository_name(model: str) -> str | None:
    """The repository that ``model`` names; None for a path: what exists here, or is not of the form OWNER/NAME."""
    if model.startswith("~") or Path(model).exists() or not _NAME.fullmatch(model):
        return None
    return model


def locate_checkpoint(config: ClusterConfig, say: Say) -> tuple[ClusterConfig, Snapshot | None]:
    """The description with an absolute directory in place of a path or a name, under which clients still ask for it.

    Raises:
        ValueError: one line, beginning with the field at fault.
    """
    name = repository_name(config.model)
    if name is None:
        if config.revision is not None:
            raise ValueError(f"revision: {config.model} is a directory; only a repository's name has revisions")
        # Absolute: workers run in other directories.
        return config.model_copy(update={"model": str(Path(config.model).expanduser().resolve())}), None
    try:
        found = download(name, config.revision, say=say)
    except ValueError as error:
        raise ValueError(f"model: {error}") from None
    served = config.served_model_name or name
    place = {"model": str(found.directory), "revision": None, "served_model_name": served}
    return config.model_copy(update=place), found


def local_directory(model: str) -> str:
    """The directory on this node of a model that is given by path or by reference.

    Raises:
        ValueError: it is not here and cannot be fetched.
    """
    if not model.startswith(_REFERENCE):
        return model
    name, _, commit = model.removeprefix(_REFERENCE).rpartition("@")
    return str(download(name, commit, say=lambda line: None).directory)


def download(name: str, revision: str | None, *, say: Say, to: Path | None = None) -> Snapshot:
    """Brings a checkpoint into the cache, or into ``to``; what is there already is not fetched again.

    Raises:
        ValueError: one line: no such repository or revision, gated, unreachable, or not a model that can be served.
    """
    if name.endswith(_PADDLE):
        torch = name.removesuffix(_PADDLE) + _TORCH
        say(f"{name} holds weights in Paddle's format; the same model in PyTorch's is taken, {torch}")
        name = torch
    found = _fetch(name, revision, SMALL_FILES, to)
    _check_kind(name, found)
    weights = _weight_files(found)
    commit = found.name if to is None else None
    say(f"{name}: {len(weights)} files of weights, to {found}")
    found = _fetch(name, commit or revision, (*SMALL_FILES, *weights), to)
    missing = [file for file in weights if not (found / file).is_file()]
    if missing:
        raise ValueError(f"{name} has no {missing[0]}")
    return Snapshot(name=name, directory=found, commit=commit)


def _check_kind(name: str, directory: Path) -> None:
    if not (directory / "config.json").is_file():
        raise ValueError(f"{name} has no config.json")
    try:
        ErnieConfig.from_dir(directory)
    except ValueError as error:
        raise ValueError(f"{name} cannot be served: {error}") from None


def _weight_files(directory: Path) -> list[str]:
    index = directory / INDEX_FILE
    if not index.is_file():
        return [SINGLE_FILE]
    try:
        shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} is not an index of shards: {error!r}") from None
    return sorted(shard for shard in shards if isinstance(shard, str))


def _fetch(name: str, revision: str | None, files: tuple[str, ...], to: Path | None) -> Path:
    from huggingface_hub import constants, errors, snapshot_download

    def fail(why: str) -> NoReturn:
        raise ValueError(f"{name} is no directory here, and {why}") from None

    hub = os.environ.get("HF_ENDPOINT", "").rstrip("/") or constants.ENDPOINT
    patterns = list(files)
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns, local_dir=to, endpoint=hub))
    except errors.GatedRepoError:
        fail(f"on {hub} it is gated: accept its terms at {hub}/{name} and set HF_TOKEN (or run hf auth login)")
    except errors.RepositoryNotFoundError:
        fail(f"{hub} has no such model (a private one needs HF_TOKEN)")
    except errors.RevisionNotFoundError:
        fail(f"the model on {hub} has no revision {revision!r}")
    except (errors.LocalEntryNotFoundError, errors.IncompleteSnapshotError):
        if constants.HF_HUB_OFFLINE:
            fail(f"its files are not all in {constants.HF_HUB_CACHE}; HF_HUB_OFFLINE forbids to ask {hub}")
        fail(f"{hub} cannot be reached; its files are not all in {constants.HF_HUB_CACHE}")
    except errors.HfHubHTTPError as error:
        fail(f"{hub} refused: {_line(error)}")
    except Exception as error:
        # Errors of its HTTP client (a proxy that refuses, a connection that breaks) come through as they are.
        fail(f"it could not be fetched from {hub}: {_line(error)}")


def _line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
