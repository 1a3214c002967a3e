"""One Ray with one Serve on this machine, owned by this process: ``ernie serve`` and ``ernie demo``.

Everything lives in a session folder and ports of its own, so clusters side by side do not meet; afterwards no process,
port or file is left. Ray reads its settings from the environment when it is imported and when its processes start, so
a session sets them first and Ray must not have been imported before.

Ray's internal ports listen on every interface whatever the public ones do: the session's token, which only its own
processes know, guards them.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import secrets
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.config import ClusterConfig
from cluster.ports import PortBlock, can_listen
from cluster.processes import MARK, Watchdog, end_processes

if TYPE_CHECKING:
    from ray.serve import Application
    from ray.serve.handle import DeploymentHandle

APPLICATION = "ernie"
GRPC_SERVICERS = (
    "ernie_serving.v1.inference_pb2_grpc.add_InferenceServiceServicer_to_server",
    "grpc_health.v1.health_pb2_grpc.add_HealthServicer_to_server",
)
STREAMS_PER_CONNECTION = 1024
INGRESS_DRAIN_S = 1
OBJECT_STORE_BYTES = 512 << 20
DIRECT_PORTS = 20
PROCESS_GRACE_S = 5.0
DRAIN_ANSWER_S = 5.0

log = logging.getLogger(__name__)


class StartFailed(Exception):
    """The cluster did not come up; the message says why, for people."""


def native_proxy_available() -> bool:
    """HAProxy comes with Ray on Linux only."""
    return sys.platform == "linux"


def ray_environment(folder: Path, first_port: int, *, native_proxy: bool) -> dict[str, str]:
    """Settings that Ray's and Serve's processes read, for a session in ``folder`` with ports from ``first_port``.

    The order of ports: HAProxy stats and metrics, Serve's fallback proxy for HTTP and gRPC, then one range each for the
    HTTP and the gRPC servers of ingress replicas.
    """
    proxy = folder / "proxy"
    http_range = first_port + 4
    grpc_range = http_range + DIRECT_PORTS
    return {
        MARK: str(folder),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": os.environ.get("RAY_AUTH_TOKEN") or secrets.token_hex(32),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_enable_worker_prestart": "0",
        # Ray's default, 15, lets everything else on the machine go first: right for batches, not for whoever answers.
        "RAY_worker_niceness": "0",
        "RAY_SERVE_ENABLE_HA_PROXY": "1" if native_proxy else "0",
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(proxy / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(proxy / "a.sock"),
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(proxy / "m.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(proxy),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(proxy / "state"),
        "RAY_SERVE_HAPROXY_H2_FE_MAX_CONCURRENT_STREAMS": str(STREAMS_PER_CONNECTION),
        "RAY_SERVE_HAPROXY_H2_BE_MAX_CONCURRENT_STREAMS": str(STREAMS_PER_CONNECTION),
        "RAY_SERVE_HAPROXY_NBTHREAD": str(min(4, os.cpu_count() or 1)),
        "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S": "10",
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": str(INGRESS_DRAIN_S),
        "RAY_SERVE_PROXY_MIN_DRAINING_PERIOD_S": str(INGRESS_DRAIN_S),
        # How long a replica may take to say how busy it is; the default is too short for a loaded machine.
        "RAY_SERVE_QUEUE_LENGTH_RESPONSE_DEADLINE_S": "1",
        "RAY_SERVE_HAPROXY_STATS_PORT": str(first_port),
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(first_port + 1),
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(first_port + 2),
        "RAY_SERVE_FALLBACK_PROXY_GRPC_PORT": str(first_port + 3),
        "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": str(http_range),
        "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": str(http_range + DIRECT_PORTS - 1),
        "RAY_SERVE_DIRECT_INGRESS_MIN_GRPC_PORT": str(grpc_range),
        "RAY_SERVE_DIRECT_INGRESS_MAX_GRPC_PORT": str(grpc_range + DIRECT_PORTS - 1),
    }


class Session:
    """Start with ``Session(...)``, ``start`` and ``deploy``; end with ``stop`` or, at once, ``abandon``."""

    def __init__(self, config: ClusterConfig, *, log_dir: Path | None = None) -> None:
        """Takes ports and a folder and sets the environment; no process but the watchdog starts yet.

        Raises:
            StartFailed: a public port is in use.
            RuntimeError: Ray was imported before, with other settings.
        """
        if "ray" in sys.modules:
            raise RuntimeError("Ray was imported before its session was made")
        listens = [("http_port", config.host, config.http_port), ("grpc_port", config.host, config.grpc_port)]
        if config.metrics_port is not None:
            listens.append(("metrics_port", config.metrics_host or config.host, config.metrics_port))
        for name, host, port in listens:
            if not can_listen(host, port):
                raise StartFailed(f"{name}: cannot listen on {host}:{port}: in use or not an address of ours")
        self.config = config
        self.native_proxy = native_proxy_available()
        self._log_dir = log_dir
        self._ports = PortBlock.take()
        # Short on purpose: unix sockets inside it may have at most 107 bytes of path.
        self.folder = Path(tempfile.mkdtemp(prefix="ernie-", dir="/tmp"))
        self._former = _set_environment(ray_environment(self.folder, self._ports.first, native_proxy=self.native_proxy))
        self._watchdog = Watchdog(self.folder)
        self._ended = False
        self._handle: DeploymentHandle[Any] | None = None

    def start(self, *, num_cpus: float) -> None:
        """Starts Ray, with room for ``num_cpus`` of claims whatever the machine has, and Serve."""
        import ray
        from ray import serve
        from ray.serve.config import HTTPOptions, gRPCOptions

        with _interrupts_blocked():
            ray.init(
                address="local",
                num_cpus=max(os.cpu_count() or 1, int(num_cpus) + 1),
                include_dashboard=False,
                object_store_memory=OBJECT_STORE_BYTES,
                logging_level=logging.ERROR,
                log_to_driver=self.config.log_level in ("DEBUG", "INFO"),
                namespace="ernie",
                _temp_dir=str(self.folder),
            )
            logging.getLogger("ray.serve").setLevel(logging.WARNING)
            serve.start(
                proxy_location="HeadOnly",
                http_options=HTTPOptions(host=self.config.host, port=self.config.http_port),
                grpc_options=gRPCOptions(port=self.config.grpc_port, grpc_servicer_functions=list(GRPC_SERVICERS)),
                logging_config=self._logging(),
            )

    def deploy(self, application: Application) -> None:
        """Begins to start the replicas; ``is_up`` tells what became of it."""
        from ray import serve

        target = serve.RunTarget(target=application, name=APPLICATION, route_prefix="/", logging_config=self._logging())
        serve.run_many([target], wait_for_applications_running=False)

    def is_up(self) -> bool:
        """True once every replica has started.

        Raises:
            StartFailed: a replica cannot; the message carries what it said.
        """
        from ray import serve
        from ray.serve.schema import ApplicationStatus

        application = serve.status().applications.get(APPLICATION)
        if application is None:
            return False
        if application.status is ApplicationStatus.DEPLOY_FAILED:
            failed = {
                name: item.message
                for name, item in application.deployments.items()
                if item.status.name == "DEPLOY_FAILED"
            }
            raise StartFailed(failure_told(failed or {APPLICATION: application.message}))
        if self._handle is None and application.status is ApplicationStatus.RUNNING:
            self._handle = serve.get_app_handle(APPLICATION)
        return self._handle is not None

    def _logging(self) -> dict[str, object]:
        config = self.config
        return {
            "log_level": config.log_level,
            "encoding": config.log_format.upper(),
            "enable_access_log": False,
        }

    def stop(self, *, on_drain: Callable[[], None] = lambda: None) -> None:
        """Routers refuse new requests and finish theirs, at most ``drain_timeout_s``; then the application is deleted
        and Serve, Ray and whatever is left end. Does nothing when the session has ended."""
        if self._ended:
            return
        if self._handle is not None:
            on_drain()
            timeout_s = self.config.drain_timeout_s
            try:
                self._handle.drain.remote(timeout_s).result(timeout_s=timeout_s + DRAIN_ANSWER_S)
            except Exception as error:
                log.warning("the router did not drain: %r", error)
        if "ray" in sys.modules:
            import ray
            from ray import serve

            # Ray prints, as errors, the calls that Serve itself breaks off while it stops.
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                if ray.is_initialized():
                    with contextlib.suppress(Exception):
                        serve.shutdown()  # type: ignore[no-untyped-call]
                    ray.shutdown()
        self._ended = True
        end_processes(self.folder, grace_s=PROCESS_GRACE_S)
        if self._log_dir is not None:
            with contextlib.suppress(OSError):
                shutil.copytree(self.folder / "session_latest" / "logs", self._log_dir, dirs_exist_ok=True)
        shutil.rmtree(self.folder, ignore_errors=True)
        self._watchdog.dismiss()
        self._ports.release()
        _restore_environment(self._former)

    def abandon(self) -> None:
        """Leaves the end, at once and of everything, to the watchdog. This process must exit without delay: Ray in it
        does not survive its raylet."""
        self._ended = True
        self._watchdog.act()


def failure_told(messages: Mapping[str, str]) -> str:
    """One line per deployment: the last of its message, which is the exception after its traceback."""
    lines = [
        f"{name} does not start: {(message.strip().splitlines() or ['no reason given'])[-1]}"
        for name, message in messages.items()
    ]
    return "\n".join([*lines, "--log-dir keeps the logs of the session, which say more"])


def _set_environment(values: Mapping[str, str]) -> dict[str, str | None]:
    former = {name: os.environ.get(name) for name in (*values, "RAY_ADDRESS")}
    os.environ.pop("RAY_ADDRESS", None)
    os.environ.update(values)
    return former


def _restore_environment(former: Mapping[str, str | None]) -> None:
    for name, value in former.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


@contextlib.contextmanager
def _interrupts_blocked() -> Iterator[None]:
    """Ctrl-C reaches every process of a terminal's foreground group; Ray's, which inherit this mask, must outlive it
    to drain."""
    former = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, former)
