"""A fault under load, on an endpoint that is only pretended."""

import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks.harness import faults
from benchmarks.harness.engine import RECORD, REFUSED, RESET
from benchmarks.harness.experiment import Damage, Happening, Scene, observe
from benchmarks.harness.processes import DEGRADED
from benchmarks.load import Result

ANSWER = {
    "items": [],
    "bundle": "0" * 32,
    "timings_ms": {},
    "degraded": ["rerank"],
    "fallback": None,
}


class Endpoint(ThreadingHTTPServer):
    """Answers 200; while ``failing``, 503 to the pinger and once to the client."""

    daemon_threads = True
    failing = False
    refused_pings = 0
    refused_calls = 0
    lock = threading.Lock()

    def refuses(self, user_agent: str | None) -> bool:
        with self.lock:
            if not self.failing:
                return False
            if user_agent is None:  # the pinger
                self.refused_pings += 1
                return True
            self.refused_calls += 1
            return self.refused_calls == 1


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Endpoint

    def do_POST(self):
        self.rfile.read(int(self.headers["content-length"]))
        status, body = 200, json.dumps(ANSWER, separators=(",", ":")).encode()
        if self.server.refuses(self.headers["user-agent"]):
            status, body = 503, b'{"detail":[]}'
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
    requests.write_text('{"history": ["a"], "k": 3}\n' * 2000)
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


def begins(recovered: Callable[[], bool]) -> Damage:
    now = time.monotonic()
    return Damage(now, now, recovered)


def test_a_failure_and_its_end(endpoint: Endpoint, scene: Scene):
    def fail(_: Scene) -> Damage:
        endpoint.failing = True

        def over() -> bool:
            endpoint.failing = not (endpoint.refused_pings >= 5 and endpoint.refused_calls)
            return not endpoint.failing

        return begins(over)

    seen = observe(scene, fail, (DEGRADED,))
    assert set(seen.counts) == {"200", "503"}
    assert 5 <= endpoint.refused_pings == seen.server_errors == seen.errors
    assert seen.result.marked(0) == len(seen.result.answered)
    assert seen.client_calls >= 1
    assert seen.client_failures == ()  # it asked again
    assert seen.last_error_s <= seen.recovery_s
    (before, _), _, (after, _) = seen.latencies_ms()
    assert before > 0
    assert after > 0
    assert len(seen.result.records) < 50 * 20  # it ends when it may


def test_what_does_not_recover(scene: Scene):
    seen = observe(replace(scene, patience_s=0.5), lambda _: begins(lambda: False))
    assert seen.recovery_s is None
    assert seen.errors == 0
    assert seen.last_error_s is None


def answers(due: Sequence[float], latency_s: float, outcome: int = 200) -> Result:
    records = np.zeros(len(due), dtype=RECORD)
    records["due"], records["done"] = due, np.array(due) + latency_s
    records["outcome"] = outcome
    return Result(records, cpu_s=0.0)


def happening(result: Result, recovered_s: float | None = 12.0) -> Happening:
    return Happening(result, 10.0, 10.5, recovered_s, client_calls=1, client_failures=())


OLD, NONE, NEW = 1.0, 0.0, 12.5
"""When a connection was dialled: to the process that was killed at 10 and gone at 10.5, none, to
its successor."""


@pytest.mark.parametrize(
    ("dialled", "sent", "done", "outcome", "in_flight", "away"),
    [
        (OLD, 9.0, 10.1, RESET, True, False),
        (OLD, 9.0, 10.1, 200, True, False),  # under way at the blow, and answered all the same
        (OLD, 10.3, 10.4, RESET, True, False),  # sent to what was ending: nobody read it
        (10.2, 10.3, 11.0, RESET, True, False),  # its connection was in the backlog only
        (OLD, 10.6, 10.6, RESET, False, True),  # the pinger had not noticed the end yet
        (NONE, 10.4, 10.4, REFUSED, False, True),
        (NONE, 12.0, 12.0, REFUSED, False, True),
        (NEW, 12.6, 12.7, 503, False, True),
        (NEW, 12.6, 12.7, 404, False, False),
        (NEW, 12.6, 12.7, RESET, False, False),
        (NEW, 14.0, 14.1, 503, False, False),  # at full strength
        (NONE, 14.0, 14.0, REFUSED, False, False),
        (OLD, 9.0, 9.9, RESET, False, False),  # nothing had happened yet
    ],
)
def test_what_a_proxy_may_fail_when_it_is_killed(
    dialled: float, sent: float, done: float, outcome: int, in_flight: bool, away: bool
):
    records = np.zeros(1, dtype=RECORD)
    records[["due", "dialled", "sent", "done", "outcome"]] = (sent, dialled, sent, done, outcome)
    seen = happening(Result(records, cpu_s=0.0), recovered_s=13.0)
    assert seen.in_flight == in_flight
    assert seen.turned_away().tolist() == [away]
    excused = in_flight or outcome == 200
    not_in_flight = ["1 errors of requests that were not in flight"]
    assert faults._only_what_was_in_flight(seen) == ([] if excused else not_in_flight)
    assert faults._only_what_it_had(seen) == ([] if excused or away else not_in_flight)


LISTEN = """
import socket, sys, time
held = bytearray(200_000_000)  # what is freed before sockets are closed
with socket.create_server(("127.0.0.1", 0)) as server:
    print(server.getsockname()[1], flush=True)
    time.sleep(600)
"""


def test_a_process_is_gone_when_it_takes_no_connection_any_more():
    with subprocess.Popen([sys.executable, "-c", LISTEN], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        address = ("127.0.0.1", int(process.stdout.readline()))
        socket.create_connection(address).close()
        damage = faults._kill([process.pid])
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(address)
    assert damage.began_s < damage.done_s < time.monotonic()


@pytest.mark.parametrize(
    ("burst", "broken"),
    [
        (answers([10, 11], 0.5), []),
        (answers([10, 11], 7.0), ["p99 of what is accepted is 7000 ms"]),
        (answers([10, 11], 0.1, outcome=503), ["nothing was accepted"]),
        (answers([10, 11], 0.1, outcome=500), ["outcomes beside", "nothing was accepted"]),
    ],
)
def test_an_overload_is_judged_by_the_burst_itself(
    burst: Result, broken: list[str], monkeypatch: pytest.MonkeyPatch
):
    process = SimpleNamespace(await_start=lambda: None, result=lambda: burst)
    monkeypatch.setattr(faults, "LoadProcess", lambda **_: process)
    fault = faults.overload(capacity=10, burst_s=1, bound_s=6)
    fault.do(SimpleNamespace(address="", requests=None, timeout_s=30.0))
    found = fault.breaches(happening(answers([9, 13], 0.1)))
    assert len(found) == len(broken)
    assert all(map(str.startswith, found, broken))


@pytest.mark.parametrize(
    ("due", "latency_s", "recovered_s", "broken"),
    [
        ([10.5, 12.5], 0.1, 12.0, False),
        ([10.5, 12.5], 0.3, 12.0, True),  # more than twice of before
        ([11.5, 12.5], 0.3, 10.1, True),  # late, but part of a swap that was quick
        ([], 0.1, 12.0, True),  # nothing was answered meanwhile
    ],
)
def test_a_swap_is_smooth_or_not(
    due: list[float], latency_s: float, recovered_s: float, broken: bool
):
    before, during = answers([8, 9], 0.1).records, answers(due, latency_s).records
    records = np.concatenate([before, during])
    records["marks"] = 0b100  # all from the new bundle
    found = faults._smooth(2.0, happening(Result(records, cpu_s=0.0), recovered_s))
    assert [words for words in found if "p99" in words] == found
    assert bool(found) == broken
