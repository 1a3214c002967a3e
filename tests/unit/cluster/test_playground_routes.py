"""How the playground's files are served, and what is among them. (A browser's own event loop keeps these apart.)"""

from __future__ import annotations

from pathlib import Path

import httpx
from fastapi import FastAPI
from fastapi.testclient import TestClient

from cluster.demo import made_samples
from cluster.pictures import open_upright
from cluster.playground.routes import PATH, install_playground
from tests.doubles import ScriptedService
from tests.unit.cluster.test_http_api import serving

STATIC = Path(__file__).resolve().parents[3] / "cluster" / "playground" / "static"


def test_the_pictures_are_those_of_the_demo() -> None:
    for name, sample in made_samples().items():
        if name != "clip":
            assert (
                open_upright((STATIC / "samples" / f"{name}.png").read_bytes()).tobytes()
                == sample.shown[0].convert("RGB").tobytes()
            )


async def test_the_page_comes_with_strict_headers() -> None:
    async with serving(ScriptedService()) as url, httpx.AsyncClient(base_url=url, trust_env=False) as client:
        for lead in ("/", "/playground"):
            assert (await client.get(lead)).headers["location"] == PATH
        index = await client.get(PATH)
        policy = index.headers["content-security-policy"]
        assert index.headers["content-type"] == "text/html; charset=utf-8"
        assert (
            policy.startswith("default-src 'none'; script-src 'self';")
            and "unsafe" not in policy
            and "http" not in policy
        )
        again = await client.get(PATH, headers={"if-none-match": index.headers["etag"]})
        assert again.status_code == 304 and again.content == b""
        for file in STATIC.rglob("*.*"):
            reply = await client.get(PATH + str(file.relative_to(STATIC)))
            assert reply.content == file.read_bytes() and reply.headers["x-content-type-options"] == "nosniff"
        for missing in ("no.js", "../routes.py", "%2e%2e/routes.py", "samples", "samples/"):
            assert (await client.get(PATH + missing)).status_code == 404


def test_below_another_path() -> None:
    inner = FastAPI()
    install_playground(inner)
    outer = FastAPI()
    outer.mount("/ernie", inner)
    client = TestClient(outer, follow_redirects=False)
    assert client.get("/ernie/").headers["location"] == "/ernie" + PATH
    assert client.get("/ernie" + PATH).status_code == 200
