"""A model hub on loopback, as far as huggingface_hub asks of one."""

from __future__ import annotations

import contextlib
import hashlib
import http.server
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest


@dataclass
class Repository:
    """Files by revision; a revision's commit is its number, forty digits long."""

    directory: Path
    commits: dict[str, str] = field(default_factory=lambda: {"main": "1" * 40})
    gated: bool = False


@dataclass
class Hub:
    """``served`` are the paths of files whose bytes were sent."""

    repositories: dict[str, Repository] = field(default_factory=dict)
    served: list[str] = field(default_factory=list)
    url: str = ""


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            self._about("/".join(parts[2:4]), parts[4:], body=body)
        elif parts[2:3] == ["resolve"]:
            self._file("/".join(parts[:2]), parts[3], "/".join(parts[4:]), body=body)
        else:
            self._send(404, b"{}", body=body)

    def _about(self, name: str, rest: list[str], *, body: bool) -> None:
        repository = self._repository(name, body=body)
        if repository is None:
            return
        revision = "/".join(rest[1:]) or "main"
        commit = self._commit(repository, revision, body=body)
        if commit is None:
            return
        files = sorted(path for path in repository.directory.rglob("*") if path.is_file())
        names = [path.relative_to(repository.directory).as_posix() for path in files]
        if rest[:1] == ["tree"]:
            entries = [
                {"type": "file", "path": name, "size": path.stat().st_size, "oid": _digest(path)}
                for name, path in zip(names, files, strict=True)
            ]
            self._send(200, json.dumps(entries).encode(), body=body)
            return
        siblings = [{"rfilename": name} for name in names]
        self._send(200, json.dumps({"id": name, "sha": commit, "siblings": siblings}).encode(), body=body)

    def _file(self, name: str, revision: str, file: str, *, body: bool) -> None:
        repository = self._repository(name, body=body)
        if repository is None or (commit := self._commit(repository, revision, body=body)) is None:
            return
        path = repository.directory / file
        if not path.is_file():
            self._send(404, b"", body=body, code="EntryNotFound")
            return
        if repository.gated:
            self._send(403, b"", body=body, code="GatedRepo")
            return
        if body:
            self.hub.served.append(file)
        headers = {"ETag": f'"{_digest(path)}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        self._send(200, path.read_bytes(), body=body, headers=headers)

    def _repository(self, name: str, *, body: bool) -> Repository | None:
        found = self.hub.repositories.get(name)
        if found is None:
            self._send(404, b"{}", body=body, code="RepoNotFound")
        return found

    def _commit(self, repository: Repository, revision: str, *, body: bool) -> str | None:
        if revision in repository.commits.values():
            return revision
        commit = repository.commits.get(revision)
        if commit is None:
            self._send(404, b"{}", body=body, code="RevisionNotFound")
        return commit

    def _send(
        self, status: int, content: bytes, *, body: bool, code: str | None = None, headers: dict[str, str] | None = None
    ) -> None:
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        if code is not None:
            self.send_header("X-Error-Code", code)
            self.send_header("X-Error-Message", code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *args: object) -> None:
        pass


def _digest(path: Path) -> str:
    return hashlib.sha1(path.read_bytes(), usedforsecurity=False).hexdigest()


@contextlib.contextmanager
def hub_server(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub that huggingface_hub of this process asks, with a cache of its own."""
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        hub.url = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        use_hub(hub.url, cache, monkeypatch)
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()


def use_hub(url: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another hub and another cache; huggingface_hub reads most of its environment when it is imported."""
    from huggingface_hub import constants

    monkeypatch.setenv("HF_ENDPOINT", url)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
