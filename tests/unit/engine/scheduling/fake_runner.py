"""A runner without a model. Its blocks remember what was computed into them, so that nothing can be shared wrongly."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

from actors.engine.plan import NewSequence, RankPlan, Slice, StepResult
from actors.types import EngineRequest, TokenLogprobs
from tests.unit.engine.scheduling.scheduler_bench import score

Unit = tuple[int, int]


def contents(request: EngineRequest, tokens: Sequence[int]) -> list[int]:
    """What the KV of each token depends on: everything before it, its medium, and the tenant."""
    pictures: dict[int, tuple[bytes, int]] = {}
    for span in request.media:
        size = span.grid.tokens_per_unit
        for at in range(span.offset, span.end):
            unit, row = divmod(at - span.offset, size)
            pictures[at] = (span.embedding_keys[unit], row)
    chain, parent = [], hash(request.salt)
    for at, token in enumerate(tokens):
        parent = hash((parent, token, pictures.get(at)))
        chain.append(parent)
    return chain


class _Resident:
    def __init__(self, new: NewSequence, request: EngineRequest, bound: bool) -> None:
        self.new = new
        self.request = request
        self.bound = bound
        self.tokens = list(new.token_ids)
        self.computed: int | None = None
        self.blocks: list[int] = []


class FakeRunner:
    """Knows of each sequence only what plans told it, and checks that this suffices and is consistent."""

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self.cells: dict[tuple[int, int], int] = {}
        """Content by (block, offset)."""
        self._residents: dict[int, _Resident] = {}
        self._embeddings: defaultdict[int, dict[Unit, bytes]] = defaultdict(dict)
        self._constraints: set[int] = set()

    @property
    def empty(self) -> bool:
        return not (self._residents or any(self._embeddings.values()) or self._constraints)

    def supply(self, id: int, unit: Unit, embedding_key: bytes) -> None:
        assert id not in self._embeddings or unit not in self._embeddings[id], "an embedding came twice"
        self._embeddings[id][unit] = embedding_key

    def constrain(self, id: int) -> None:
        assert id not in self._constraints, "a constraint came twice"
        self._constraints.add(id)

    def run(self, plan: RankPlan, known: dict[int, tuple[EngineRequest, bool]], token: int) -> StepResult:
        """``known``: request of each number, and whether it needs a constraint."""
        for id in plan.ended:
            assert id in self._residents or id in self._embeddings or id in self._constraints, "ended for nothing"
            self._residents.pop(id, None)
            self._embeddings.pop(id, None)
            self._constraints.discard(id)
        for new in plan.new:
            assert new.id not in self._residents, "introduced twice"
            self._residents[new.id] = _Resident(new, *known[new.id])
        assert len({part.id for part in plan.slices}) == len(plan.slices)
        tokens: dict[int, int] = {}
        scores: dict[int, tuple[TokenLogprobs | None, ...]] = {}
        for part in plan.slices:
            resident = self._residents[part.id]
            self._compute(resident, part)
            if resident.new.sampling.prompt_logprobs is not None:
                last = min(part.first + part.count, resident.new.prompt_length - 1)
                first = part.first + 1 if part.first else 0
                scores[part.id] = tuple(score(at) if at else None for at in range(first, last + 1))
            assert part.sample == (resident.computed == len(resident.tokens))
            if part.sample:
                assert not resident.bound or part.id in self._constraints, "drawn without its constraint"
                resident.tokens.append(token)
                tokens[part.id] = token
        return StepResult(tokens=tokens, logprobs={id: score(token) for id in tokens}, prompt_logprobs=scores)

    def _compute(self, resident: _Resident, part: Slice) -> None:
        assert resident.computed in (None, part.first), "tokens skipped or repeated"
        assert part.count >= 1
        resident.blocks += part.new_blocks
        end = resident.computed = part.first + part.count
        assert end <= len(resident.blocks) * self.block_size, "no block for a token"
        truth = contents(resident.request, resident.tokens[:end])
        self.check(resident.blocks, truth[: part.first])
        for at in range(part.first, end):
            self._use_embedding(resident, at)
            self.cells[self._cell(resident.blocks, at)] = truth[at]

    def _use_embedding(self, resident: _Resident, at: int) -> None:
        for media_index, (offset, grid) in enumerate(resident.new.spans):
            if offset <= at < offset + grid.tokens:
                unit, row = divmod(at - offset, grid.tokens_per_unit)
                on_hand = self._embeddings[resident.new.id]
                wanted = resident.request.media[media_index].embedding_keys[unit]
                assert on_hand.get((media_index, unit)) == wanted, "computed without its embedding"
                if row == grid.tokens_per_unit - 1:
                    del on_hand[media_index, unit]

    def _cell(self, blocks: Sequence[int], at: int) -> tuple[int, int]:
        return blocks[at // self.block_size], at % self.block_size

    def check(self, blocks: Sequence[int], truth: Iterable[int], first: int = 0) -> None:
        """The blocks hold what they should from token ``first`` on."""
        for at, content in enumerate(truth, start=first):
            assert self.cells.get(self._cell(blocks, at)) == content, f"token {at} is not what it was"

    def write(self, blocks: Sequence[int], truth: Sequence[int], first: int) -> None:
        """A transfer brings tokens ``first`` .. ``len(truth)``."""
        for at in range(first, len(truth)):
            self.cells[self._cell(blocks, at)] = truth[at]
