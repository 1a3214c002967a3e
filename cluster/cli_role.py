"""``ernie role``: asks for another role and waits until the engine has it."""

from __future__ import annotations

import time

from cluster.cli_http import ask, connect

POLL_S = 0.2


def change_role(url: str, engine: str, role: str, *, token: str | None, wait_s: float) -> str:
    """One line about what became of it.

    Raises ValueError for a refusal, in the server's words, and if the engine does not have the role in time; OSError
    where no cluster answers.
    """
    headers = {} if token is None else {"authorization": f"Bearer {token}"}
    begin = time.monotonic()
    with connect(url) as client:
        answer = ask(client, "POST", "/admin/role", json={"engine": engine, "role": role}, headers=headers)
        name = answer["engine"]
        while True:
            found = next((one for one in ask(client, "GET", "/status")["engines"] if one["id"] == name), None)
            if found is None:
                raise ValueError(f"engine {name} left the cluster before it was {role}")
            if found["role"] == role:
                return f"{name} is {role}, after {time.monotonic() - begin:.1f} s"
            if time.monotonic() - begin > wait_s:
                raise ValueError(f"engine {name} is still {found['role']} after {wait_s:g} s; it goes on changing")
            time.sleep(POLL_S)
