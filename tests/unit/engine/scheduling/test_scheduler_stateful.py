"""Random histories: nothing leaks or is shared wrongly, bounds hold, stories make sense, everything finishes."""

from __future__ import annotations

import itertools
from collections import Counter

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from actors.engine import events as ev
from actors.engine.config import EngineConfig
from actors.engine.plan import LayerPart, StepPlan, StepResult
from actors.engine.scheduling.block_pool import BlockPool
from actors.engine.scheduling.rank_state import RankState
from actors.engine.scheduling.scheduler import Scheduler
from actors.engine.scheduling.sequence import Sequence, SequenceState
from actors.errors import Unavailable
from actors.types import AttemptMode, EngineRequest, EngineRole, SequenceKey
from tests.unit.engine.engine_requests import EOS, IMAGE, key, request
from tests.unit.engine.scheduling.attempt_specs import LONG_S, SPECS, Spec
from tests.unit.engine.scheduling.attempt_story import Story
from tests.unit.engine.scheduling.fake_runner import FakeRunner, contents
from tests.unit.engine.scheduling.scheduler_bench import check_progress, hasher_of

State = SequenceState


class SchedulerMachine(RuleBasedStateMachine):
    @initialize(
        ranks=st.sampled_from([1, 2, 4]),
        blocks=st.integers(5, 16),
        block_size=st.integers(1, 4),
        max_num_seqs=st.integers(1, 5),
        spare=st.integers(0, 6),
        max_waiting=st.sampled_from([3, 20, 20, 20]),
        margin=st.integers(0, 4),
        caching=st.sampled_from([True, True, True, False]),
        eager=st.booleans(),
    )
    def start(
        self,
        ranks: int,
        blocks: int,
        block_size: int,
        max_num_seqs: int,
        spare: int,
        max_waiting: int,
        margin: int,
        caching: bool,
        eager: bool,
    ) -> None:
        self.config = EngineConfig(
            role=EngineRole.COLOCATED,
            block_size=block_size,
            max_model_len=50,
            max_num_seqs=max_num_seqs,
            max_batched_tokens=max_num_seqs + spare,
            max_waiting=max_waiting,
            reserve_margin_tokens=margin,
            reserve_wait_s=50.0,
            priority_step_s=3.0,
            prefix_caching=caching,
            parted_tokens=3,
        )
        self.pools = [BlockPool(blocks + number) for number in range(ranks)]
        self.scheduler = Scheduler(self.config, self.pools, frozenset({EOS}), IMAGE)
        self.runners = [FakeRunner(block_size) for _ in range(ranks)]
        self.early: set[int] = set()
        """Sequences whose constraints came before they were introduced to a runner."""
        self.eager = eager
        self.now = 0.0
        self.counter = itertools.count()
        self.stories: dict[SequenceKey, Story] = {}
        self.past: list[EngineRequest] = []
        self.asked: Counter[SequenceKey] = Counter()
        self.answered: Counter[SequenceKey] = Counter()
        self.findable: set[bytes] = set()

    # Intake

    @rule(specs=st.lists(SPECS, min_size=1, max_size=4))
    def submit(self, specs: list[Spec]) -> None:
        for spec in specs:
            self.take(spec.request(), spec.mode, self.now + spec.life_s, spec.bound)

    def take(self, wanted: EngineRequest, mode: AttemptMode, deadline: float = LONG_S, bound: bool = False) -> None:
        if len(wanted.prompt_ids) + len(wanted.output_ids) + 1 > self.scheduler.max_model_len:
            return
        name = key(next(self.counter))
        sequence = Sequence(
            key=name,
            request=wanted,
            mode=mode,
            deadline=deadline,
            hasher=hasher_of(wanted, self.config.block_size) if self.config.prefix_caching else None,
            needs_constraint=bound,
        )
        self.stories[name] = Story(sequence)
        self.scheduler.submit(sequence, self.now)
        self.listen()

    @rule(
        length=st.integers(1, 6),
        modes=st.lists(st.sampled_from(list(AttemptMode)), min_size=1, max_size=3),
        picture=st.sampled_from([None, 1]),
        bound=st.booleans(),
        scored=st.sampled_from([None, None, 0]),
    )
    def submit_long_replies(
        self, length: int, modes: list[AttemptMode], picture: int | None, bound: bool, scored: int | None
    ) -> None:
        """What runs out of blocks soonest: the first of them is pure text, and grows at the cost of the others."""
        for number, mode in enumerate([AttemptMode.COLOCATED, *modes]):
            shown = picture if number else None
            spec = Spec(mode=mode, family=0, length=length, max_tokens=40, picture=shown, scored=scored)
            self.take(spec.request(), mode, bound=bound)

    @rule(length=st.integers(1, 12), steps=st.integers(5, 30))
    def transfer_under_pressure(self, length: int, steps: int) -> None:
        """A reply grows while the rest of a prompt that is being sent waits for its picture."""
        self.take(Spec(mode=AttemptMode.COLOCATED, family=0, length=1, max_tokens=40).request(), AttemptMode.COLOCATED)
        spec = Spec(mode=AttemptMode.PREFILL, family=1, length=length, max_tokens=40, picture=0, arrival_s=1.0)
        self.take(spec.request(), spec.mode)
        for _ in range(steps):
            for sequence in list(self.scheduler.roster.by_key.values()):
                if sequence.state is State.RESERVING:
                    self.answer_reserve(sequence.key, 0)
            self.step_once(9)

    @precondition(lambda self: bool(self.past))
    @rule(data=st.data(), mode=st.sampled_from(list(AttemptMode)), more=st.integers(0, 4))
    def submit_next_turn(self, data: st.DataObject, mode: AttemptMode, more: int) -> None:
        """A prompt that begins with one that was computed."""
        before = data.draw(st.sampled_from(self.past))
        prompt = [*before.prompt_ids, *before.output_ids, *[9] * more, 8]
        self.take(request(prompt, media=before.media, max_tokens=12, salt=before.salt, ignore_eos=False), mode)

    def pick(self, data: st.DataObject, *states: State) -> SequenceKey | None:
        keys = [s.key for s in self.scheduler.roster.by_key.values() if not states or s.state in states]
        return data.draw(st.sampled_from(keys)) if keys else None

    @rule(
        data=st.data(),
        how=st.sampled_from(["cancel", "cancel", "fail"]),
        states=st.sampled_from([(), (State.RECEIVING, State.HANDED_OVER), (State.RESERVING, State.RUNNING)]),
    )
    def end(self, data: st.DataObject, how: str, states: tuple[State, ...]) -> None:
        if (name := self.pick(data, *states)) is not None:
            if how == "cancel":
                self.scheduler.cancel(name)
            else:
                self.scheduler.end(name, Unavailable("lost"))
            self.listen()

    @rule(number=st.integers(0, 40))
    def cancel_anything(self, number: int) -> None:
        self.scheduler.cancel(key(number))
        self.listen()

    # The surroundings' answers, timely or not

    @rule(data=st.data(), unit=st.integers(0, 1))
    def supply(self, data: st.DataObject, unit: int) -> None:
        if (name := self.pick(data)) is not None:
            self.give_embedding(name, unit)

    def give_embedding(self, name: SequenceKey, unit: int) -> None:
        id = self.scheduler.add_embedding(name, 0, unit)
        if id is not None:
            assert unit < self.stories[name].request.media[0].grid.units
            embedding_key = self.stories[name].request.media[0].embedding_keys[unit]
            self.runner_of(self.scheduler.roster.by_key[name]).supply(id, (0, unit), embedding_key)

    def runner_of(self, sequence: Sequence) -> FakeRunner:
        assert sequence.rank is not None
        return self.runners[sequence.rank]

    @rule(data=st.data())
    def constrain(self, data: st.DataObject) -> None:
        if (name := self.pick(data)) is not None:
            self.give_constraint(name)

    def give_constraint(self, name: SequenceKey) -> None:
        id = self.scheduler.constraint_ready(name)
        if id is not None:
            assert self.stories[name].bound
            sequence = self.scheduler.roster.by_key[name]
            if sequence.introduced:
                self.runner_of(sequence).constrain(id)
            else:
                self.early.add(id)

    @rule(data=st.data(), held=st.integers(0, 30))
    def reserved(self, data: st.DataObject, held: int) -> None:
        if (name := self.pick(data, State.RESERVING, State.WAITING)) is not None:
            self.answer_reserve(name, held)

    def answer_reserve(self, name: SequenceKey, held: int) -> None:
        sequence = self.scheduler.roster.by_key[name]
        if not sequence.reservation_asked or sequence.reservation_granted:
            return
        size = self.config.block_size
        held = min(held, sequence.initial_count - 1) // size * size
        self.stories[name].sent_to = held
        self.scheduler.reserved(name, held)
        self.listen()

    @rule(data=st.data())
    def refused(self, data: st.DataObject) -> None:
        if (name := self.pick(data, State.RESERVING)) is not None:
            self.stories[name].transfer_over = True
            self.scheduler.refused(name, "NO_BLOCKS")
            self.listen()

    @rule(data=st.data(), ahead=st.integers(0, 2))
    def reserve(self, data: st.DataObject, ahead: int) -> None:
        name = self.pick(data, State.EXPECTED)
        if name is None or ahead == 2:
            name = key(10_000 + len(self.asked))
        self.ask(name)

    @rule(data=st.data())
    def reserve_again(self, data: st.DataObject) -> None:
        if (name := self.pick(data)) is not None:
            self.ask(name)

    def ask(self, name: SequenceKey) -> None:
        sequence = self.scheduler.roster.by_key.get(name)
        self.asked[name] += 1
        self.scheduler.reserve(name, sequence.initial_count if sequence else 3, self.now)
        self.listen()

    @rule(data=st.data(), tokens=st.integers(0, 30))
    def receive(self, data: st.DataObject, tokens: int) -> None:
        """Some of a prompt's KV comes in, on top of what is held."""
        if (name := self.pick(data, State.RECEIVING)) is not None:
            self.write(self.scheduler.roster.by_key[name], tokens)

    def write(self, sequence: Sequence, tokens: int) -> None:
        truth = contents(sequence.request, sequence.tokens)[:tokens]
        held = self.stories[sequence.key].granted
        assert held is not None
        self.runner_of(sequence).write(sequence.blocks, truth, held)

    @rule(data=st.data(), finished=st.sampled_from([False, False, False, True]))
    def kv_arrived(self, data: st.DataObject, finished: bool) -> None:
        if (name := self.pick(data)) is not None:
            self.finish_transfer(name, finished)

    def finish_transfer(self, name: SequenceKey, finished: bool) -> None:
        sequence, story = self.scheduler.roster.by_key[name], self.stories[name]
        if sequence.state is State.RECEIVING:
            self.write(sequence, sequence.initial_count)
            story.granted, story.over_there = None, finished
        self.scheduler.kv_arrived(name, 9, finished)
        self.listen()

    @rule(data=st.data())
    def transferred(self, data: st.DataObject) -> None:
        if (name := self.pick(data)) is not None:
            self.give_blocks_back(name)

    def give_blocks_back(self, name: SequenceKey) -> None:
        """No transfer reads them any more: until now they were what was handed out."""
        self.check_lent(name)
        lent = self.stories[name].chunks
        if lent and not lent[-1].last:
            self.stories[name].transfer_over = False  # it is ended by this, and may be told of it
        self.stories[name].read = True
        self.scheduler.transferred(name)
        self.listen()

    def check_lent(self, name: SequenceKey) -> None:
        story, sequence = self.stories[name], self.scheduler.roster.by_key[name]
        for chunk in story.chunks:
            assert tuple(sequence.blocks) == chunk.block_table, "blocks freed under a transfer"
            end = chunk.first_token + chunk.token_count
            truth = contents(sequence.request, sequence.tokens[:end])
            self.runner_of(sequence).check(chunk.block_table, truth[chunk.first_token :], chunk.first_token)

    # Time

    @rule(seconds=st.sampled_from([0.1, 1.0, 6.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @precondition(lambda self: bool(self.scheduler.roster.by_key))
    @rule(token=st.sampled_from([9, 9, 9, 9, EOS]), repeat=st.integers(1, 12))
    def step(self, token: int, repeat: int) -> None:
        for _ in range(repeat):
            if not self.step_once(token):
                break

    @precondition(lambda self: bool(self.scheduler.roster.by_key))
    @rule(repeat=st.integers(1, 25), patience=st.integers(0, 4))
    def live(self, repeat: int, patience: int) -> None:
        """All goes as it should, but media and transfers take their time: with 4 they do not come at all."""
        for number in range(repeat):
            for sequence in list(self.scheduler.roster.by_key.values()):
                if sequence.state is not State.HANDED_OVER or number % 4 >= patience:
                    self.answer(sequence, media=number % 4 >= patience)
            self.step_once(9)

    def step_once(self, token: int) -> bool:
        safe = {s: s.preemptions for rank in self.scheduler.ranks if (s := self.first_of(rank)) is not None}
        waited = list(self.scheduler.roster.queue)
        plan = self.scheduler.plan(self.now)
        check_progress(self.scheduler, plan)
        admitted = [self.position(s) for s in waited if s.state.takes_part]
        left = [self.position(s) for s in waited if s.state is State.WAITING]
        assert not admitted or not left or max(admitted) <= min(left), "the head of the queue was overtaken"
        self.listen()
        for first, lost in safe.items():
            assert first.preemptions == lost and self.stories[first.key].error != "PREEMPTED", "the first was preempted"
        if plan is None:
            return False
        self.check_shape(plan)
        result = self.run_ranks(plan, token)
        for rank in range(len(plan.parts)):
            parts = (plan.shape.step + rank) % 4  # Ranks may tell of it before they are through, or not.
            for index in range(parts):
                self.scheduler.hand_over(plan, rank, LayerPart(index, parts))
                self.listen()
        outcome = self.scheduler.apply(plan, result, 0.0)
        for piece in outcome.prompt_logprobs:
            self.stories[piece.key].hear_scores(piece)
        assert len({event.key for event in outcome.tokens}) == len(outcome.tokens)
        for event in outcome.tokens:
            self.stories[event.key].hear_token(event)
        self.listen()
        self.sound()
        return True

    def first_of(self, rank: RankState) -> Sequence | None:
        """Whoever must not be preempted there, unless its time is over."""
        preemptible = [s for s in rank.holders if s.state.takes_part and not s.chunk_count]
        return preemptible[0] if preemptible and preemptible[0].deadline > self.now else None

    def run_ranks(self, plan: StepPlan, token: int) -> StepResult:
        known = {s.id: (s.request, s.needs_constraint) for s in self.scheduler.roster.by_key.values()}
        results = []
        for runner, part in zip(self.runners, plan.parts, strict=True):
            for id in (*part.ended, *(new.id for new in part.new)):
                if id in self.early:
                    self.early.remove(id)
                    runner.constrain(id)
            results.append(runner.run(part, known, token))
        return StepResult.gathered(results)

    def check_shape(self, plan: StepPlan) -> None:
        counts = [part.token_count for part in plan.parts]
        assert max(counts) <= self.config.max_batched_tokens, "budget exceeded"
        assert all(part.shape == plan.shape for part in plan.parts)
        assert (plan.shape.max_tokens, plan.shape.step) == (max(counts), self.scheduler.step)
        by_id = self.scheduler.roster.by_id
        decodes = [by_id[part.id].decodes for part in plan.slices]
        assert plan.shape.decodes == (bool(decodes) and all(decodes))
        shown = [by_id[part.id].tokens[part.first : part.first + part.count] for part in plan.slices]
        assert plan.shape.vision == any(token >= IMAGE for tokens in shown for token in tokens)

    def position(self, sequence: Sequence) -> float:
        return sequence.request.arrival_s - sequence.request.priority * self.config.priority_step_s

    # What must hold

    def listen(self) -> None:
        for event in self.scheduler.take_events():
            if isinstance(event, ev.ReservationGranted | ev.ReservationFailed):
                self.answered[event.key] += 1
            story = self.stories.get(event.key)
            if story is None:
                assert isinstance(event, ev.ReservationFailed), "told of an attempt that was never submitted"
                continue
            story.hear(event)
            if isinstance(event, ev.ConstraintNeeded) and self.eager:
                self.give_constraint(event.key)  # between a plan and its run, as the engine does
            if isinstance(event, ev.ReservationGranted):
                sequence = self.scheduler.roster.by_key[event.key]
                assert (sequence.rank, tuple(sequence.blocks)) == (event.rank, event.block_table)
                truth = contents(story.request, story.request.prompt_ids)[: event.held_tokens]
                self.runners[event.rank].check(event.block_table, truth)
            if story.released and story.request not in self.past:
                self.past.append(story.request)
        changes = self.scheduler.take_block_changes()
        assert not self.findable & set(changes.stored) and self.findable >= set(changes.removed)
        self.findable = (self.findable | set(changes.stored)) - set(changes.removed)

    @invariant()
    def sound(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        self.scheduler.check_integrity()
        roster = self.scheduler.roster
        came_back = sum(s.preemptions > 0 for s in roster.queue)
        assert roster.waiting_count - came_back <= self.config.max_waiting, "the queue is too long"
        assert all(self.answered[name] <= count for name, count in self.asked.items())
        assert {name for name, story in self.stories.items() if not story.released} == set(roster.by_key)
        assert not (self.findable and not self.config.prefix_caching)
        for name in roster.by_key:
            self.check_lent(name)

    def teardown(self) -> None:
        """With everything answered, everything finishes: nobody starves."""
        if not hasattr(self, "scheduler"):
            return
        for _ in range(1500):
            if not self.scheduler.roster.by_key:
                break
            for sequence in list(self.scheduler.roster.by_key.values()):
                self.answer(sequence)
            self.step_once(9)
        self.now += 2.0  # reservations of attempts that never came
        self.step_once(9)
        assert not self.scheduler.roster.by_key, "attempts never ended"
        assert all(pool.free == pool.total for pool in self.pools)
        assert all(runner.empty for runner in self.runners) and not self.early, "a runner still holds something"
        assert self.asked == self.answered, "reservations without an answer"
        assert all(story.released for story in self.stories.values())

    def answer(self, sequence: Sequence, media: bool = True) -> None:
        if media:
            self.give_embedding(sequence.key, 0)
            self.give_embedding(sequence.key, 1)
        self.give_constraint(sequence.key)
        match sequence.state:
            case State.EXPECTED:
                self.ask(sequence.key)
            case State.RESERVING:
                self.answer_reserve(sequence.key, 0)
            case State.RECEIVING:
                self.finish_transfer(sequence.key, False)
            case State.HANDED_OVER | State.PINNED:
                self.give_blocks_back(sequence.key)
            case _:
                pass


SchedulerMachine.TestCase.settings = settings(
    max_examples=200, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
TestScheduler = SchedulerMachine.TestCase
