"""What commands ask a running cluster over HTTP."""

from __future__ import annotations

from typing import Any

import httpx

TIMEOUT_S = 10.0


def connect(url: str) -> httpx.Client:
    return httpx.Client(base_url=url, timeout=TIMEOUT_S, trust_env=False)


def ask(client: httpx.Client, method: str, path: str, **options: Any) -> dict[str, Any]:
    """The JSON object that answers. Raises ValueError for a refusal, in the server's words; OSError if nobody does."""
    try:
        response = client.request(method, path, **options)
        body = response.json()
    except httpx.HTTPError as error:
        raise OSError(f"{client.base_url}: {error}") from None
    except ValueError:
        raise ValueError(f"{client.base_url}{path}: what answers there is no ernie cluster") from None
    if response.is_error:
        raise ValueError(body["error"]["message"])
    return dict(body)
