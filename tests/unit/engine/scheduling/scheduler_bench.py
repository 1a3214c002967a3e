"""A scheduler with a clock set by hand and a runner that draws what it is told to."""

from __future__ import annotations

from typing import Any

from actors.engine import events as ev
from actors.engine.config import EngineConfig
from actors.engine.plan import StepPlan, StepResult
from actors.engine.scheduling.block_hash import BlockHasher
from actors.engine.scheduling.block_pool import BlockPool
from actors.engine.scheduling.outcomes import StepOutcome
from actors.engine.scheduling.scheduler import Scheduler
from actors.engine.scheduling.sequence import Sequence, SequenceState
from actors.reports import KvIdentity
from actors.types import AttemptMode, EngineRequest, EngineRole, SequenceKey, TokenEvent, TokenLogprobs
from tests.unit.engine.engine_requests import EOS, IMAGE, key, request

COLOCATED, PREFILL, DECODE = AttemptMode.COLOCATED, AttemptMode.PREFILL, AttemptMode.DECODE


def identity(block_size: int) -> KvIdentity:
    return KvIdentity(fingerprint="00", dtype="float64", block_size=block_size, switches="")


def hasher_of(wanted: EngineRequest, block_size: int) -> BlockHasher:
    return BlockHasher(identity(block_size), wanted.media, wanted.salt)


def score(token: int) -> TokenLogprobs:
    return TokenLogprobs(token_id=token, logprob=-1.0, rank=1, top=())


def drawn(plan: StepPlan, token: int = 9) -> StepResult:
    return StepResult(tokens={part.id: token for part in plan.slices if part.sample})


class Bench:
    """Samples token 9 unless told otherwise. Prefix caching is off unless asked for: equal prompts are usual here."""

    def __init__(self, blocks: int = 20, ranks: int = 1, **changes: Any) -> None:
        fields: dict[str, Any] = {
            "role": EngineRole.COLOCATED,
            "block_size": 4,
            "max_model_len": 60,
            "max_num_seqs": 4,
            "max_batched_tokens": 16,
            "max_waiting": 6,
            "reserve_margin_tokens": 4,
            "prefix_caching": False,
        }
        self.config = EngineConfig(**(fields | changes))
        self.pools = [BlockPool(blocks) for _ in range(ranks)]
        self.pool = self.pools[0]
        self.scheduler = Scheduler(self.config, self.pools, frozenset({EOS}), IMAGE)
        self.now = 0.0
        self.events: list[ev.Event] = []
        self.plans: list[StepPlan] = []
        self.outcomes: list[StepOutcome] = []

    def submit(self, name: str | SequenceKey, length: int, mode: AttemptMode = COLOCATED, **options: Any) -> Sequence:
        options.setdefault("arrival_s", 0.0)
        prompt = options.pop("prompt", None) or [5] * length
        deadline = options.pop("deadline", 1000.0)
        constrained = options.pop("constrained", False)
        wanted = request(prompt, **options)
        sequence = Sequence(
            key=name if isinstance(name, SequenceKey) else key(name),
            request=wanted,
            mode=mode,
            deadline=deadline,
            hasher=hasher_of(wanted, self.config.block_size) if self.config.prefix_caching else None,
            needs_constraint=constrained,
        )
        self.scheduler.submit(sequence, self.now)
        return sequence

    def plan(self) -> StepPlan | None:
        plan = self.scheduler.plan(self.now)
        self.collect()
        if plan is not None:
            self.plans.append(plan)
        return plan

    def step(self, token: int = 9) -> list[TokenEvent]:
        plan = self.plan()
        assert plan is not None, "nothing to do"
        return self.finish(plan, drawn(plan, token))

    def finish(self, plan: StepPlan, result: StepResult) -> list[TokenEvent]:
        outcome = self.scheduler.apply(plan, result, 1.0)
        self.outcomes.append(outcome)
        self.collect()
        return outcome.tokens

    def receive(self, name: str, token: int = 17) -> None:
        """A reservation is asked for and granted, and its KV comes."""
        sequence = self.scheduler.roster.by_key[key(name)]
        self.scheduler.reserve(key(name), sequence.initial_count, self.now)
        self.plan()
        self.scheduler.kv_arrived(key(name), token, False)
        self.collect()

    def collect(self) -> None:
        self.events += self.scheduler.take_events()
        self.scheduler.check_integrity()

    def of(self, kind: type[Any]) -> list[Any]:
        self.collect()
        return [event for event in self.events if isinstance(event, kind)]

    def rank(self, name: str | SequenceKey) -> int | None:
        return self.scheduler.roster.by_key[name if isinstance(name, SequenceKey) else key(name)].rank

    def states(self, *names: str) -> list[SequenceState]:
        return [self.scheduler.roster.by_key[key(name)].state for name in names]

    def ended(self) -> dict[SequenceKey, Any]:
        return {event.key: event.error for event in self.of(ev.Ended)}


def slices(plan: StepPlan | None) -> list[tuple[int, int, int, bool]]:
    return [(part.id, part.first, part.count, part.sample) for part in plan.slices] if plan else []


def check_progress(scheduler: Scheduler, plan: StepPlan | None) -> None:
    """Right after ``plan``, on every rank: whoever can decode does, and the first prompt that can go on does."""
    for rank in scheduler.ranks:
        planned = {part.id for part in plan.parts[rank.number].slices} if plan else set()
        prompt_passed = False
        for s in rank.holders:
            if s.state is not SequenceState.RUNNING or s.plannable_tokens <= s.computed:
                assert s.id not in planned
            elif s.decodes:
                full = s.computed == len(s.blocks) * scheduler.config.block_size
                assert s.id in planned or (full and not rank.pool.free), "a reply stands still"
            elif not prompt_passed:
                assert s.id in planned, "the first prompt stands still"
                prompt_passed = True
