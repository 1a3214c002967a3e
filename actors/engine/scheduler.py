"""Decides what is computed when. Pure: no tensors, no threads, no clock but the ``now`` it is given.

Commands change the state, ``plan`` says what the next step computes, ``apply`` takes what the step sampled. What others
must hear of is listed as events. Order among attempts is ``Sequence.rank``: priority, arrival, submission; whoever goes
first is also the last to be preempted. In a step decoding sequences come first, prompts share the rest of the budget.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping

from actors.engine import events as ev
from actors.engine.block_pool import BlockPool
from actors.engine.config import EngineConfig
from actors.engine.plan import NewSequence, Slice, StepPlan
from actors.engine.roster import Roster
from actors.engine.sequence import Sequence, SequenceState
from actors.errors import DeadlineExceeded, InternalError, Overloaded, RequestCancelled, ServingError, Unavailable
from actors.types import AttemptMode, MilestoneKind, SequenceKey, TokenEvent

State = SequenceState


class Scheduler:
    """Owns every attempt of an engine and the blocks they hold.

    Commands name attempts by key and ignore unknown ones: an answer may always arrive after the end.
    """

    def __init__(self, config: EngineConfig, pool: BlockPool, eos_ids: frozenset[int]) -> None:
        self.config = config
        self.pool = pool
        self.eos_ids = eos_ids
        self.max_model_len = min(config.max_model_len, pool.total * config.block_size)
        self.roster = Roster()
        self.step = 0
        self._early_reserves: dict[SequenceKey, tuple[int, float]] = {}
        self._timers: list[tuple[float, SequenceKey]] = []
        self._ended_ids: list[int] = []
        self._events: list[ev.Event] = []

    # Commands

    def submit(self, sequence: Sequence, now: float) -> None:
        """Takes a new attempt whose request was validated. A full queue ends it with Overloaded."""
        waiting = self.roster.waiting_count
        self.roster.add(sequence, State.EXPECTED if sequence.mode is AttemptMode.DECODE else State.WAITING)
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
        sequence = self.roster.by_key.get(key)
        if sequence is None or sequence.state is not State.RESERVING:
            return
        if not 0 <= held_tokens <= sequence.initial_count:
            self._abort(sequence, InternalError(f"{held_tokens} tokens held of {sequence.initial_count}"))
            return
        sequence.held_tokens = held_tokens
        self.roster.move(sequence, State.RUNNING)
        # Only now: embeddings pulled while it waits for the decode engine would starve sequences that can go on.
        if sequence.units:
            self._events.append(ev.Admitted(sequence.key))

    def refused(self, key: SequenceKey, reason: str) -> None:
        """Prefill: the decode engine holds no blocks."""
        sequence = self.roster.by_key.get(key)
        if sequence is not None and sequence.state is State.RESERVING:
            message = f"the decode engine refused the transfer: {reason}"
            error = Unavailable(message, reason=reason, retry_after_s=self.config.retry_after_s)
            self._abort(sequence, error, tell_transfer=False)

    def kv_arrived(self, key: SequenceKey, first_output_id: int, finished: bool) -> None:
        """Decode: every chunk is verified and written; ``first_output_id`` went out on the prefill engine."""
        sequence = self.roster.by_key.get(key)
        if sequence is None or sequence.state is not State.RECEIVING:
            return
        if finished:
            self._release(sequence)
            return
        sequence.tokens.append(first_output_id)
        self.roster.advance(sequence, sequence.initial_count)
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
        slices: list[Slice] = []
        new: list[NewSequence] = []
        budget = self.config.max_batched_tokens
        for sequence in list(self.roster.holders):
            if sequence.state is State.RUNNING and self._decodes(sequence) and self._grow(sequence):
                budget -= 1
                slices.append(self._slice(sequence, 1, new))
        self._admit()
        for sequence in self.roster.holders:
            if budget == 0:
                break
            if sequence.state is State.RUNNING and not self._decodes(sequence):
                count = min(budget, sequence.ready_tokens - sequence.computed)
                if count > 0:
                    budget -= count
                    slices.append(self._slice(sequence, count, new))
        if not slices and not self._ended_ids:
            return None
        if slices:
            self.step += 1
        ended, self._ended_ids = tuple(self._ended_ids), []
        return StepPlan(step=self.step, ended=ended, new=tuple(new), slices=tuple(slices))

    def apply(self, plan: StepPlan, sampled: Mapping[int, int], step_s: float) -> list[TokenEvent]:
        """Takes the result of ``plan``: a token for each slice that samples. No command may come between the two.

        Raises ValueError if ``sampled`` does not match the plan.
        """
        if sampled.keys() != {part.id for part in plan.slices if part.sample}:
            raise ValueError(f"step {plan.step} sampled sequences {sorted(sampled)}, which is not what was planned")
        tokens: list[TokenEvent] = []
        share = step_s / max(1, plan.token_count)
        for part in plan.slices:
            sequence = self.roster.by_id[part.id]
            sequence.busy_s += share * part.count
            self.roster.advance(sequence, part.count)
            for unit in sequence.consume_units():
                self._events.append(ev.MediaConsumed(sequence.key, unit.media_index, unit.unit_index))
            if part.sample:
                tokens.append(self._accept(sequence, part, sampled[part.id]))
            elif sequence.mode is AttemptMode.PREFILL:
                self._chunk(sequence, part)
        return tokens

    def next_wakeup(self) -> float | None:
        """When ``plan`` has something to do without a command: the next deadline or expiry."""
        return self._timers[0][0] if self._timers else None

    def take_events(self) -> list[ev.Event]:
        """Events since the last call, in order."""
        taken, self._events = self._events, []
        return taken

    # Decisions

    def _decodes(self, sequence: Sequence) -> bool:
        return sequence.computed >= sequence.initial_count

    def _grow(self, sequence: Sequence) -> bool:
        """Makes room for the token to be computed, at the cost of the newest. False if it cannot run in this step."""
        if self._blocks_for(sequence.computed + 1) <= len(sequence.blocks):
            return True
        while not self.pool.free:
            victim = self._newest_preemptable()
            if victim is None:
                return False
            message = "the engine ran out of KV blocks"
            error = Unavailable(message, reason="PREEMPTED", retry_after_s=self.config.retry_after_s)
            self._abort(victim, error)
            if victim is sequence:
                return False
        sequence.blocks += self.pool.allocate(1)
        return True

    def _newest_preemptable(self) -> Sequence | None:
        """The last of those whose blocks can be had now; never the first of them."""
        candidates = [s for s in self.roster.holders if s.state.takes_part and not s.chunk_count]
        return candidates[-1] if len(candidates) > 1 else None

    def _admit(self) -> None:
        """Gives blocks to the head of the queue while the whole of it fits. Nobody overtakes the head."""
        queue, holders = self.roster.queue, self.roster.holders
        while queue and self.roster.active_count < self.config.max_num_seqs:
            sequence = queue[0]
            need = self._blocks_for(self._admission_tokens(sequence))
            # Replies that grow need a block each before long; admission leaves it to them.
            growing = sum(s.state is State.RUNNING and s.mode is not AttemptMode.PREFILL for s in holders)
            if need + growing > self.pool.free:
                return
            sequence.blocks = self.pool.allocate(need)
            if sequence.units and sequence.mode is not AttemptMode.PREFILL:
                self._events.append(ev.Admitted(sequence.key))
            if sequence.mode is AttemptMode.DECODE:
                self.roster.move(sequence, State.RECEIVING)
                self._events.append(ev.ReservationGranted(sequence.key, tuple(sequence.blocks)))
            elif sequence.mode is AttemptMode.PREFILL:
                self.roster.move(sequence, State.RESERVING)
                self._events.append(ev.ReserveNeeded(sequence.key, sequence.initial_count))
            else:
                self.roster.move(sequence, State.RUNNING)

    def _admission_tokens(self, sequence: Sequence) -> int:
        margin = {AttemptMode.PREFILL: 0, AttemptMode.COLOCATED: 1, AttemptMode.DECODE: 1}[sequence.mode]
        if sequence.mode is AttemptMode.DECODE:
            margin = max(margin, self.config.reserve_margin_tokens)
        return min(sequence.initial_count + margin, self.max_model_len)

    def _blocks_for(self, token_count: int) -> int:
        return -(-token_count // self.config.block_size)

    def _slice(self, sequence: Sequence, count: int, new: list[NewSequence]) -> Slice:
        if not sequence.introduced:
            new.append(sequence.introduction())
            if sequence.mode is not AttemptMode.DECODE:
                self._milestone(sequence, MilestoneKind.PREFILL_STARTED)
        fresh = tuple(sequence.blocks[sequence.told_blocks :])
        sequence.told_blocks = len(sequence.blocks)
        first = sequence.computed
        sample = first + count == len(sequence.tokens)
        return Slice(id=sequence.id, first=first, count=count, new_blocks=fresh, sample=sample)

    # Outcomes

    def _accept(self, sequence: Sequence, part: Slice, token: int) -> TokenEvent:
        busy_s = sequence.take_busy()
        finish = sequence.finish_reason(token, self.eos_ids, self.max_model_len)
        index = len(sequence.tokens) - len(sequence.request.prompt_ids)
        sequence.finished = finish is not None
        if sequence.mode is AttemptMode.PREFILL:
            self.roster.move(sequence, State.HANDED_OVER)
            self._chunk(sequence, part, token)
        elif finish is None:
            sequence.tokens.append(token)
        else:
            self._release(sequence)
        return TokenEvent(key=sequence.key, index=index, token_id=token, finish=finish, busy_s=busy_s)

    def _chunk(self, sequence: Sequence, part: Slice, token: int | None = None) -> None:
        first = max(part.first, sequence.held_tokens)
        count = max(0, sequence.computed - first)
        if count == 0 and token is None:
            return
        chunk = ev.ComputedChunk(
            key=sequence.key,
            index=sequence.chunk_count,
            first_token=sequence.computed - count,
            token_count=count,
            block_table=tuple(sequence.blocks),
            last=token is not None,
            first_output_id=token,
            finished=sequence.finished,
        )
        sequence.chunk_count += 1
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
        elif state.holds_blocks and sequence.mode is AttemptMode.PREFILL and tell_transfer:
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
        self.pool.release(sequence.blocks)
        sequence.blocks = []
        self.roster.remove(sequence)
        self._milestone(sequence, MilestoneKind.RELEASED)

    def _tell_runner_ended(self, sequence: Sequence) -> None:
        if sequence.introduced or sequence.media_on_hand:
            self._ended_ids.append(sequence.id)

    def _milestone(self, sequence: Sequence, kind: MilestoneKind) -> None:
        self._events.append(ev.Milestone(sequence.key, kind, sequence.take_busy()))

    def _set_timer(self, due: float, key: SequenceKey) -> None:
        """Wakes ``plan`` at ``due``. Timers of ended attempts are dropped once they are the most."""
        if len(self._timers) > 64 + 4 * (len(self.roster.by_key) + len(self._early_reserves)):
            self._timers = [t for t in self._timers if t[1] in self.roster.by_key or t[1] in self._early_reserves]
            heapq.heapify(self._timers)
        heapq.heappush(self._timers, (due, key))

    def _expire(self, now: float) -> None:
        while self._timers and self._timers[0][0] <= now:
            _, key = heapq.heappop(self._timers)
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
        self.roster.check_integrity(self.pool, self.config.block_size)
        assert self.roster.active_count <= self.config.max_num_seqs, "too many sequences take part"
