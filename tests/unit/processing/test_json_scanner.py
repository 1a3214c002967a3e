"""The scanner against Python's own parser, character by character."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.processing.json_scanner import JsonScanner


def scan(text: str) -> tuple[int, bool]:
    """How many characters were taken, and whether they are a whole object."""
    scanner = JsonScanner()
    for count, character in enumerate(text):
        if scanner.done or not scanner.push(character):
            return count, scanner.done
    return len(text), scanner.done


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@settings(deadline=None, max_examples=300)
@given(st.dictionaries(st.text(max_size=3), VALUES, max_size=3), st.booleans(), st.sampled_from([None, 0, 2]))
def test_every_object_python_writes_is_read_to_its_end(value: dict[str, Any], ascii_only: bool, indent: Any) -> None:
    text = json.dumps(value, ensure_ascii=ascii_only, indent=indent)
    assert scan(text) == (len(text), True)
    assert scan(text + "x") == (len(text), True)
    assert not scan(text[:-1])[1]


@settings(deadline=None, max_examples=500)
@given(st.text(alphabet='{}[]",:\\ \nab01.-+eEtrufalsn', max_size=14).map(lambda text: '{"a":' + text + "}"))
def test_what_is_read_to_its_end_python_reads_too(text: str) -> None:
    count, whole = scan(text)
    if whole:
        assert isinstance(json.loads(text[:count]), dict)


@settings(deadline=None, max_examples=500)
@given(st.text(alphabet='{}[]",: ab01.-+eEtru', max_size=12).map(lambda text: '{"a":' + text))
def test_what_python_reads_is_read_to_its_end(text: str) -> None:
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    whole = text.rstrip()
    assert scan(whole) == (len(whole), True) or not isinstance(value, dict)


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "x",
        '{"a":01}',
        '{"a":-}',
        '{"a":1.}',
        '{"a":.5}',
        '{"a":1e}',
        '{"a":1e+}',
        '{"a":+1}',
        '{"a":NaN}',
        '{"a":Infinity}',
        '{"a":truly}',
        '{"a":True}',
        '{"a":"\n"}',
        '{"a":"\\x"}',
        '{"a":"\\u12g4"}',
        '{"a":[1,]}',
        '{"a":1,}',
        '{"a":[1}',
        '{"a":{"b":1]',
        '{"a" 1}',
        "{'a':1}",
        '{"a":1 2}',
        "{,}",
        '{"a":,}',
        "{1:2}",
        '{"a":\u0661}',
    ],
)
def test_what_is_no_object_is_seen_at_once(text: str) -> None:
    count, whole = scan(text)
    assert count < len(text) and not whole


def test_keys_of_the_outer_object() -> None:
    scanner = JsonScanner()
    seen = []
    for character in '{"a\\u00e9\\"": {"x": [1, {"y": 2}]}, "b": "c", "": null}':
        if scanner.depth == 1 and scanner.wants_value and character != " ":
            seen.append((scanner.key, character))
        assert scanner.push(character)
    assert seen == [('aé"', "{"), ("b", '"'), ("", "n")]
    assert scanner.done and scanner.behind_value and scanner.depth == 0
