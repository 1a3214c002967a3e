"""An engine's role over HTTP: who may, what is refused and how; and ``ernie role`` before it."""

from __future__ import annotations

import json
from functools import partial
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, Request, Response

from actors.errors import NotFound, Unavailable
from actors.types import EngineRole
from cluster import cli_role
from cluster.admin_api import set_role
from cluster.config import Admin
from cluster.http_api import install_error_handlers

TOKEN = "0123456789abcdef"
ASKED = {"engine": "1", "role": "decode"}


class Planner:
    """Orders are done by the next look at the status."""

    def __init__(self) -> None:
        self.orders: list[tuple[str, EngineRole]] = []
        self.status = {"engines": [{"id": "engine-1", "role": "prefill"}]}

    async def order_role(self, engine: str, role: EngineRole) -> str:
        if engine == "x":
            raise NotFound("engine: 'x' is not known; there are engine-1", field="engine", reason="ENGINE_NOT_FOUND")
        if role is EngineRole.COLOCATED:
            raise Unavailable("engine engine-1 is needed as prefill", reason="LAST_OF_ROLE")
        self.orders.append((engine, role))
        return "engine-1"


def serving(planner: Planner, admin: Admin | None) -> httpx.ASGITransport:
    app = FastAPI()

    async def role(request: Request) -> Response:
        return await set_role(admin, planner.order_role, request)

    app.add_route("/admin/role", role, methods=["POST"])
    install_error_handlers(app)
    return httpx.ASGITransport(app)


async def post(
    admin: Admin | None, body: Any, planner: Planner | None = None, kind: str = "application/json", **headers: str
) -> httpx.Response:
    async with httpx.AsyncClient(
        transport=serving(planner or Planner(), admin), base_url="http://cluster", headers=headers
    ) as client:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        return await client.post("/admin/role", content=content, headers={"content-type": kind})


async def test_an_order_is_passed_on() -> None:
    planner = Planner()
    answer = await post(Admin(), ASKED, planner)
    assert (answer.status_code, answer.json()) == (200, {"engine": "engine-1", "role": "decode"})
    assert planner.orders == [("1", EngineRole.DECODE)]


@pytest.mark.parametrize(
    ("body", "status", "code", "param"),
    [
        ({"engine": "x", "role": "decode"}, 404, "engine_not_found", "engine"),
        ({"engine": "1", "role": "colocated"}, 503, "last_of_role", None),
        ({"engine": "1", "role": "judge"}, 400, "invalid_field", "role"),
        ({"engine": "1"}, 400, "invalid_field", "role"),
        (ASKED | {"force": True}, 400, "invalid_field", "force"),
        (b"{", 400, "invalid_field", None),
        (b" " * 5000, 400, "body_too_large", None),
    ],
)
async def test_what_is_wrong_is_told(body: Any, status: int, code: str, param: str | None) -> None:
    answer = await post(Admin(), body)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (status, code, param)


async def test_only_with_the_token_where_there_is_one_and_not_at_all_where_it_is_off() -> None:
    planner = Planner()
    refused = [
        await post(Admin(token=TOKEN), ASKED, planner),
        await post(Admin(token=TOKEN), ASKED, planner, authorization="Bearer 0123456789abcdeF"),
        await post(Admin(token=TOKEN), ASKED, planner, authorization=TOKEN),
    ]
    assert [answer.status_code for answer in refused] == [401] * 3
    assert (await post(None, ASKED, planner)).json()["error"]["code"] == "admin_off"
    assert not planner.orders
    assert (await post(Admin(token=TOKEN), ASKED, planner, authorization=f"Bearer {TOKEN}")).status_code == 200


@pytest.mark.parametrize("kind", ["", "text/plain", "text/plain;application/json", "application/x-www-form-urlencoded"])
async def test_what_a_foreign_web_page_can_send_is_no_order(kind: str) -> None:
    planner = Planner()
    answer = await post(Admin(), ASKED, planner, kind)
    assert (answer.status_code, answer.json()["error"]["code"]) == (415, "content_type")
    assert not planner.orders
    assert (await post(Admin(), ASKED, planner, "Application/JSON; charset=utf-8")).status_code == 200


def command(planner: Planner, monkeypatch: pytest.MonkeyPatch, *, becomes: str) -> None:
    """The command meets the planner; the engine has the role at the second look."""
    looks = iter(["prefill", becomes, becomes])

    def answer(request: httpx.Request) -> httpx.Response:
        if request.method == "POST":
            assert request.headers["authorization"] == f"Bearer {TOKEN}"
            assert request.headers["content-type"] == "application/json"
            if b"colocated" in request.content:
                return httpx.Response(503, json={"error": {"message": "engine engine-1 is needed as prefill"}})
            return httpx.Response(200, json={"engine": "engine-1"})
        return httpx.Response(200, json={"engines": [{"id": "engine-1", "role": next(looks)}]})

    monkeypatch.setattr(cli_role, "POLL_S", 0.0)
    monkeypatch.setattr(httpx, "Client", partial(httpx.Client, transport=httpx.MockTransport(answer)))


def test_the_command_waits_for_the_role(monkeypatch: pytest.MonkeyPatch) -> None:
    command(Planner(), monkeypatch, becomes="decode")
    told = cli_role.change_role("http://cluster", "1", "decode", token=TOKEN, wait_s=60)
    assert told.startswith("engine-1 is decode, after 0.")


def test_the_command_tells_what_it_waited_for_in_vain(monkeypatch: pytest.MonkeyPatch) -> None:
    command(Planner(), monkeypatch, becomes="prefill")
    with pytest.raises(ValueError, match="engine-1 is still prefill after 0 s"):
        cli_role.change_role("http://cluster", "1", "decode", token=TOKEN, wait_s=0)
    with pytest.raises(ValueError, match="is needed as prefill"):
        cli_role.change_role("http://cluster", "1", "colocated", token=TOKEN, wait_s=0)


def test_the_command_tells_who_did_not_answer() -> None:
    with pytest.raises(OSError, match=r"127\.0\.0\.1:1"):
        cli_role.change_role("http://127.0.0.1:1", "1", "decode", token=None, wait_s=0)
