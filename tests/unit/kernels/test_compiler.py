from __future__ import annotations

import shutil
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from actors.kernels.compiler import KernelUnavailable, cache_directory, find_compiler, load_library
from actors.kernels.cpu import SOURCES

COMPILER = find_compiler()
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C compiler")


def script(path: Path, text: str) -> str:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def counting(tmp_path: Path) -> tuple[str, Path]:
    """A compiler that notes each build in a file before it passes it on."""
    log = tmp_path / "builds"
    lines = f'case "$*" in *-shared*) echo build >> {log};; esac\nexec {COMPILER} "$@"'
    return script(tmp_path / "counting-cc", lines), log


@needs_compiler
def test_a_library_is_built_once(tmp_path: Path) -> None:
    compiler, log = counting(tmp_path)
    for _ in range(2):
        library = load_library("cpu", SOURCES, tmp_path / "cache", compiler=compiler)
        assert library.linear and library.route
    assert log.read_text().splitlines() == ["build"]
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".so"], "something was left behind"


@needs_compiler
def test_other_sources_are_another_library(tmp_path: Path) -> None:
    load_library("cpu", SOURCES, tmp_path)
    load_library("cpu", SOURCES[:2], tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


@needs_compiler
def test_several_may_build_at_once(tmp_path: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        found = [pool.submit(load_library, "cpu", SOURCES, tmp_path) for _ in range(4)]
    assert all(future.result().linear for future in found)
    assert len(list(tmp_path.iterdir())) == 1


def test_a_failing_compiler_says_why(tmp_path: Path) -> None:
    compiler = script(tmp_path / "cc", 'case "$*" in *-shared*) echo "bad target" >&2; exit 1;; esac')
    with pytest.raises(KernelUnavailable, match="bad target"):
        load_library("cpu", SOURCES, tmp_path / "cache", compiler=compiler)
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_library_that_is_none_is_refused(tmp_path: Path) -> None:
    lines = 'for last; do :; done\ncase "$*" in *-shared*) echo text > "$last";; esac'
    with pytest.raises(KernelUnavailable, match="could not be built"):
        load_library("cpu", SOURCES, tmp_path / "cache", compiler=script(tmp_path / "cc", lines))


def test_no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(KernelUnavailable, match="no C compiler"):
        load_library("cpu", SOURCES, tmp_path)


@needs_compiler
def test_a_cache_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(KernelUnavailable, match="could not be built"):
        load_library("cpu", SOURCES, tmp_path / "file" / "cache")


def test_cc_names_the_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    mine = script(tmp_path / "my-cc", "")
    monkeypatch.setenv("CC", mine)
    assert find_compiler() == mine
    monkeypatch.setenv("CC", str(tmp_path / "absent"))
    assert find_compiler() is None


def test_where_libraries_are_kept() -> None:
    assert cache_directory({"XDG_CACHE_HOME": "/some"}) == Path("/some/ernie-serving/kernels")
    assert cache_directory({}) == Path.home() / ".cache/ernie-serving/kernels"
