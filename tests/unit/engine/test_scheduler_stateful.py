"""Random histories: each attempt ends once, no block leaks or is freed twice, bounds hold, everything finishes."""

from __future__ import annotations

import itertools
from collections import Counter

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from actors.engine import events as ev
from actors.engine.block_pool import BlockPool
from actors.engine.config import EngineConfig
from actors.engine.plan import StepPlan
from actors.engine.scheduler import Scheduler
from actors.engine.sequence import Sequence, SequenceState
from actors.errors import Unavailable
from actors.types import AttemptMode, EngineRole, Grid, MediaKind, MilestoneKind, SequenceKey
from tests.unit.engine.harness import EOS, IMAGE, key, request, span

State = SequenceState


class FakeRunner:
    """Knows of each sequence only what plans told it, and checks that this suffices and is consistent."""

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self.tokens: dict[int, int] = {}
        self.computed: dict[int, int] = {}
        self.blocks: dict[int, list[int]] = {}

    def run(self, plan: StepPlan, token: int) -> dict[int, int]:
        for id in plan.ended:
            for table in (self.tokens, self.computed, self.blocks):
                table.pop(id, None)
        for new in plan.new:
            assert new.id not in self.tokens, "introduced twice"
            self.tokens[new.id] = len(new.token_ids)
            self.blocks[new.id] = []
        sampled = {}
        assert len({part.id for part in plan.slices}) == len(plan.slices)
        for part in plan.slices:
            assert part.first == self.computed.setdefault(part.id, part.first), "tokens skipped or repeated"
            self.blocks[part.id] += part.new_blocks
            assert part.count >= 1
            assert part.first + part.count <= len(self.blocks[part.id]) * self.block_size, "no block for a token"
            self.computed[part.id] += part.count
            assert part.sample == (self.computed[part.id] == self.tokens[part.id])
            if part.sample:
                self.tokens[part.id] += 1
                sampled[part.id] = token
        used = Counter(itertools.chain.from_iterable(self.blocks.values()))
        assert max(used.values(), default=1) == 1, "two sequences share a block"
        return sampled


class SchedulerMachine(RuleBasedStateMachine):
    @initialize(
        blocks=st.integers(4, 14),
        block_size=st.integers(1, 4),
        max_num_seqs=st.integers(1, 4),
        spare=st.integers(0, 5),
        max_waiting=st.integers(1, 6),
    )
    def start(self, blocks: int, block_size: int, max_num_seqs: int, spare: int, max_waiting: int) -> None:
        self.config = EngineConfig(
            role=EngineRole.COLOCATED,
            block_size=block_size,
            max_model_len=1000,
            max_num_seqs=max_num_seqs,
            max_batched_tokens=max_num_seqs + spare,
            max_waiting=max_waiting,
            reserve_margin_tokens=3,
            reserve_wait_s=50.0,
        )
        self.scheduler = Scheduler(self.config, BlockPool(blocks), frozenset({EOS}))
        self.runner = FakeRunner(block_size)
        self.now = 0.0
        self.counter = itertools.count()
        self.submitted: set[SequenceKey] = set()
        self.requested: list[SequenceKey] = []
        self.closed: Counter[SequenceKey] = Counter()
        self.released: Counter[SequenceKey] = Counter()
        self.asked: Counter[SequenceKey] = Counter()
        self.answered: Counter[SequenceKey] = Counter()
        self.preempted: set[SequenceKey] = set()
        self.lent: dict[SequenceKey, tuple[int, ...]] = {}

    # Intake

    @rule(
        mode=st.sampled_from(list(AttemptMode)),
        length=st.integers(1, 12),
        outputs=st.integers(0, 2),
        max_tokens=st.integers(3, 30),
        image=st.booleans(),
        arrival=st.integers(0, 5),
        priority=st.sampled_from([0, 0, 0, 1]),
        life=st.sampled_from([5.0, 1000.0]),
    )
    def submit(
        self,
        mode: AttemptMode,
        length: int,
        outputs: int,
        max_tokens: int,
        image: bool,
        arrival: int,
        priority: int,
        life: float,
    ) -> None:
        if length + 4 + outputs + 1 > self.scheduler.max_model_len:
            return
        number = next(self.counter)
        prompt = [5] * length + ([IMAGE] * 4 if image else [])
        wanted = request(
            prompt,
            media=[span(MediaKind.IMAGE, length, Grid(1, 4, 4))] if image else [],
            outputs=[6] * outputs,
            max_tokens=max_tokens,
            arrival_s=float(arrival),
            priority=priority,
            ignore_eos=False,
        )
        sequence = Sequence(id=number, key=key(number), request=wanted, mode=mode, deadline=self.now + life)
        self.submitted.add(sequence.key)
        self.scheduler.submit(sequence, self.now)
        self.listen()

    @rule(length=st.integers(1, 4), outputs=st.integers(0, 2), priority=st.sampled_from([0, 1]))
    def submit_long_reply(self, length: int, outputs: int, priority: int) -> None:
        self.submit(AttemptMode.COLOCATED, length, outputs, 60, False, 0, priority, 1000.0)

    @rule(length=st.integers(1, 8), max_tokens=st.integers(1, 2))
    def submit_with_peer(self, length: int, max_tokens: int) -> None:
        """A transfer that gets as far as the room allows."""
        number = next(self.counter)
        name = key(number)
        if length + 1 > self.scheduler.max_model_len:
            return
        self.submitted.add(name)
        wanted = request([5] * length, max_tokens=max_tokens)
        sequence = Sequence(id=number, key=name, request=wanted, mode=AttemptMode.PREFILL, deadline=self.now + 100.0)
        self.scheduler.submit(sequence, self.now)
        self.step_once(9)
        self.scheduler.reserved(name, 0)
        self.step_once(9)

    def pick(self, data: st.DataObject, *states: State) -> SequenceKey | None:
        keys = [s.key for s in self.scheduler.roster.by_key.values() if not states or s.state in states]
        return data.draw(st.sampled_from(keys)) if keys else None

    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        if (name := self.pick(data)) is not None:
            self.scheduler.cancel(name)
            self.listen()

    @rule(data=st.data())
    def fail(self, data: st.DataObject) -> None:
        if (name := self.pick(data)) is not None:
            self.scheduler.end(name, Unavailable("lost"))
            self.listen()

    @rule(number=st.integers(0, 40))
    def cancel_anything(self, number: int) -> None:
        self.scheduler.cancel(key(number))
        self.listen()

    # The surroundings' answers, timely or not

    @rule(data=st.data())
    def supply(self, data: st.DataObject) -> None:
        if (name := self.pick(data)) is not None:
            self.scheduler.add_embedding(name, 0, 0)

    @rule(data=st.data(), held=st.integers(0, 3))
    def reserved(self, data: st.DataObject, held: int) -> None:
        if (name := self.pick(data, State.RESERVING)) is not None:
            held = min(held, self.scheduler.roster.by_key[name].initial_count)
            self.scheduler.reserved(name, held)
            self.listen()

    @rule(data=st.data())
    def refused(self, data: st.DataObject) -> None:
        if (name := self.pick(data, State.RESERVING)) is not None:
            self.scheduler.refused(name, "NO_BLOCKS")
            self.listen()

    @rule(data=st.data(), ahead=st.integers(0, 2))
    def reserve(self, data: st.DataObject, ahead: int) -> None:
        name = self.pick(data, State.EXPECTED)
        if name is None or ahead == 2:
            name = key(10_000 + len(self.requested))
        count = self.scheduler.roster.by_key[name].initial_count if name in self.scheduler.roster.by_key else 3
        self.ask(name, count)

    def ask(self, name: SequenceKey, count: int) -> None:
        self.requested.append(name)
        self.asked[name] += 1
        self.scheduler.reserve(name, count, self.now)
        self.listen()

    @rule(data=st.data(), finished=st.booleans())
    def kv_arrived(self, data: st.DataObject, finished: bool) -> None:
        if (name := self.pick(data, State.RECEIVING)) is not None:
            self.scheduler.kv_arrived(name, 9, finished)
            self.listen()

    @rule(data=st.data())
    def transferred(self, data: st.DataObject) -> None:
        if (name := self.pick(data)) is not None:
            self.lent.pop(name, None)
            self.scheduler.transferred(name)
            self.listen()

    # Time

    @rule(seconds=st.sampled_from([0.1, 1.0, 6.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @precondition(lambda self: bool(self.scheduler.roster.by_key))
    @rule(token=st.sampled_from([9, 9, 9, EOS]), repeat=st.integers(1, 12))
    def step(self, token: int, repeat: int) -> None:
        for _ in range(repeat):
            self.step_once(token)

    def step_once(self, token: int) -> bool:
        running = [s for s in self.scheduler.roster.by_key.values() if s.state.takes_part and not s.chunk_count]
        oldest = min(running, key=lambda s: s.rank).key if running else None
        plan = self.scheduler.plan(self.now)
        preempted_before = set(self.preempted)
        self.listen()
        assert oldest not in self.preempted - preempted_before, "the oldest was preempted"
        if plan is None:
            return False
        assert plan.token_count <= self.config.max_batched_tokens, "budget exceeded"
        sampled = self.runner.run(plan, token)
        for event in self.scheduler.apply(plan, sampled, 0.0):
            if event.finish is not None:
                self.closed[event.key] += 1
        self.listen()
        return True

    # What must hold

    def listen(self) -> None:
        for event in self.scheduler.take_events():
            match event:
                case ev.Ended(name, error):
                    self.closed[name] += 1
                    if error.reason == "PREEMPTED":
                        self.preempted.add(name)
                case ev.Milestone(name, MilestoneKind.RELEASED, _):
                    self.released[name] += 1
                case ev.ReservationGranted(name, _) | ev.ReservationFailed(name, _, _):
                    self.answered[name] += 1
                case ev.ComputedChunk():
                    self.lent[event.key] = event.block_table
                case _:
                    pass

    @invariant()
    def sound(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        self.scheduler.check_integrity()
        assert max(self.closed.values(), default=0) <= 1, "ended twice"
        assert max(self.released.values(), default=0) <= 1, "released twice"
        assert self.scheduler.roster.waiting_count <= self.config.max_waiting
        assert all(self.answered[name] <= count for name, count in self.asked.items())
        for name, table in self.lent.items():
            assert tuple(self.scheduler.roster.by_key[name].blocks) == table, "blocks freed under a transfer"
        assert set(self.released) == self.submitted - set(self.scheduler.roster.by_key)

    def teardown(self) -> None:
        """With everything answered, everything finishes: nobody starves."""
        if not hasattr(self, "scheduler"):
            return
        for _ in range(3000):
            if not self.scheduler.roster.by_key:
                break
            for sequence in list(self.scheduler.roster.by_key.values()):
                self.scheduler.add_embedding(sequence.key, 0, 0)
                match sequence.state:
                    case State.EXPECTED:
                        self.ask(sequence.key, sequence.initial_count)
                    case State.RESERVING:
                        self.scheduler.reserved(sequence.key, 0)
                    case State.RECEIVING:
                        self.scheduler.kv_arrived(sequence.key, 9, False)
                    case State.HANDED_OVER | State.PINNED:
                        self.lent.pop(sequence.key, None)
                        self.scheduler.transferred(sequence.key)
                    case _:
                        pass
            self.step_once(9)
            self.sound()
        self.now += 2.0
        self.step_once(9)
        assert not self.scheduler.roster.by_key, "attempts never ended"
        assert self.scheduler.pool.free == self.scheduler.pool.total
        assert not self.runner.tokens, "the runner still holds sequences"
        assert self.asked == self.answered, "reservations without an answer"
        handed_over = {name for name in self.submitted if self.closed[name] == 0}
        assert handed_over <= {name for name in self.submitted if self.released[name] == 1}


SchedulerMachine.TestCase.settings = settings(max_examples=100, stateful_step_count=60, deadline=None)
TestScheduler = SchedulerMachine.TestCase
