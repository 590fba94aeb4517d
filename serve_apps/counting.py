"""Counts how requests to one path end, whoever answers: the route, or what stands before it.

Plain ASGI, for the reason that security.py gives.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from serve_apps.security import App, Message, Receive, Scope, Send

CLIENT_LEFT = 499
"""The status that proxies write down where the client did not wait for one."""


class Counted:
    """ASGI middleware."""

    def __init__(self, app: App, *, path: str, count: Callable[[int], None]) -> None:
        """Call ``count`` with the status of every request to ``path``."""
        self._app = app
        self._path = path
        self._count = count

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass everything on."""
        if scope["type"] != "http" or self._elsewhere(scope):
            await self._app(scope, receive, send)
            return
        answered: int | None = None

        async def send_counted(message: Message) -> None:
            nonlocal answered
            if message["type"] == "http.response.start":
                answered = message["status"]
            await send(message)

        ended = 500
        try:
            await self._app(scope, receive, send_counted)
        except asyncio.CancelledError:
            ended = CLIENT_LEFT
            raise
        finally:
            self._count(ended if answered is None else answered)

    def _elsewhere(self, scope: Scope) -> bool:
        prefix = str(scope.get("root_path", ""))  # where the application is not at the root
        return str(scope["path"]).removeprefix(prefix) != self._path
