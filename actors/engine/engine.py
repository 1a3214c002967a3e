"""One engine: a step thread that owns all state, and thread-safe methods that leave it commands.

    while running:  apply commands -> tell events -> plan -> tell events -> run -> tell tokens, then events

The thread sleeps on a condition when there is nothing to compute, until a command or the next deadline. An exception on
it is a defect of ours, never a request's, and so is the loss of a rank, whatever the thread does meanwhile: the engine
stops for good and ``on_fatal`` ends the process.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace

from torch import Tensor

from actors.busy import BusyShare
from actors.engine import events as ev
from actors.engine.config import EngineConfig
from actors.engine.constraint_supply import ConstraintSupply
from actors.engine.constraints.compiler import ConstraintCompiler
from actors.engine.events import EngineSink
from actors.engine.keys import KeyRegistry
from actors.engine.load import measure
from actors.engine.plan import LayerPart, StepPlan
from actors.engine.scheduling.block_hash import BlockHasher
from actors.engine.scheduling.block_pool import BlockPool
from actors.engine.scheduling.reservations import Reservation, Reservations
from actors.engine.scheduling.scheduler import Scheduler
from actors.engine.scheduling.sequence import Sequence
from actors.engine.step_runner import StepRunner
from actors.engine.step_tallies import StepTallies
from actors.engine.validation import check_request
from actors.ernie.config import ErnieConfig, Rules
from actors.errors import InternalError, ServingError, Unavailable
from actors.reports import KvIdentity, LoadReport
from actors.types import AttemptMode, EngineRequest, EngineRole, MilestoneKind, SequenceKey, vision_end

Command = Callable[[float], None]

MAX_WAIT_S = 3600.0
"""Longest sleep: deadlines may lie further away than a condition can wait."""


class Engine:
    """See the module. Keys that are unknown or ended are ignored by every method but ``submit`` and ``reserve``."""

    def __init__(
        self,
        config: EngineConfig,
        model_config: ErnieConfig,
        rules: Rules,
        runner: StepRunner,
        sink: EngineSink,
        *,
        identity: KvIdentity,
        compiler: ConstraintCompiler | None = None,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self.config = config
        self.model_config = model_config
        self.rules = rules
        self.steps = StepTallies()
        self._runner = runner
        self._sink = sink
        self._identity = identity
        self._clock = clock
        self._wall_clock = wall_clock
        eos_ids = frozenset(model_config.eos_token_ids)
        pools = [BlockPool(count) for count in runner.block_counts]
        self._scheduler = Scheduler(config, pools, eos_ids, model_config.im_patch_id)
        self._constraints = ConstraintSupply(compiler, self._scheduler, runner, self.fail)
        self._wake = threading.Condition()
        # Guarded by _wake:
        self._commands: deque[Command] = deque()
        self._keys = KeyRegistry(config.ended_memory_s)
        self._accepting = True
        self._stopping = False
        self._closed = False
        self._lost: Exception | None = None
        self._told_fatal = False
        self._checks: set[Future[None]] = set()
        self._role_changes: set[Future[None]] = set()
        self._load = measure(self._scheduler)
        self._step_began: float | None = None
        """Of the step under way."""
        self._prefilling = BusyShare(clock=clock)
        # The step thread's own:
        self._reservations = Reservations(config.retry_after_s)
        self._plan: StepPlan | None = None
        """Of the step under way."""
        runner.kv_written = self._hand_over
        self._thread = threading.Thread(target=self._main, name="engine-step", daemon=True)

    @property
    def max_model_len(self) -> int:
        """Longest prompt and reply together: the configured bound, or what all blocks hold if that is less."""
        return self._scheduler.max_model_len

    def start(self) -> None:
        """Starts the step thread."""
        self._runner.watch(self._lose)
        self._thread.start()

    def stop(self) -> None:
        """Ends the step thread after the present step; what is still here ends with reason STOPPED. Idempotent."""
        with self._wake:
            self._accepting = False
            self._stopping = True
            self._wake.notify_all()
        if self._thread.ident is not None and threading.current_thread() is not self._thread:
            self._thread.join()
        self._constraints.close()

    def drain(self) -> None:
        """Refuses new attempts from now on; those here go on."""
        with self._wake:
            self._accepting = False

    def move(self) -> None:
        """Ends every attempt with reason MOVED: its owner goes on elsewhere. Chunks handed out still need
        ``transferred``."""
        self._send(lambda _: self._end_each(Unavailable("the engine leaves", reason="MOVED")))

    def wait_idle(self, timeout_s: float | None = None) -> bool:
        """Waits until no attempt is here. False if the time ran out, or the engine stopped with some left."""
        with self._wake:
            self._wake.wait_for(lambda: not self._keys.active or self._closed, timeout_s)
            return not self._keys.active

    # Attempts

    def submit(self, key: SequenceKey, request: EngineRequest, mode: AttemptMode) -> None:
        """Takes an attempt. A full queue is told later, by ``on_ended`` with Overloaded.

        Raises InvalidRequest or ContextExceeded for what the request gets wrong, AlreadyExists for an active key,
        Unavailable with reason ENDED for one that ended or was cancelled lately, WRONG_ROLE or DRAINING, Overloaded if
        too many structures wait to be compiled.
        A structure that cannot be used is told by ``on_ended``.
        """
        check_request(request, mode, role=self.config.role, model=self.model_config, max_model_len=self.max_model_len)
        now = self._clock()
        constraint = self._constraints.order(request.sampling)
        sequence = Sequence(
            key=key,
            request=request,
            mode=mode,
            deadline=now + (request.deadline_s - self._wall_clock()),
            hasher=BlockHasher(self._identity, request.media, request.salt) if self.config.prefix_caching else None,
            needs_constraint=constraint is not None,
            least_cached=self._vision_end(request, mode),
        )
        with self._wake:
            if not self._accepting:
                raise Unavailable("this engine takes no new requests", reason="DRAINING")
            self._keys.claim(key, now)
            self._command(lambda now: self._scheduler.submit(sequence, now))
        if constraint is not None:
            constraint.add_done_callback(
                lambda made: self._send(lambda _: self._constraints.deliver(sequence, made)),
            )

    def _vision_end(self, request: EngineRequest, mode: AttemptMode) -> int:
        """Leading tokens of a prompt that hold all it has for the vision experts, where this engine has none."""
        if self.config.role is not EngineRole.DECODE or mode is not AttemptMode.COLOCATED:
            return 0
        return vision_end(request.prompt_ids, self.model_config.im_patch_id)

    def cancel(self, key: SequenceKey) -> None:
        """Ends an attempt in any state and frees all of it. A key not submitted yet will be refused. Idempotent."""
        with self._wake:
            if key not in self._keys.active:
                self._keys.retire(key, self._clock())
            self._command(lambda _: self._scheduler.cancel(key))

    def fail(self, key: SequenceKey, error: ServingError) -> None:
        """Ends an attempt because of something outside. Chunks handed out still need ``transferred``."""
        self._send(lambda _: self._scheduler.end(key, error))

    def supply_embedding(self, key: SequenceKey, media_index: int, unit_index: int, embedding: Tensor) -> None:
        """An embedding [tokens of the unit, hidden size] that ``on_admitted`` asked for; units come in any order.

        A tensor of another shape ends the attempt with InternalError.
        """
        self._send(lambda _: self._take_embedding(key, media_index, unit_index, embedding))

    def set_role(self, role: EngineRole) -> Future[None]:
        """Takes another role and new attempts again. Only after ``drain``, once no attempt is here.

        The future fails with RuntimeError otherwise, and if the engine ends before. A checkpoint that cannot be read
        again ends the engine.
        """
        future: Future[None] = Future()
        future.set_running_or_notify_cancel()
        with self._wake:
            if self._stopping or self._closed:
                future.set_exception(RuntimeError("the engine was stopped"))
            else:
                self._role_changes.add(future)
                self._command(lambda _: self._set_role(role, future))
        return future

    # Transfers, prefill side

    def reserved(self, key: SequenceKey, held_tokens: int = 0) -> None:
        """The decode engine holds blocks, and the KV of ``held_tokens`` leading tokens already."""
        self._send(lambda _: self._scheduler.reserved(key, held_tokens))

    def refused(self, key: SequenceKey, reason: str) -> None:
        """The decode engine holds no blocks: ends the attempt with Unavailable(reason)."""
        self._send(lambda _: self._scheduler.refused(key, reason))

    def transferred(self, key: SequenceKey) -> None:
        """No transfer reads the blocks any more: all chunks were verified, or the transfer was given up."""
        self._send(lambda _: self._scheduler.transferred(key))

    # Transfers, decode side

    def reserve(self, key: SequenceKey, token_count: int) -> Future[Reservation]:
        """Blocks for ``token_count`` tokens (prompt and earlier outputs) and a margin; waits for the attempt's Submit
        and for free blocks, each up to a bound of the config.

        The future gives the rank, the block table and how many leading tokens are in it already, shared with others and
        not to be written; or it fails with Unavailable and a reason: NO_BLOCKS, ENDED, UNKNOWN (no Submit),
        DUPLICATE, MISMATCH (another prompt length), STOPPED. Its callbacks run on the step thread.
        """
        future: Future[Reservation] = Future()
        future.set_running_or_notify_cancel()
        with self._wake:
            if self._stopping or self._closed:
                future.set_exception(Unavailable("the engine was stopped", reason="STOPPED"))
            else:
                self._command(lambda now: self._reserve(key, token_count, future, now))
        return future

    def kv_arrived(self, key: SequenceKey, first_output_id: int, finished: bool = False) -> None:
        """Every chunk is verified and written: decoding starts after ``first_output_id``, which the prefill engine has
        told the router; with ``finished`` it was the last token and everything is freed.
        """
        self._send(lambda _: self._start_decoding(key, first_output_id, finished))

    # Observation

    def load(self) -> LoadReport:
        """As of the last change of state."""
        with self._wake:
            return replace(self._load, prefill_busy=self._prefilling.share())

    def check_step(self, limit_s: float) -> None:
        """Ends the engine if the step under way takes longer: its thread hangs, and nothing can interrupt it."""
        with self._wake:
            hangs = self._step_began is not None and self._clock() - self._step_began > limit_s
        if hangs:
            self._lose(RuntimeError(f"step {self._load.step} did not end in {limit_s:g} s"))

    def check_integrity(self) -> None:
        """Checks all bookkeeping between two steps; waits for that. Raises AssertionError naming what is wrong."""
        with self._wake:
            if not self._thread.is_alive():
                self._scheduler.check_integrity()
                self._constraints.check_integrity()
                return
            done: Future[None] = Future()
            self._checks.add(done)
            self._wake.notify_all()
        done.result()

    # The step thread

    def _send(self, command: Command) -> None:
        with self._wake:
            self._command(command)

    def _command(self, command: Command) -> None:
        self._commands.append(command)
        self._wake.notify_all()

    def _main(self) -> None:
        try:
            while self._turn():
                pass
            self._end_all(Unavailable("the engine was stopped", reason="STOPPED"))
        except BaseException as error:  # whatever it is, this process cannot go on serving
            self._close()
            self._reservations.refuse_all("ENGINE_LOST", "the engine failed")
            self._tell_fatal(error)

    def _lose(self, error: Exception) -> None:
        """A rank is lost. The step thread may be where nothing wakes it, in a collective: it is not waited for."""
        with self._wake:
            if self._closed:
                return
            self._lost = error
            self._wake.notify_all()
        self._tell_fatal(error)

    def _tell_fatal(self, error: BaseException) -> None:
        with self._wake:
            told, self._told_fatal = self._told_fatal, True
        if not told:
            self._sink.on_fatal(error)

    def _turn(self) -> bool:
        """Applies commands and runs at most one step. False when the thread must end."""
        with self._wake:
            if self._lost is not None:
                raise self._lost
            commands, self._commands = self._commands, deque()
            if self._stopping:
                self._commands = commands
                return False
        now = self._clock()
        for command in commands:
            command(now)
        self._tell()
        plan = self._scheduler.plan(now)
        self._tell()
        if plan is not None:
            with self._wake:
                self._load = measure(self._scheduler)
                self._step_began = now
            self._step(plan)
        self._run_checks()
        with self._wake:
            self._load = measure(self._scheduler)
            self._step_began = None
            if plan is None and not (self._commands or self._checks or self._stopping or self._lost):
                wakeup = self._scheduler.next_wakeup()
                self._wake.wait(None if wakeup is None else min(MAX_WAIT_S, max(0.0, wakeup - self._clock())))
        return True

    def _step(self, plan: StepPlan) -> None:
        started = time.perf_counter()
        self._plan = plan
        with self._prefilling.doing(plan.prompt_share):
            result = self._runner.run(plan)
        seconds = time.perf_counter() - started
        self.steps.add(plan, seconds, len(result.tokens))
        outcome = self._scheduler.apply(plan, result, seconds)
        for piece in outcome.prompt_logprobs:
            self._sink.on_prompt_logprobs(piece)
        if outcome.tokens:
            self._sink.on_tokens(outcome.tokens)
        self._tell()

    def _hand_over(self, rank: int, part: LayerPart) -> None:
        assert self._plan is not None, "no step is under way"
        self._scheduler.hand_over(self._plan, rank, part)
        self._tell()

    def _end_all(self, error: ServingError) -> None:
        with self._wake:
            commands, self._commands = self._commands, deque()
        now = self._clock()
        for command in commands:
            command(now)
        self._tell()
        self._end_each(error)
        self._tell()
        self._reservations.refuse_all(error.reason, error.message)
        plan = self._scheduler.plan(now)
        if plan is not None:
            self._runner.run(plan)
        self._close()

    def _end_each(self, error: ServingError) -> None:
        for key in list(self._scheduler.roster.by_key):
            self._scheduler.end(key, error)

    def _close(self) -> None:
        """The thread's last act: nobody may wait for it any more."""
        with self._wake:
            self._accepting = False
            self._closed = True
            self._load = measure(self._scheduler)
            changes, self._role_changes = self._role_changes, set()
            self._wake.notify_all()
        for change in changes:
            change.set_exception(RuntimeError("the engine has ended"))
        self._run_checks()

    def _run_checks(self) -> None:
        with self._wake:
            checks, self._checks = self._checks, set()
        for done in checks:
            try:
                self._scheduler.check_integrity()
                self._constraints.check_integrity()
            except AssertionError as error:
                done.set_exception(error)
            else:
                done.set_result(None)

    def _set_role(self, role: EngineRole, future: Future[None]) -> None:
        with self._wake:
            self._role_changes.discard(future)
            busy = "it takes attempts" if self._accepting else "attempts are here" if self._keys.active else ""
        if busy:
            future.set_exception(RuntimeError(f"an engine cannot change its role while {busy}"))
            return
        try:
            self._runner.set_role(role)
        except BaseException as error:
            future.set_exception(error)
            raise
        self._scheduler.resize(self._runner.block_counts)
        with self._wake:
            self.config = replace(self.config, role=role)
            self._accepting = not self._stopping
            self._load = measure(self._scheduler)
        future.set_result(None)

    def _reserve(self, key: SequenceKey, token_count: int, future: Future[Reservation], now: float) -> None:
        with self._wake:
            ended = self._keys.has_ended(key, now)
        if ended:
            future.set_exception(Unavailable(f"attempt {key} has ended", reason="ENDED"))
        elif self._reservations.add(key, future):
            self._scheduler.reserve(key, token_count, now)

    def _take_embedding(self, key: SequenceKey, media_index: int, unit_index: int, embedding: Tensor) -> None:
        sequence = self._scheduler.roster.by_key.get(key)
        if sequence is None:
            return
        unit = sequence.unit(media_index, unit_index)
        expected = None if unit is None else (unit.end - unit.start, self.model_config.text.hidden_size)
        if tuple(embedding.shape) != expected:
            message = f"embedding {media_index}.{unit_index} has shape {tuple(embedding.shape)}, expected {expected}"
            self._scheduler.end(key, InternalError(message))
            return
        id = self._scheduler.add_embedding(key, media_index, unit_index)
        if id is not None and sequence.rank is not None:
            self._runner.supply_embedding(sequence.rank, id, media_index, unit_index, embedding)

    def _start_decoding(self, key: SequenceKey, first_output_id: int, finished: bool) -> None:
        if 0 <= first_output_id < self.model_config.im_patch_id:
            self._scheduler.kv_arrived(key, first_output_id, finished)
        else:
            self._scheduler.end(key, InternalError(f"token 0 is {first_output_id}, which cannot be generated"))

    def _tell(self) -> None:
        for event in self._scheduler.take_events():
            self._tell_one(event)
        changes = self._scheduler.take_block_changes()
        if changes.stored or changes.removed:
            self._sink.on_blocks_changed(changes.stored, changes.removed)

    def _tell_one(self, event: ev.Event) -> None:
        sink = self._sink
        match event:
            case ev.Admitted(key, cached_tokens):
                sink.on_admitted(key, cached_tokens)
            case ev.MediaConsumed(key, media_index, unit_index):
                sink.on_media_consumed(key, media_index, unit_index)
            case ev.Preempted(key):
                sink.on_preempted(key)
            case ev.ConstraintNeeded(key):
                self._constraints.supply(self._scheduler.roster.by_key[key])
            case ev.ReserveNeeded(key, token_count):
                sink.on_reserve_needed(key, token_count)
            case ev.ComputedChunk():
                sink.on_chunk(event)
            case ev.TransferCancelled(key):
                sink.on_transfer_cancelled(key)
            case ev.ReservationGranted(key, rank, block_table, held_tokens):
                self._reservations.grant(key, rank, block_table, held_tokens)
            case ev.ReservationFailed(key, reason, message):
                self._reservations.refuse(key, reason, message)
            case ev.ReservationDropped(key):
                sink.on_reservation_dropped(key)
            case ev.Ended(key, error):
                sink.on_ended(key, error)
            case ev.Milestone(key, kind, busy_s, token_count):
                if kind is MilestoneKind.RELEASED:
                    self._retire(key)
                sink.on_milestone(key, kind, busy_s, token_count)

    def _retire(self, key: SequenceKey) -> None:
        self._constraints.drop(key)
        with self._wake:
            self._keys.retire(key, self._clock())
            self._wake.notify_all()
