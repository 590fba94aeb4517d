import asyncio
import hashlib
import json
import logging
import re
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, Request

from serve_apps import api as api_module
from serve_apps.api import build_api
from serve_apps.audit import AuditLog, Pseudonyms
from serve_apps.security import MAX_HEADER_BYTES, Access, Door, Secured

KEY = "a-secret-key"
SHOP = (f"shop={hashlib.sha256(KEY.encode()).hexdigest()}",)
HEADERS = {"x-api-key": KEY, "content-type": "application/json"}
ALWAYS = {
    "content-security-policy",
    "cross-origin-opener-policy",
    "cross-origin-resource-policy",
    "permissions-policy",
    "referrer-policy",
    "x-content-type-options",
}


def call(app: Any, method: str, path: str, **options: Any) -> httpx.Response:
    async def main() -> httpx.Response:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await asyncio.wait_for(client.request(method, path, **options), 10)

    return asyncio.run(main())


def guarded(**access: Any) -> FastAPI:
    """The API around no endpoint: what is refused never gets that far."""
    door = Door.build(Access(api_keys=SHOP, **access), {"FUSIONREC_LOG_SECRET": "pepper"})
    return build_api(None, door)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/healthz", 200),
        ("GET", "/openapi.json", 200),
        ("GET", "/docs", 200),
        ("GET", "/nothing", 404),
        ("GET", "/v1/recommend", 405),
        ("POST", "/v1/recommend", 401),
    ],
)
def test_every_answer_carries_the_security_headers(method: str, path: str, status: int):
    answer = call(guarded(), method, path)
    assert answer.status_code == status
    assert set(answer.headers) >= ALWAYS
    assert answer.headers["cache-control"] == "no-store"
    policy = answer.headers["content-security-policy"]
    assert "default-src 'self'" in policy
    assert "frame-ancestors 'none'" in policy
    assert "unsafe" not in policy
    assert "http" not in policy


def test_only_tls_is_told_to_stay():
    app = guarded()
    assert "strict-transport-security" not in call(app, "GET", "/healthz").headers
    behind = {"x-forwarded-proto": "https"}
    assert "strict-transport-security" in call(app, "GET", "/healthz", headers=behind).headers
    assert "strict-transport-security" in call(app, "GET", "https://test/healthz").headers


def test_an_answer_may_say_that_it_can_be_kept():
    app = FastAPI()
    app.add_middleware(Secured)

    @app.get("/style.css")
    async def style(request: Request) -> Any:
        from fastapi import Response

        return Response("", headers={"cache-control": "max-age=60"})

    assert call(app, "GET", "/style.css").headers.get_list("cache-control") == ["max-age=60"]


def test_the_explorer_needs_no_host_from_outside():
    app = guarded()
    page = call(app, "GET", "/docs").text
    addresses = re.findall(r"""(?:src|href)=["']([^"']+)""", page)
    assert len(addresses) == 4
    for address in addresses:
        assert "//" not in address
        assert call(app, "GET", f"/{address}").status_code == 200
    assert "<script>" not in page  # the policy forbids what stands inline


def test_headers_are_bounded():
    app = guarded()
    answer = call(app, "GET", "/healthz", headers={"x-filler": "x" * MAX_HEADER_BYTES})
    assert answer.status_code == 431
    assert answer.json()["detail"][0]["field"] == "headers"
    assert set(answer.headers) >= ALWAYS
    assert call(app, "GET", "/healthz", headers={"x-filler": "x" * 8_000}).status_code == 200


def test_a_body_that_does_not_end_is_408(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(api_module, "BODY_TIMEOUT_S", 0.05)

    async def slow():
        yield b'{"k":'
        await asyncio.sleep(60)
        yield b"1}"

    async def main() -> tuple[int, bytes]:
        """By hand: httpx's transport collects a body before it calls the application."""
        sent: list[Any] = []
        chunks = slow()

        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": await anext(chunks), "more_body": True}

        async def send(message: Any) -> None:
            sent.append(message)

        headers = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
        scope = {
            "type": "http",
            "method": "POST",
            "path": "/v1/recommend",
            "raw_path": b"/v1/recommend",
            "query_string": b"",
            "root_path": "",
            "scheme": "http",
            "http_version": "1.1",
            "headers": headers,
        }
        await asyncio.wait_for(guarded()(scope, receive, send), 10)
        return sent[0]["status"], sent[1]["body"]

    status, body = asyncio.run(main())
    assert status == 408
    assert json.loads(body)["detail"][0]["field"] == "body"


def test_a_key_that_sends_too_much_is_told_when_to_come_back():
    app = guarded(requests_per_s=0.1, burst=2)
    answers = [call(app, "POST", "/v1/recommend", headers=HEADERS, content="{") for _ in range(3)]
    assert [answer.status_code for answer in answers] == [422, 422, 429]
    assert 9 <= int(answers[2].headers["retry-after"]) <= 10
    assert "too many requests with this key" in answers[2].text


def lines(caplog: pytest.LogCaptureFixture) -> list[dict[str, Any]]:
    return [json.loads(r.getMessage()) for r in caplog.records if r.name == "fusionrec.audit"]


def test_whoever_is_denied_is_written_down(caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO, "fusionrec.audit")
    app = guarded(audit_sample=0, requests_per_s=0.1, burst=1)
    call(app, "POST", "/v1/recommend", headers={"x-api-key": "wrong"})
    call(app, "POST", "/v1/recommend", headers=HEADERS, content="{")  # admitted, not drawn
    call(app, "GET", "/v1/bundle", headers=HEADERS)
    call(app, "GET", "/healthz")  # asks for no key
    seen = [(line["key"], line["method"], line["route"], line["status"]) for line in lines(caplog)]
    assert seen == [
        (None, "POST", "/v1/recommend", 401),
        ("shop", "GET", "/v1/bundle", 429),
    ]


def test_users_are_written_down_as_hmac_only(caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO, "fusionrec.audit")
    app = guarded(audit_sample=1)
    with pytest.raises(AttributeError):  # there is no endpoint behind the door
        call(app, "POST", "/v1/recommend", headers=HEADERS, json={"user_id": "ann"})
    call(app, "POST", "/v1/recommend", headers=HEADERS, json={"user_id": "ann", "k": 0})
    (first, second) = lines(caplog)
    assert first["status"] == 500
    assert first["user"] == Pseudonyms(b"pepper").of("ann")
    assert second["status"] == 422
    assert "user" not in second
    assert "ann" not in caplog.text


def test_pseudonyms_depend_on_user_and_secret():
    of = Pseudonyms(b"pepper").of
    assert of("ann") == of("ann") != of("bob")
    assert re.fullmatch(r"[0-9a-f]{32}", of("\ud800"))
    assert Pseudonyms(b"salt").of("ann") != of("ann")
    assert Pseudonyms.from_environment({}) != Pseudonyms.from_environment({})


def test_the_audit_log_is_written_to_a_file_without_waiting(tmp_path: Path):
    audit = AuditLog(1.0, Pseudonyms(b"pepper"))
    audit.write_to(tmp_path / "serve" / "audit.jsonl")
    try:
        for user in ("ann", "bob"):
            audit.note({"state": {"key": "shop", "user": user}, "method": "POST"}, 200)
    finally:
        audit.close()
    written = (tmp_path / "serve" / "audit.jsonl").read_text().splitlines()
    assert [json.loads(line)["key"] for line in written] == ["shop", "shop"]
    assert "ann" not in "".join(written)


class Stopped:
    """A listener that never takes anything out of the queue."""

    def __init__(self, _queue: Any, *handlers: logging.Handler) -> None:
        self.handlers = handlers

    def start(self) -> None: ...

    def stop(self) -> None: ...


def test_what_finds_the_queue_full_is_counted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr("serve_apps.audit._MAX_WAITING", 1)
    monkeypatch.setattr("serve_apps.audit.QueueListener", Stopped)
    audit = AuditLog(1.0, Pseudonyms(b"pepper"))
    audit.write_to(tmp_path / "audit.jsonl")
    scope = {"state": {"key": "shop"}, "method": "GET"}
    for _ in range(4):
        audit.note(scope, 200)
    handler = audit._handler
    assert handler is not None
    handler.queue.get_nowait()
    audit.note(scope, 200)
    assert json.loads(handler.queue.get_nowait().getMessage())["dropped"] == 3
    audit.close()
