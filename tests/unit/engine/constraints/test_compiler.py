"""Compiling on threads: kept, shared, bounded, and given up without a trace."""

from __future__ import annotations

import threading
from concurrent.futures import Future
from typing import Any

import pytest

from actors.engine.constraints import compiler as constraint_compiler
from actors.engine.constraints.compiler import ConstraintCompiler
from actors.engine.constraints.structure import StructureTemplate
from actors.errors import InternalError, InvalidRequest, Overloaded, Unavailable
from tests.unit.engine.constraints import structures as st


class Gate:
    """Compiles when it is let, and remembers what."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open = threading.Event()
        self.compiled: list[str] = []
        monkeypatch.setattr(constraint_compiler, "StructureTemplate", self._template)

    def _template(self, structure: Any, vocabulary: Any) -> StructureTemplate:
        assert self.open.wait(30)
        self.compiled.append(structure.text)
        return StructureTemplate(structure, vocabulary)


def texts(futures: list[Future[Any]]) -> list[bool]:
    return [future.done() for future in futures]


def test_a_structure_is_compiled_once_and_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch)
    compiler = ConstraintCompiler(st.vocabulary())
    made = [compiler.compile(st.sampling(st.regex("[ab]c"), stop_token_ids=(stop,))) for stop in (5, 6, 5)]
    assert texts(made) == [False] * 3
    gate.open.set()
    states = [future.result(30)((), st.raising) for future in made]
    made.append(compiler.compile(st.sampling(st.regex("[ab]c"))))
    assert made[-1].done(), "known ones need no thread"
    assert gate.compiled == ["[ab]c"]
    first, second, _ = states
    st.advance(first, st.encode("a"))
    assert st.allowed(second) != st.allowed(first), "states are their own"
    compiler.close()


def test_the_least_recently_used_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch)
    gate.open.set()
    compiler = ConstraintCompiler(st.vocabulary(), max_templates=2)
    for text in ("a", "b", "a", "c", "a", "b"):
        compiler.compile(st.sampling(st.regex(text))).result(30)
    assert gate.compiled == ["a", "b", "c", "b"]
    compiler.close()


def test_a_bad_structure_fails_every_time() -> None:
    compiler = ConstraintCompiler(st.vocabulary())
    for _ in range(2):
        assert isinstance(compiler.compile(st.sampling(st.regex("("))).exception(30), InvalidRequest)
    with pytest.raises(InvalidRequest, match="limit"):
        compiler.compile(st.sampling(st.regex("a" * 70_000)))
    compiler.close()


def test_a_panic_of_the_library_is_an_error_of_the_request(monkeypatch: pytest.MonkeyPatch) -> None:
    class Panic(BaseException):
        pass

    def panics(*_: object) -> StructureTemplate:
        raise Panic("deep inside")

    monkeypatch.setattr(constraint_compiler, "StructureTemplate", panics)
    compiler = ConstraintCompiler(st.vocabulary())
    error = compiler.compile(st.sampling(st.regex("a"))).exception(30)
    assert isinstance(error, InternalError) and "deep inside" not in error.message
    compiler.close()


def test_a_budget_alone_needs_no_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    Gate(monkeypatch)
    compiler = ConstraintCompiler(st.vocabulary())
    assert compiler.compile(st.sampling(reasoning_max_tokens=3, starts_thinking=True)).done()
    compiler.close()


def test_what_waits_is_bounded_and_given_up_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch)
    compiler = ConstraintCompiler(st.vocabulary(), threads=1, max_pending=3)
    made = [compiler.compile(st.sampling(st.regex(text))) for text in "abc"]
    again = compiler.compile(st.sampling(st.regex("a")))
    with pytest.raises(Overloaded):
        compiler.compile(st.sampling(st.regex("d")))
    compiler.close()
    assert [future.cancelled() for future in made] == [False, True, True]
    with pytest.raises(Unavailable):
        compiler.compile(st.sampling(st.regex("e")))
    gate.open.set()
    assert made[0].result(30) and again.result(30)
    assert gate.compiled == ["a"]
    compiler.close()


def test_room_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    Gate(monkeypatch).open.set()
    compiler = ConstraintCompiler(st.vocabulary(), max_pending=1)
    for text in "abcde":
        compiler.compile(st.sampling(st.regex(text))).result(30)
    compiler.close()
