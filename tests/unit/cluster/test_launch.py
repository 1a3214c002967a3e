"""How long a cluster may take to start, and what people are told meanwhile."""

from __future__ import annotations

from typing import Any

import pytest

from cluster import launch
from cluster.config import ClusterConfig
from cluster.session import StartFailed, failure_told


class Waited:
    """A clock that moves with every sleep, and a cluster that comes up at given times."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, up_s: float, ready_s: float) -> None:
        self.now = 100.0
        self.said: list[str] = []
        self._up, self._ready = self.now + up_s, self.now + ready_s
        monkeypatch.setattr(launch.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(launch.time, "sleep", self._sleep)
        monkeypatch.setattr(launch, "missing_for_ready", self._missing)

    def _sleep(self, seconds: float) -> None:
        self.now += seconds

    def _missing(self, url: str) -> str | None:
        return None if self.now >= self._ready else f"loading since {int(self.now)}"

    def is_up(self) -> bool:
        return self.now >= self._up

    def wait(self) -> None:
        session: Any = self
        launch._wait_ready(ClusterConfig(model="m"), session, self.said.append)


def test_loading_may_take_long_and_is_told_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    waited = Waited(monkeypatch, up_s=3600, ready_s=3600)
    waited.wait()
    assert waited.now >= 3700
    assert 600 <= len(waited.said) <= 3600 / launch.TELL_PERIOD_S + 1


def test_ready_waits_for_every_replica(monkeypatch: pytest.MonkeyPatch) -> None:
    waited = Waited(monkeypatch, up_s=10, ready_s=1)
    waited.wait()
    assert waited.now >= 110


def test_replicas_that_are_up_and_of_no_use_end_the_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    waited = Waited(monkeypatch, up_s=5, ready_s=10**6)
    with pytest.raises(StartFailed, match="every replica is up, but after 60 s there is loading"):
        waited.wait()
    assert waited.now < 170


def test_a_proxy_of_the_environment_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    assert not [handler for handler in launch._DIRECT.handlers if getattr(handler, "proxies", None)]


def test_a_failed_replica_is_told_in_a_line() -> None:
    message = "The deployment failed to start 2 times in a row. Error:\nTraceback ...\nValueError: no room\n"
    assert failure_told({"engine": message, "planner": ""}).splitlines()[:2] == [
        "engine does not start: ValueError: no room",
        "planner does not start: no reason given",
    ]
