"""Machines for ``ray up`` on one computer: namespaces with an address, a process tree, a home and an SSH server each.

A machine has network, pid, mount, uts and ipc namespaces of its own, so that Ray's hunt for its processes, its fixed
paths and its ports stay inside, and losing power is killing one process. Machines share the files of the computer
except /tmp, /run, /dev/shm, /home and /etc. Nothing of the computer's own network is touched: the switch between them
is in a namespace too. They need root with CAP_SYS_ADMIN and CAP_NET_ADMIN; ``lacking`` says what is missing.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

USER = "ernie"
HOME = Path("/home") / USER
TOOLS = ("ip", "setpriv", "unshare", "nsenter", "ssh", "ssh-keygen", "rsync", "sshd", "redis-server")
LIMIT_S = 20.0
BRIDGE = "switch"
_PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
_ROOT = Path(__file__).resolve().parents[2]
_SPACES = ("net", "pid", "mount", "uts", "ipc")
# Whatever ends this process ends what it started.
_BOUND = ["setpriv", "--pdeathsig", "KILL", "unshare", "--fork", "--kill-child"]
_UNSHARE = [*_BOUND, *(f"--{space}" for space in _SPACES)]
_PASSWD = f"{USER}:x:0:0::{HOME}:/bin/bash\nsshd:x:105:65534::/run/sshd:/usr/sbin/nologin\n"
_LOGGED_IN = {"HOME": str(HOME), "USER": USER, "LOGNAME": USER, "SHELL": "/bin/bash", "LANG": "C.UTF-8", "PATH": _PATH}

# $1: the machine's folder, $2: its name, then directories of the computer it needs. What is kept below a directory that
# is emptied is held open and bound again. The last command becomes the machine: when it ends, everything in it does.
_BOOT = """
set -e
folder=$1; name=$2; shift 2
hostname "$name"
exec {home}<"$folder/home"
declare -A held
for kept in "$@"; do exec {held["$kept"]}<"$kept"; done
mount -t proc proc /proc
for emptied in /tmp /run /dev/shm /home; do mount -t tmpfs -o mode=1777 tmpfs "$emptied"; done
bind() { mkdir -p "$2"; mount -c --rbind "/proc/self/fd/$1" "$2"; }
bind $home /home/ernie
for kept in "$@"; do
    case $kept in /tmp/*|/run/*|/home/*) bind ${held["$kept"]} "$kept" ;; esac
done
mkdir -p /run/sshd
cd /home/ernie/.machine
# All of /etc: a file alone would lose its mount when the computer's is replaced, by an installation for example.
rm -rf etc; cp -a /etc etc; cp passwd hosts resolv.conf etc/
mount --bind etc /etc
until ip -o -4 address show dev eth0 2>/dev/null | grep -q inet; do sleep 0.05; done
exec "$(PATH=$PATH:/usr/sbin command -v sshd)" -D -e -f sshd_config
"""

_SSHD = f"""Port 22
HostKey {HOME}/.machine/host_key
PidFile none
PermitRootLogin yes
StrictModes no
UsePAM no
LogLevel ERROR
AuthorizedKeysFile {HOME}/.ssh/authorized_keys
"""


def lacking() -> str:
    """Why machines cannot be made here; empty when they can."""
    if sys.platform != "linux":
        return "namespaces are Linux's"
    missing = [tool for tool in TOOLS if shutil.which(tool, path=_PATH) is None]
    if missing:
        packages = "openssh-server, openssh-client, rsync, iproute2, redis-server"
        return f"not installed: {', '.join(missing)} (Debian: {packages})"
    if os.geteuid() != 0:
        return "making network and mount namespaces needs root"
    for trial in (
        [*_UNSHARE, "mount", "-t", "tmpfs", "tmpfs", "/tmp"],
        ["unshare", "--net", "ip", "link", "add", "trial", "type", "bridge"],
    ):
        done = subprocess.run(trial, capture_output=True, text=True, check=False)
        if done.returncode:
            return f"`{' '.join(trial)}` fails: {done.stderr.strip()}"
    return ""


class Machine:
    """One machine, on. ``home`` is its home directory as the computer sees it."""

    def __init__(self, network: Network, name: str, address: str) -> None:
        self.name, self.address = name, address
        self.home = network.folder / name / "home"
        self._network = network
        self._log = network.folder / name / "sshd.log"
        self._prepare()
        with self._log.open("ab") as log:
            self._unshare = subprocess.Popen(
                [*_UNSHARE, "bash", "-c", _BOOT, "boot", str(self.home.parent), name, *map(str, kept_directories())],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        try:
            self.process = _child(self._unshare, self._log)
            self._plug_in()
            self._wait_for_ssh()
        except BaseException:
            self.lose_power()
            raise

    def _prepare(self) -> None:
        machine, ssh = self.home / ".machine", self.home / ".ssh"
        for folder in (machine, ssh):
            folder.mkdir(parents=True, exist_ok=True)
        ssh.chmod(0o700)
        shutil.copy(self._network.host_key, machine / "host_key")
        shutil.copy(self._network.user_key.with_suffix(".pub"), ssh / "authorized_keys")
        (machine / "sshd_config").write_text(_SSHD)
        (machine / "passwd").write_text(_PASSWD)
        (machine / "hosts").write_text(f"127.0.0.1 localhost\n{self.address} {self.name}\n")
        (machine / "resolv.conf").write_text("")

    def _plug_in(self) -> None:
        self._network.ip("link", "add", self.name, "type", "veth", "peer", "name", "eth0", "netns", str(self.process))
        self._network.ip("link", "set", self.name, "master", BRIDGE, "up")
        mac = ":".join(f"{byte:02x}" for byte in (2, 0, *map(int, self.address.split("."))))
        for arguments in (
            "link set lo up",
            f"link set eth0 address {mac} up",
            f"address add {self.address}/24 dev eth0",
            "route add default dev eth0",
        ):
            _run(_enter(self.process, "net"), ["ip", *arguments.split()])

    def _wait_for_ssh(self) -> None:
        """Returns once port 22 (0x16) listens (state 0x0A)."""
        deadline = time.monotonic() + LIMIT_S
        while ":0016 00000000:0000 0A" not in Path(f"/proc/{self.process}/net/tcp").read_text():
            assert time.monotonic() < deadline, f"{self.name} has no SSH server:\n{self._log.read_text()}"
            time.sleep(0.02)

    def popen(
        self, command: Sequence[str], *, cwd: Path = HOME, env: Mapping[str, str] | None = None
    ) -> subprocess.Popen[str]:
        """Starts a command in the machine as its user; the output is one text stream."""
        return subprocess.Popen(
            [*_enter(self.process, *_SPACES), f"--wdns={cwd}", *command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**_LOGGED_IN, **(env or {})},
            start_new_session=True,
        )

    def run(self, script: str, *, cwd: Path = HOME, limit_s: float = LIMIT_S) -> str:
        """Runs a bash script in the machine, which stops at the first failure; returns what it printed.

        Raises:
            AssertionError: it failed or took longer than ``limit_s``; with what it printed.
        """
        process = self.popen(["bash", "-c", f"set -euo pipefail\n{script}"], cwd=cwd)
        try:
            output, _ = process.communicate(timeout=limit_s)
        except subprocess.TimeoutExpired:
            # Its parent, `nsenter`, alone would not do.
            os.killpg(process.pid, signal.SIGKILL)
            output, _ = process.communicate()
            raise AssertionError(f"{self.name}: not done in {limit_s:.0f} s:\n{script}\n{output}") from None
        assert process.returncode == 0, f"{self.name}: exit code {process.returncode}:\n{script}\n{output}"
        return output

    def processes(self) -> dict[int, str]:
        """Command lines of its processes, its SSH server left out, by the computer's ids. Empty when it is off."""
        found = {}
        with contextlib.suppress(OSError):
            ours = os.readlink(f"/proc/{self.process}/ns/pid")
            for entry in Path("/proc").glob("[0-9]*"):
                with contextlib.suppress(OSError):
                    if os.readlink(entry / "ns/pid") == ours and int(entry.name) != self.process:
                        line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
                        if line and not line.startswith("sshd:"):
                            found[int(entry.name)] = line
        return found

    def lose_power(self) -> None:
        """Ends all its processes at once. Peers hear nothing of it: its network goes first."""
        self._network.ip("link", "del", self.name, check=False)
        with contextlib.suppress(ProcessLookupError, AttributeError):
            os.kill(self.process, signal.SIGKILL)
        self._unshare.wait(LIMIT_S)


class Network:
    """A switch with machines on it, all in one /24."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.machines: list[Machine] = []
        self.user_key, self.host_key = folder / "user_key", folder / "host_key"
        for key in (self.user_key, self.host_key):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key)], check=True)
        self._unshare = subprocess.Popen([*_BOUND, "--net", "sleep", "infinity"])
        self._switch = _child(self._unshare, None)
        self.ip("link", "add", BRIDGE, "type", "bridge")
        self.ip("link", "set", BRIDGE, "up")

    def ip(self, *arguments: str, check: bool = True) -> None:
        """Runs ``ip`` on the switch."""
        _run(_enter(self._switch, "net"), ["ip", *arguments], check=check)

    def add(self, name: str, address: str) -> Machine:
        """Starts a machine. One that lost its power comes back with its home under the same name."""
        machine = Machine(self, name, address)
        self.machines.append(machine)
        return machine

    def close(self) -> None:
        """Ends all machines and the switch."""
        for machine in self.machines:
            machine.lose_power()
        self._unshare.kill()
        self._unshare.wait(LIMIT_S)


@contextlib.contextmanager
def network(folder: Path) -> Iterator[Network]:
    """A network whose end takes everything with it."""
    made = Network(folder)
    try:
        yield made
    finally:
        made.close()


def kept_directories() -> list[Path]:
    """Directories of the computer that machines need: the checkout, its environment, the interpreter."""
    return sorted({_ROOT, Path(sys.prefix), Path(sys.base_prefix)})


def _child(unshare: subprocess.Popen[bytes], log: Path | None) -> int:
    """Id of the process that ``unshare --fork`` started."""
    children = Path(f"/proc/{unshare.pid}/task/{unshare.pid}/children")
    deadline = time.monotonic() + LIMIT_S
    while time.monotonic() < deadline and unshare.poll() is None:
        with contextlib.suppress(OSError):
            if found := children.read_text().split():
                return int(found[0])
        time.sleep(0.02)
    raise AssertionError(f"a namespace does not start: {log.read_text() if log else ''}")


def _enter(process: int, *spaces: str) -> list[str]:
    return ["nsenter", f"--target={process}", *(f"--{space}" for space in spaces)]


def _run(enter: list[str], command: list[str], *, check: bool = True) -> None:
    done = subprocess.run([*enter, *command], capture_output=True, text=True, check=False, env=_LOGGED_IN)
    assert not check or done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
