import asyncio
import json
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from types import SimpleNamespace
from typing import Any, get_type_hints

import httpx
import pytest

from fusionrec import client as client_module
from fusionrec.client import AsyncClient, Client, calls
from fusionrec.errors import (
    ConfigError,
    DeadlinePassed,
    RequestFailed,
    RequestRefused,
    Unauthorized,
    Unavailable,
)
from fusionrec.serving.schemas import Filters, HistoryEvent, RecommendRequest

URL = "http://endpoint.test"
ANSWER = {
    "items": [{"item_id": "i1", "title": "One", "score": 0.5}],
    "bundle": "b1",
    "timings_ms": {"total": 1.0},
    "degraded": [],
    "fallback": None,
}
Handler = Callable[[httpx.Request], httpx.Response]


class Time:
    """A clock that only pauses move; keeps how long they were."""

    def __init__(self) -> None:
        self.now = 0.0
        self.pauses: list[float] = []

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)
        self.now += seconds

    async def async_sleep(self, seconds: float) -> None:
        self.sleep(seconds)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Time:
    clock = Time()
    monkeypatch.setattr(calls, "time", clock)
    monkeypatch.setattr(client_module, "time", clock)
    fake = SimpleNamespace(sleep=clock.async_sleep, timeout=asyncio.timeout)
    monkeypatch.setattr(client_module, "asyncio", fake)
    monkeypatch.setattr(calls, "random", SimpleNamespace(uniform=lambda _, bound: bound))
    return clock


class Script(httpx.MockTransport):
    """Answers in turn; exceptions are raised. The last one stays."""

    def __init__(self, *outcomes: httpx.Response | Exception) -> None:
        super().__init__(self._next)
        self._outcomes = list(outcomes)
        self.requests: list[httpx.Request] = []

    def _next(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        outcome = self._outcomes[min(len(self.requests), len(self._outcomes)) - 1]
        if isinstance(outcome, Exception):
            raise outcome
        # A response can be read once only.
        return httpx.Response(outcome.status_code, headers=outcome.headers, content=outcome.content)


def good() -> httpx.Response:
    return httpx.Response(200, json=ANSWER)


def bad(status: int, field: str = "", message: str = "no", **headers: str) -> httpx.Response:
    body = {"detail": [{"field": field, "message": message}]}
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return httpx.Response(status, json=body, headers=named)


def test_a_request_carries_what_was_given_the_key_and_the_time_left(ask: Any, clock: Time):
    script = Script(good())
    answer = ask(
        script,
        "recommend",
        history=("i1", "i2"),
        filters=Filters(domains=["film"]),
        k=3,
        timeout_s=4.0,
        made={"api_key": "k3y"},
    )
    assert answer.items[0].title == "One"
    [request] = script.requests
    assert (request.method, request.url) == ("POST", f"{URL}/v1/recommend")
    assert json.loads(request.content) == {
        "history": ["i1", "i2"],
        "k": 3,
        "filters": {"domains": ["film"]},
    }
    assert request.headers["authorization"] == "Bearer k3y"
    assert request.headers["content-type"] == "application/json"
    assert request.headers["x-request-timeout-seconds"] == "4.000"


def test_every_route_is_asked_and_its_answer_read(ask: Any):
    bundle = {"bundle": "b", "dataset": {}, "pipeline": {}, "metrics": {}, "num_items": 1}
    held = {"held": ["b"], "bundle": "b"}
    status = {"next": None, "replicas": {}, "degraded": [], "queue": 0, "uptime_s": 1.5}
    answers = {
        ("GET", "/v1/bundle"): bundle | held | {"num_users": 2},
        ("GET", "/v1/status"): status | held,
        ("GET", "/readyz"): {"ready": True, "degraded": []},
        ("POST", "/v1/items"): {"items": []},
        ("POST", "/v1/users"): {"users": [{"user_id": "ann", "events": 3}]},
    }
    routes = httpx.MockTransport(
        lambda request: httpx.Response(200, json=answers[request.method, request.url.path])
    )
    assert ask(routes, "bundle").num_users == 2
    assert ask(routes, "status").uptime_s == 1.5
    assert ask(routes, "ready").ready
    assert ask(routes, "items", "film", k=5).items == []
    assert ask(routes, "users", user_id="ann").users[0].events == 3


def test_the_fields_of_a_request_are_those_of_the_schema():
    assert set(get_type_hints(calls.RecommendFields)) == set(RecommendRequest.model_fields)


@pytest.mark.parametrize(
    "failure",
    [
        *(bad(status) for status in (429, 500, 502, 503, 504)),
        httpx.Response(500, text="Internal Server Error"),
        httpx.Response(404, text="a proxy without routes"),
        httpx.ConnectError("refused"),
        httpx.ConnectTimeout(""),
        httpx.RemoteProtocolError("dropped"),
        httpx.ReadError("reset"),
    ],
    ids=str,
)
def test_what_may_pass_is_tried_again(ask: Any, clock: Time, failure: Any):
    script = Script(failure, failure, good())
    assert ask(script, "recommend", user_id="ann").bundle == "b1"
    assert clock.pauses == [0.1, 0.2]
    left = [request.headers["x-request-timeout-seconds"] for request in script.requests]
    assert left == ["10.000", "9.900", "9.700"]


def test_waits_double_up_to_a_bound_and_retries_end(ask: Any, clock: Time):
    script = Script(httpx.ConnectError("refused"))
    with pytest.raises(Unavailable, match=r"could not be reached \(refused\), 8 times"):
        ask(script, "status", made={"retries": 7, "timeout_s": 60.0})
    assert clock.pauses == [0.1, 0.2, 0.4, 0.8, 1.6, 2.0, 2.0]


def test_by_default_a_call_goes_on_as_long_as_there_is_time(
    ask: Any, clock: Time, monkeypatch: pytest.MonkeyPatch
):
    """Until a proxy that is gone is there again; waits as long as they are on average."""
    half = SimpleNamespace(uniform=lambda _, bound: bound / 2)
    monkeypatch.setattr(calls, "random", half)
    with pytest.raises(Unavailable, match="could not be reached"):
        ask(Script(httpx.ConnectError("refused")), "recommend")
    assert clock.now > calls.TIMEOUT_S - calls.MAX_BACKOFF_S


def test_a_wait_is_random():
    def pause() -> Any:
        steps = calls.Settings.check(URL, None, 10, 1).steps(calls.STATUS)
        next(steps)
        return steps.send(httpx.ConnectError("refused"))

    seconds = {pause().seconds for _ in range(50)}
    assert len(seconds) == 50
    assert 0 <= min(seconds) <= max(seconds) <= calls.BACKOFF_S


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("3", 3.0),
        ("0", 0.0),
        ("", 0.0),
        ("soon", 0.0),
        ("-1", 0.0),
        ("Thu, 01 Jan 1970 00:00:00 GMT", 0.0),
    ],
)
def test_retry_after_is_honoured(ask: Any, clock: Time, value: str, seconds: float):
    ask(Script(bad(503, retry_after=value), good()), "recommend")
    assert clock.pauses == [seconds + calls.BACKOFF_S]


def test_retry_after_may_be_a_date(ask: Any, clock: Time):
    date = format_datetime(datetime.now(UTC) + timedelta(seconds=5), usegmt=True)
    ask(Script(bad(503, retry_after=date), good()), "recommend")
    assert 3 < clock.pauses[0] < 5.2


def test_nobody_waits_for_longer_than_the_deadline(ask: Any, clock: Time):
    script = Script(bad(503, message="too many requests", retry_after="30"))
    with pytest.raises(Unavailable, match=r"answered 503 \(too many requests\): try") as raised:
        ask(script, "recommend")
    assert raised.value.retry_after_s == 30
    assert (len(script.requests), clock.pauses) == (1, [])


@pytest.mark.parametrize("outcome", [httpx.ReadTimeout(""), httpx.PoolTimeout(""), bad(408)])
def test_a_deadline_that_passed_is_said_and_nothing_sent_again(ask: Any, outcome: Any):
    script = Script(outcome)
    with pytest.raises(DeadlinePassed, match="timeout_s=2: allow more"):
        ask(script, "recommend", timeout_s=2)
    assert len(script.requests) == 1


def test_a_refusal_names_the_fields_and_is_not_repeated(ask: Any, clock: Time):
    script = Script(bad(422, "bundle", "is not held"))
    with pytest.raises(RequestRefused, match="refused: bundle: is not held") as raised:
        ask(script, "recommend", bundle="b0")
    assert raised.value.fields == {"bundle": "is not held"}
    assert len(script.requests) == 1


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"k": 0}, "k"),
        ({"user_id": "ann", "text": "thieves"}, "text"),
        ({"history": "i1"}, "history"),
        ({"history": [HistoryEvent(item_id="i1", timestamp=1), "i2"]}, "history"),
        ({"users": "ann"}, "users"),
    ],
)
def test_what_the_endpoint_would_refuse_is_not_sent(ask: Any, fields: Any, field: str):
    script = Script(good())
    with pytest.raises(RequestRefused) as raised:
        ask(script, "recommend", **fields)
    assert list(raised.value.fields) == [field]
    assert script.requests == []


@pytest.mark.parametrize("status", [401, 403])
def test_a_key_that_is_not_admitted(ask: Any, status: int):
    script = Script(bad(status, "authorization", "no valid API key"))
    with pytest.raises(Unauthorized, match=r"no valid API key\): set api_key"):
        ask(script, "bundle")


@pytest.mark.parametrize(
    "outcome",
    [
        httpx.Response(404, text="nothing here", headers={"x-content-type-options": "nosniff"}),
        httpx.Response(301, headers={"location": "/elsewhere"}),
        httpx.Response(422, json={"detail": "another service's error"}),
        httpx.Response(200, text="<html>"),
        httpx.Response(200, json={"items": []}),
        httpx.UnsupportedProtocol("no proxy"),
        httpx.DecodingError("not gzip"),
    ],
    ids=str,
)
def test_what_is_not_the_endpoint_is_one_clear_error(ask: Any, outcome: Any):
    script = Script(outcome)
    with pytest.raises(RequestFailed, match=f"^{URL} ") as raised:
        ask(script, "recommend")
    assert type(raised.value) is RequestFailed
    assert len(script.requests) == 1


def test_readiness_is_about_now(ask: Any, clock: Time):
    with pytest.raises(Unavailable, match="a stage is down"):
        ask(Script(bad(503, message="a stage is down")), "ready")
    assert clock.pauses == []


@pytest.mark.parametrize(
    ("url", "options", "words"),
    [
        ("127.0.0.1:8000", {}, "give an address such as http"),
        ("ftp://host", {}, "give an address such as http"),
        ("http://host:port", {}, "url is 'http://host:port'"),
        (URL, {"api_key": "key\n"}, "give the key alone"),
        (URL, {"api_key": ""}, "give the key alone"),
        (URL, {"timeout_s": 0}, "timeout_s is 0: give more"),
        (URL, {"timeout_s": float("nan")}, "timeout_s is nan: give more"),
        (URL, {"retries": -1}, "retries is -1: give 0 or more"),
    ],
)
@pytest.mark.parametrize("made", [Client, AsyncClient])
def test_settings_that_cannot_be_used(made: Any, url: str, options: Any, words: str):
    with pytest.raises(ConfigError, match=words) as raised:
        made(url, **options)
    assert "key\n" not in str(raised.value)


def test_a_call_of_its_own_timeout_is_checked_too(ask: Any):
    with pytest.raises(ConfigError, match="timeout_s is -1"):
        ask(Script(good()), "recommend", timeout_s=-1)


def test_importing_the_client_imports_no_model_library():
    code = (
        "import sys; import fusionrec.client; "
        "assert not {'torch', 'ray', 'numpy', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
