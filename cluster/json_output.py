"""JSON that a command was asked for with ``--json``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console

STANDARD_OUTPUT = "-"


def write_json(value: Any, target: str, console: Console) -> None:
    """Writes one object to a file, or prints it where ``target`` is "-". Raises OSError."""
    text = json.dumps(value, indent=2)
    if target == STANDARD_OUTPUT:
        console.out(text, highlight=False)
    else:
        Path(target).write_text(text + "\n", encoding="utf-8")
