"""What stands between the network and the routes: keys, rates, the audit log, security headers.

:class:`Door` decides who comes in. :class:`Secured` is plain ASGI around the whole application: it
bounds the headers of a request, adds those of the answer and notes it in the audit log.
(Starlette's ``BaseHTTPMiddleware`` would cost a task and two queues a request.)
"""

from __future__ import annotations

import json
import math
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import Any, Self

from pydantic import Field

from fusionrec.config import Config
from serve_apps.audit import AuditLog, Pseudonyms
from serve_apps.keys import ApiKeys, KeyName, RateLimit

MAX_HEADER_BYTES = 16 << 10
"""Names and values of all headers of a request; Serve's own proxy has no bound."""
BODY_TIMEOUT_S = 10.0
"""A body that is not complete by then is not waited for."""

CONTENT_SECURITY_POLICY = "; ".join(
    (
        "default-src 'self'",
        "img-src 'self' data:",  # icons inside style sheets
        "object-src 'none'",
        "base-uri 'none'",
        "form-action 'self'",
        "frame-ancestors 'none'",
    )
)
"""Scripts and styles come from files of this endpoint: neither inline nor from other hosts."""

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

_HEADERS = [
    (b"content-security-policy", CONTENT_SECURITY_POLICY.encode()),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"permissions-policy", b"camera=(), geolocation=(), microphone=()"),
    (b"referrer-policy", b"no-referrer"),
    (b"x-content-type-options", b"nosniff"),
]
_NOT_KEPT = (b"cache-control", b"no-store")
_ONLY_TLS = (b"strict-transport-security", b"max-age=31536000")


class Access(Config):
    """Who may come in; every gateway replica counts for itself."""

    api_keys: tuple[str, ...] = ()
    """SHA-256 hashes of the keys that are admitted, `hash` or `name=hash`; by default those of
    FUSIONREC_API_KEYS."""
    requests_per_s: float | None = Field(default=None, gt=0)
    """Requests that a key may send to a gateway replica in a second; by default any number."""
    burst: int = Field(default=100, ge=1)
    """Requests that a key may send at once after a silence, where `requests_per_s` bounds it."""
    audit_sample: float = Field(default=0.01, ge=0, le=1)
    """Share of the admitted requests that the audit log keeps; it keeps all that were denied."""


class NoKey(Exception):
    """The request carries no key that is admitted."""


class TooFast(Exception):
    """The key sends more than its rate."""

    def __init__(self, retry_after_s: int) -> None:
        self.retry_after_s = retry_after_s


@dataclass(frozen=True, slots=True)
class Door:
    """Who may come in, how often, and what is kept of it."""

    keys: ApiKeys = field(default_factory=ApiKeys)
    limit: RateLimit | None = None
    audit: AuditLog | None = None

    @classmethod
    def build(cls, access: Access, environment: Mapping[str, str]) -> Self:
        """The door that ``access`` describes.

        Raises:
            ConfigError: a key is malformed.
        """
        return cls(
            ApiKeys.parse(access.api_keys),
            None
            if access.requests_per_s is None
            else RateLimit(access.requests_per_s, access.burst),
            AuditLog(access.audit_sample, Pseudonyms.from_environment(environment)),
        )

    def admit(self, headers: Mapping[str, str], state: Any) -> KeyName:
        """Whose request it is; ``state.key`` keeps that for the audit log.

        Raises:
            NoKey: nobody's.
            TooFast: of somebody who sends too many.
        """
        state.key = key = self.keys.admit(headers)
        if key is None:
            raise NoKey
        wait_s = self.limit.take(key) if self.limit is not None else 0.0
        if wait_s > 0:
            raise TooFast(math.ceil(wait_s))
        return key


class Secured:
    """ASGI middleware."""

    def __init__(self, app: App, audit: AuditLog | None = None) -> None:
        self._app = app
        self._audit = audit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer 431 to too many headers; pass everything else on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        size, tls = 0, scope.get("scheme") == "https"
        for name, value in scope["headers"]:
            size += len(name) + len(value)
            # Anybody can send this, and tell nobody but himself to come back with TLS.
            tls = tls or (name == b"x-forwarded-proto" and value == b"https")

        answered = False

        async def send_secured(message: Message) -> None:
            nonlocal answered
            if message["type"] == "http.response.start":
                answered = True
                given = list(message.get("headers", ()))
                kept = any(name == b"cache-control" for name, _ in given)
                message["headers"] = [
                    *given,
                    *_HEADERS,
                    *([] if kept else [_NOT_KEPT]),
                    *([_ONLY_TLS] if tls else []),
                ]
                if self._audit is not None:
                    self._audit.note(scope, message["status"])
            await send(message)

        app = self._app if size <= MAX_HEADER_BYTES else _too_many_headers
        try:
            await app(scope, receive, send_secured)
        except Exception:  # whoever is around this one answers
            if self._audit is not None and not answered:
                self._audit.note(scope, 500)
            raise


async def _too_many_headers(_scope: Scope, _receive: Receive, send: Send) -> None:
    problem = {"field": "headers", "message": f"are larger than {MAX_HEADER_BYTES:,} bytes"}
    body = json.dumps({"detail": [problem]}).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        (b"connection", b"close"),
    ]
    await send({"type": "http.response.start", "status": 431, "headers": headers})
    await send({"type": "http.response.body", "body": body})
