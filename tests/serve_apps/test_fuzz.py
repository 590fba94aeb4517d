"""Generated requests to every route of the API, with keys on, over real HTTP: no 5xx and no hang.

The gateway is the real one and its stages are fakes, so that thousands of requests take seconds;
test_recommend.py sends fewer to the real stages.
"""

import hashlib
import socket
import threading
import time
from collections.abc import Iterator

import httpx
import pytest
import schemathesis
import uvicorn
from hypothesis import given, settings
from hypothesis import strategies as st
from schemathesis.specs.openapi import checks as openapi_checks

from fusionrec.bundles.store import BundleStore
from serve_apps.security import Access
from tests.serve_apps.test_gateway import Rig

KEY = "a-secret-key"
KEYED = {"x-api-key": KEY}
CHECKS = [
    schemathesis.checks.not_a_server_error,
    openapi_checks.response_schema_conformance,
    openapi_checks.status_code_conformance,
    openapi_checks.content_type_conformance,
    openapi_checks.negative_data_rejection,
]
SLOWEST_S = 5.0


@pytest.fixture(scope="module")
def address(paper_bundles: BundleStore) -> Iterator[str]:
    access = Access(api_keys=(hashlib.sha256(KEY.encode()).hexdigest(),), audit_sample=1)
    rig = Rig(paper_bundles, access=access, stage_timeout_s=5.0, max_waiting=512)
    app = rig.gateway.__serve_build_asgi_app__()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(uvicorn.Config(app, log_config=None, ws="none"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        port = listener.getsockname()[1]
        while not server.started:
            time.sleep(0.01)
        yield f"http://127.0.0.1:{port}"
        server.should_exit = True
        thread.join(20)


@pytest.mark.parametrize("mode", list(schemathesis.GenerationMode))
def test_every_route_answers_what_the_document_says(
    address: str, mode: schemathesis.GenerationMode
):
    document = schemathesis.openapi.from_url(f"{address}/openapi.json")
    sent: dict[str, int] = {}
    for result in document.get_all_operations():
        operation = result.ok()
        if mode is schemathesis.GenerationMode.NEGATIVE and not operation.body:
            continue  # nothing of it can be wrong

        @settings(
            max_examples=150 if operation.body else 3,
            deadline=None,
            derandomize=True,
            database=None,
        )
        @given(case=operation.as_strategy(generation_mode=mode))
        def check(case: schemathesis.Case) -> None:
            sent[case.path] = sent.get(case.path, 0) + 1
            case.call_and_validate(checks=CHECKS, headers=KEYED, timeout=SLOWEST_S)

        check()
    with_body = {"/v1/recommend", "/v1/items", "/v1/users"}
    assert {path for path, number in sent.items() if number >= 100} == with_body
    if mode is schemathesis.GenerationMode.POSITIVE:
        others = {"/v1/bundle", "/v1/status", "/healthz", "/readyz"}
        assert set(sent) == with_body | others


header_name = st.text("abcdefghijklmnopqrstuvwxyz-", min_size=1, max_size=20)
printable = st.characters(min_codepoint=0x21, max_codepoint=0x7E)
header_value = st.text(st.one_of(printable, st.just(" ")), max_size=200).map(str.strip)


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(
    method=st.sampled_from(["GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS", "PATCH", "TRACE"]),
    path=st.one_of(
        st.sampled_from(["/", "/v1/recommend", "/v1/items", "/v1/users", "/v1/status", "/docs"]),
        st.text(printable, max_size=60).map("/".__add__),
    ),
    headers=st.dictionaries(
        st.one_of(
            st.sampled_from(["authorization", "x-api-key", "content-type", "accept", "range",
                             "x-request-timeout-seconds", "x-forwarded-proto", "if-none-match",
                             "traceparent"]),
            header_name.filter(lambda name: name not in _FRAMING),
        ),
        header_value,
        max_size=4,
    ),
    body=st.binary(max_size=300),
)  # fmt: skip
def test_whatever_is_sent_is_not_a_server_error(
    address: str, method: str, path: str, headers: dict[str, str], body: bytes
):
    url = httpx.URL(address).copy_with(raw_path=path.replace("#", "%23").encode())
    given_headers = {**headers, **KEYED} if "x-api-key" not in headers else headers
    response = httpx.request(method, url, headers=given_headers, content=body, timeout=SLOWEST_S)
    assert response.status_code < 500


_FRAMING = {"host", "connection", "content-length", "transfer-encoding", "upgrade", "expect", "te"}
"""What a client must not make up, or does not get through httpx."""
