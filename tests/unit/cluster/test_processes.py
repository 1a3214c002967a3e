"""Marked processes are found and ended, also by the watchdog of an owner that was killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cluster.processes import MARK, Watchdog, end_processes, marked_processes

pytestmark = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs /proc")

Start = Callable[[Path], subprocess.Popen[bytes]]


@pytest.fixture
def start() -> Iterator[Start]:
    started: list[subprocess.Popen[bytes]] = []

    def sleeper(session: Path) -> subprocess.Popen[bytes]:
        started.append(subprocess.Popen(["sleep", "60"], env={**os.environ, MARK: str(session)}))
        while started[-1].pid not in marked_processes(session):
            assert started[-1].poll() is None
        return started[-1]

    yield sleeper
    for process in started:
        process.kill()
        process.wait()


def test_only_the_session_asked_for_is_ended(tmp_path: Path, start: Start) -> None:
    ours, other = start(tmp_path / "a"), start(tmp_path / "ab")
    assert end_processes(tmp_path / "a", grace_s=0.0) == [ours.pid]
    assert ours.wait(5) == -signal.SIGKILL
    assert marked_processes(tmp_path / "a") == []
    assert other.poll() is None


def test_ray_processes_that_lost_the_mark_are_known_by_their_files(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != MARK}
    with (tmp_path / "log").open("wb") as log:
        agent, reader = (
            subprocess.Popen([title, "60"], executable="/bin/sleep", env=environment, stdout=log)
            for title in ("ray::Agent", "tail")
        )
    try:
        assert end_processes(tmp_path, grace_s=0.0) == [agent.pid]
        assert agent.wait(5) == -signal.SIGKILL
        assert reader.poll() is None
    finally:
        for process in (agent, reader):
            process.kill()
            process.wait()


def test_nothing_to_end(tmp_path: Path) -> None:
    assert end_processes(tmp_path, grace_s=0.0) == []


def test_a_dismissed_watchdog_touches_nothing(tmp_path: Path, start: Start) -> None:
    process = start(tmp_path)
    Watchdog(tmp_path).dismiss()
    assert process.poll() is None
    assert tmp_path.exists()


def test_the_watchdog_of_a_killed_owner_cleans_up(tmp_path: Path, start: Start) -> None:
    session = tmp_path / "session"
    session.mkdir()
    process = start(session)
    code = (
        "import os, pathlib, signal, sys; from cluster.processes import Watchdog\n"
        "Watchdog(pathlib.Path(sys.argv[1])); os.kill(os.getpid(), signal.SIGKILL)"
    )
    root = Path(__file__).resolve().parents[3]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    assert subprocess.run([sys.executable, "-c", code, str(session)], env=environment).returncode == -signal.SIGKILL
    assert process.wait(30) == -signal.SIGKILL
    deadline = time.monotonic() + 30
    while session.exists():
        assert time.monotonic() < deadline
