"""Builds C sources of this package into a shared library, once per machine, and loads it.

The library lies in the user's cache directory under a name that says what it was made from: source, flags, compiler and
processor. It appears there by an atomic rename, so any number of processes may build it at the same time.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path

log = logging.getLogger(__name__)

COMPILERS = ("cc", "gcc", "clang")
FLAGS = ("-O3", "-march=native", "-std=gnu11", "-fPIC", "-shared", "-fno-math-errno", "-fno-trapping-math")
BUILD_TIMEOUT_S = 120.0


class KernelUnavailable(Exception):
    """A kernel cannot be had on this machine; says why."""


def find_compiler() -> str | None:
    """Path of the system's C compiler: ``$CC``, or the first of ``COMPILERS`` that is there."""
    wanted = os.environ.get("CC")
    return next((path for name in ([wanted] if wanted else COMPILERS) if (path := shutil.which(name))), None)


def cache_directory(environment: Mapping[str, str] = os.environ) -> Path:
    """``ernie-serving/kernels`` in ``$XDG_CACHE_HOME``, by default ``~/.cache``."""
    base = environment.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "ernie-serving" / "kernels"


def load_library(
    name: str, sources: Sequence[str], directory: Path | None = None, *, compiler: str | None = None
) -> ctypes.CDLL:
    """The library of C files of this package, compiled as one, built if ``directory`` (the cache) does not hold it yet.

    Raises KernelUnavailable without a compiler, if it fails, or where nothing can be written.
    """
    compiler = compiler or find_compiler()
    if compiler is None:
        raise KernelUnavailable(f"no C compiler: set CC or install one of {', '.join(COMPILERS)}")
    package = resources.files("actors.kernels")
    source = b"".join(package.joinpath(file).read_bytes() for file in sources)
    folder = directory or cache_directory()
    try:
        path = folder / f"{name}-{_identity(source, compiler)}.so"
        if not path.exists():
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            _build(source, compiler, path)
        return ctypes.CDLL(str(path))
    except (OSError, subprocess.SubprocessError) as error:
        raise KernelUnavailable(f"{name} could not be built with {compiler}: {_why(error)}") from error


def _build(source: bytes, compiler: str, path: Path) -> None:
    started = time.monotonic()
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".build-") as work:
        built = Path(work) / path.name
        command = [compiler, *FLAGS, "-x", "c", "-", "-o", str(built)]
        subprocess.run(command, input=source, check=True, capture_output=True, timeout=BUILD_TIMEOUT_S)
        built.replace(path)
    log.info("built %s with %s in %.1f s", path, compiler, time.monotonic() - started)


def _identity(source: bytes, compiler: str) -> str:
    """What ``-march=native`` means differs between machines that share a home, so the processor is part of it."""
    answer = subprocess.run([compiler, "--version"], check=True, capture_output=True, timeout=BUILD_TIMEOUT_S)
    digest = hashlib.blake2b(digest_size=12)
    processor = " ".join(sorted(cpu_flags()))
    for part in (source, " ".join(FLAGS).encode(), os.fsencode(compiler), answer.stdout, processor.encode()):
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()


def cpu_flags() -> frozenset[str]:
    """What the first processor can do, in Linux's names; empty where ``/proc/cpuinfo`` does not say."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return frozenset()
    found = next((line for line in lines if line.startswith("flags")), "")
    return frozenset(found.partition(":")[2].split())


def _why(error: Exception) -> str:
    if isinstance(error, subprocess.CalledProcessError):
        return (error.stderr or b"").decode(errors="replace").strip()[-500:] or f"exit status {error.returncode}"
    return str(error)
