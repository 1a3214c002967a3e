"""``ernie explain`` and what answers it."""

from __future__ import annotations

import json
from functools import partial
from typing import Any

import httpx
import pytest
from starlette.testclient import TestClient
from typer.testing import CliRunner

from actors.errors import NotFound
from cluster.cli import app
from cluster.explain_api import explain_route
from cluster.http_api import build_api
from tests.doubles import ScriptedService

TOLD: dict[str, Any] = {
    "request_id": "ab-1",
    "alias": None,
    "running": True,
    "stage": "decode",
    "arrival_s": 1.0,
    "elapsed_s": 0.25,
    "notes": [
        {"at_s": 0.0, "what": "admitted", "choice": None, "attempt": None, "choices": 1},
        {
            "at_s": 0.125,
            "what": "route",
            "choice": 0,
            "attempt": 2,
            "prefill": "p",
            "candidates": [
                {"name": "p -> d", "cost": 74.5, "terms": {"computes": 10.5, "handover": 64.0}},
                {"name": "q -> d", "cost": 0.0, "terms": {}, "last_for": "no room now"},
                {"name": "d alone", "excluded": "it is not ready"},
            ],
        },
    ],
    "notes_dropped": 0,
    "exposed_s": {"queued": 0.125, "decode": 0.125},
    "busy_s": {"decode": 0.0625},
}


def explain(name: str) -> dict[str, Any]:
    if name != "ab-1":
        raise NotFound(f"request_id: {name!r} does not run", reason="REQUEST_NOT_FOUND", field="request_id")
    return TOLD


@pytest.fixture(autouse=True)
def cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command talks to the real route."""
    api = build_api(ScriptedService, (explain_route(explain),))
    inside = TestClient(api)

    def answer(request: httpx.Request) -> httpx.Response:
        reply = inside.request(request.method, request.url.raw_path.decode())
        return httpx.Response(reply.status_code, content=reply.content)

    monkeypatch.setattr(httpx, "Client", partial(httpx.Client, transport=httpx.MockTransport(answer)))


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["explain", *arguments])
    return result.exit_code, result.output


@pytest.mark.parametrize("name", ["ab-1", "chatcmpl-ab-1", "resp_ab-1"])
def test_a_request_is_explained_by_the_names_clients_know(name: str) -> None:
    code, output = run(name)
    assert code == 0
    assert [line.strip() for line in output.splitlines()] == [
        "request ab-1: decode since 0.250 s",
        "0.0000 s  admitted: choices 1",
        "0.1250 s  choice 0/2: route: prefill p",
        "74.5  p -> d = computes 10.5 + handover 64",
        "0.0  q -> d = nothing; comes last: no room now",
        "-  d alone: it is not ready",
        "queued      125.0 ms",
        "decode      125.0 ms  busy 62.5 ms",
    ]
    code, output = run(name, "--json")
    assert code == 0 and json.loads(output) == TOLD


def test_one_that_is_not_known_is_told_in_the_servers_words() -> None:
    code, output = run("never seen?")
    assert code == 1 and "does not run" in output
