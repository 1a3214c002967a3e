"""Routers and engines broken on purpose: a chaos run that does not fail with them does not see what it looks for."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

VARIABLE = "ERNIE_CHAOS_MUTANT"
MUTANTS = ("no_dedupe", "no_resume", "no_epoch")


@contextlib.contextmanager
def mutated(name: str) -> Iterator[None]:
    """Processes started meanwhile are mutants: Python imports ``sitecustomize`` of the folder before anything else."""
    if not name:
        yield
        return
    before = {key: os.environ.get(key) for key in (VARIABLE, "PYTHONPATH")}
    folder = str(Path(__file__).parent / "mutation")
    os.environ[VARIABLE] = name
    os.environ["PYTHONPATH"] = os.pathsep.join([folder, before["PYTHONPATH"] or ""])
    try:
        yield
    finally:
        for key, value in before.items():
            if value is None:
                os.environ.pop(key, None)
            else:
                os.environ[key] = value
