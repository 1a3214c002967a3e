"""Processes that carry a session's mark in their environment, and the watchdog that ends them when their owner dies.

Ray ends its own processes with their driver, but not HAProxy, nor its agents when they are slow. A killed owner cannot
clean up, so a watchdog outside the session waits for the end of the owner's pipe and does it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

MARK = "ERNIE_SESSION"
RAY_TITLE = b"ray::"
_DONE = b"done\n"


def marked_processes(session: Path) -> list[int]:
    """Ids of live processes started inside a session, this one left out. Empty where there is no /proc.

    A process that sets its title may overwrite its environment, and with it the mark: Ray's agents do. They are known
    by their title and by files they hold open in the session's folder.
    """
    wanted = f"{MARK}={session}".encode()
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            environment = (entry / "environ").read_bytes()
            title = (entry / "cmdline").read_bytes()
            state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            continue
        ours = wanted in environment.split(b"\0") or (title.startswith(RAY_TITLE) and _holds_files(entry, session))
        if ours and state != "Z" and int(entry.name) != os.getpid():
            found.append(int(entry.name))
    return found


def _holds_files(process: Path, folder: Path) -> bool:
    """True when a process has a file of a folder open, deleted or not. ``process``: its folder in /proc."""
    with contextlib.suppress(OSError):
        for descriptor in (process / "fd").iterdir():
            with contextlib.suppress(OSError):
                if os.readlink(descriptor).startswith(f"{folder}/"):
                    return True
    return False


def end_processes(session: Path, *, grace_s: float) -> list[int]:
    """Waits for a session's processes to end and kills those that remain. Returns the killed ones."""
    deadline = time.monotonic() + grace_s
    while (left := marked_processes(session)) and time.monotonic() < deadline:
        time.sleep(0.05)
    killed = []
    while left:
        for process in left:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(process, signal.SIGKILL)
                killed.append(process)
        time.sleep(0.02)
        left = [process for process in marked_processes(session) if process not in killed]
    return killed


class Watchdog:
    """Ends a session's processes and removes its folder should this process die without doing so."""

    def __init__(self, session: Path) -> None:
        environment = {name: value for name, value in os.environ.items() if name != MARK}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "cluster.processes", str(session)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            env=environment,
        )

    def dismiss(self) -> None:
        """The session ended in order: nothing is left to do."""
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            self._process.communicate(_DONE, timeout=10)

    def act(self) -> None:
        """Ends the session's processes now, as if this process had died."""
        if self._process.stdin is not None:
            self._process.stdin.close()


def main(session: Path) -> None:
    """The watchdog's own process."""
    if sys.stdin.buffer.read() == _DONE:
        return
    end_processes(session, grace_s=0.0)
    shutil.rmtree(session, ignore_errors=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
