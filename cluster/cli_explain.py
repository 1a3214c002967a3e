"""``ernie explain``: what became of a request, for people."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import quote

from cluster.cli_http import ask, connect


def fetch_explanation(url: str, request: str) -> dict[str, Any]:
    """Raises ValueError for a refusal, in the server's words, and OSError where no cluster answers."""
    with connect(url) as client:
        return ask(client, "GET", f"/requests/{quote(request, safe='')}/explain")


def explanation_lines(told: Mapping[str, Any]) -> Iterator[str]:
    """The answer of ``/requests/{id}/explain`` in lines of text."""
    alias = "" if told["alias"] is None else f" ({told['alias']})"
    state = f"{told['stage']} since" if told["running"] else "ended after"
    yield f"request {told['request_id']}{alias}: {state} {told['elapsed_s']:.3f} s"
    for note in told["notes"]:
        yield f"{note['at_s']:10.4f} s  {_where(note)}{_sentence(note)}"
        for candidate in note.get("candidates", ()):
            yield f"{'':14}{_candidate(candidate)}"
    if told["notes_dropped"]:
        yield f"{told['notes_dropped']} notes between the first and the last are not kept"
    for stage, exposed_s in told["exposed_s"].items():
        busy_s = told["busy_s"].get(stage)
        beside = "" if busy_s is None else f"  busy {busy_s * 1e3:.1f} ms"
        yield f"{stage:>12} {exposed_s * 1e3:10.1f} ms{beside}"


def _where(note: Mapping[str, Any]) -> str:
    if note["choice"] is None:
        return ""
    return f"choice {note['choice']}: " if note["attempt"] is None else f"choice {note['choice']}/{note['attempt']}: "


def _candidate(candidate: Mapping[str, Any]) -> str:
    if "excluded" in candidate:
        return f"-  {candidate['name']}: {candidate['excluded']}"
    terms = " + ".join(f"{name} {value:g}" for name, value in candidate["terms"].items()) or "nothing"
    last = f"; comes last: {candidate['last_for']}" if "last_for" in candidate else ""
    return f"{candidate['cost']:8.1f}  {candidate['name']} = {terms}{last}"


def _sentence(note: Mapping[str, Any]) -> str:
    """Its kind and its facts."""
    known = ("at_s", "what", "choice", "attempt", "candidates")
    facts = ", ".join(f"{name} {_value(value)}" for name, value in note.items() if name not in known)
    what = str(note["what"]).replace("_", " ")
    return f"{what}: {facts}" if facts else what


def _value(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
