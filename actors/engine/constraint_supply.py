"""Brings the constraints of attempts from the compiler to the runner, before a token of theirs is drawn."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future

from actors.engine.constraints.compiler import ConstraintCompiler, needs_constraint
from actors.engine.constraints.constraint import ConstraintFactory
from actors.engine.constraints.structure import unexpected
from actors.engine.scheduling.scheduler import Scheduler
from actors.engine.scheduling.sequence import Sequence
from actors.engine.step_runner import StepRunner
from actors.errors import InvalidRequest, ServingError
from actors.types import SamplingParams, SequenceKey


class ConstraintSupply:
    """The step thread's own, but for ``order`` and ``close``.

    Args:
        compiler: None refuses what needs one.
        fail: ends an attempt between two steps.
    """

    def __init__(
        self,
        compiler: ConstraintCompiler | None,
        scheduler: Scheduler,
        runner: StepRunner,
        fail: Callable[[SequenceKey, ServingError], None],
    ) -> None:
        self._compiler = compiler
        self._scheduler = scheduler
        self._runner = runner
        self._fail = fail
        self._factories: dict[SequenceKey, ConstraintFactory] = {}

    def order(self, sampling: SamplingParams) -> Future[ConstraintFactory] | None:
        """Begins to make what an attempt needs; None if it needs nothing. Any thread.

        Raises InvalidRequest or Overloaded.
        """
        if not needs_constraint(sampling):
            return None
        if self._compiler is None:
            field = "reasoning_max_tokens" if sampling.structure is None else "structure"
            raise InvalidRequest(f"this engine was started without a tokenizer: no {field}", field=field)
        return self._compiler.compile(sampling)

    def deliver(self, sequence: Sequence, made: Future[ConstraintFactory]) -> None:
        """An order is done. Nothing happens if the attempt has ended meanwhile, or the engine stops."""
        if made.cancelled() or self._scheduler.roster.by_key.get(sequence.key) is not sequence:
            return
        error = made.exception()
        if error is not None:
            self._scheduler.end(sequence.key, error if isinstance(error, ServingError) else unexpected(error))
            return
        self._factories[sequence.key] = made.result()
        self.supply(sequence)

    def supply(self, sequence: Sequence) -> None:
        """Gives the runner a constraint at its start, unless none is ready or it has one. Again after a preemption."""
        key = sequence.key
        factory = self._factories.get(key)
        if factory is None:
            return
        id = self._scheduler.constraint_ready(key)
        if id is not None:
            prompt_ids = sequence.request.prompt_ids
            self._runner.supply_constraint(id, factory(prompt_ids, lambda error: self._fail(key, error)))

    def drop(self, key: SequenceKey) -> None:
        """The attempt is released."""
        self._factories.pop(key, None)

    def check_integrity(self) -> None:
        """Raises AssertionError if anything is kept for an attempt that is released."""
        lost = self._factories.keys() - self._scheduler.roster.by_key.keys()
        assert not lost, f"constraints of released attempts are kept: {sorted(lost)}"

    def close(self) -> None:
        """Any thread."""
        if self._compiler is not None:
            self._compiler.close()
