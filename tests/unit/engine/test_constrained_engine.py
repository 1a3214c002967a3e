"""Constraints in a running engine: on time, again after a preemption, and gone with their attempt."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from actors.engine.constraints import compiler as constraint_compiler
from actors.engine.constraints.compiler import ConstraintCompiler
from actors.engine.constraints.structure import StructureState, StructureTemplate
from actors.engine.constraints.structure_grammar import refused
from actors.errors import DeadlineExceeded, InvalidRequest, RequestCancelled, Unavailable
from actors.types import EngineRequest, SequenceKey
from tests.unit.engine.constraints import structures as st
from tests.unit.engine.harness import Rig, request

PROMPT = st.encode("In the mountains, ")
OBJECT = st.schema({"type": "object", "properties": {"a": {"type": "string"}, "b": {"type": "integer"}}})


def rig(compiler: ConstraintCompiler | None, **options: Any) -> Rig:
    fields: dict[str, Any] = {"blocks": 300, "block_size": 4, "max_model_len": 150, "max_num_seqs": 40}
    return Rig(st.model(), config=st.model_config(), compiler=compiler, **(fields | options))


def own() -> ConstraintCompiler:
    return ConstraintCompiler(st.vocabulary())


def constrained(seed: int, *, prompt: tuple[int, ...] = PROMPT, **fields: Any) -> EngineRequest:
    sampling = {"temperature": 1.0, "structure": OBJECT, "max_tokens": 30, "seed": seed, "ignore_eos": False} | fields
    return request(prompt, **sampling)


def thinking(seed: int) -> EngineRequest:
    prompt = st.encode("Assistant: <think>")
    return constrained(seed, prompt=prompt, starts_thinking=True, reasoning_max_tokens=seed % 7)


def some_of_each(count: int) -> list[EngineRequest]:
    free = [request(PROMPT, seed=seed, temperature=1.0, max_tokens=30) for seed in range(count)]
    return [
        wanted
        for seed in range(count)
        for wanted in (constrained(seed), thinking(seed), free[seed], constrained(seed, structure=st.choice("a", "bc")))
    ]


def test_the_same_tokens_alone_and_in_a_batch() -> None:
    wanted = some_of_each(8)
    with rig(own()) as together:
        outputs = together.run(*wanted)
    with rig(own(), max_num_seqs=1) as alone:
        assert alone.run(*wanted) == outputs


def test_the_same_tokens_with_and_without_preemption() -> None:
    wanted = some_of_each(4)
    with rig(own()) as roomy:
        outputs = roomy.run(*wanted)
        assert not roomy.sink.preempted
    with rig(own(), blocks=40) as tight:
        assert tight.run(*wanted) == outputs
        assert len({key.request_id for key in tight.sink.preempted}) > 4


def test_the_same_tokens_from_any_position_on() -> None:
    for whole in (constrained(5), thinking(5), thinking(0)):
        with rig(own()) as first:
            (output,) = first.run(whole)
        parts = [
            request(
                whole.prompt_ids,
                outputs=output[:count],
                seed=whole.seed,
                **{
                    name: getattr(whole.sampling, name)
                    for name in (
                        "temperature",
                        "structure",
                        "max_tokens",
                        "ignore_eos",
                        "starts_thinking",
                        "reasoning_max_tokens",
                    )
                },
            )
            for count in range(1, len(output))
        ]
        with rig(own()) as later:
            rests = later.run(*parts)
        assert [output[:count] + rest for count, rest in enumerate(rests, 1)] == [output] * len(parts)


class SlowCompiler(ConstraintCompiler):
    """Compiles when ``open`` is set."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, error: Exception | None = None) -> None:
        super().__init__(st.vocabulary())
        self.open, self.begun = threading.Event(), threading.Event()

        def template(*args: Any) -> StructureTemplate:
            self.begun.set()
            assert self.open.wait(30)
            if error is not None:
                raise error
            return StructureTemplate(*args)

        monkeypatch.setattr(constraint_compiler, "StructureTemplate", template)


def test_nothing_is_drawn_before_the_structure_is_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = SlowCompiler(monkeypatch)
    with rig(compiler) as running:
        waiting = running.submit("waiting", constrained(1))
        others = [running.submit(f"free {n}", request(PROMPT, max_tokens=3)) for n in range(3)]
        running.wait_released(*others)
        assert not running.sink.tokens[waiting]
        compiler.open.set()
        running.wait_released(waiting)
        output = running.sink.ids(waiting)
    with rig(own()) as quick:
        assert quick.run(constrained(1)) == [output]


def ended_with(running: Rig, name: SequenceKey) -> Exception:
    running.wait_released(name)
    assert not running.sink.tokens[name]
    return running.sink.ended[name]


def test_a_structure_that_cannot_be_used_ends_the_attempt() -> None:
    with rig(own()) as running:
        name = running.submit("bad", constrained(1, structure=st.regex("(")))
        error = ended_with(running, name)
        assert isinstance(error, InvalidRequest) and error.field == "structure"


def test_cancelled_while_it_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = SlowCompiler(monkeypatch)
    with rig(compiler) as running:
        name = running.submit("gone", constrained(1))
        assert compiler.begun.wait(30)
        running.engine.cancel(name)
        assert isinstance(ended_with(running, name), RequestCancelled)
        compiler.open.set()
        running.run(constrained(2))  # compiled after the other


def test_its_deadline_passes_while_it_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = SlowCompiler(monkeypatch)
    with rig(compiler) as running:
        name = running.submit("late", constrained(1, deadline_s=0.0))
        assert isinstance(ended_with(running, name), DeadlineExceeded)
        compiler.open.set()


@pytest.mark.parametrize("error", [None, refused("no")])
def test_stopped_while_it_is_compiled(monkeypatch: pytest.MonkeyPatch, error: Exception | None) -> None:
    compiler = SlowCompiler(monkeypatch, error)
    running = rig(compiler)
    running.engine.start()
    names = [running.submit(n, constrained(n, structure=st.choice("a", str(n)))) for n in range(6)]
    assert compiler.begun.wait(30)
    running.engine.stop()
    compiler.open.set()
    errors = [running.sink.ended[name] for name in names]
    assert all(isinstance(error, Unavailable) and error.reason == "STOPPED" for error in errors)
    running.assert_empty()
    for later in (lambda: running.submit("later", constrained(7)), lambda: compiler.compile(constrained(7).sampling)):
        with pytest.raises(Unavailable):
            later()


def test_an_answer_that_grows_too_complex_ends_with_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    compute = StructureState._compute

    def fails_later(self: StructureState) -> Any:
        row = compute(self)
        if len(self._tokens) == 5:
            row[:] = 0
        return row

    monkeypatch.setattr(StructureState, "_compute", fails_later)
    with rig(own()) as running:
        name = running.submit("complex", constrained(1, structure=st.regex("[a-z]{20,25}")))
        running.wait_released(name)
        error = running.sink.ended[name]
        assert isinstance(error, InvalidRequest) and "after 5 tokens" in error.message
        running.run(request(PROMPT))


def test_an_engine_without_a_tokenizer_refuses_what_needs_one() -> None:
    with rig(None) as running:
        for wanted, field in (
            (constrained(1), "structure"),
            (request(PROMPT, reasoning_max_tokens=3), "reasoning_max_tokens"),
        ):
            with pytest.raises(InvalidRequest) as caught:
                running.submit("no", wanted)
            assert caught.value.field == field
        running.run(request(PROMPT))
