"""Structured output: which tokens may come next in an answer that must match a structure. llguidance computes it.

* Only ordinary text may stand in an answer, and where it must be calls of tools their markers. End tokens come when the
  structure may end; a caller's stop tokens too, or where nothing else is left.
* No structure can hold up or kill the process: its size and that of everything derived from it are bounded.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np
from llguidance import LLMatcher, LLParserLimits

from actors.engine.constraints.constraint import PackedMask
from actors.engine.constraints.structure_grammar import CALL_MARKERS, grammar_of, refused
from actors.engine.constraints.vocabulary import ConstraintVocabulary
from actors.errors import InternalError, ServingError
from actors.types import Structure, StructureKind

MAX_RENEWAL_S = 0.05
"""A structure that took longer to compile is not compiled again between two steps."""


def _limits() -> LLParserLimits:
    """Lower than llguidance's own where those would let one request hold a step up, or hundreds of megabytes."""
    return LLParserLimits(
        initial_lexer_fuel=250_000,
        step_lexer_fuel=100_000,
        max_lexer_states=100_000,
        max_grammar_size=250_000,
        verbose_errors=False,
    )


class StructureTemplate:
    """A compiled structure, from which sequences start. One thread at a time, together with its sequences.

    The sequences of a template share what they learn of the structure, and the bounds on that.
    """

    def __init__(self, structure: Structure, vocabulary: ConstraintVocabulary) -> None:
        """Raises InvalidRequest saying what is wrong with the structure."""
        self._vocabulary = vocabulary
        self._grammar = grammar_of(structure, vocabulary.special_id)
        self.text_W = vocabulary.plain_W
        """What may stand in an answer."""
        if structure.kind is StructureKind.TOOL_CALLS:
            markers = map(vocabulary.special_id, CALL_MARKERS)
            self.text_W = vocabulary.plain_W | vocabulary.pack(token for token in markers if token is not None)
        started = time.perf_counter()
        self._matcher = self._compile()
        self._renewable = time.perf_counter() - started < MAX_RENEWAL_S
        row_W = self.start((), _raise).allowed()
        self.begins_with_newline_only = not (row_W & ~vocabulary.newline_first_W).any()
        """Nothing but a line end can begin it: it cannot follow a thinking."""

    def start(self, ends: Sequence[int], fail: Callable[[ServingError], None]) -> StructureState:
        """State before an answer's first token. ``ends`` are the ids that end the sequence, besides end tokens."""
        return StructureState(self, self._matcher.deep_copy(), self._vocabulary, ends=ends, fail=fail)

    def renew(self) -> LLMatcher | None:
        """Forgets what was learnt. Returns the matcher of an answer's start, or None if that would take too long."""
        if not self._renewable:
            return None
        self._matcher = self._compile()
        return self._matcher.deep_copy()

    def _compile(self) -> LLMatcher:
        matcher = LLMatcher(self._vocabulary.tokenizer, self._grammar, limits=_limits(), log_level=0)
        if matcher.is_error():
            raise refused(matcher.get_error())
        return matcher


class StructureState:
    """Where one answer stands in its structure."""

    def __init__(
        self,
        template: StructureTemplate,
        matcher: LLMatcher,
        vocabulary: ConstraintVocabulary,
        *,
        ends: Sequence[int],
        fail: Callable[[ServingError], None],
    ) -> None:
        self._template = template
        self._matcher = matcher
        self._vocabulary = vocabulary
        self._fail = fail
        self._ends = frozenset((*vocabulary.end_ids, *ends))
        self._stops_W = vocabulary.pack(ends)
        self._row_W: PackedMask = np.zeros(vocabulary.words, dtype=np.int32)
        self._tokens: list[int] = []
        self._renewed = False
        self._ended = False
        self._failed = False

    def allowed(self) -> PackedMask:
        """Row of bits, at least one set; valid until the next call."""
        if self._failed:
            return self._vocabulary.plain_W
        if self._ended:
            return self._vocabulary.ends_W
        row_W = self._compute()
        if self._matcher.is_error() and self._renew():
            row_W = self._compute()
        may_end = self._matcher.is_accepting()
        row_W &= self._template.text_W
        if may_end:
            row_W |= self._vocabulary.ends_W | self._stops_W
        else:
            without_W = row_W & ~self._stops_W
            if without_W.any():
                row_W[:] = without_W
        if self._matcher.is_error() or not row_W.any():
            self._give_up()
            return self._vocabulary.plain_W
        return row_W

    def accept(self, token: int) -> None:
        if self._ended or self._failed:
            return
        if token in self._ends and self._matcher.is_accepting():
            self._ended = True
            return
        self._tokens.append(token)
        if not self._matcher.consume_token(token) and not self._renew():
            self._give_up()

    def _compute(self) -> PackedMask:
        row_W = self._row_W
        self._matcher.unsafe_compute_mask_ptr(row_W.ctypes.data, row_W.nbytes)
        return row_W

    def _renew(self) -> bool:
        """Whether the answer so far can go on without what others have learnt."""
        matcher = None if self._renewed else self._template.renew()
        self._renewed = True
        if matcher is None or not matcher.consume_tokens(self._tokens):
            return False
        self._matcher = matcher
        return True

    def _give_up(self) -> None:
        self._failed = True
        reason = self._matcher.get_error()
        if not reason or reason.startswith("NoExtension"):
            reason = "no text can match it"
        self._fail(refused(f"after {len(self._tokens)} tokens: {reason}"))


def _raise(error: ServingError) -> None:
    raise error


def unexpected(error: BaseException) -> ServingError:
    """What to tell of an exception that compiling ought not to raise."""
    return InternalError(f"the structure could not be compiled ({type(error).__name__})")
