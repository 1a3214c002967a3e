"""Starts a cluster on this machine, keeps it until a signal, and ends it in order."""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from cluster.config import LOOPBACK, LOOPBACK_HOSTS, Admin, ClusterConfig, resolve
from cluster.placement import claimed_cpus, lacking_gpus
from cluster.session import Session, StartFailed
from cluster.status import engine_notes

Say = Callable[[str], None]

READY_POLL_S = 0.2
TELL_PERIOD_S = 5.0
READY_LIMIT_S = 60.0
"""Longest wait for readiness once every replica has loaded."""
SHUTDOWN_LIMIT_S = 60.0
"""Longest orderly end after the drain; then everything is killed."""
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))
"""A proxy of the environment is not on the way to this machine."""
STOPPING = "Stopping: running requests may finish; a second signal ends everything at once."


class StopRequested(KeyboardInterrupt):
    """A signal came. No Exception, and a kind that asyncio passes on: nothing on the way may swallow it."""


class Signals:
    """SIGINT and SIGTERM: the first asks to stop, the second ends the process at once.

    Handlers are installed explicitly, since a background child of a script inherits SIGINT ignored, and once more after
    Ray has put its own in place.
    """

    def __init__(self, abandon: Callable[[], None]) -> None:
        self._abandon = abandon
        self._stop = threading.Event()
        self._raises = True

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        former = {number: signal.getsignal(number) for number in STOP_SIGNALS}
        self.install()
        try:
            yield
        finally:
            for number, handler in former.items():
                signal.signal(number, handler)

    def install(self) -> None:
        for number in STOP_SIGNALS:
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._stop.is_set():
            self._abandon()
            os._exit(128 + number)
        self._stop.set()
        if self._raises:
            raise StopRequested

    def only_note(self) -> None:
        """From here on a first signal raises nothing: an orderly end has begun."""
        self._raises = False

    def wait(self) -> None:
        """Returns at the first signal."""
        self.only_note()
        while not self._stop.wait(0.5):
            pass


@contextlib.contextmanager
def running_cluster(config: ClusterConfig, say: Say, *, log_dir: Path | None = None) -> Iterator[Signals]:
    """A cluster that answers, for as long as the block runs.

    Raises:
        StartFailed: it did not come up.
        StopRequested: a signal came, while it started or in the block. The caller must exit without delay (``leave``).
    """
    session = Session(config, log_dir=log_dir)
    signals = Signals(session.abandon)
    with signals.installed():
        try:
            try:
                _start(config, session, signals, say)
            except StopRequested:
                session.abandon()
                raise
            yield signals
        finally:
            signals.only_note()
            with _limited(config.drain_timeout_s + SHUTDOWN_LIMIT_S, session):
                session.stop(on_drain=lambda: say(STOPPING))
        say("Stopped.")


def _start(config: ClusterConfig, session: Session, signals: Signals, say: Say) -> None:
    begin = time.monotonic()
    session.start(num_cpus=claimed_cpus(resolve(config, gpus=0)))
    signals.install()
    # Imported only now: these import Ray, whose settings the session has just made.
    from cluster.app import build, cluster_gpus

    gpus = cluster_gpus()
    settled = resolve(config, gpus=gpus)
    if lacking := lacking_gpus(settled, gpus):
        raise StartFailed(lacking)
    if settled.worker_host is None:
        settled = settled.model_copy(update={"worker_host": LOOPBACK})
    if settled.metrics_host is None:
        settled = settled.model_copy(update={"metrics_host": settled.host})
    if settled.admin is None and settled.host in LOOPBACK_HOSTS:
        settled = settled.model_copy(update={"admin": Admin()})
    _announce_plan(settled, session, say)
    try:
        application = build(settled)
    except ValueError as error:
        raise StartFailed(str(error)) from None
    session.deploy(application)
    _wait_ready(settled, session, say)
    for note in engine_notes(fetch_status(http_url(settled))):
        say(f"  {note}")
    say(f"Ready after {time.monotonic() - begin:.1f} s.")


def leave(code: int) -> NoReturn:
    """Exits after StopRequested: without Ray's own exit handlers, which would wait for what has been killed."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


@contextlib.contextmanager
def _limited(seconds: float, session: Session) -> Iterator[None]:
    def give_up() -> None:
        session.abandon()
        os._exit(1)

    timer = threading.Timer(seconds, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _announce_plan(config: ClusterConfig, session: Session, say: Say) -> None:
    from cluster.placement import describe

    say(f"ernie-serving {version('ernie-serving')}: {config.model_name} from {config.model}")
    rows = describe(config)
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    for pool, replicas, what in rows:
        say(f"  {pool:<{widths[0]}}  {replicas:<{widths[1]}}  {what}")
    if not session.native_proxy:
        say(
            "  Serve's default proxies are used: HAProxy comes with Ray on Linux only. Here a client that disconnects "
            "may not free its request at once; CancelGeneration does."
        )


def http_url(config: ClusterConfig) -> str:
    """Base URL a client on this machine can use."""
    return f"http://{_reachable(config.host)}:{config.http_port}"


def metrics_url(config: ClusterConfig) -> str:
    """What Prometheus on this machine is to scrape."""
    if config.metrics_port is None:
        return f"{http_url(config)}/metrics"
    return f"http://{_reachable(config.metrics_host or config.host)}:{config.metrics_port}/metrics"


def _reachable(host: str) -> str:
    return {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, host)


def grpc_address(config: ClusterConfig) -> str:
    """host:port a client on this machine can use."""
    return f"{http_url(config).removeprefix('http://').rpartition(':')[0]}:{config.grpc_port}"


def _wait_ready(config: ClusterConfig, session: Session, say: Say) -> None:
    """Tells now and then what is missing, such as weights that still load.

    Raises:
        StartFailed: a replica cannot start, or all have started and are of no use.
    """
    told, next_tell, deadline = "", 0.0, math.inf
    while True:
        up = session.is_up()
        missing = missing_for_ready(http_url(config))
        if up and missing is None:
            return
        now = time.monotonic()
        deadline = min(deadline, now + READY_LIMIT_S) if up else math.inf
        if now > deadline:
            raise StartFailed(f"every replica is up, but after {READY_LIMIT_S:.0f} s there is {missing}")
        if missing is not None and missing != told and now >= next_tell:
            say(f"Waiting: {missing}")
            told, next_tell = missing, now + TELL_PERIOD_S
        time.sleep(READY_POLL_S)


def fetch_status(url: str) -> dict[str, Any]:
    """What ``/status`` says."""
    with _DIRECT.open(f"{url}/status", timeout=5.0) as response:
        status: dict[str, Any] = json.load(response)
        return status


def missing_for_ready(url: str) -> str | None:
    """None when ``/ready`` says so, else what it, or the way to it, lacks."""
    try:
        with _DIRECT.open(f"{url}/ready", timeout=5.0):
            return None
    except urllib.error.HTTPError as error:
        with error, contextlib.suppress(ValueError, KeyError, TypeError):
            return str(json.load(error)["missing"])
        return f"no router (HTTP {error.code})"
    except OSError:
        return "no router"
