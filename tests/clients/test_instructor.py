"""instructor: replies as pydantic models, by schema and by call, sync and async."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.demo import Sample
from tests.clients.conftest import INSTRUCTOR, data_url
from tests.clients.site import FOLDER, HOST

PICTURES = ("data", "model card")
FACES = ("", ", asyncio")
CASES = [f"{name}, {mode}{face}" for name in PICTURES for mode in ("tools", "json_schema") for face in FACES]


@pytest.fixture(scope="module")
def boxes(base_url: str, samples: dict[str, Sample], tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[int]]:
    card = f"https://{HOST}{FOLDER}example2.jpg"
    file = tmp_path_factory.mktemp("instructor") / "pictures.json"
    file.write_text(json.dumps(dict(zip(PICTURES, (data_url(samples["thought"]), card), strict=True))))
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("with_instructor.py")), base_url, str(file)],
        capture_output=True,
        text=True,
        timeout=200,
        env={**os.environ, "PYTHONPATH": str(INSTRUCTOR)},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, list[int]] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("case", CASES)
def test_a_box(boxes: dict[str, list[int]], case: str) -> None:
    x1, y1, x2, y2 = boxes[case]
    if "json_schema" in case:
        assert 450 < x1 < x2 < 750 and 650 < y1 < y2 < 1000
    else:
        # nano knows no function of that name: a forced call has the right form only.
        assert all(isinstance(corner, int) for corner in (x1, y1, x2, y2))
