"""Serve's own proxy on paper, with what the endpoint puts around it, loaded as Serve loads it."""

from typing import Any

import pytest
from ray.serve._private.http_util import _apply_middlewares, validate_http_proxy_callback_return
from ray.serve._private.utils import call_function_from_import_path
from starlette.testclient import TestClient

from serve_apps.ingress import SWITCH, prepare_ingress

OURS = (b"x-content-type-options", b"nosniff")


@pytest.mark.parametrize(
    ("status", "headers", "seen"),
    [(404, [], 503), (404, [OURS], 404), (200, [], 200), (500, [], 500)],
)
def test_a_proxy_without_routes_says_503(
    status: int, headers: list[tuple[bytes, bytes]], seen: int
):
    async def proxy(_scope: Any, _receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": b"not found"})

    environment = {SWITCH: "0"}
    assert not prepare_ingress(environment)
    callback = environment["RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"]
    middlewares = validate_http_proxy_callback_return(call_function_from_import_path(callback))
    answer = TestClient(_apply_middlewares(proxy, middlewares)).post("/v1/recommend")
    assert answer.status_code == seen
    assert answer.headers.get("retry-after") == ("1" if seen == 503 else None)
    assert answer.text == "not found"
