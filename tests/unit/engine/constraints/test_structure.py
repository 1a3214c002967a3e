"""Structures: what may come next, where they may end, what is refused, and that nothing hangs."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable

import numpy as np
import pytest

from actors.engine.constraints import structure as structure_module
from actors.engine.constraints.structure import StructureTemplate
from actors.engine.constraints.structure_grammar import MAX_BYTES
from actors.engine.constraints.vocabulary import ConstraintVocabulary
from actors.errors import InvalidRequest, ServingError
from actors.types import Structure, StructureKind
from tests.unit.engine.constraints import structures as st


@functools.cache
def plain_texts() -> dict[int, bytes]:
    special = set(st.LAYOUT.special.values())
    texts = {token: st.vocabulary().text((token,)) for token in range(st.LAYOUT.im_patch_id) if token not in special}
    return {token: text for token, text in texts.items() if text}


def every(texts: list[str], prefix: bytes) -> set[int]:
    """Ids of plain text that lead from a prefix towards one of the texts: what a grammar of choices must allow."""
    encoded = [text.encode() for text in texts]
    ids = {
        token
        for token, text in plain_texts().items()
        if any(whole.startswith(text, len(prefix)) and whole.startswith(prefix) for whole in encoded)
    }
    if prefix in encoded:
        ids.update(st.ENDS)
    return ids


@pytest.mark.parametrize(
    "texts",
    [["yes", "no"], ["a", "ab", "abc"], ["größe", "große", "漢字"], ["</think>", "</s>", "<think>"], ["", "x"]],
)
def test_choices_allow_exactly_the_tokens_that_lead_to_one(texts: list[str]) -> None:
    """Against a search of the whole vocabulary, along random walks to every end."""
    reached = set()
    for seed in range(25):
        rng = np.random.default_rng(seed)
        state, prefix = st.constraint(st.sampling(st.choice(*texts))), b""
        while True:
            ids = st.allowed(state)
            assert ids is not None
            forced = every(texts, prefix)
            # Where the bytes are certain, only the tokens that the tokenizer itself would use are left.
            assert ids <= forced
            assert ids == forced or not any(token in ids for token in st.ENDS)
            token = int(rng.choice(sorted(ids)))
            if token in st.ENDS:
                break
            prefix += st.vocabulary().text((token,))
            state.accept(token)
        reached.add(prefix.decode())
    assert reached == set(texts)


def test_all_end_tokens_end_an_answer_and_nothing_else_special_is_allowed() -> None:
    special = set(st.LAYOUT.special.values())
    for seed in range(20):
        rng, state = np.random.default_rng(seed), st.constraint(st.sampling(st.regex(r"(?s).{0,3}")))
        for _ in range(4):
            ids = st.allowed(state)
            assert ids is not None and not ids & (special - set(st.ENDS))
            assert set(st.ENDS) <= ids or seed
            assert max(ids) < st.LAYOUT.im_patch_id
            token = int(rng.choice(sorted(ids - set(st.ENDS)) or [st.EOS]))
            if token in st.ENDS:
                break
            state.accept(token)


def test_ids_above_the_bound_are_never_allowed() -> None:
    """Placeholders may be ordinary tokens to a tokenizer."""
    document = json.loads(st.tokenizer_json())
    for token in document["added_tokens"]:
        token["special"] = False
    limit = st.LAYOUT.im_patch_id - 300
    below = ConstraintVocabulary(json.dumps(document), limit=limit, end_ids=(*st.ENDS, 5000))
    assert below.end_ids == (st.EOS,)
    state = st.compiled(st.sampling(st.regex(r"(?s).*")), below)((), st.raising)
    ids = st.allowed(state)
    assert ids is not None and max(ids) < limit and st.EOS in ids


def test_markers_are_no_text_even_where_the_file_calls_them_pieces() -> None:
    document = json.loads(st.tokenizer_json())
    document["added_tokens"] = [token for token in document["added_tokens"] if token["content"] not in ("<think>",)]
    assert "<think>" in document["model"]["vocab"]
    own = ConstraintVocabulary(json.dumps(document), limit=st.LAYOUT.im_patch_id, end_ids=st.ENDS)
    state = st.compiled(st.sampling(st.choice("<think>")), own)((), st.raising)
    ids = st.allowed(state)
    assert ids and st.THINK not in ids


def test_after_its_end_only_end_tokens_follow() -> None:
    """A sequence that ignores them goes on until its length."""
    state = st.constraint(st.sampling(st.choice("a"), ignore_eos=True))
    st.advance(state, st.encode("a"))
    for _ in range(3):
        assert st.allowed(state) == set(st.ENDS)
        state.accept(st.EOS)


def test_stop_tokens_are_allowed_where_the_structure_may_end() -> None:
    for text in ("b", "z"):
        (stop,) = st.encode(text)
        state = st.constraint(st.sampling(st.regex("a[ab]{0,2}"), stop_token_ids=(stop,)))
        ids = st.allowed(state)
        assert ids is not None and stop not in ids
        st.advance(state, st.encode("a"))
        ids = st.allowed(state)
        assert ids is not None and {stop, *st.ENDS} <= ids
        state.accept(stop)
        assert st.allowed(state) == set(st.ENDS), "the stop token ended the answer"


def test_stop_tokens_are_no_text_while_something_else_can_be() -> None:
    a, b = st.encode("a")[0], st.encode("b")[0]
    state = st.constraint(st.sampling(st.regex("[abc][xyz]"), stop_token_ids=(a, b)))
    ids = st.allowed(state)
    assert ids is not None and not ids & {a, b, *st.ENDS} and st.encode("c")[0] in ids
    one, two = st.encode("1")[0], st.encode("2")[0]
    forced = st.constraint(st.sampling(st.regex("[12][34]"), stop_token_ids=(one, two)))
    assert st.allowed(forced) == {one, two}


def test_classes_are_ascii_as_in_json_schema() -> None:
    arabic = "\u0663".encode()
    for structure in (st.regex(r"\d\w[\d\w]"), st.schema({"type": "string", "pattern": r"^\d\w[\d\w]$"})):
        for seed in range(30):
            output = st.draw(st.constraint(st.sampling(structure)), seed)
            assert output is not None
            assert re.fullmatch(r'"?[0-9][0-9A-Za-z_]{2}"?', st.decode(output)), st.decode(output)
    negated = st.constraint(st.sampling(st.regex(r"[^\d]")))
    first, second = (next(id for id, text in plain_texts().items() if text == arabic[at : at + 1]) for at in (0, 1))
    ids = st.allowed(negated)
    assert ids is not None and first in ids, "other characters share the first byte"
    negated.accept(first)
    ids = st.allowed(negated)
    assert ids and second not in ids, "what is no digit is none anywhere"


def test_patterns_are_narrowed_and_values_are_not() -> None:
    schema = {
        "properties": {"pattern": {"const": r"\d"}, r"\d": {"enum": [r"\w"]}},
        "patternProperties": {r"^k\d$": {"const": {"pattern": r"\w"}}},
        "required": ["pattern", r"\d", "k5"],
        "additionalProperties": False,
        "type": "object",
    }
    seen = set()
    for seed in range(30):
        output = st.draw(st.constraint(st.sampling(st.schema(schema))), seed, 400)
        if output is not None:
            document = json.loads(st.decode(output))
            assert (document["pattern"], document[r"\d"]) == (r"\d", r"\w")
            seen.update(document.keys() - {"pattern", r"\d"})
            assert all(document[name] == {"pattern": r"\w"} for name in document if name[0] == "k")
    assert "k5" in seen


REFUSED: dict[str, tuple[Structure, str]] = {
    "no JSON": (Structure(kind=StructureKind.JSON_SCHEMA, text="{"), "cannot be read as JSON"),
    "no schema": (st.schema([1]), "must be an object"),
    "unsatisfiable": (st.schema(False), "must be an object"),
    "bad type": (st.schema({"type": "frob"}), "frob"),
    "unique items": (st.schema({"type": "array", "uniqueItems": True}), "uniqueItems"),
    "not": (st.schema({"not": {"type": "string"}}), "not"),
    "if": (st.schema({"if": {"type": "string"}, "then": {"minLength": 1}}), "if"),
    "contains": (st.schema({"type": "array", "contains": {"type": "integer"}}), "contains"),
    "nested": (st.schema({"type": "object", "properties": {"a": {"propertyNames": {}}}}), "propertyNames"),
    "format": (st.schema({"type": "string", "format": "frob"}), "frob"),
    "pattern": (st.schema({"type": "string", "pattern": "("}), "regex"),
    "look-ahead": (st.schema({"type": "string", "pattern": "^(?=a)b"}), "look-ahead"),
    "no reference": (st.schema({"$ref": "#/$defs/none"}), "none"),
    "remote reference": (st.schema({"$ref": "https://example.com/schema.json"}), "example.com"),
    "own options": (st.schema({"type": "string", "x-guidance": {"lenient": True}}), "x-guidance"),
    "overlapping oneOf": (st.schema({"oneOf": [{"type": "number"}, {"type": "integer"}]}), "oneOf"),
    "nothing in range": (st.schema({"type": "integer", "minimum": 3, "maximum": 2}), "minimum"),
    "endless reference": (
        st.schema({"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}),
        "no text can match it",
    ),
    "surrogate": (Structure(kind=StructureKind.JSON_SCHEMA, text='{"const": "\\ud800"}'), "escape"),
    "regex syntax": (st.regex("a(b"), "unclosed group"),
    "regex look-around": (st.regex("a(?!b)"), "look-ahead"),
    "regex back reference": (st.regex(r"(a)\1"), "backreference"),
    "regex empty": (st.regex(""), "empty"),
    "regex of nothing": (st.regex("[a&&b]"), "no text can match it"),
    "grammar syntax": (st.lark('start: "a'), "lexer error"),
    "grammar name": (st.lark("start: unknown"), "unknown"),
    "grammar without start": (st.lark('a: "b"'), "start"),
    "grammar empty": (st.lark("  \n"), "empty"),
    "grammar endless": (st.lark("start: start"), "no text can match it"),
    "grammar of another kind": (st.lark('root ::= "a"'), "Expected"),
    "grammar as JSON": (st.lark('{"grammars": [{"json_schema": {}}]}'), "expecting rule"),
    "special token": (st.lark('start: "a" <think> "b"'), "<think>"),
    "token range": (st.lark("start: <[0-99]>"), r"<\[0-99\]>"),
    "grammar options": (st.lark('%llguidance {"allow_invalid_utf8": true}\nstart: "a"'), "%llguidance"),
    "no choices": (Structure(kind=StructureKind.CHOICE, text="[]"), "at least one"),
    "choices of numbers": (Structure(kind=StructureKind.CHOICE, text="[1]"), "string"),
    "choices no list": (Structure(kind=StructureKind.CHOICE, text='{"a": "b"}'), "list"),
    "half a character": (Structure(kind=StructureKind.CHOICE, text='["\\ud800"]'), "surrogate"),
    "raw surrogate": (st.regex("\ud800"), "surrogate"),
    "too large": (st.regex("a" * (MAX_BYTES + 1)), f"the limit is {MAX_BYTES}"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_enforced_is_refused(name: str) -> None:
    structure, reason = REFUSED[name]
    with pytest.raises(InvalidRequest, match=reason) as caught:
        st.compiled(st.sampling(structure))
    assert caught.value.field == "structure"
    assert caught.value.reason == "INVALID_STRUCTURE"
    assert len(caught.value.message) < 500


def test_grammars_may_speak_of_brackets() -> None:
    for text in (
        'start: "</s><think>" "<b>" /<[a-z]>/ // <think>',
        'start: A # <x>\nA: "</" "b>"',
        'start: %json {"const": "<p>"}',
    ):
        assert st.draw(st.constraint(st.sampling(st.lark(text))), 1) is not None


def deep(depth: int) -> Structure:
    text = '{"type": "null"}'
    for _ in range(depth):
        text = f'{{"items": {text}}}'
    return Structure(kind=StructureKind.JSON_SCHEMA, text=text)


def references(count: int) -> Structure:
    names: dict[str, object] = {f"d{i}": {"anyOf": [{"$ref": f"#/$defs/d{i + 1}"}] * 2} for i in range(count)}
    return st.schema({"$defs": names | {f"d{count}": {"type": "null"}}, "$ref": "#/$defs/d0"})


NASTY: dict[str, Callable[[], Structure]] = {
    "brackets": lambda: st.regex("(" * 20_000 + "a" + ")" * 20_000),
    "stars": lambda: st.regex("(?:" * 9_000 + "a" + ")*" * 9_000),
    "alternatives": lambda: st.regex("|".join("a" * length for length in range(300))),
    "million": lambda: st.regex("a{1000000}"),
    "repeats of repeats": lambda: st.regex("(((((a{1000}){1000}){1000}){1000}){1000})"),
    "ambiguous": lambda: st.regex("(a|a|aa)+" * 300 + "b"),
    "optional": lambda: st.regex("a?" * 2_000 + "a" * 2_000),
    "looking back": lambda: st.regex(".*a.{300}"),
    "wide classes": lambda: st.regex(r"(\p{L}\p{N}\w){200}"),
    "literal": lambda: st.regex("ab" * 30_000),
    "deep schema": lambda: deep(3_000),
    "many arrays": lambda: st.schema({"type": "array", "minItems": 10**9, "maxItems": 10**9}),
    "long strings": lambda: st.schema({"type": "string", "minLength": 10**6}),
    "huge numbers": lambda: st.schema({"type": "number", "minimum": -1e300, "maximum": 1e300}),
    "huge multiple": lambda: st.schema({"type": "integer", "multipleOf": 999_999_937}),
    "many properties": lambda: st.schema({"properties": {f"p{i}": {"type": "string"} for i in range(1_500)}}),
    "references": lambda: references(300),
    "intersections": lambda: st.schema(
        {"allOf": [{"anyOf": [{"properties": {f"{c}{i}": {"type": "null"}}} for c in "ab"]} for i in range(40)]}
    ),
    "choices": lambda: st.choice(*(f"{number}" for number in range(10_000))),
    "rule powers": lambda: st.lark(
        "\n".join(["start: r0", *(f"r{i}: r{i + 1} r{i + 1}" for i in range(300)), 'r300: "a"'])
    ),
    "terminal powers": lambda: st.lark(
        "\n".join(["start: T0", *(f"T{i}: T{i + 1} T{i + 1}" for i in range(60)), "T60: /a/"])
    ),
    "grammar brackets": lambda: st.lark("start: " + "(" * 9_000 + '"a"' + ")" * 9_000),
    "grammar repeats": lambda: st.lark('start: r{1000000000}\nr: "a" | "b" "c"'),
    "grammar ambiguous": lambda: st.lark('start: a+\na: "x"* | "x" a | a "x"'),
    "grammar empty loops": lambda: st.lark("start: a\na: | a a"),
    "conjunction": lambda: st.lark("start: A\nA: " + " & ".join(f"/(.*{chr(97 + i)}.*)/" for i in range(26))),
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", NASTY)
def test_nothing_hangs_or_kills(name: str) -> None:
    """It is refused, or fails later with a clear error, or draws on."""
    failures: list[ServingError] = []
    try:
        state = st.constraint(st.sampling(NASTY[name]()), fail=failures.append)
    except InvalidRequest as error:
        failures.append(error)
    else:
        rng = np.random.default_rng(0)
        for _ in range(60):
            ids = st.allowed(state)
            assert ids
            token = int(rng.choice(sorted(ids)))
            if token in st.ENDS or failures:
                break
            state.accept(token)
    assert len(failures) <= 1
    assert all(error.field == "structure" and error.message.isprintable() for error in failures)


def bound_states(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    bounds = structure_module.LLParserLimits(max_lexer_states=count, verbose_errors=False)
    monkeypatch.setattr(structure_module, "_limits", lambda: bounds)


def test_an_answer_too_complex_to_go_on_fails_once_and_allows_something(monkeypatch: pytest.MonkeyPatch) -> None:
    bound_states(monkeypatch, 300)
    failures: list[ServingError] = []
    state = st.constraint(st.sampling(st.regex("(a|b)*a(a|b){25}")), fail=failures.append)
    rng = np.random.default_rng(0)
    letters = st.encode("a")[0], st.encode("b")[0]
    for _ in range(1000):
        assert st.allowed(state)
        if failures:
            break
        state.accept(int(rng.choice(letters)))
    assert [error.field for error in failures] == ["structure"]
    assert "too many states" in failures[0].message
    state.accept(5)
    assert st.allowed(state)
    assert len(failures) == 1


def test_sequences_of_a_structure_outlive_what_they_all_learnt(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bound on what is kept holds for all together: one that reaches it goes on with bounds of its own."""
    bound_states(monkeypatch, 300)
    template = StructureTemplate(st.regex("(a|b)*a(a|b){18}"), st.vocabulary())
    renewed: list[bool] = []
    renew = template.renew
    monkeypatch.setattr(template, "renew", lambda: (renewed.append(True), renew())[1])
    for seed in range(30):
        state = template.start((), st.raising)
        rng = np.random.default_rng(seed)
        text = b""
        for _ in range(40):
            ids = np.flatnonzero(np.unpackbits(state.allowed().view(np.uint8), bitorder="little"))
            token = int(rng.choice(ids))
            if token in st.ENDS:
                assert re.fullmatch(rb"[ab]*a[ab]{18}", text)
                break
            state.accept(token)
            text += st.vocabulary().text((token,))
    assert renewed, "the bound was never reached: the test shows nothing"


def test_a_token_that_was_not_allowed_fails_the_sequence() -> None:
    failures: list[ServingError] = []
    state = st.constraint(st.sampling(st.choice("yes")), fail=failures.append)
    st.advance(state, st.encode("no"))
    assert len(failures) == 1 and "after 1 tokens" in failures[0].message
    assert st.allowed(state)


def test_what_a_tokenizer_must_have() -> None:
    with pytest.raises(ValueError, match="end tokens"):
        ConstraintVocabulary(st.tokenizer_json(), limit=st.LAYOUT.im_patch_id, end_ids=(5000,))
    document = json.loads(st.tokenizer_json())
    document["decoder"] = None
    with pytest.raises(Exception, match="decoder"):
        ConstraintVocabulary(json.dumps(document), limit=st.LAYOUT.im_patch_id, end_ids=st.ENDS)
