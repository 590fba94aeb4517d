"""What Serve's own proxy says while it does not know its routes: 503 with Retry-After, not 404.

One that is started again after a fault listens before the controller has told it where requests
go, and answers 404 for that moment, which no client tries again. Its 404 is told from ours by a
header that all answers of the gateway carry. (haproxy.sh does the same for HAProxy.)
"""

from __future__ import annotations

from starlette.middleware import Middleware

from serve_apps.security import App, Message, Receive, Scope, Send

_OURS = b"x-content-type-options"
_RETRY_AFTER = (b"retry-after", b"1")


class Unrouted:
    """ASGI middleware."""

    def __init__(self, app: App) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass everything on but the status of a 404 that is not the endpoint's."""

        async def send_routed(message: Message) -> None:
            if message["type"] == "http.response.start" and message["status"] == 404:
                headers = list(message.get("headers", ()))
                if all(bytes(name).lower() != _OURS for name, _ in headers):
                    message = {**message, "status": 503, "headers": [*headers, _RETRY_AFTER]}
            await send(message)

        await self._app(scope, receive, send_routed)


def middlewares() -> list[Middleware]:
    """What Serve puts around its proxy, by RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH."""
    return [Middleware(Unrouted)]
