"""Decides what is computed when. Pure: no tensors, no threads, no clock but the ``now`` it is given.

Commands change the state, ``plan`` says what the next step computes, ``apply`` takes what the step sampled. What others
must hear of is listed as events. Order among attempts is ``Sequence.order``: arrival, each level of priority being
worth ``EngineConfig.priority_step_s`` of waiting, then submission; whoever goes first is also the last to be preempted.
As the order of an attempt never changes while those of new ones grow, everybody is first at last.

An attempt that is given blocks lives on one rank (``placement``), until it ends or is preempted. Ranks have seats,
blocks, a token budget and preemption of their own; the queue is one. In a step of a rank decoding sequences come first,
prompts share the rest of its budget (``fair_share``).
"""

from __future__ import annotations

from collections.abc import Sequence as Listed
from dataclasses import dataclass, field

from actors.engine import events as ev
from actors.engine.config import EngineConfig
from actors.engine.plan import ALL_LAYERS, LayerPart, NewSequence, RankPlan, Slice, StepPlan, StepResult, StepShape
from actors.engine.scheduling.admission import Admission
from actors.engine.scheduling.block_pool import BlockPool, Changes
from actors.engine.scheduling.fair_share import Want, share_budget
from actors.engine.scheduling.findable import FindableBlocks
from actors.engine.scheduling.outcomes import StepOutcome, next_chunk, next_prompt_logprobs
from actors.engine.scheduling.preemption import choose_victim, recomputes_here
from actors.engine.scheduling.rank_state import RankState
from actors.engine.scheduling.roster import Roster
from actors.engine.scheduling.sequence import Sequence, SequenceState
from actors.engine.scheduling.timers import Timers
from actors.errors import DeadlineExceeded, InternalError, Overloaded, RequestCancelled, ServingError, Unavailable
from actors.types import AttemptMode, MilestoneKind, SequenceKey, TokenEvent, TokenLogprobs, service_rank

State = SequenceState


@dataclass(slots=True)
class _Draft:
    """One rank's part of a plan in the making."""

    slices: list[Slice] = field(default_factory=list)
    new: list[NewSequence] = field(default_factory=list)


class Scheduler:
    """Owns every attempt of an engine and the blocks they hold.

    Commands name attempts by key and ignore unknown ones: an answer may always arrive after the end.
    """

    def __init__(
        self, config: EngineConfig, pools: Listed[BlockPool], eos_ids: frozenset[int], im_patch_id: int
    ) -> None:
        """``pools``: of each rank."""
        self.config = config
        self.ranks = tuple(RankState(number, pool, config.block_size) for number, pool in enumerate(pools))
        self.eos_ids = eos_ids
        self.im_patch_id = im_patch_id
        self.max_model_len = self._longest()
        self.roster = Roster(self.ranks)
        self.step = 0
        self.preemptions = 0
        """Sequences that lost their blocks to another."""
        self._admission = Admission(config, self.ranks, self.roster, self.max_model_len)
        self._findable = FindableBlocks()
        self._early_reserves: dict[SequenceKey, tuple[int, float]] = {}
        self._timers = Timers()
        self._events: list[ev.Event] = []

    def _longest(self) -> int:
        return min(self.config.max_model_len, *(rank.pool.total * self.config.block_size for rank in self.ranks))

    # Commands

    def resize(self, block_counts: Listed[int]) -> None:
        """Each rank has so many blocks from now on. Raises ValueError if one that would go is used."""
        for rank, count in zip(self.ranks, block_counts, strict=True):
            rank.pool.resize(count)
        self.max_model_len = self._admission.max_model_len = self._longest()

    def submit(self, sequence: Sequence, now: float) -> None:
        """Takes a new attempt whose request was validated. A full queue ends it with Overloaded."""
        waiting = self.roster.waiting_count
        request = sequence.request
        position = service_rank(request.arrival_s, request.priority, self.config.priority_step_s)
        self.roster.add(sequence, State.EXPECTED if sequence.mode is AttemptMode.DECODE else State.WAITING, position)
        if waiting >= self.config.max_waiting:
            self._fail_early_reserve(sequence.key, "ENDED", "the attempt was refused")
            error = Overloaded(f"{waiting} requests wait already", retry_after_s=self.config.retry_after_s)
            self._events.append(ev.Ended(sequence.key, error))
            self._release(sequence)
            return
        self._set_timer(sequence.deadline, sequence.key)
        early = self._early_reserves.pop(sequence.key, None)
        if early is not None:
            self.reserve(sequence.key, early[0], now)

    def end(self, key: SequenceKey, error: ServingError) -> None:
        """Ends an attempt in any state and frees everything it holds, except blocks a transfer may still read."""
        sequence = self.roster.by_key.get(key)
        if sequence is not None:
            self._abort(sequence, error)

    def cancel(self, key: SequenceKey) -> None:
        """``end`` because nobody wants it any more."""
        self._fail_early_reserve(key, "ENDED", "the attempt was cancelled")
        self.end(key, RequestCancelled("cancelled"))

    def add_embedding(self, key: SequenceKey, media_index: int, unit_index: int) -> int | None:
        """A unit's embedding is on hand. Returns the sequence's number if it still waits for that unit."""
        sequence = self.roster.by_key.get(key)
        if sequence is None or not sequence.state.takes_part:
            return None
        return sequence.id if sequence.add_embedding(media_index, unit_index) else None

    def constraint_ready(self, key: SequenceKey) -> int | None:
        """The constraint of an attempt is on hand. Returns the sequence's number if it still waits for that: the runner
        must have it before the next plan.
        """
        sequence = self.roster.by_key.get(key)
        if sequence is None or not sequence.constraint_pending or sequence.state is State.PINNED:
            return None
        sequence.constraint_pending = False
        return sequence.id

    def reserve(self, key: SequenceKey, token_count: int, now: float) -> None:
        """Decode: asks for blocks for ``token_count`` tokens; ReservationGranted or ReservationFailed answers."""
        sequence = self.roster.by_key.get(key)
        if sequence is None:
            if key in self._early_reserves:
                self._events.append(ev.ReservationFailed(key, "DUPLICATE", "a reservation of that key waits already"))
                return
            expiry = now + self.config.submit_wait_s
            self._early_reserves[key] = (token_count, expiry)
            self._set_timer(expiry, key)
        elif sequence.state is not State.EXPECTED:
            self._events.append(ev.ReservationFailed(key, "DUPLICATE", f"the attempt is {sequence.state.value}"))
        elif token_count != sequence.initial_count:
            message = f"the prompt has {sequence.initial_count} tokens, not {token_count}"
            self._events.append(ev.ReservationFailed(key, "MISMATCH", message))
        else:
            sequence.reserve_expiry = now + self.config.reserve_wait_s
            self._set_timer(sequence.reserve_expiry, key)
            self.roster.move(sequence, State.WAITING)

    def reserved(self, key: SequenceKey, held_tokens: int) -> None:
        """Prefill: the decode engine holds blocks, and the KV of ``held_tokens`` leading tokens already."""
        sequence = self._asking(key)
        if sequence is None:
            return
        if not 0 <= held_tokens < sequence.initial_count:
            self._abort(sequence, InternalError(f"{held_tokens} tokens held of {sequence.initial_count}"))
            return
        sequence.reservation_granted = True
        sequence.sent_tokens = held_tokens
        if sequence.state is State.RESERVING:  # not if it was preempted meanwhile
            self.roster.move(sequence, State.RUNNING)
            self._tell_admitted(sequence)

    def refused(self, key: SequenceKey, reason: str) -> None:
        """Prefill: the decode engine holds no blocks."""
        sequence = self._asking(key)
        if sequence is not None:
            message = f"the decode engine refused the transfer: {reason}"
            error = Unavailable(message, reason=reason, retry_after_s=self.config.retry_after_s)
            self._abort(sequence, error, tell_transfer=False)

    def kv_arrived(self, key: SequenceKey, first_output_id: int, finished: bool) -> None:
        """Decode: every chunk is verified and written; ``first_output_id`` went out on the prefill engine."""
        sequence = self.roster.by_key.get(key)
        if sequence is None or sequence.state is not State.RECEIVING:
            return
        self.roster.advance(sequence, sequence.initial_count - sequence.computed)
        self.roster.rank_of(sequence).prefix.publish(sequence)
        if finished:
            self._release(sequence)
            return
        sequence.tokens.append(first_output_id)
        self.roster.move(sequence, State.RUNNING)

    def transferred(self, key: SequenceKey) -> None:
        """Prefill: no transfer reads the blocks any more."""
        sequence = self.roster.by_key.get(key)
        if sequence is None:
            return
        if sequence.state in (State.HANDED_OVER, State.PINNED):
            self._release(sequence)
        elif sequence.mode is AttemptMode.PREFILL and sequence.chunk_count:
            sequence.chunk_count = 0
            self._abort(sequence, Unavailable("the transfer ended before the prompt was computed", reason="STAGE_LOST"))

    # Steps

    def plan(self, now: float) -> StepPlan | None:
        """What to compute next; None when there is nothing to tell the ranks before the next command or wake-up."""
        self._expire(now)
        drafts = [_Draft() for _ in self.ranks]
        for rank, draft in zip(self.ranks, drafts, strict=True):
            self._plan_replies(rank, draft)
        while (admitted := self._admission.next()) is not None:
            if admitted.cached_tokens < admitted.least_cached:
                message = f"{admitted.least_cached} tokens with media are not in the cache of an engine that decodes"
                self._abort(admitted, Unavailable(message, reason="NOT_CACHED"))
            else:
                self._tell_place(admitted)
        chunks: list[Slice] = []
        for rank, draft in zip(self.ranks, drafts, strict=True):
            chunks += self._plan_prompts(rank, draft)
        computes = any(draft.slices for draft in drafts)
        if not computes and not any(rank.ended_ids for rank in self.ranks):
            return None
        self.step += computes
        shape = StepShape(
            step=self.step,
            max_tokens=max(sum(part.count for part in draft.slices) for draft in drafts),
            decodes=computes and not chunks,
            vision=any(self._has_vision(part) for part in chunks),
        )
        parts = []
        for rank, draft in zip(self.ranks, drafts, strict=True):
            ended, rank.ended_ids = tuple(rank.ended_ids), []
            parts.append(RankPlan(shape=shape, ended=ended, new=tuple(draft.new), slices=tuple(draft.slices)))
        return StepPlan(shape=shape, parts=tuple(parts))

    def hand_over(self, plan: StepPlan, rank: int, part: LayerPart) -> None:
        """In the midst of a step: keys and values of a rank's tokens are in its blocks, in a part of the layers and in
        those before, whatever else there is to compute. Transfers need not wait for that. Few tokens go when all
        layers have them: a part more is not worth its messages.

        Either all parts of a rank's step are told, in order, or none.
        """
        for piece in plan.parts[rank].slices:
            sequence = self.roster.by_id[piece.id]
            if sequence.mode is AttemptMode.PREFILL:
                end = piece.first + piece.count
                if end - sequence.sent_tokens >= self.config.parted_tokens:
                    self._chunk(sequence, end, part=part)
                elif part.is_last:
                    self._chunk(sequence, end)

    def apply(self, plan: StepPlan, result: StepResult, step_s: float) -> StepOutcome:
        """Takes the result of ``plan``: a token for each slice that samples. No command but
        ``constraint_ready`` and ``hand_over`` may come between the two.

        Raises ValueError if ``result`` does not match the plan.
        """
        slices = plan.slices
        if result.tokens.keys() != {part.id for part in slices if part.sample}:
            raise ValueError(f"step {plan.shape.step} sampled {sorted(result.tokens)}, which is not what was planned")
        outcome = StepOutcome(tokens=[], prompt_logprobs=[])
        share = step_s / max(1, plan.token_count)
        for part in slices:
            sequence = self.roster.by_id[part.id]
            sequence.busy_s += share * part.count
            self.roster.advance(sequence, part.count)
            self.roster.rank_of(sequence).prefix.publish(sequence)
            if sequence.needs_embeddings:
                for unit in sequence.consume_units():
                    self._events.append(ev.MediaConsumed(sequence.key, unit.media_index, unit.unit_index))
            if sequence.prompt_logprobs_due:
                piece = next_prompt_logprobs(sequence, part, result)
                if piece is not None:
                    outcome.prompt_logprobs.append(piece)
            if part.sample:
                logprobs = result.logprobs.get(part.id)
                outcome.tokens.append(self._accept(sequence, result.tokens[part.id], logprobs))
            elif sequence.mode is AttemptMode.PREFILL:
                self._chunk(sequence, sequence.computed)
        return outcome

    def next_wakeup(self) -> float | None:
        """When ``plan`` has something to do without a command: the next deadline or expiry."""
        return self._timers.next_due

    def take_events(self) -> list[ev.Event]:
        """Events since the last call, in order."""
        taken, self._events = self._events, []
        return taken

    def take_block_changes(self) -> Changes:
        """The net changes of what the prefix cache can find, on any rank, since the last call."""
        return self._findable.update(rank.pool.take_changes() for rank in self.ranks)

    # Decisions

    def _plan_replies(self, rank: RankState, draft: _Draft) -> None:
        for sequence in tuple(rank.holders):
            if sequence.state is not State.RUNNING or not sequence.decodes or sequence.constraint_pending:
                continue
            if self._grow(sequence, rank):
                draft.slices.append(self._slice(sequence, 1, draft.new))

    def _plan_prompts(self, rank: RankState, draft: _Draft) -> list[Slice]:
        """What is left of the rank's budget; returns the slices that were added."""
        prompts = [s for s in rank.holders if s.state is State.RUNNING and not s.decodes]
        if not prompts:
            return []
        for sequence in prompts:
            if sequence.begins_to_await_media():
                self._milestone(sequence, MilestoneKind.MEDIA_AWAITED, sequence.computed)
        wants = [Want(s.plannable_tokens - s.computed, len(s.tokens) - s.computed) for s in prompts]
        grants = share_budget(self.config.max_batched_tokens - len(draft.slices), wants)
        chunks = [self._slice(s, count, draft.new) for s, count in zip(prompts, grants, strict=True) if count]
        draft.slices += chunks
        return chunks

    def _has_vision(self, chunk: Slice) -> bool:
        """It may have tokens for the vision experts: by some rules not all of these ids go there."""
        tokens = self.roster.by_id[chunk.id].tokens[chunk.first : chunk.first + chunk.count]
        return max(tokens) >= self.im_patch_id

    def _grow(self, sequence: Sequence, rank: RankState) -> bool:
        """Makes room for the token to be computed, at the cost of the rank's last. False if it cannot run now."""
        if sequence.computed < len(sequence.blocks) * self.config.block_size:
            return True
        while not rank.pool.free:
            victim = choose_victim(rank.holders)
            if victim is None:
                return False
            self._preempt(victim)
            if victim is sequence:
                return False
        sequence.blocks += rank.pool.allocate(1)
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self.preemptions += 1
        if not recomputes_here(sequence, self.im_patch_id):
            message = "the engine ran out of KV blocks"
            retry_after_s = self.config.retry_after_s
            self._abort(sequence, Unavailable(message, reason="PREEMPTED", retry_after_s=retry_after_s))
            return
        self._tell_runner_ended(sequence)
        self.roster.rank_of(sequence).pool.release(sequence.blocks)
        self.roster.requeue(sequence)
        self._events.append(ev.Preempted(sequence.key))
        if sequence.needs_constraint:
            self._events.append(ev.ConstraintNeeded(sequence.key))

    def _slice(self, sequence: Sequence, count: int, new: list[NewSequence]) -> Slice:
        if not sequence.introduced:
            new.append(sequence.introduction())
            if not sequence.started:
                sequence.started = True
                self._milestone(sequence, MilestoneKind.PREFILL_STARTED, sequence.cached_tokens)
        fresh: tuple[int, ...] = ()
        if sequence.told_blocks < len(sequence.blocks):
            fresh = tuple(sequence.blocks[sequence.told_blocks :])
            sequence.told_blocks = len(sequence.blocks)
        first = sequence.computed
        sample = first + count == len(sequence.tokens)
        return Slice(id=sequence.id, first=first, count=count, new_blocks=fresh, sample=sample)

    # Outcomes

    def _accept(self, sequence: Sequence, token: int, logprobs: TokenLogprobs | None) -> TokenEvent:
        busy_s = sequence.take_busy()
        finish = sequence.finish_reason(token, self.eos_ids, self.max_model_len)
        index = len(sequence.tokens) - len(sequence.request.prompt_ids)
        sequence.finished = finish is not None
        if sequence.mode is AttemptMode.PREFILL:
            self.roster.move(sequence, State.HANDED_OVER)
            self._chunk(sequence, sequence.computed, token)
        elif finish is None:
            sequence.tokens.append(token)
        else:
            self._release(sequence)
        return TokenEvent(
            key=sequence.key, index=index, token_id=token, finish=finish, busy_s=busy_s, logprobs=logprobs
        )

    def _chunk(self, sequence: Sequence, end: int, token: int | None = None, part: LayerPart = ALL_LAYERS) -> None:
        chunk = next_chunk(sequence, end, token, part)
        if chunk is not None:
            self._events.append(chunk)

    def _abort(self, sequence: Sequence, error: ServingError, *, tell_transfer: bool = True) -> None:
        """Ends an attempt without a last token. Ends what is ended only once."""
        state = sequence.state
        if state in (State.PINNED, State.ENDED):
            return
        if not sequence.finished:
            self._events.append(ev.Ended(sequence.key, error))
        if state is State.WAITING and sequence.mode is AttemptMode.DECODE:
            reason = "NO_BLOCKS" if error.reason == "NO_BLOCKS" else "ENDED"
            self._events.append(ev.ReservationFailed(sequence.key, reason, error.message))
        elif state is State.RECEIVING:
            self._events.append(ev.ReservationDropped(sequence.key))
        elif sequence.reservation_asked and tell_transfer:
            self._events.append(ev.TransferCancelled(sequence.key))
        if sequence.chunk_count:
            self._tell_runner_ended(sequence)
            self.roster.move(sequence, State.PINNED)
        else:
            self._release(sequence)

    def _release(self, sequence: Sequence) -> None:
        """Gives back everything; the last thing that happens to an attempt."""
        if sequence.state is not State.PINNED:
            self._tell_runner_ended(sequence)
        if sequence.blocks:
            self.roster.rank_of(sequence).pool.release(sequence.blocks)
            sequence.blocks = []
        self.roster.remove(sequence)
        self._milestone(sequence, MilestoneKind.RELEASED)

    # Telling

    def _tell_place(self, sequence: Sequence) -> None:
        """What follows from an admission."""
        if sequence.state is State.RECEIVING:
            rank, held_tokens = self.roster.rank_of(sequence).number, sequence.cached_tokens
            self._events.append(ev.ReservationGranted(sequence.key, rank, tuple(sequence.blocks), held_tokens))
        elif sequence.state is State.RUNNING:
            self._tell_admitted(sequence)
        elif not sequence.reservation_asked:
            sequence.reservation_asked = True
            self._events.append(ev.ReserveNeeded(sequence.key, sequence.initial_count))

    def _tell_admitted(self, sequence: Sequence) -> None:
        """Only of one that runs: embeddings pulled while it waits for a decode engine would starve those that can go
        on.
        """
        if sequence.needs_embeddings:
            self._events.append(ev.Admitted(sequence.key, sequence.cached_tokens))

    def _tell_runner_ended(self, sequence: Sequence) -> None:
        """The leader keeps constraints of those that never had a rank."""
        if sequence.known_to_runner:
            self.ranks[sequence.rank or 0].ended_ids.append(sequence.id)

    def _milestone(self, sequence: Sequence, kind: MilestoneKind, token_count: int = 0) -> None:
        token_count = min(token_count, len(sequence.request.prompt_ids))
        self._events.append(ev.Milestone(sequence.key, kind, sequence.take_busy(), token_count))

    # Time

    def _asking(self, key: SequenceKey) -> Sequence | None:
        """A prefill attempt that waits for the answer to its reservation."""
        sequence = self.roster.by_key.get(key)
        if sequence is None or sequence.state not in (State.RESERVING, State.WAITING):
            return None
        return sequence if sequence.reservation_asked and not sequence.reservation_granted else None

    def _set_timer(self, due: float, key: SequenceKey) -> None:
        self._timers.prune(self.roster.by_key, self._early_reserves)
        self._timers.set(due, key)

    def _expire(self, now: float) -> None:
        for key in self._timers.pop_due(now):
            early = self._early_reserves.get(key)
            if early is not None and early[1] <= now:
                self._fail_early_reserve(key, "UNKNOWN", "no such attempt was submitted in time")
            sequence = self.roster.by_key.get(key)
            if sequence is None:
                continue
            expiry = sequence.reserve_expiry
            if sequence.deadline <= now:
                self._abort(sequence, DeadlineExceeded("the request's time ran out"))
            elif sequence.state is State.WAITING and expiry is not None and expiry <= now:
                message = "no KV blocks became free in time"
                retry_after_s = self.config.retry_after_s
                self._abort(sequence, Unavailable(message, reason="NO_BLOCKS", retry_after_s=retry_after_s))

    def _fail_early_reserve(self, key: SequenceKey, reason: str, message: str) -> None:
        if self._early_reserves.pop(key, None) is not None:
            self._events.append(ev.ReservationFailed(key, reason, message))

    def check_integrity(self) -> None:
        """Raises AssertionError if blocks, lists and counts disagree."""
        self.roster.check_integrity(self.config.block_size)
        for rank in self.ranks:
            assert rank.active <= self.config.max_num_seqs, f"too many sequences take part on rank {rank.number}"
