"""Clusters as processes of their own, started by the ``ernie serve`` command."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx
import psutil
import yaml

from cluster.ports import free_ports
from cluster.processes import MARK

ROOT = Path(__file__).resolve().parents[2]
LAUNCH_MARK = "ERNIE_TEST_LAUNCH"
START_LIMIT_S = 240.0
STOP_LIMIT_S = 120.0
COMMAND_LIMIT_S = 60.0


class LaunchedCluster:
    """A running ``ernie serve``, or several nodes. ``config`` holds fields of ClusterConfig; ports are free ones."""

    def __init__(
        self,
        folder: Path,
        config: Mapping[str, Any],
        command: Sequence[str] = ("-m", "cluster.cli", "serve"),
        *,
        log_dir: Path | None = None,
    ) -> None:
        http_port, grpc_port, metrics_port = free_ports(3)
        self.http_url = f"http://127.0.0.1:{http_port}"
        self.grpc_address = f"127.0.0.1:{grpc_port}"
        self.metrics_url = f"http://127.0.0.1:{metrics_port}/metrics"
        self.ports = (http_port, grpc_port, metrics_port)
        self.log_dir = log_dir or folder / "logs"
        self._output = folder / "output.txt"
        self._launch = secrets.token_hex(8)
        self._seen: dict[int, str] = {}
        file = folder / "cluster.yaml"
        ports = {"http_port": http_port, "grpc_port": grpc_port, "metrics_port": metrics_port}
        file.write_text(yaml.safe_dump({**config, **ports}))
        self._environment = {
            **os.environ,
            LAUNCH_MARK: self._launch,
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "proto"), os.environ.get("PYTHONPATH", "")]),
            # Ray would kill actors whenever anybody fills the machine's memory.
            "RAY_memory_monitor_refresh_ms": "0",
            # Tables are not to be folded.
            "COLUMNS": "240",
        }
        with self._output.open("wb") as output:
            self._process = subprocess.Popen(
                [sys.executable, *command, "--config", str(file), "--log-dir", str(self.log_dir)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=folder,
                env=self._environment,
            )

    @property
    def output(self) -> str:
        """What ``ernie serve`` has printed."""
        return self._output.read_text(errors="replace")

    def wait_ready(self) -> None:
        """Returns once requests can be answered; raises AssertionError with the output when that fails."""
        self.wait_output("Ready after")
        self.processes()

    def wait_output(self, text: str) -> None:
        """Returns once it has printed ``text``; raises AssertionError when it ends before or takes too long."""
        deadline = time.monotonic() + START_LIMIT_S
        while text not in self.output:
            assert self._process.poll() is None, f"ernie serve ended:\n{self.output}"
            assert time.monotonic() < deadline, f"ernie serve did not print {text!r}:\n{self.output}"
            time.sleep(0.05)

    def processes(self) -> dict[int, str]:
        """Command lines of its live processes, the watchdog included, by id."""
        found = {}
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get(LAUNCH_MARK) == self._launch and process.status() != psutil.STATUS_ZOMBIE:
                    found[process.pid] = " ".join(process.cmdline())
        self._seen |= found
        return found

    @property
    def session(self) -> Path:
        """Its session folder."""
        for pid in self.processes():
            with contextlib.suppress(psutil.Error):
                folder = psutil.Process(pid).environ().get(MARK)
                if folder is not None:
                    return Path(folder)
        raise AssertionError("no process of the session is left")

    @contextlib.contextmanager
    def connected(self) -> Iterator[None]:
        """Ray in this process as a further driver of the cluster, for handles and named actors."""
        import ray

        commands = " ".join(self.processes().values())
        address = commands.partition("--gcs-address=")[2].partition(" ")[0]
        ray.init(address=address, namespace="ernie", log_to_driver=False, logging_level="ERROR")
        try:
            yield
        finally:
            ray.shutdown()

    def command(self, *arguments: str) -> str:
        """Runs another ``ernie`` command to its end; returns what it printed, raises AssertionError if it failed."""
        done = subprocess.run(
            [sys.executable, "-m", "cluster.cli", *arguments],
            capture_output=True,
            text=True,
            env=self._environment,
            timeout=COMMAND_LIMIT_S,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def signal(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def wait_ended(self) -> int:
        """Waits for ``ernie serve`` itself; returns its exit status."""
        try:
            return self._process.wait(STOP_LIMIT_S)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"ernie serve does not end:\n{self.output}") from None

    def wait_clean(self, within_s: float) -> None:
        """Returns when every part holds nothing for requests and its books agree; else raises AssertionError."""
        deadline = time.monotonic() + within_s
        while True:
            asked = time.monotonic()
            status = httpx.get(f"{self.http_url}/status", params={"audit": "true"}, timeout=10).json()
            audits = status["audits"]
            unclean = {name: audit for name, audit in audits.items() if any(audit["held"].values()) or audit["problem"]}
            if not unclean:
                return
            assert asked < deadline, unclean
            time.sleep(0.05)

    def stop(self) -> None:
        """Ends it in order and asserts that nothing was held before, that this went well and left nothing."""
        if self._process.poll() is None:
            self.wait_clean(within_s=10.0)
        session = self.session if self._process.poll() is None else None
        self.processes()
        self.signal(signal.SIGTERM)
        status = self.wait_ended()
        assert status == 0, f"ernie serve ended with {status}:\n{self.output}"
        self.assert_nothing_left(session, within_s=0.0)

    def assert_nothing_left(self, session: Path | None, *, within_s: float) -> None:
        """No process, port, file or shared memory of it remains."""
        deadline = time.monotonic() + within_s
        while (left := self._left(session)) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not left, "\n".join(left)

    def _left(self, session: Path | None) -> list[str]:
        left = [f"process {pid}: {command}" for pid, command in self.processes().items()]
        left += [f"port {port} is open" for port in self.ports if _answers(port)]
        if session is not None and session.exists():
            left.append(f"{session} is there")
        shared = Path("/dev/shm")
        if shared.is_dir():
            pids = {str(pid) for pid in self._seen}
            left += [str(path) for path in shared.iterdir() if pids & set(path.name.replace(".", "_").split("_"))]
        return left

    def kill(self) -> None:
        """Ends every process at once, whatever the state: for tests that failed."""
        with contextlib.suppress(AssertionError):
            shutil.rmtree(self.session, ignore_errors=True)
        for pid in self.processes():
            with contextlib.suppress(psutil.Error):
                psutil.Process(pid).kill()
        self._process.wait(STOP_LIMIT_S)


def _answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
