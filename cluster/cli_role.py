"""``ernie role``: asks for another role and waits until the engine has it."""

from __future__ import annotations

import time
from typing import Any

import httpx

POLL_S = 0.2


def change_role(url: str, engine: str, role: str, *, token: str | None, wait_s: float) -> str:
    """One line about what became of it.

    Raises ValueError for a refusal, in the server's words, and if the engine does not have the role in time; OSError
    where no cluster answers.
    """
    headers = {} if token is None else {"authorization": f"Bearer {token}"}
    begin = time.monotonic()
    with httpx.Client(base_url=url, timeout=10.0, trust_env=False) as client:
        answer = _ask(client, "POST", "/admin/role", json={"engine": engine, "role": role}, headers=headers)
        name = answer["engine"]
        while True:
            found = next((one for one in _ask(client, "GET", "/status")["engines"] if one["id"] == name), None)
            if found is None:
                raise ValueError(f"engine {name} left the cluster before it was {role}")
            if found["role"] == role:
                return f"{name} is {role}, after {time.monotonic() - begin:.1f} s"
            if time.monotonic() - begin > wait_s:
                raise ValueError(f"engine {name} is still {found['role']} after {wait_s:g} s; it goes on changing")
            time.sleep(POLL_S)


def _ask(client: httpx.Client, method: str, path: str, **options: Any) -> dict[str, Any]:
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
