"""Finds a model directory's tokenizer and reads it once per process.

``tokenizer.json`` wins; else ``tokenizer.model`` is converted, with the tokens that the JSON files beside it add, as
the slow tokenizers of transformers read them: ``tokenizer_config.json`` (``added_tokens_decoder``), else
``added_tokens.json``; special are those that ``tokenizer_config.json`` or ``special_tokens_map.json`` name so.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from actors.model_files import BAIDU_MODEL_TYPE, MEDIA_TOKENS, read_json
from actors.tokenization.conversion import AddedToken, convert
from actors.tokenization.runs import RunEncoder
from actors.tokenization.sentencepiece_model import SentencePieceModel, read_model

TOKENIZER_JSON = "tokenizer.json"
TOKENIZER_MODEL = "tokenizer.model"
ADDED_FILES = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")

Kind = Literal["tokenizer.json", "SentencePiece BPE", "SentencePiece unigram"]


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenizerSource:
    """A tokenizer in the form that ``tokenizers`` reads."""

    path: Path
    """The file it is from, for messages."""
    document: str
    """Contents of tokenizer.json."""
    kind: Kind = "tokenizer.json"
    runs: RunEncoder | None = None
    """Encodes in place of the document, which then only names and decodes; None: the document says it all."""


def tokenizer_path(directory: str | Path) -> Path | None:
    """The file that holds the tokenizer; None without one."""
    paths = (Path(directory) / name for name in (TOKENIZER_JSON, TOKENIZER_MODEL))
    return next((path for path in paths if path.is_file()), None)


def load_tokenizer(directory: str | Path) -> TokenizerSource:
    """Raises ValueError naming the file."""
    path = tokenizer_path(directory)
    if path is None:
        raise ValueError(f"{directory} holds neither {TOKENIZER_JSON} nor {TOKENIZER_MODEL}")
    return read_tokenizer(path)


def read_tokenizer(path: Path) -> TokenizerSource:
    """A tokenizer.json, or a SentencePiece model and the files beside it. Raises ValueError naming the file."""
    try:
        if path.suffix == ".json":
            return TokenizerSource(path=path, document=path.read_text(encoding="utf-8"))
        beside = [path, *(path.parent / name for name in ADDED_FILES)]
        return _converted(path, tuple(_stamp(file) for file in beside))
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: {error}") from error


def token_ids(directory: str | Path, names: Iterable[str]) -> dict[str, int]:
    """Ids of those of ``names`` that the tokenizer has as single tokens; empty without a tokenizer.

    Raises ValueError naming a malformed file.
    """
    path = tokenizer_path(directory)
    if path is None:
        return {}
    try:
        document = json.loads(read_tokenizer(path).document)
        ids = _vocabulary(document["model"]["vocab"])
        ids |= {token["content"]: int(token["id"]) for token in document.get("added_tokens") or []}
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: cannot be read: {error!r}") from None
    return {name: ids[name] for name in names if name in ids}


def spelled_media_tokens(directory: str | Path, config: Mapping[str, Any]) -> dict[str, int]:
    """What ``media_token_ids`` needs of the tokenizer: nothing where config.json is transformers', naming them all."""
    return token_ids(directory, MEDIA_TOKENS.values()) if config.get("model_type") == BAIDU_MODEL_TYPE else {}


def _vocabulary(vocab: Any) -> dict[str, int]:
    """A mapping from token to id, or (unigram models) a list of [token, score] in id order."""
    if isinstance(vocab, dict):
        return dict(vocab)
    return {entry[0]: token_id for token_id, entry in enumerate(vocab)}


def _stamp(path: Path) -> tuple[int, int] | None:
    if not path.is_file():
        return None
    status = path.stat()
    return status.st_mtime_ns, status.st_size


@functools.lru_cache(maxsize=4)
def _converted(path: Path, _stamps: tuple[tuple[int, int] | None, ...]) -> TokenizerSource:
    """Once per process and state of the files: a vocabulary of 100 thousand pieces takes seconds."""
    try:
        model = read_model(path.read_bytes())
        document = convert(model, added_tokens(path.parent, model))
        runs = RunEncoder(model, document) if RunEncoder.needed(model) else None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    kind: Kind = "SentencePiece BPE" if model.model_type.name == "BPE" else "SentencePiece unigram"
    return TokenizerSource(path=path, document=json.dumps(document, ensure_ascii=False), kind=kind, runs=runs)


def added_tokens(directory: Path, model: SentencePieceModel) -> list[AddedToken]:
    """Tokens that files beside the model add to it or declare special, by id.

    One without an id gets the piece of its name, else the next free id, as in transformers.
    """
    config, named, listed = (read_json(path) if (path := directory / name).is_file() else {} for name in ADDED_FILES)
    special = dict.fromkeys((*special_strings(named), *special_strings(config)))
    found: dict[str, AddedToken] = {}
    decoder = config.get("added_tokens_decoder")
    if isinstance(decoder, Mapping) and decoder:
        for token_id, entry in decoder.items():
            token = _declared(int(token_id), entry)
            found[token.content] = token
    else:
        for content, token_id in listed.items():
            if not isinstance(token_id, int) or token_id < 0:
                raise ValueError(f"added_tokens.json: {content!r} has id {token_id!r}")
            found[content] = AddedToken(id=token_id, content=content, special=content in special)
    ids = {piece.text: token_id for token_id, piece in enumerate(model.pieces)}
    for content in special:
        if content not in found:
            taken = max(len(ids), *(token.id + 1 for token in found.values()), 0)
            found[content] = AddedToken(id=ids.get(content, taken), content=content, special=True)
    return sorted(found.values(), key=lambda token: token.id)


def _declared(token_id: int, entry: Any) -> AddedToken:
    if not isinstance(entry, Mapping) or not isinstance(entry.get("content"), str):
        raise ValueError(f"tokenizer_config.json: added_tokens_decoder.{token_id} has no content")
    flags = {name: bool(entry.get(name, False)) for name in ("special", "lstrip", "rstrip", "single_word")}
    return AddedToken(id=token_id, content=entry["content"], **flags)


def special_strings(config: Mapping[str, Any]) -> Iterator[str]:
    """Texts of the tokens a file declares special: ``bos_token`` and its kind, and additional ones."""
    for key, value in config.items():
        if key.endswith("_token"):
            yield from _texts([value])
        elif key in ("additional_special_tokens", "extra_special_tokens"):
            yield from _texts(value.values() if isinstance(value, Mapping) else value or ())


def _texts(values: Iterable[Any]) -> Iterator[str]:
    for value in values:
        text = value.get("content") if isinstance(value, Mapping) else value
        if isinstance(text, str) and text:
            yield text
