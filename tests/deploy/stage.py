"""A site as README.md of deploy/ wants it: an operator's machine with a checkout, and machines for the cluster.

The cluster's machines come with Python and the dependencies of the wheel installed, as a machine image would have them,
so that nothing is downloaded; the wheel itself is built from the checkout and installed by ``ray up``.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

from tests.deploy.machines import HOME, Machine, Network

ROOT = Path(__file__).resolve().parents[2]
CHECKOUT = HOME / "ernie-serving"
WHEEL_COMMAND = "python -m pip wheel --no-deps -w dist ."
WHEEL_LIMIT_S = 180.0


def build_wheel(folder: Path) -> Path:
    """A copy of the checkout with the wheel in dist/, by the command of README.md."""
    checkout = folder / "checkout"
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split("\0")
    for name in filter(None, listed):
        if (ROOT / name).is_file():
            target = checkout / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target)
    program, *arguments = WHEEL_COMMAND.split()
    assert program == "python"
    done = subprocess.run(
        [sys.executable, *arguments, "--quiet"],
        cwd=checkout,
        capture_output=True,
        text=True,
        timeout=WHEEL_LIMIT_S,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return checkout


def add_operator(network: Network, checkout: Path, address: str) -> Machine:
    """The machine that commands are typed on, with the checkout in ``CHECKOUT`` and an SSH key for the others."""
    home = network.folder / "operator" / "home"
    home.mkdir(parents=True)
    shutil.move(checkout, home / CHECKOUT.name)
    (home / CHECKOUT.name / ".venv").symlink_to(sys.prefix)
    operator = network.add("operator", address)
    key = home / ".ssh" / "id_ed25519"
    shutil.copy(network.user_key, key)
    key.chmod(0o600)
    return operator


def add_node(network: Network, name: str, address: str) -> Machine:
    """A machine for the cluster."""
    home = network.folder / name / "home"
    if not home.exists():
        _install_dependencies(home / "ernie" / "venv", HOME / "ernie" / "venv")
        # Others may fill this computer's memory; Ray would kill our workers for it.
        (home / ".bashrc").write_text("export RAY_memory_monitor_refresh_ms=0 RAY_enable_worker_prestart=0\n")
    return network.add(name, address)


def _install_dependencies(folder: Path, place: Path) -> None:
    """A virtual environment in ``folder``, which the machine sees as ``place``: this one's packages without ours."""
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    packages, programs = folder / "lib" / version / "site-packages", folder / "bin"
    packages.mkdir(parents=True)
    programs.mkdir()
    home = Path(sys.base_prefix) / "bin"
    (folder / "pyvenv.cfg").write_text(f"home = {home}\nversion = {sys.version.split()[0]}\n")
    for name in ("python", "python3", version):
        (programs / name).symlink_to(home / version)
    for entry in os.scandir(Path(sys.prefix) / "lib" / version / "site-packages"):
        if "ernie_serving" not in entry.name and entry.name != "__pycache__":
            (packages / entry.name).symlink_to(entry.path)
    for script in entry_points(group="console_scripts"):
        if script.name in ("pip", "ray", "serve"):
            program = programs / script.name
            call = f"sys.exit({script.attr}())"
            program.write_text(f"#!{place}/bin/python\nimport sys\nfrom {script.module} import {script.attr}\n{call}\n")
            program.chmod(0o755)
