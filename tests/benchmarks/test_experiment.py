"""A fault under load, on an endpoint that is only pretended."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from benchmarks.harness.experiment import Scene, observe

ANSWER = {
    "items": [],
    "bundle": "0" * 32,
    "timings_ms": {},
    "degraded": ["rerank"],
    "fallback": None,
}


class Endpoint(ThreadingHTTPServer):
    """Answers 200, or 503 while ``failing``."""

    daemon_threads = True
    failing = False


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Endpoint

    def do_POST(self):
        self.rfile.read(int(self.headers["content-length"]))
        status, body = (503, b'{"detail":[]}') if self.server.failing else (200, b"")
        body = body or json.dumps(ANSWER, separators=(",", ":")).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object):
        pass


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    with Endpoint(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def scene(endpoint: Endpoint, tmp_path: Path) -> Scene:
    requests = tmp_path / "requests.jsonl"
    requests.write_text('{"history": ["a"], "k": 3}\n' * 500)
    return Scene(
        address=f"http://127.0.0.1:{endpoint.server_port}",
        requests=requests,
        rate=50.0,
        client_rate=20.0,
        before_s=0.5,
        after_s=0.5,
        patience_s=20.0,
        connections=4,
    )


def test_a_failure_and_its_end(endpoint: Endpoint, scene: Scene):
    def fail(_: Scene) -> Callable[[], bool]:
        endpoint.failing = True
        ends = time.monotonic() + 0.4

        def over() -> bool:
            endpoint.failing = time.monotonic() < ends
            return not endpoint.failing

        return over

    seen = observe(scene, fail, ('"degraded":["',))
    assert set(seen.counts) == {"200", "503"}
    assert 5 <= seen.server_errors == seen.errors
    assert seen.result.marked(0) == len(seen.result.answered)
    assert seen.client_calls >= 5
    assert seen.client_failures == ()  # it asked again
    assert seen.recovery_s > 0.3
    assert seen.last_error_s < seen.recovery_s + 1
    (before, _), _, (after, _) = seen.latencies_ms()
    assert before > 0
    assert after > 0
    assert len(seen.result.records) < 50 * 20  # it ends when it may


def test_what_does_not_recover(scene: Scene):
    seen = observe(replace(scene, patience_s=0.5), lambda _: lambda: False)
    assert seen.recovery_s is None
    assert seen.errors == 0
    assert seen.last_error_s is None
