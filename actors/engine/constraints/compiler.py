"""Makes constraints of requests: structures are compiled on threads of their own and kept for the next request."""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from actors.engine.constraints.constraint import ConstraintFactory, TokenConstraint
from actors.engine.constraints.sequence_constraint import SequenceConstraint
from actors.engine.constraints.structure import StructureTemplate, unexpected
from actors.engine.constraints.structure_grammar import check_size, refused
from actors.engine.constraints.thinking import Thinking
from actors.engine.constraints.vocabulary import CLOSE_THINK, ConstraintVocabulary
from actors.errors import InvalidRequest, Overloaded, ServingError, Unavailable
from actors.types import SamplingParams, Structure

log = logging.getLogger(__name__)

THREADS = 2
MAX_TEMPLATES = 64
"""Compiled structures kept. Most take some 100 kB, the worst 50 MB."""
MAX_PENDING = 256


def needs_constraint(sampling: SamplingParams) -> bool:
    """Whether a sequence's tokens are bound by more than masks and penalties."""
    return sampling.structure is not None or sampling.reasoning_max_tokens is not None


class ConstraintCompiler:
    """Thread-safe. What its factories make belongs to one thread at a time, and so do the factories themselves."""

    def __init__(
        self,
        vocabulary: ConstraintVocabulary,
        *,
        threads: int = THREADS,
        max_templates: int = MAX_TEMPLATES,
        max_pending: int = MAX_PENDING,
    ) -> None:
        self._vocabulary = vocabulary
        self._pool = ThreadPoolExecutor(max_workers=threads, thread_name_prefix="structure")
        self._max_templates = max_templates
        self._max_pending = max_pending
        self._lock = threading.Lock()
        # Guarded by _lock:
        self._templates: OrderedDict[Structure, Future[StructureTemplate]] = OrderedDict()
        self._pending = 0
        self._closed = False

    def compile(self, sampling: SamplingParams) -> Future[ConstraintFactory]:
        """For a request that ``needs_constraint``. The future may fail with InvalidRequest, and is cancelled by
        ``close``; its callbacks run on a thread of the pool, or at once.

        Raises:
            InvalidRequest: the checkpoint has no thinking to bound, or the structure is too large.
            Overloaded: too many structures wait to be compiled.
            Unavailable: closed.
        """
        if sampling.reasoning_max_tokens is not None and self._vocabulary.think is None:
            raise InvalidRequest(
                f"this model has no {CLOSE_THINK} token: its thinking cannot be bounded", field="reasoning_max_tokens"
            )
        made: Future[ConstraintFactory] = Future()
        if sampling.structure is None:
            made.set_result(self._factory(sampling, None))
            return made
        check_size(sampling.structure)

        def finish(compiled: Future[StructureTemplate]) -> None:
            if compiled.cancelled():
                made.cancel()
                return
            try:
                made.set_result(self._factory(sampling, compiled.result()))
            except BaseException as error:
                made.set_exception(error)

        self._template(sampling.structure).add_done_callback(finish)
        return made

    def close(self) -> None:
        """Gives up what waits to be compiled; a thread that compiles ends with that. Idempotent."""
        with self._lock:
            self._closed = True
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _template(self, structure: Structure) -> Future[StructureTemplate]:
        with self._lock:
            known = self._templates.get(structure)
            if known is not None:
                self._templates.move_to_end(structure)
                return known
            if self._closed:
                raise Unavailable("the engine was stopped", reason="STOPPED")
            if self._pending >= self._max_pending:
                raise Overloaded("too many structures wait to be compiled", retry_after_s=1.0)
            self._pending += 1
            template = self._templates[structure] = self._pool.submit(self._compile, structure)
            while len(self._templates) > self._max_templates:
                self._templates.popitem(last=False)
        template.add_done_callback(self._note_done)
        return template

    def _note_done(self, _: Future[StructureTemplate]) -> None:
        with self._lock:
            self._pending -= 1

    def _compile(self, structure: Structure) -> StructureTemplate:
        try:
            return StructureTemplate(structure, self._vocabulary)
        except ServingError:
            raise
        except BaseException as error:  # the library's panics are no Exceptions
            log.exception("a structure could not be compiled")
            raise unexpected(error) from None

    def _factory(self, sampling: SamplingParams, template: StructureTemplate | None) -> ConstraintFactory:
        vocabulary = self._vocabulary
        stops = sampling.stop_token_ids
        thinks = vocabulary.think is not None and (sampling.starts_thinking or template is None)
        if thinks and template is not None and template.begins_with_newline_only:
            raise refused("an answer after thinking cannot begin with a newline")

        def make(prompt_ids: Sequence[int], fail: Callable[[ServingError], None]) -> TokenConstraint:
            thinking = None
            if thinks:
                thinking = Thinking(
                    vocabulary,
                    prompt_ids,
                    starts_thinking=sampling.starts_thinking,
                    budget=sampling.reasoning_max_tokens,
                    structured=template is not None,
                    ends=(*vocabulary.end_ids, *stops),
                )
            return SequenceConstraint(thinking, None if template is None else template.start(stops, fail))

        return make
