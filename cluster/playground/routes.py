"""Serves the playground's files."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from importlib.resources.abc import Traversable

from fastapi import FastAPI, Request, Response
from fastapi.responses import RedirectResponse

PATH = "/playground/"
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


def install_playground(app: FastAPI) -> None:
    """Adds the page at ``PATH``, to which ``/`` leads. Its routes are not part of the API's description."""
    served = _read(files(__package__) / "static")

    async def page(request: Request) -> Response:
        file = served.get(request.path_params.get("name") or INDEX)
        if file is None:
            return Response("There is no such page.\n", 404, HEADERS, "text/plain")
        if request.headers.get("if-none-match") == file.headers["etag"]:
            return Response(status_code=304, headers=file.headers)
        return Response(file.content, headers=file.headers)

    async def to_page(request: Request) -> Response:
        return RedirectResponse(request.scope.get("root_path", "").rstrip("/") + PATH)

    app.add_route("/", to_page, methods=["GET"], include_in_schema=False)
    app.add_route(PATH.rstrip("/"), to_page, methods=["GET"], include_in_schema=False)
    app.add_route(PATH, page, methods=["GET"], include_in_schema=False)
    app.add_route(PATH + "{name:path}", page, methods=["GET"], include_in_schema=False)


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
