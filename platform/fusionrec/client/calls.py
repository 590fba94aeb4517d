"""What a client asks and how it decides: no input or output happens here.

A call is a generator of attempts and pauses, which is told how each attempt ended. Whoever drives
it sends and sleeps, with or without asyncio.
"""

from __future__ import annotations

import random
import re
import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, Generic, Self, TypeAlias, TypedDict, TypeVar

import httpx
from pydantic import BaseModel, ValidationError

from fusionrec import __version__
from fusionrec.errors import (
    ConfigError,
    DeadlinePassed,
    RequestFailed,
    RequestRefused,
    Unauthorized,
    Unavailable,
)
from fusionrec.serving.schemas import (
    BundleResponse,
    ErrorResponse,
    Filters,
    HistoryEvent,
    ItemsRequest,
    ItemsResponse,
    ReadyResponse,
    RecommendRequest,
    RecommendResponse,
    StatusResponse,
    UsersRequest,
    UsersResponse,
    describe,
)

TIMEOUT_S = 10.0
RETRIES = 20
"""More than fit in `TIMEOUT_S`, with waits as long as they are on average: a call waits for a proxy
that comes back as long as it has time."""
CONNECT_TIMEOUT_S = 2.0
"""A machine that is gone does not refuse a connection, it says nothing."""
BACKOFF_S = 0.1
"""Upper bound of the wait before the first retry; it doubles with each further one."""
MAX_BACKOFF_S = 2.0
MIN_LEFT_S = 0.001
_UNREACHABLE = (httpx.ConnectTimeout, httpx.NetworkError, httpx.RemoteProtocolError)
_TRANSIENT = frozenset({429, 500, 502, 503, 504})
_OWN_HEADER = "x-content-type-options"
"""On every answer of an endpoint, but on none of a proxy that does not know its routes yet."""

A = TypeVar("A", bound=BaseModel)


@dataclass(frozen=True, slots=True)
class Call(Generic[A]):
    """One question to the endpoint; None means what the client was made with."""

    method: str
    path: str
    answer: type[A]
    body: str | None = None
    timeout_s: float | None = None
    retries: int | None = None


@dataclass(frozen=True, slots=True)
class Attempt:
    """To be sent, with what is left of the deadline."""

    left_s: float


@dataclass(frozen=True, slots=True)
class Pause:
    """To be slept through before the next attempt."""

    seconds: float


Outcome: TypeAlias = httpx.Response | httpx.RequestError | None
"""Of an attempt; None after a pause."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What both clients are made from, and what they decide alike."""

    url: httpx.URL
    headers: dict[str, str]
    timeout_s: float
    retries: int

    @classmethod
    def check(cls, url: str, api_key: str | None, timeout_s: float, retries: int) -> Self:
        """From what the user gave.

        Raises:
            ConfigError: something of it cannot be used.
        """
        try:
            parsed = httpx.URL(url)
        except httpx.InvalidURL as error:
            raise ConfigError(f"url is {url!r}: {error}") from error
        if parsed.scheme not in ("http", "https") or not parsed.host:
            raise ConfigError(f"url is {url!r}: give an address such as http://127.0.0.1:8000")
        headers = {"user-agent": f"fusionrec/{__version__}", "content-type": "application/json"}
        if api_key is not None:
            if not re.fullmatch("[!-~]+", api_key):
                raise ConfigError("api_key has characters that no key has: give the key alone")
            headers["authorization"] = f"Bearer {api_key}"
        _check_timeout(timeout_s)
        if retries < 0:
            raise ConfigError(f"retries is {retries}: give 0 or more")
        return cls(parsed, headers, timeout_s, retries)

    def request(self, http: httpx.Client | httpx.AsyncClient, call: Call[A], left_s: float) -> Any:
        """What to send for an attempt."""
        return http.build_request(
            call.method,
            call.path,
            content=call.body,
            headers={"x-request-timeout-seconds": f"{left_s:.3f}"},
            timeout=httpx.Timeout(left_s, connect=min(left_s, CONNECT_TIMEOUT_S)),
        )

    def steps(self, call: Call[A]) -> Generator[Attempt | Pause, Outcome, A]:
        """The attempts and pauses of a call; returns its answer.

        Raises:
            RequestFailed: there is none.
        """
        timeout_s = self.timeout_s if call.timeout_s is None else call.timeout_s
        retries = self.retries if call.retries is None else call.retries
        _check_timeout(timeout_s)
        deadline = time.monotonic() + timeout_s
        bound_s = BACKOFF_S
        attempts = 0
        while True:
            attempts += 1
            # A pause ends a little late at times, also when it was to end just in time.
            outcome = yield Attempt(max(deadline - time.monotonic(), MIN_LEFT_S))
            assert outcome is not None
            if isinstance(outcome, httpx.Response) and outcome.status_code == 200:
                return self._read(call, outcome)
            failure = self._failure(call.path, outcome, timeout_s, attempts)
            if not isinstance(failure, Unavailable) or attempts > retries:
                raise failure
            pause_s = (failure.retry_after_s or 0.0) + random.uniform(0, bound_s)
            if time.monotonic() + pause_s >= deadline:
                raise failure
            yield Pause(pause_s)
            bound_s = min(2 * bound_s, MAX_BACKOFF_S)

    def _read(self, call: Call[A], response: httpx.Response) -> A:
        try:
            return call.answer.model_validate_json(response.content)
        except ValidationError as error:
            raise RequestFailed(
                f"{self.url} answered {call.path} with something else than a "
                f"{call.answer.__name__}: is it an endpoint of this version?"
            ) from error

    def _failure(
        self, path: str, outcome: httpx.Response | httpx.RequestError, timeout_s: float, n: int
    ) -> RequestFailed:
        """The exception for an attempt that brought no answer; ``n`` attempts were made."""
        times = "" if n == 1 else f", {n} times"
        if isinstance(outcome, httpx.ReadTimeout | httpx.WriteTimeout | httpx.PoolTimeout):
            return DeadlinePassed(
                f"{self.url} did not answer within timeout_s={timeout_s:g}: allow more, or ask less"
            )
        if isinstance(outcome, _UNREACHABLE):
            reason = str(outcome) or type(outcome).__name__
            return Unavailable(f"{self.url} could not be reached ({reason}){times}: is it running?")
        if isinstance(outcome, httpx.RequestError):
            return RequestFailed(f"{self.url} cannot be asked: {outcome}")
        status = outcome.status_code
        detail = _detail(outcome)
        reason = "; ".join(detail.values()) or outcome.reason_phrase
        if status in _TRANSIENT or (status == 404 and _OWN_HEADER not in outcome.headers):
            return Unavailable(
                f"{self.url} answered {status} ({reason}){times}: try again later",
                _retry_after_s(outcome.headers.get("retry-after", "")),
            )
        if status == 408:
            return DeadlinePassed(
                f"{self.url} gave up ({reason}) within timeout_s={timeout_s:g}: allow more"
            )
        if status in (401, 403):
            return Unauthorized(f"{self.url} answered {status} ({reason}): set api_key")
        if status in (413, 415, 422) and detail:
            return RequestRefused(detail)
        return RequestFailed(
            f"{self.url} answered {path} with {status} ({reason}): is it an endpoint of this "
            "version?"
        )


class RecommendFields(TypedDict, total=False):
    """The fields of :class:`~fusionrec.serving.schemas.RecommendRequest`: see there."""

    user_id: str
    history: Sequence[str] | Sequence[HistoryEvent]
    text: str
    k: int
    filters: Filters
    explain: bool
    bundle: str


def recommend(fields: RecommendFields, timeout_s: float | None) -> Call[RecommendResponse]:
    """Items for a user, a history, a text, or in general.

    Raises:
        RequestRefused: the endpoint would refuse it.
    """
    given: dict[str, Any] = dict(fields)
    if "history" in given and not isinstance(given["history"], str):
        given["history"] = list(given["history"])
    body = _body(RecommendRequest, given)
    return Call("POST", "/v1/recommend", RecommendResponse, body, timeout_s)


def items(query: str, k: int, timeout_s: float | None) -> Call[ItemsResponse]:
    """Items by words of their titles.

    Raises:
        RequestRefused: the endpoint would refuse it.
    """
    body = _body(ItemsRequest, {"query": query, "k": k})
    return Call("POST", "/v1/items", ItemsResponse, body, timeout_s)


def users(user_id: str | None, k: int, timeout_s: float | None) -> Call[UsersResponse]:
    """Some users, or one with the history.

    Raises:
        RequestRefused: the endpoint would refuse it.
    """
    body = _body(UsersRequest, {"user_id": user_id, "k": k})
    return Call("POST", "/v1/users", UsersResponse, body, timeout_s)


BUNDLE = Call("GET", "/v1/bundle", BundleResponse)
STATUS = Call("GET", "/v1/status", StatusResponse)
READY = Call("GET", "/readyz", ReadyResponse, retries=0)
"""Asks about now."""


def _check_timeout(timeout_s: float) -> None:
    """Refuse what no answer could come within.

    Raises:
        ConfigError: ``timeout_s`` is not above 0.
    """
    if not timeout_s > 0:
        raise ConfigError(f"timeout_s is {timeout_s}: give more than 0 seconds")


def _body(model: type[BaseModel], fields: dict[str, Any]) -> str:
    """The request in JSON.

    Raises:
        RequestRefused: the endpoint would refuse it.
    """
    try:
        return model(**fields).model_dump_json(exclude_unset=True)
    except ValidationError as error:
        raise RequestRefused(_messages(describe(error))) from error


def _messages(error: ErrorResponse) -> dict[str, str]:
    return {each.field: each.message for each in error.detail}


def _detail(response: httpx.Response) -> dict[str, str]:
    """Field → message of an error; nothing where it is not the endpoint that answers."""
    try:
        return _messages(ErrorResponse.model_validate_json(response.content))
    except ValidationError:
        return {}


def _retry_after_s(value: str) -> float | None:
    """Seconds from a ``Retry-After`` header: a number of them, or a date."""
    if value.isascii() and value.isdigit():
        return float(value)
    try:
        date = parsedate_to_datetime(value)
    except ValueError:
        return None
    if date.tzinfo is None:
        date = date.replace(tzinfo=UTC)
    return max((date - datetime.now(UTC)).total_seconds(), 0.0)
