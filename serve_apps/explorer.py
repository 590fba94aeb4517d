"""The interactive description of the API under ``/docs``, without a host from outside.

FastAPI's own page loads its scripts from elsewhere and starts them inline, which the endpoint's
content security policy forbids, rightly: a script of that page could read every answer.
"""

from __future__ import annotations

from pathlib import Path

import fastapi_offline
from fastapi import FastAPI, Response
from fastapi.staticfiles import StaticFiles

_PAGE = """<!doctype html>
<html lang="en">
<title>FusionRec: API</title>
<link rel="icon" href="docs/files/favicon.png">
<link rel="stylesheet" href="docs/files/swagger-ui.css">
<div id="api"></div>
<script src="docs/files/swagger-ui-bundle.js"></script>
<script src="docs/start.js"></script>
</html>
"""
_START = """SwaggerUIBundle({
  url: "openapi.json",
  dom_id: "#api",
  presets: [SwaggerUIBundle.presets.apis],
});
"""


def add_explorer(api: FastAPI) -> None:
    """Let ``api`` serve the page."""

    @api.get("/docs", include_in_schema=False)
    async def page() -> Response:
        return Response(_PAGE, media_type="text/html")

    @api.get("/docs/start.js", include_in_schema=False)
    async def start() -> Response:
        return Response(_START, media_type="text/javascript")

    files = Path(fastapi_offline.__file__).parent / "static"
    api.mount("/docs/files", StaticFiles(directory=files), name="explorer")
