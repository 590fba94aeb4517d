"""The HTTP surface: routes, errors, OpenAPI. Whatever a client sends, the answer is not a 500.

The body is read and validated here instead of by FastAPI, whose own reader turns some malformed
JSON (lone surrogates, huge numbers, deep nesting) into errors that it cannot answer.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from functools import cached_property
from typing import Any, Literal, Protocol

from fastapi import FastAPI, Request, Response
from pydantic import BaseModel, ValidationError
from pydantic.json_schema import models_json_schema
from starlette.concurrency import run_in_threadpool
from starlette.routing import BaseRoute

from fusionrec.serving.schemas import (
    MAX_BODY_BYTES,
    BundleResponse,
    ErrorResponse,
    FieldError,
    ItemsRequest,
    ItemsResponse,
    ReadyResponse,
    RecommendRequest,
    RecommendResponse,
    StatusResponse,
    UsersRequest,
    UsersResponse,
    describe,
    parse_request,
)
from serve_apps.batching import Overloaded
from serve_apps.counting import Counted
from serve_apps.explorer import add_explorer
from serve_apps.security import (
    BODY_TIMEOUT_S,
    App,
    Door,
    NoKey,
    Receive,
    Scope,
    Secured,
    Send,
    TooFast,
)
from serve_apps.tracing import Tracer, TracingMiddleware
from serve_apps.web import add_page

RETRY_AFTER_S = 1
TIMEOUT_HEADER = "x-request-timeout-seconds"
"""Serve's own name for it: its proxies give up after so long, and so do we, with an answer."""


class Unavailable(Exception):
    """No answer can be made now; ask again later."""


class UnknownBundle(Exception):
    """The bundle that a request asks for is not held."""

    def __init__(self, held: Sequence[str]) -> None:
        self.held = held


class Endpoint(Protocol):
    """What answers behind the routes."""

    async def recommend(
        self, request: RecommendRequest, timeout_s: float | None = None
    ) -> RecommendResponse:
        """Answer one request within ``timeout_s`` or a default time.

        Overloaded or Unavailable where that cannot be done now; UnknownBundle.
        """
        ...

    async def ready(self) -> ReadyResponse:
        """Answer like recommend would."""
        ...

    def describe_bundle(self) -> BundleResponse:
        """The bundle in service."""
        ...

    async def status(self) -> StatusResponse:
        """Bundles, replicas and queue at this moment."""
        ...

    def find_items(self, request: ItemsRequest) -> ItemsResponse:
        """Items by words of their titles; called in a thread."""
        ...

    def find_users(self, request: UsersRequest) -> UsersResponse:
        """Some users, or one with the history; called in a thread."""
        ...


class Refused(Exception):
    """An answer that is an error."""

    def __init__(self, status: int, field: str, message: str, **headers: str) -> None:
        self.status = status
        self.body = ErrorResponse(detail=[FieldError(field=field, message=message)])
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}


def build_api(
    endpoint: Endpoint,
    door: Door,
    *,
    background: Sequence[Callable[[], Coroutine[Any, Any, None]]] = (),
    on_too_fast: Callable[[], None] = lambda: None,
    on_request: Callable[[int], None] = lambda _status: None,
    tracer: Tracer | None = None,
) -> FastAPI:
    """The ASGI application around ``endpoint``.

    Args:
        endpoint: what answers.
        door: who is let in.
        background: what runs for as long as the application does.
        on_too_fast: told of every request that is refused because its key asks too often.
        on_request: told the status that every request for recommendations ended with.
        tracer: makes a span of every request.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        tasks = [asyncio.ensure_future(run()) for run in background]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()

    api = FastAPI(title="FusionRec", version="1", docs_url=None, redoc_url=None, lifespan=lifespan)

    async def recommend(request: Request) -> Response:
        """Recommend items to a known user, for a history, for a text, or in general."""
        admit(request)
        question = parse_request(await _read_body(request))
        request.state.user = question.user_id
        return _json(await endpoint.recommend(question, _timeout(request)))

    # The last that is added is the first that is asked.
    api.add_middleware(Shortcut, api=api, method="POST", path=_RECOMMEND, answer=recommend)
    api.add_middleware(Secured, audit=door.audit)
    api.add_middleware(Counted, path=_RECOMMEND, count=on_request)
    if tracer is not None:
        api.add_middleware(TracingMiddleware, tracer=tracer)
    add_explorer(api)

    def admit(request: Request) -> None:
        try:
            door.admit(request.headers, request.state)
        except NoKey as error:
            message = "no valid API key: send Authorization: Bearer KEY or x-api-key: KEY"
            raise Refused(401, "authorization", message, WWW_Authenticate="Bearer") from error
        except TooFast as error:
            on_too_fast()
            message = "too many requests with this key; try again later"
            raise Refused(429, "", message, Retry_After=str(error.retry_after_s)) from error

    @api.exception_handler(Refused)
    async def refused(_: Request, error: Refused) -> Response:
        return _json(error.body, error.status, error.headers)

    @api.exception_handler(ValidationError)
    async def invalid(_: Request, error: ValidationError) -> Response:
        return _json(describe(error), 422)

    @api.exception_handler(UnknownBundle)
    async def unknown_bundle(_: Request, error: UnknownBundle) -> Response:
        message = f"is not held: send one of {', '.join(error.held)}, or leave it out"
        return _json(ErrorResponse(detail=[FieldError(field="bundle", message=message)]), 422)

    @api.exception_handler(Overloaded)
    @api.exception_handler(Unavailable)
    async def unavailable(_: Request, error: Exception) -> Response:
        message = "too many requests" if isinstance(error, Overloaded) else "a stage is down"
        body = ErrorResponse(detail=[FieldError(field="", message=f"{message}; try again later")])
        return _json(body, 503, {"Retry-After": str(RETRY_AFTER_S)})

    api.post(_RECOMMEND, **_posted(RecommendRequest, RecommendResponse))(recommend)

    @api.get("/v1/bundle", responses=_errors(401, 429))
    async def bundle(request: Request) -> BundleResponse:
        """What is in service, what it was made from, what was measured."""
        admit(request)
        return endpoint.describe_bundle()

    @api.get("/v1/status", responses=_errors(401, 429))
    async def status(request: Request) -> StatusResponse:
        """What the endpoint is made of at this moment."""
        admit(request)
        return await endpoint.status()

    @api.post("/v1/items", **_posted(ItemsRequest, ItemsResponse))
    async def items(request: Request) -> Response:
        """Find items by words of their titles."""
        admit(request)
        question = ItemsRequest.model_validate_json(await _read_body(request))
        return _json(await run_in_threadpool(endpoint.find_items, question))

    @api.post("/v1/users", **_posted(UsersRequest, UsersResponse))
    async def users(request: Request) -> Response:
        """Some users, the same at every call; or one of them, with the history."""
        admit(request)
        question = UsersRequest.model_validate_json(await _read_body(request))
        request.state.user = question.user_id
        return _json(await run_in_threadpool(endpoint.find_users, question))

    @api.get("/healthz")
    async def healthz() -> dict[str, str]:
        """The gateway lives."""
        return {"status": "ok"}

    @api.get("/readyz", responses={503: {"model": ErrorResponse}})
    async def readyz() -> ReadyResponse:
        """A request through all stages is answered; found out about once a second."""
        return await endpoint.ready()

    add_page(api)
    _describe_requests(api)
    return api


class Shortcut:
    """ASGI middleware: one route answered before FastAPI looks for it and for its parameters.

    What is said of the route stays in FastAPI; errors are answered by its handlers.
    """

    def __init__(
        self,
        app: App,
        *,
        api: FastAPI,
        method: str,
        path: str,
        answer: Callable[[Request], Awaitable[Response]],
    ) -> None:
        self._app = app
        self._api = api
        self._asked = ("http", method, path)
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer what is asked for; pass everything else on."""
        if (scope["type"], scope.get("method"), scope.get("path")) != self._asked:
            await self._app(scope, receive, send)
            return
        scope["route"] = self._route  # as the router would: traces and the audit log name it
        request = Request(scope, receive, send)
        try:
            response = await self._answer(request)
        except Exception as error:
            handlers = self._api.exception_handlers
            found = next((handlers[kind] for kind in type(error).__mro__ if kind in handlers), None)
            if found is None:
                raise
            response = await found(request, error)  # type: ignore[misc]  # ours are coroutines
        await response(scope, receive, send)

    @cached_property
    def _route(self) -> BaseRoute:
        _, _, path = self._asked
        return next(route for route in self._api.routes if getattr(route, "path", None) == path)


def _timeout(request: Request) -> float | None:
    """What the client says about how long it waits, in seconds.

    Raises:
        Refused: it is not a positive number.
    """
    value = request.headers.get(TIMEOUT_HEADER)
    if value is None:
        return None
    try:
        timeout_s = float(value)
    except ValueError:
        timeout_s = math.nan
    if not 0 < timeout_s < math.inf:
        raise Refused(422, TIMEOUT_HEADER, "must be a positive number of seconds")
    return timeout_s


async def _read_body(request: Request) -> bytes:
    """The body of a request, bounded.

    Raises:
        Refused: it is not declared as JSON, is too large, or does not end in time.
    """
    declared = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if declared != _JSON:
        raise Refused(415, "content-type", f"must be {_JSON}")
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            async for chunk in request.stream():
                body += chunk
                if len(body) > MAX_BODY_BYTES:
                    raise Refused(413, "body", f"is larger than {MAX_BODY_BYTES:,} bytes")
    except TimeoutError as error:
        message = f"was not complete after {BODY_TIMEOUT_S:g} seconds"
        raise Refused(408, "body", message, Connection="close") from error
    return bytes(body)


def _json(body: BaseModel, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(body.model_dump_json(exclude_unset=True), status, headers, media_type=_JSON)


def _errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: {"model": ErrorResponse} for status in statuses}


def _posted(question: type[BaseModel], answer: type[BaseModel]) -> dict[str, Any]:
    """What OpenAPI says of a route whose question comes as a body."""
    content = {_JSON: {"schema": {"$ref": _REF.format(model=question.__name__)}}}
    return {
        "response_model": answer,
        "responses": _errors(401, 408, 413, 415, 422, 429, 431, 503),
        "openapi_extra": {"requestBody": {"required": True, "content": content}},
    }


_JSON = "application/json"
_RECOMMEND = "/v1/recommend"
_REF = "#/components/schemas/{model}"


def _describe_requests(api: FastAPI) -> None:
    """Add the schemas of the requests to the document, which FastAPI would make from parameters."""
    generate = api.openapi
    requests = (RecommendRequest, ItemsRequest, UsersRequest)

    def openapi() -> dict[str, Any]:
        document = generate()
        models: list[tuple[type[BaseModel], Literal["validation"]]] = [
            (model, "validation") for model in requests
        ]
        _, schemas = models_json_schema(models, ref_template=_REF)
        document["components"]["schemas"].update(schemas["$defs"])
        return document

    api.openapi = openapi  # type: ignore[method-assign]
