"""How the files of the pages are served, and what is among them. (A browser's own event loop keeps these apart.)"""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from cluster.demo import made_samples
from cluster.pages.routes import CONSOLE, PLAYGROUND, SHARED, install_pages
from cluster.pictures import open_upright
from tests.doubles import ScriptedService
from tests.unit.cluster.test_http_api import serving

PAGES = Path(__file__).resolve().parents[3] / "cluster" / "pages"


def test_the_pictures_are_those_of_the_demo() -> None:
    for name, sample in made_samples().items():
        if name != "clip":
            assert (
                open_upright((PAGES / "playground" / "samples" / f"{name}.png").read_bytes()).tobytes()
                == sample.shown[0].convert("RGB").tobytes()
            )


async def test_the_pages_come_with_strict_headers() -> None:
    leads = {"/": PLAYGROUND, "/playground": PLAYGROUND, "/console": CONSOLE}
    async with serving(ScriptedService()) as url, httpx.AsyncClient(base_url=url, trust_env=False) as client:
        for lead, path in leads.items():
            assert (await client.get(lead)).headers["location"] == path
        for path in (PLAYGROUND, CONSOLE):
            index = await client.get(path)
            policy = index.headers["content-security-policy"]
            assert index.headers["content-type"] == "text/html; charset=utf-8"
            assert (
                policy.startswith("default-src 'none'; script-src 'self';")
                and "unsafe" not in policy
                and "http" not in policy
            )
            again = await client.get(path, headers={"if-none-match": index.headers["etag"]})
            assert again.status_code == 304 and again.content == b""
        for path in (PLAYGROUND, CONSOLE, SHARED):
            folder = PAGES / path.strip("/")
            for file in folder.rglob("*.*"):
                reply = await client.get(path + str(file.relative_to(folder)))
                assert reply.content == file.read_bytes() and reply.headers["x-content-type-options"] == "nosniff"
            for missing in ("no.js", "../routes.py", "%2e%2e/routes.py", "samples", "samples/"):
                assert (await client.get(path + missing)).status_code == 404
        assert (await client.get(SHARED)).status_code == 404


@pytest.mark.parametrize("path", [PLAYGROUND, CONSOLE])
def test_below_another_path(path: str) -> None:
    inner = FastAPI()
    install_pages(inner)
    outer = FastAPI()
    outer.mount("/ernie", inner)
    client = TestClient(outer, follow_redirects=False)
    assert client.get("/ernie" + path.rstrip("/")).headers["location"] == "/ernie" + path
    assert client.get("/ernie" + path).status_code == 200
