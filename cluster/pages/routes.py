"""Serves the files of the pages."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from importlib.resources.abc import Traversable

from fastapi import FastAPI, Request, Response
from fastapi.responses import RedirectResponse

PLAYGROUND, CONSOLE = "/playground/", "/console/"
SHARED = "/shared/"
INDEX = "index.html"
MEDIA_TYPES: Mapping[str, str] = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
    "png": "image/png",
    "mp4": "video/mp4",
}
HEADERS: Mapping[str, str] = {
    # Nothing from elsewhere, nothing inline. Pictures and clips that people drop are blob: and data: URLs.
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' blob: data:; media-src 'self' blob: data:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    # A browser asks again each time; an unchanged file costs it no bytes.
    "cache-control": "no-cache",
}


@dataclass(frozen=True, slots=True)
class _File:
    content: bytes
    headers: Mapping[str, str]


def install_pages(app: FastAPI) -> None:
    """Adds the pages; ``/`` leads to the playground. Their routes are not part of the API's description."""
    for path in (PLAYGROUND, CONSOLE, SHARED):
        _install_folder(app, path)
    for path in (PLAYGROUND, CONSOLE):
        _install_lead(app, path.rstrip("/"), path)
    _install_lead(app, "/", PLAYGROUND)


def _install_folder(app: FastAPI, path: str) -> None:
    served = _read(files(__package__) / path.strip("/"))

    async def file(request: Request) -> Response:
        found = served.get(request.path_params.get("name") or INDEX)
        if found is None:
            return Response("There is no such page.\n", 404, HEADERS, "text/plain")
        if request.headers.get("if-none-match") == found.headers["etag"]:
            return Response(status_code=304, headers=found.headers)
        return Response(found.content, headers=found.headers)

    app.add_route(path, file, methods=["GET"], include_in_schema=False)
    app.add_route(path + "{name:path}", file, methods=["GET"], include_in_schema=False)


def _install_lead(app: FastAPI, path: str, to: str) -> None:
    async def lead(request: Request) -> Response:
        return RedirectResponse(request.scope.get("root_path", "").rstrip("/") + to)

    app.add_route(path, lead, methods=["GET"], include_in_schema=False)


def _read(folder: Traversable, prefix: str = "") -> dict[str, _File]:
    found: dict[str, _File] = {}
    for entry in folder.iterdir():
        if entry.is_dir():
            found |= _read(entry, f"{prefix}{entry.name}/")
        elif (kind := MEDIA_TYPES.get(entry.name.rpartition(".")[2])) is not None:
            content = entry.read_bytes()
            etag = f'"{hashlib.blake2b(content, digest_size=16).hexdigest()}"'
            found[prefix + entry.name] = _File(content, {**HEADERS, "content-type": kind, "etag": etag})
    return found
