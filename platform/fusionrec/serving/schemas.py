"""What the endpoint is asked and what it answers.

Every string, list and number is bounded, unknown fields are errors, and types are strict, so that
whatever passes here can be served. The bounds are part of the OpenAPI schema.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    model_validator,
)
from pydantic_core import InitErrorDetails, PydanticCustomError

MAX_K = 100
MAX_BROWSED = 50
"""Items or users that one search answers."""
MAX_QUERY_CHARS = 200
MAX_HISTORY = 1_000
MAX_TEXT_CHARS = 4_000
MAX_ID_CHARS = 256
MAX_EXCLUDED = 1_000
MAX_TIMESTAMP = 253_402_300_799
"""The last second of the year 9999."""
MAX_BODY_BYTES = 1 << 20
_MAX_ERRORS = 20
"""Errors of one request that are told; a long list of wrong events says nothing new."""

Identifier = Annotated[str, Field(min_length=1, max_length=MAX_ID_CHARS)]


class _Body(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True
    )


class _Answer(BaseModel):
    model_config = ConfigDict(use_attribute_docstrings=True)


class HistoryEvent(_Body):
    """One item that somebody met, and when."""

    item_id: Identifier
    timestamp: int = Field(ge=0, le=MAX_TIMESTAMP)
    """Seconds since the epoch."""


def _kind(event: object) -> str:
    """Which of the two kinds an event of a history is meant to be: keeps error messages short."""
    return "event" if isinstance(event, dict | HistoryEvent) else "id"


Event = Annotated[
    Annotated[Identifier, Tag("id")] | Annotated[HistoryEvent, Tag("event")], Discriminator(_kind)
]


class Filters(_Body):
    """Which items may be answered; they narrow the ranked candidates and never reorder them."""

    domains: list[Identifier] | None = Field(default=None, min_length=1, max_length=100)
    """Only items of these domains."""
    categories: list[Identifier] | None = Field(default=None, min_length=1, max_length=100)
    """Only items with at least one of these categories."""
    exclude_items: list[Identifier] = Field(default_factory=list, max_length=MAX_EXCLUDED)
    """None of these items."""


class RecommendRequest(_Body):
    """A known user, or a history and/or a text, or nothing of these."""

    user_id: Identifier | None = None
    """A user whose history the bundle holds. Not together with `history` or `text`."""
    history: list[Event] | None = Field(default=None, max_length=MAX_HISTORY)
    """Item ids, oldest first, or events with times in any order; not a mixture. Ids that the
    catalogue does not know are skipped."""
    text: str | None = Field(default=None, max_length=MAX_TEXT_CHARS)
    """A wish in free words."""
    k: int = Field(default=10, ge=1, le=MAX_K)
    """How many items to answer, at most."""
    filters: Filters | None = None
    explain: bool = False
    """Whether to answer the terms of every score, and the categories and domain of every item."""
    bundle: Identifier | None = None
    """Id of the bundle that answers, one of those `GET /v1/bundle` names as `held`; by default the
    one in service."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.user_id is not None:
            for field in ("history", "text"):
                if getattr(self, field) is not None:
                    raise _error(field, "cannot be given together with user_id: send one of them")
        if self.history is not None and len({type(event) for event in self.history}) > 1:
            raise _error("history", "mixes item ids and events with times: send one kind")
        return self


def _error(field: str, message: str) -> ValidationError:
    """An error that names ``field``, where pydantic would name the whole request."""
    detail = InitErrorDetails(
        type=PydanticCustomError("inconsistent", "{message}", {"message": message}),
        loc=(field,),
        input=None,
    )
    return ValidationError.from_exception_data("RecommendRequest", [detail])


class ItemsRequest(_Body):
    """Words of a title."""

    query: str = Field(min_length=1, max_length=MAX_QUERY_CHARS)
    """Words, or beginnings of words, that the title holds, without regard to case and accents; or
    the id of an item."""
    k: int = Field(default=10, ge=1, le=MAX_BROWSED)
    """How many items to answer, at most."""


class UsersRequest(_Body):
    """Some users of the bundle, or one of them."""

    user_id: Identifier | None = None
    """Answer this user alone, with the history; nobody, where the bundle does not know the user."""
    k: int = Field(default=10, ge=1, le=MAX_BROWSED)
    """How many users to answer, at most."""


class Fallback(StrEnum):
    """Why an answer is made of popular items instead of personal ones."""

    UNKNOWN_USER = "unknown_user"
    """The bundle knows nothing of this user."""
    EMPTY_REQUEST = "empty_request"
    """Neither a user, nor an item, nor a word was sent."""
    UNKNOWN_ITEMS = "unknown_items"
    """No item of the history is in the catalogue, and there was no text."""


class Recommendation(_Answer):
    """One recommended item."""

    item_id: str
    title: str
    score: float
    """The fused score: comparable within one answer only."""
    terms: dict[str, float] | None = None
    """With `explain`: what each source added, and where there are such terms what `history`,
    `item`, `diversity` and `reranker` did. They sum to the score."""
    categories: list[str] | None = None
    """With `explain`."""
    domain: str | None = None
    """With `explain`."""


class RecommendResponse(_Answer):
    """An answer, made by one bundle."""

    items: list[Recommendation]
    """Best first; fewer than `k` where the filters leave no more."""
    bundle: str
    timings_ms: dict[str, float]
    """Milliseconds of each stage, of the wait for a place in a batch, and in total."""
    degraded: list[str]
    """Stages that were skipped because they failed: `embed`, `rerank`."""
    fallback: Fallback | None


class FieldError(_Answer):
    """One thing that is wrong with a request."""

    field: str
    """Where: a path such as `history.3.timestamp`; `body` for the whole."""
    message: str


class ErrorResponse(_Answer):
    """Why a request was not answered."""

    detail: list[FieldError]


class BundleResponse(_Answer):
    """The bundle in service."""

    bundle: str
    held: list[str]
    """Bundles that a request can ask for, newest first: this one, and the one before it while it is
    still loaded."""
    dataset: dict[str, Any]
    pipeline: dict[str, Any]
    metrics: dict[str, Any]
    num_items: int
    num_users: int


class ReadyResponse(_Answer):
    """Whether the endpoint answers requests now."""

    ready: bool
    degraded: list[str]
    """Stages that a request would do without."""


class ReplicaCounts(_Answer):
    """Replicas of one deployment."""

    running: int
    target: int
    """How many there are going to be: those that run, and those that come up."""


class StatusResponse(_Answer):
    """What the endpoint is made of at this moment, as one gateway sees it."""

    bundle: str
    """The bundle in service."""
    held: list[str]
    """Bundles that a request can ask for, newest first."""
    next: str | None
    """The bundle that is being loaded to take over."""
    replicas: dict[str, ReplicaCounts]
    """Deployment → replicas."""
    degraded: list[str]
    """Stages that answers do without at present."""
    queue: int
    """Requests that wait in this gateway."""
    uptime_s: float
    """Seconds since this gateway came up."""


class Item(_Answer):
    """One item of the catalogue."""

    item_id: str
    title: str
    domain: str
    categories: list[str]


class ItemsResponse(_Answer):
    """Items whose titles hold the words."""

    items: list[Item]
    """Closest first: whole words before beginnings of words, titles that begin with them before
    others, short ones before long ones."""


class KnownEvent(Item):
    """One item that a user of the bundle met, and when."""

    timestamp: int
    """Seconds since the epoch."""


class KnownUser(_Answer):
    """One user whose history the bundle holds."""

    user_id: str
    events: int
    """How many events the history has."""
    history: list[KnownEvent] | None = None
    """Where `user_id` was asked for: the newest events, oldest first, as many as a request for
    recommendations may hold."""


class UsersResponse(_Answer):
    """Users of the bundle, shortest history first."""

    users: list[KnownUser]


def parse_request(body: bytes) -> RecommendRequest:
    """Read a request from JSON; the parser bounds depth and number length.

    Raises:
        ValidationError: :func:`describe` says where.
    """
    return RecommendRequest.model_validate_json(body)


def describe(error: ValidationError) -> ErrorResponse:
    """The fields of ``error``, without the input: it may not be expressible in JSON."""
    errors = error.errors(include_url=False, include_context=False, include_input=False)
    return ErrorResponse(
        detail=[FieldError(field=_path(e["loc"]), message=e["msg"]) for e in errors[:_MAX_ERRORS]]
    )


def _path(location: tuple[int | str, ...]) -> str:
    """The place in the request: ``("history", 3, "event", "timestamp")`` is history.3.timestamp."""
    parts = [str(part) for part in location]
    if parts[:1] == ["history"]:
        del parts[2:3]  # the tag of the kind
    return ".".join(parts)[:MAX_ID_CHARS] or "body"
