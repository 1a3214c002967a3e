"""What SentencePiece does to a text before it cuts it: characters rewritten, spaces trimmed and marked.

The rules are those of the library: at each place a user-defined piece stands as it is, else the longest entry of the
character map that matches is rewritten, else one character is kept.
"""

from __future__ import annotations

import re
import struct
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping

from actors.tokenization.sentencepiece_model import PieceType, SentencePieceModel

SPACE_MARK = "\u2581"


class SentencePieceNormalizer:
    """Immutable; safe for use from many threads."""

    def __init__(self, model: SentencePieceModel) -> None:
        """Raises ValueError for a malformed character map."""
        self._prefix = SPACE_MARK if model.add_dummy_prefix else ""
        self._trims = model.remove_extra_whitespaces
        rewrites = read_charsmap(model.precompiled_charsmap)
        firsts = {key[0] for key in rewrites}
        # Others hold nothing that would be rewritten.
        kept = {p.text for p in model.pieces if p.type is PieceType.USER_DEFINED and not firsts.isdisjoint(p.text)}
        self._tables = ({text: text for text in kept}, rewrites)
        self._longest = _longest_by_first(kept), _longest_by_first(rewrites)
        starts = "".join(map(re.escape, sorted(firsts | {text[0] for text in kept})))
        self._start = re.compile(f"[{starts}]") if starts else None

    @classmethod
    def needed(cls, model: SentencePieceModel) -> bool:
        """Whether it would do more than to mark spaces, which a tokenizer does by itself."""
        return bool(model.precompiled_charsmap) or model.add_dummy_prefix or model.remove_extra_whitespaces

    def __call__(self, text: str) -> str:
        chunks = self._chunks(text)
        normal = "".join(_trimmed(chunks) if self._trims else (chunk for chunk, _ in chunks))
        if not normal and (self._trims or not text):
            return ""
        normal = self._prefix + normal.replace(" ", SPACE_MARK)
        return normal.rstrip(SPACE_MARK) if self._trims else normal

    def _chunks(self, text: str) -> Iterator[tuple[str, bool]]:
        """The text in pieces, rewritten: runs that nothing applies to (True), and what stands for one match each."""
        position = 0
        while self._start is not None and (match := self._start.search(text, position)) is not None:
            at = match.start()
            if at > position:
                yield text[position:at], True
            found = self._match(text, at)
            key, value = (text[at], text[at]) if found is None else found
            yield value, False
            position = at + len(key)
        if position < len(text):
            yield text[position:], True

    def _match(self, text: str, at: int) -> tuple[str, str] | None:
        for table, longest in zip(self._tables, self._longest, strict=True):
            for length in range(longest.get(text[at], 0), 0, -1):
                key = text[at : at + length]
                if key in table:
                    return key, table[key]
        return None


def _trimmed(chunks: Iterable[tuple[str, bool]]) -> Iterator[str]:
    """Without spaces at the start and behind other spaces. Those inside what one match gives stay, as there."""
    behind_space = True
    for chunk, is_run in chunks:
        text = chunk.lstrip(" ") if behind_space else chunk
        if is_run:
            text = re.sub(" {2,}", " ", text)
        if text:
            behind_space = text.endswith(" ")
            yield text


def _longest_by_first(keys: Mapping[str, str] | set[str]) -> dict[str, int]:
    longest: dict[str, int] = {}
    for key in keys:
        longest[key[0]] = max(longest.get(key[0], 0), len(key))
    return longest


def read_charsmap(content: bytes) -> dict[str, str]:
    """Rewrites of a precompiled_charsmap: a double-array trie of keys, then the values, each ended by a zero byte.

    Raises ValueError if it is malformed.
    """
    if not content:
        return {}
    try:
        (size,) = struct.unpack_from("<I", content)
        units = struct.unpack_from(f"<{size // 4}I", content, 4)
        values = content[4 + size :]
        return {
            key.decode(): values[offset : values.index(b"\0", offset)].decode() for key, offset in _trie_entries(units)
        }
    except (struct.error, IndexError, ValueError) as error:
        raise ValueError(f"its character map is malformed: {error}") from None


def _trie_entries(units: tuple[int, ...]) -> Iterator[tuple[bytes, int]]:
    """All (key, value) of a darts-clone double array."""
    children: dict[int, list[int]] = defaultdict(list)
    for node, unit in enumerate(units):
        if not unit >> 31 and unit & 0xFF:
            children[node ^ unit & 0xFF].append(node)
    stack = [(b"", _offset(units[0]))]
    while stack:
        key, base = stack.pop()
        for node in children.get(base, ()):
            unit = units[node]
            longer, child = key + bytes([unit & 0xFF]), node ^ _offset(unit)
            if unit >> 8 & 1:
                yield longer, units[child] & 0x7FFFFFFF
            stack.append((longer, child))


def _offset(unit: int) -> int:
    return (unit >> 10) << ((unit & (1 << 9)) >> 6)
