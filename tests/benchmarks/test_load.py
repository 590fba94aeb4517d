"""The load generator against a server of a few lines, in a thread."""

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from benchmarks.harness.engine import RECORD, REFUSED, RESET, TIMED_OUT
from benchmarks.load import Arrivals, LoadConfig, Result, due_moments, generate
from fusionrec.errors import ConfigError


class Server:
    """Answers each body with what it asks for: ``answer``, ``busy``, ``close``, ``drop``, ``hang``;
    one at a time, after ``service_s``; ``stall`` keeps everybody waiting for 0.3 s; after ``stop``
    nobody is there any more."""

    def __init__(self, service_s: float = 0.0) -> None:
        self.received: list[str] = []
        self.service_s = service_s
        self._loop = asyncio.new_event_loop()
        self._up = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        assert self._up.wait(10)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(self._serve())
        self._loop.close()

    async def _serve(self) -> None:
        self._stop = asyncio.Event()
        self._turn = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()
        server = await asyncio.start_server(self._connection, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        self._up.set()
        await self._stop.wait()
        server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await server.wait_closed()

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._tasks.add(asyncio.current_task())
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                [length] = [
                    int(line.partition(b":")[2])
                    for line in head.split(b"\r\n")
                    if line.startswith(b"content-length")
                ]
                body = (await reader.readexactly(length)).decode()
                self.received.append(body)
                if body == '"drop"':
                    return
                if body == '"hang"':
                    await asyncio.sleep(60)
                async with self._turn:
                    await asyncio.sleep(0.3 if body == '"stall"' else self.service_s)
                if body == '"busy"':  # chunked, as Serve's own refusals are
                    writer.write(
                        b"HTTP/1.1 503 Service Unavailable\r\ntransfer-encoding: chunked\r\n\r\n"
                        b"4\r\nbusy\r\n0\r\n\r\n"
                    )
                    continue
                close = b"connection: close\r\n" if body == '"close"' else b""
                answer = b'{"degraded":[]}'
                writer.write(
                    b"HTTP/1.1 200 OK\r\n%scontent-length: %d\r\n\r\n%s"
                    % (close, len(answer), answer)
                )
                if body == '"stop"':
                    self._stop.set()
                if close:
                    return
        except (asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            writer.close()

    def stop(self) -> None:
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stop.set)
            self._thread.join(10)


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.stop()


@pytest.fixture
def slow_server() -> Iterator[Server]:
    server = Server(service_s=0.01)
    yield server
    server.stop()


def config(tmp_path: Path, server: Server, bodies: list[str], **settings: object) -> LoadConfig:
    requests = tmp_path / "requests.jsonl"
    requests.write_text("".join(f'"{body}"\n' for body in bodies))
    return LoadConfig(
        url=f"http://127.0.0.1:{server.port}/ask",
        requests=requests,
        out=tmp_path / "records.npy",
        **settings,
    )


def test_a_closed_loop_sends_every_body_once(server: Server, tmp_path: Path):
    bodies = [f"answer {n}" for n in range(300)]
    result = generate(
        config(tmp_path, server, bodies, connections=7, marks=('"degraded":[]', "degraded:x"))
    )
    assert sorted(server.received) == sorted(f'"{body}"' for body in bodies)
    assert result.counts == {200: 300}
    assert (result.marked(0), result.marked(1)) == (300, 0)
    records = result.records
    assert (records["done"] > records["sent"]).all()
    assert (records["sent"] > records["dialled"]).all()
    assert len(set(records["dialled"].tolist())) == 7  # one for each connection


def test_rate_and_latencies_are_of_what_was_answered():
    records = np.zeros(4, dtype=RECORD)
    records["due"] = [10, 11, 12, 13]
    records["sent"] = [10, 12, 12, 13]
    records["done"] = [10.5, 14, 12.1, 15]
    records["outcome"] = [200, 200, 503, TIMED_OUT]
    result = Result(records, cpu_s=0.0)
    assert result.rate == pytest.approx(2 / 4)
    assert result.latencies_ms() == pytest.approx([500, 3000])


def test_capacity_leaves_out_the_first_batches_and_the_last():
    """Two connections; the first answers take 3 s, those after them 1 s, the last two 5 s."""
    rounds = [0.0, 3.0, 4.0, 5.0, 6.0, 11.0]
    records = np.zeros(2 * (len(rounds) - 1), dtype=RECORD)
    records["due"], records["done"] = np.repeat(rounds[:-1], 2), np.repeat(rounds[1:], 2)
    records["outcome"] = 200
    result = Result(records, cpu_s=0.0)
    assert result.rate == pytest.approx(10 / 11)
    assert result.capacity(2) == pytest.approx(6 / 3)
    assert Result(records[:4], cpu_s=0.0).capacity(2) == pytest.approx(4 / 4)  # too few
    assert Result(records[:0], cpu_s=0.0).capacity(2) == 0


def test_a_closed_loop_ends_with_its_time(slow_server: Server, tmp_path: Path):
    result = generate(
        config(tmp_path, slow_server, ["a"] * 1000, connections=4, duration_s=0.3, first=10)
    )
    assert 0 < result.counts[200] < 40  # no faster than 100 a second
    assert len(result.records) == len(slow_server.received) == result.counts[200]


def test_every_outcome_is_counted(server: Server, tmp_path: Path):
    bodies = ["answer", "busy", "close", "drop", "answer", "busy", "hang", "answer"]
    result = generate(config(tmp_path, server, bodies, connections=2, timeout_s=2.0))
    assert result.counts == {200: 4, 503: 2, RESET: 1, TIMED_OUT: 1}
    by_body = dict(zip(bodies, result.records["outcome"].tolist(), strict=True))
    assert by_body["hang"] == TIMED_OUT
    assert by_body["drop"] == RESET


def test_an_open_loop_counts_from_the_moment_a_request_was_due(server: Server, tmp_path: Path):
    """One stall of 0.3 s among 60 requests, 10 ms apart, on one connection."""
    bodies = ["answer"] * 10 + ["stall"] + ["answer"] * 49
    closed = generate(config(tmp_path, server, bodies)).records
    opened = generate(config(tmp_path, server, bodies, rate=100.0, duration_s=0.6)).records
    assert len(closed) == len(opened) == 60
    # In the closed loop nobody comes during the stall; in the open one 30 do, and wait for its end.
    assert (closed["due"][1:] >= closed["done"][:-1]).all()
    np.testing.assert_allclose(np.diff(opened["due"]), 0.01, atol=1e-6)
    end = opened["done"][10]
    assert end - opened["due"][10] >= 0.29
    came = opened[11:][opened["due"][11:] < end]
    assert len(came) >= 28
    assert (came["sent"] >= end).all()


def test_what_waits_too_long_has_failed_unsent(server: Server, tmp_path: Path):
    bodies = ["hang"] * 20
    result = generate(
        config(tmp_path, server, bodies, rate=100.0, duration_s=0.2, connections=1, timeout_s=0.1)
    )
    assert result.counts == {TIMED_OUT: 20}
    assert (result.records["done"] - result.records["due"]).min() >= 0.1
    # Nobody hangs up earlier than after 0.1 s: more than half of them find no connection in time.
    assert 1 <= len(server.received) <= (result.records["sent"] > 0).sum() < 10


def test_refused_connections_fail_what_is_due(server: Server, tmp_path: Path):
    bodies = ["answer"] * 10 + ["stop"] + ["answer"] * 29
    result = generate(config(tmp_path, server, bodies, rate=50.0, duration_s=0.8, connections=4))
    assert set(result.counts) <= {200, RESET, REFUSED}
    assert result.counts[200] >= 5
    assert result.counts[REFUSED] >= 10
    refused = result.records["outcome"] == REFUSED
    np.testing.assert_array_equal(result.records["dialled"] == 0, refused)
    assert len(result.records) == 40


def test_idle_connections_that_the_server_closes_cost_nothing(server: Server, tmp_path: Path):
    """Every answer ends its connection: the next request finds none and opens one."""
    bodies = ["close"] * 30
    result = generate(config(tmp_path, server, bodies, rate=100.0, duration_s=0.3, connections=2))
    assert result.counts == {200: 30}
    assert len(set(result.records["dialled"].tolist())) == 30


def test_due_moments():
    assert due_moments(4.0, 1.0, Arrivals.CONSTANT, 0) == [0.0, 0.25, 0.5, 0.75]
    moments = due_moments(100.0, 20.0, Arrivals.POISSON, 1)
    assert len(moments) == 2000
    gaps = np.diff(moments)
    assert gaps.mean() == pytest.approx(0.01, rel=0.1)
    assert gaps.std() == pytest.approx(0.01, rel=0.1)
    assert moments == due_moments(100.0, 20.0, Arrivals.POISSON, 1)


def test_mistakes_are_named(server: Server, tmp_path: Path):
    with pytest.raises(ConfigError, match="has no line 5"):
        generate(config(tmp_path, server, ["a"], first=5))
    server.stop()
    with pytest.raises(ConfigError, match="nothing listens on"):
        generate(config(tmp_path, server, ["a"]))
