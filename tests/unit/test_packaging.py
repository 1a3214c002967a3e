"""What the distribution contains, and that nothing else owns our import names."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = {"actors": ROOT / "actors", "cluster": ROOT / "cluster", "ernie_serving": ROOT / "proto" / "ernie_serving"}


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def folders_with_files() -> set[str]:
    found = set()
    for name, source in SOURCES.items():
        for folder in (source, *(path for path in source.rglob("*") if path.is_dir())):
            kept = [path for path in folder.iterdir() if path.is_file() and path.suffix != ".pyc"]
            if kept and "__pycache__" not in folder.parts:
                found.add(".".join((name, *folder.relative_to(source).parts)))
    return found


def test_every_folder_is_packaged(project: dict[str, Any]) -> None:
    assert set(project["tool"]["setuptools"]["packages"]) == folders_with_files()


def test_the_proto_folder_is_no_package() -> None:
    assert not (ROOT / "proto" / "__init__.py").exists()


@pytest.mark.parametrize("name", ["cluster", "actors"])
def test_nobody_else_owns_our_names(name: str) -> None:
    assert set(packages_distributions().get(name, [])) <= {"ernie-serving"}


def test_importing_from_the_checkout_leaves_proto_plus_alone() -> None:
    code = "import proto; proto.Message; import cluster, actors, ernie_serving.v1.inference_pb2"
    path = [str(ROOT), str(ROOT / "proto")]
    program = f"import sys; sys.path[:0] = {path!r}\n{code}"
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)


def test_non_python_files_are_package_data(project: dict[str, Any]) -> None:
    patterns: dict[str, list[str]] = project["tool"]["setuptools"]["package-data"]
    for name, source in SOURCES.items():
        for path in source.rglob("*"):
            if path.is_dir() or path.suffix in (".py", ".pyc"):
                continue
            matches = any(
                path.match(pattern) and (package == "*" or path.is_relative_to(ROOT / package.replace(".", "/")))
                for package, wanted in patterns.items()
                for pattern in wanted
            )
            assert matches, f"{name}: {path.relative_to(ROOT)} would be left out of the wheel"


def test_help_is_quick_to_import() -> None:
    program = (
        "import sys; sys.argv = ['ernie', '--help']; import cluster.cli\n"
        "try: cluster.cli.main()\n"
        "except SystemExit: pass\n"
        "heavy = {'ray', 'torch', 'grpc', 'fastapi', 'transformers'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


@pytest.mark.parametrize("module", ["cluster.ingress", "cluster.planner", "cluster.workers.preprocessor"])
def test_who_holds_no_weights_loads_no_torch(module: str) -> None:
    program = f"import sys; sys.modules['torch'] = None; import {module}"
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)
