"""The request of the model cards, its media host allowed and resolved to a local HTTPS server."""

from __future__ import annotations

import base64
from typing import Any

import httpx

from actors.types import EngineRole
from tests.in_process import in_process_cluster
from tests.media import png
from tests.media_site import HOST, media_site
from tests.tiny_model import tiny_checkpoint
from tests.unit.cluster.test_http_api import serving

PATH = "/datasets/paddlemix/demo_images/example2.jpg"
PICTURE = png(200, 150)


def card_request(url: str) -> dict[str, Any]:
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "Descript this image"}]
    return {"messages": [{"role": "user", "content": parts}], "temperature": 0, "max_tokens": 8, "seed": 1}


async def test_a_picture_by_its_url_is_the_picture_itself() -> None:
    with media_site() as site:
        site.files[PATH] = PICTURE
        async with (
            in_process_cluster(tiny_checkpoint(), EngineRole.PREFILL, EngineRole.DECODE) as cluster,
            serving(cluster.parts.router) as url,  # type: ignore[arg-type]
            httpx.AsyncClient(base_url=url, trust_env=False, timeout=60) as http,
        ):
            inline = "data:image/png;base64," + base64.b64encode(PICTURE).decode()
            expected = (await http.post("/v1/chat/completions", json=card_request(inline))).json()
            refusal = await http.post("/v1/chat/completions", json=card_request(f"https://{HOST}{PATH}"))
            assert refusal.status_code == 400 and "--allowed-media-domains" in refusal.json()["error"]["message"]
            assert not site.seen
            fetcher = cluster.preprocessor._processor._fetcher = site.fetcher()
            reply = await http.post("/v1/chat/completions", json=card_request(f"https://{HOST}{PATH}"))
            assert reply.status_code == 200, reply.text
            assert reply.json()["choices"] == expected["choices"]
            usage = reply.json()["usage"]
            assert usage["prompt_tokens"] == expected["usage"]["prompt_tokens"]
            assert usage["prompt_tokens_details"]["cached_tokens"] > 0, "the prefix cache knows it by its content"
            assert site.seen == [(HOST, PATH)]
            cluster.preprocessor._processor._fetcher = site.fetcher(networks=())
            closed = await http.post("/v1/chat/completions", json=card_request(f"https://{HOST}{PATH}"))
            error = closed.json()["error"]
            assert closed.status_code == 400 and "--allowed-media-networks" in error["message"]
            assert error["param"].startswith("messages[0].content[0]")
            fetcher.close()
            await cluster.wait_clean()
