"""A real Prometheus, for tests of what is scraped, shown and alerted."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from cluster.ports import free_ports

START_LIMIT_S = 30.0
STOP_LIMIT_S = 20.0


def tool(name: str) -> str:
    """Path of ``prometheus`` or ``promtool``; skips the test where it is not installed."""
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed (on Debian: apt-get install prometheus)")
    return found


def promtool(*arguments: object) -> str:
    """What it printed; fails the test with that when it found something wrong."""
    done = subprocess.run(
        [tool("promtool"), *map(str, arguments)], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


class Prometheus:
    """The HTTP API of a running one."""

    def __init__(self, url: str) -> None:
        self._client = httpx.Client(base_url=url, timeout=30)

    def instant(self, expr: str) -> list[dict[str, Any]]:
        """Series of the result now: ``{"metric": labels, "value": [time, text]}``."""
        return self._asked("query", query=expr)["result"]  # type: ignore[no-any-return]

    def ranged(self, expr: str, start: float, end: float, step_s: float = 1.0) -> list[dict[str, Any]]:
        """Series of the result over a time: ``{"metric": labels, "values": [[time, text], ...]}``."""
        found = self._asked("query_range", query=expr, start=str(start), end=str(end), step=str(step_s))
        return found["result"]  # type: ignore[no-any-return]

    def rules(self) -> list[dict[str, Any]]:
        """Alerting rules with their ``health``, ``lastError``, ``state`` and ``alerts``."""
        return [rule for group in self._asked("rules")["groups"] for rule in group["rules"]]

    def targets(self) -> list[dict[str, Any]]:
        return self._asked("targets")["activeTargets"]  # type: ignore[no-any-return]

    def ready(self) -> bool:
        try:
            return self._client.get("/-/ready").is_success
        except httpx.TransportError:
            return False

    def close(self) -> None:
        self._client.close()

    def _asked(self, what: str, **params: str) -> dict[str, Any]:
        reply = self._client.get(f"/api/v1/{what}", params=params).json()
        assert reply["status"] == "success", f"{params}: {reply}"
        data: dict[str, Any] = reply["data"]
        return data


@contextlib.contextmanager
def prometheus(
    folder: Path, scrapes: Sequence[Mapping[str, Any]], rules: Sequence[Path] = (), interval: str = "1s"
) -> Iterator[Prometheus]:
    """One that scrapes these and evaluates these files of rules; ended behind it."""
    program = tool("prometheus")
    (port,) = free_ports(1)
    config = folder / "prometheus.yml"
    config.write_text(
        yaml.safe_dump(
            {
                "global": {"scrape_interval": interval, "evaluation_interval": interval},
                "rule_files": [str(path) for path in rules],
                "scrape_configs": list(scrapes),
            }
        )
    )
    log = folder / "prometheus.txt"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [
                program,
                f"--config.file={config}",
                f"--storage.tsdb.path={folder / 'tsdb'}",
                f"--web.listen-address=127.0.0.1:{port}",
            ],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    found = Prometheus(f"http://127.0.0.1:{port}")
    try:
        deadline = time.monotonic() + START_LIMIT_S
        while not found.ready():
            assert process.poll() is None and time.monotonic() < deadline, log.read_text(errors="replace")
            time.sleep(0.1)
        yield found
    finally:
        found.close()
        process.terminate()
        try:
            process.wait(STOP_LIMIT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
