"""The page at ``/``: a few files, served by the gateway itself.

They are read once and live in memory. Their names stay the same from one version to the next, so a
browser keeps them but asks each time whether they are still what it has; the tag is a hash of the
content, equal in all replicas. Nothing here needs a key: the page asks for one where the API does.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException

_TYPES = {
    ".html": "text/html",
    ".js": "text/javascript",
    ".css": "text/css",
    ".svg": "image/svg+xml",
}


@dataclass(frozen=True, slots=True)
class _File:
    content: bytes
    media_type: str
    headers: dict[str, str]

    def answer(self, request: Request) -> Response:
        """The file, or 304 to a browser that has it."""
        known = request.headers.get("if-none-match", "")
        if self.headers["etag"] in (tag.strip().removeprefix("W/") for tag in known.split(",")):
            return Response(status_code=304, headers=self.headers)
        return Response(self.content, headers=self.headers, media_type=self.media_type)


def add_page(api: FastAPI) -> None:
    """Let ``api`` serve the page at ``/`` and its files under ``/static/``."""
    folder = Path(__file__).parent
    files = {path.name: _read(path) for path in folder.iterdir() if path.suffix in _TYPES}
    page = files.pop("index.html")

    @api.get("/", include_in_schema=False)
    async def index(request: Request) -> Response:
        return page.answer(request)

    @api.get("/static/{name}", include_in_schema=False)
    async def static(request: Request, name: str) -> Response:
        if name not in files:
            raise HTTPException(404)
        return files[name].answer(request)


def _read(path: Path) -> _File:
    content = path.read_bytes()
    tag = hashlib.sha256(content).hexdigest()[:32]
    headers = {"etag": f'"{tag}"', "cache-control": "no-cache"}
    return _File(content, _TYPES[path.suffix], headers)
