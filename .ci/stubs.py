"""Generates the stubs beside the protos, or with --check tells which differ from what would be generated."""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PROTO = ROOT / "proto"
SUFFIXES = ("_pb2.py", "_pb2.pyi", "_pb2_grpc.py", "_pb2_grpc.pyi")


def generate(target: Path) -> None:
    """Writes the stubs of every proto file below ``target``."""
    tools = Path(sys.executable).parent
    command = [
        sys.executable,
        "-m",
        "grpc_tools.protoc",
        f"--proto_path={PROTO}",
        f"--plugin=protoc-gen-mypy={tools / 'protoc-gen-mypy'}",
        f"--plugin=protoc-gen-mypy_grpc={tools / 'protoc-gen-mypy_grpc'}",
        f"--python_out={target}",
        f"--grpc_python_out={target}",
        f"--mypy_out=quiet:{target}",
        f"--mypy_grpc_out=quiet:{target}",
        *sorted(str(path) for path in PROTO.rglob("*.proto")),
    ]
    subprocess.run(command, check=True)


def stubs(folder: Path) -> dict[str, bytes]:
    """Contents of the stubs below a folder, by relative path."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name.endswith(SUFFIXES)
    }


def check() -> int:
    with tempfile.TemporaryDirectory() as folder:
        generate(Path(folder))
        wanted, present = stubs(Path(folder)), stubs(PROTO)
    wrong = sorted(name for name in wanted.keys() | present.keys() if wanted.get(name) != present.get(name))
    for name in wrong:
        print(f"proto/{name}: {'differs' if name in wanted and name in present else 'missing or left over'}")
    if wrong:
        print("run `make proto` and commit the result")
    return int(bool(wrong))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    if parser.parse_args().check:
        return check()
    generate(PROTO)
    return 0


if __name__ == "__main__":
    sys.exit(main())
