"""The HTTP surface: routes, errors, OpenAPI. Whatever a client sends, the answer is not a 500.

The body is read and validated here instead of by FastAPI, whose own reader turns some malformed
JSON (lone surrogates, huge numbers, deep nesting) into errors that it cannot answer.
"""

from __future__ import annotations

import asyncio
from typing import Any, Protocol

from fastapi import FastAPI, Request, Response
from pydantic import BaseModel, ValidationError
from pydantic.json_schema import models_json_schema

from fusionrec.serving.schemas import (
    MAX_BODY_BYTES,
    BundleResponse,
    ErrorResponse,
    FieldError,
    ReadyResponse,
    RecommendRequest,
    RecommendResponse,
    describe,
    parse_request,
)
from serve_apps.batching import Overloaded
from serve_apps.explorer import add_explorer
from serve_apps.security import BODY_TIMEOUT_S, Door, NoKey, Secured, TooFast

RETRY_AFTER_S = 1


class Unavailable(Exception):
    """No answer can be made now; ask again later."""


class Endpoint(Protocol):
    """What answers behind the routes."""

    async def recommend(self, request: RecommendRequest) -> RecommendResponse:
        """Answer one request; Overloaded or Unavailable where that cannot be done now."""
        ...

    async def ready(self) -> ReadyResponse:
        """Answer like recommend would."""
        ...

    def describe_bundle(self) -> BundleResponse:
        """The bundle in service."""
        ...


class Refused(Exception):
    """An answer that is an error."""

    def __init__(self, status: int, field: str, message: str, **headers: str) -> None:
        self.status = status
        self.body = ErrorResponse(detail=[FieldError(field=field, message=message)])
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}


def build_api(endpoint: Endpoint, door: Door) -> FastAPI:
    """The ASGI application around ``endpoint``, for those whom ``door`` lets in."""
    api = FastAPI(title="FusionRec", version="1", docs_url=None, redoc_url=None)
    api.add_middleware(Secured, audit=door.audit)
    add_explorer(api)

    def admit(request: Request) -> None:
        try:
            door.admit(request.headers, request.state)
        except NoKey as error:
            message = "no valid API key: send Authorization: Bearer KEY or x-api-key: KEY"
            raise Refused(401, "authorization", message, WWW_Authenticate="Bearer") from error
        except TooFast as error:
            message = "too many requests with this key; try again later"
            raise Refused(429, "", message, Retry_After=str(error.retry_after_s)) from error

    @api.exception_handler(Refused)
    async def refused(_: Request, error: Refused) -> Response:
        return _json(error.body, error.status, error.headers)

    @api.exception_handler(ValidationError)
    async def invalid(_: Request, error: ValidationError) -> Response:
        return _json(describe(error), 422)

    @api.exception_handler(Overloaded)
    @api.exception_handler(Unavailable)
    async def unavailable(_: Request, error: Exception) -> Response:
        message = "too many requests" if isinstance(error, Overloaded) else "a stage is down"
        body = ErrorResponse(detail=[FieldError(field="", message=f"{message}; try again later")])
        return _json(body, 503, {"Retry-After": str(RETRY_AFTER_S)})

    @api.post(
        "/v1/recommend",
        response_model=RecommendResponse,
        responses={
            status: {"model": ErrorResponse} for status in (401, 408, 413, 415, 422, 429, 431, 503)
        },
        openapi_extra={"requestBody": {"required": True, "content": {_JSON: {"schema": _REQUEST}}}},
    )
    async def recommend(request: Request) -> Response:
        """Recommend items to a known user, for a history, for a text, or in general."""
        admit(request)
        question = parse_request(await _read_body(request))
        request.state.user = question.user_id
        return _json(await endpoint.recommend(question))

    @api.get("/v1/bundle", responses={status: {"model": ErrorResponse} for status in (401, 429)})
    async def bundle(request: Request) -> BundleResponse:
        """What is in service, what it was made from, what was measured."""
        admit(request)
        return endpoint.describe_bundle()

    @api.get("/healthz")
    async def healthz() -> dict[str, str]:
        """The gateway lives."""
        return {"status": "ok"}

    @api.get("/readyz", responses={503: {"model": ErrorResponse}})
    async def readyz() -> ReadyResponse:
        """A request through all stages is answered."""
        return await endpoint.ready()

    _describe_request(api)
    return api


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


_JSON = "application/json"
_REF = "#/components/schemas/{model}"
_REQUEST = {"$ref": _REF.format(model=RecommendRequest.__name__)}


def _describe_request(api: FastAPI) -> None:
    """Add the schema of the request to the document, which FastAPI would make from a parameter."""
    generate = api.openapi

    def openapi() -> dict[str, Any]:
        document = generate()
        _, schemas = models_json_schema([(RecommendRequest, "validation")], ref_template=_REF)
        document["components"]["schemas"].update(schemas["$defs"])
        return document

    api.openapi = openapi  # type: ignore[method-assign]
