"""A light load generator for HTTP/1.1, in a process of its own: ``python -m benchmarks.load``.

Two ways to ask, over a fixed number of keep-alive connections, one request at a time on each:

*Open loop* (``--rate``). Requests are due at moments that are fixed beforehand. One that finds all
connections busy waits, and its latency counts from the moment it was due: a server that stalls is
charged for everybody who would have come meanwhile (no coordinated omission).

*Closed loop* (no ``--rate``). Every connection sends its next request when it has the answer to the
last: the rate that comes out is the capacity at that concurrency. Its latencies say how long a
request takes at saturation, and nothing about users who come when they please.

Nothing is retried and every outcome counts: a status, or one of REFUSED, RESET and TIMED_OUT. Needs
Linux's system-wide monotonic clock for times that other processes can compare. Costs 6 µs of CPU
a request at full speed, 50 µs at 250 requests/s.
"""

from __future__ import annotations

import asyncio
import json
import math
import sys
import time
from array import array
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import cast
from urllib.parse import urlsplit

import httptools
import numpy as np
import numpy.typing as npt
import uvloop
from pydantic import Field

from fusionrec.config import JobConfig, parse
from fusionrec.errors import ConfigError
from jobs.entry import run

REFUSED, RESET, TIMED_OUT = -1, -2, -3
"""Outcomes without a status: no connection, a connection lost before the answer, no answer within
``timeout_s``."""

NAMES = {REFUSED: "refused", RESET: "reset", TIMED_OUT: "timed out"}

RECORD = np.dtype(
    [("due", "f8"), ("sent", "f8"), ("done", "f8"), ("outcome", "i2"), ("marks", "u1")]
)
"""One request: three moments of ``time.monotonic()``, its status or outcome, and a bit for each
mark that the answer contains."""

Records = npt.NDArray[np.void]
RECONNECT_S = 0.05
SWEEP_S = 0.05


class Arrivals(StrEnum):
    """How an open loop's requests are spread over time."""

    CONSTANT = "constant"
    POISSON = "poisson"


class LoadConfig(JobConfig):
    """Send requests to an endpoint and count what comes back."""

    url: str
    """Where to POST, such as http://127.0.0.1:8000/v1/recommend."""
    requests: Path
    """File of bodies in JSON, one a line; each is sent at most once."""
    out: Path
    """Where the records go (.npy)."""
    first: int = Field(default=0, ge=0)
    """Line of the first body."""
    count: int = Field(default=100_000, ge=1)
    """Bodies to send at most."""
    connections: int = Field(default=1, ge=1, le=4096)
    """Connections to send them over."""
    rate: float | None = Field(default=None, gt=0)
    """Requests due in a second; by default a closed loop."""
    arrivals: Arrivals = Arrivals.CONSTANT
    """Spread of the due moments: constant or poisson."""
    duration_s: float = Field(default=10.0, gt=0, le=3600)
    """Seconds in which requests are due; answers are awaited beyond."""
    timeout_s: float = Field(default=60.0, gt=0)
    """Seconds after which a request that was due has failed."""
    headers: tuple[str, ...] = ()
    """Further headers, each NAME: VALUE."""
    marks: tuple[str, ...] = Field(default=(), max_length=8)
    """Strings to look for in every answer."""
    seed: int = Field(default=0, ge=0)
    """Of poisson arrivals."""


@dataclass(frozen=True, slots=True)
class Result:
    """What a run saw."""

    records: Records
    """Every request, in the order in which they were due."""
    cpu_s: float
    """What the generator itself took while it ran, user and system."""

    @property
    def counts(self) -> Counter[int]:
        """Status or outcome → requests."""
        return Counter(self.records["outcome"].tolist())

    @property
    def answered(self) -> Records:
        """The records with status 200."""
        good: Records = self.records[self.records["outcome"] == 200]
        return good

    @property
    def rate(self) -> float:
        """Answers with status 200 in a second, from the first request to the last answer."""
        good = self.answered
        if not len(good):
            return 0.0
        return len(good) / float(good["done"].max() - self.records["due"].min())

    def latencies_ms(self) -> npt.NDArray[np.float64]:
        """Of the answers with status 200, from the moment that they were due."""
        good = self.answered
        return np.asarray((good["done"] - good["due"]) * 1e3, dtype=np.float64)

    def marked(self, mark: int) -> int:
        """How many answers contained the mark of this number."""
        return int((self.records["marks"] >> mark & 1).sum())


def due_moments(rate: float, duration_s: float, arrivals: Arrivals, seed: int) -> list[float]:
    """Seconds after the start at which requests are due: ``rate · duration_s`` of them."""
    count = max(1, round(rate * duration_s))
    if arrivals is Arrivals.CONSTANT:
        return [index / rate for index in range(count)]
    gaps = np.random.default_rng(seed).exponential(1 / rate, count)
    return [float(moment) for moment in np.cumsum(gaps)]


class _Connection(asyncio.Protocol):
    """One keep-alive connection with at most one request under way."""

    def __init__(self, load: _Load) -> None:
        self._load = load
        self._parser = httptools.HttpResponseParser(self)
        self._body = bytearray()
        self._transport: asyncio.Transport | None = None
        self.index: int | None = None
        """The request under way."""

    def send(self, index: int) -> None:
        assert self._transport is not None
        self.index = index
        self._load.sent[index] = time.monotonic()
        self._transport.write(self._load.requests[index])

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            self.abort()  # counts as a reset

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002
        self._load.lost(self)

    def on_body(self, body: bytes) -> None:
        """Called by the parser."""
        self._body += body

    def on_message_complete(self) -> None:
        """Called by the parser."""
        index, self.index = self.index, None
        if index is not None:
            self._load.finish(index, self._parser.get_status_code(), self._body)
        self._body = bytearray()
        if self._parser.should_keep_alive():
            self._load.idle(self)
        else:
            self.abort()


class _Load:
    """One run of the generator, in one event loop."""

    def __init__(
        self,
        requests: Sequence[bytes],
        connections: int,
        due: Sequence[float] | None,
        duration_s: float,
        timeout_s: float,
        marks: Sequence[bytes],
    ) -> None:
        self.requests = requests
        size = len(requests) if due is None else min(len(requests), len(due))
        self.due, self.sent, self.done = (array("d", bytes(8 * size)) for _ in range(3))
        self.outcome, self.marks = array("h", bytes(2 * size)), array("B", bytes(size))
        self._size = size
        self._offsets = due
        self._connections: list[_Connection] = []
        self._num_connections = connections
        self._duration_s = duration_s
        self._timeout_s = timeout_s
        self._marks = marks
        self._free: list[_Connection] = []
        self._waiting: deque[int] = deque()
        self._next = 0
        self._left = size
        self._tasks: set[asyncio.Task[None]] = set()
        self._over = asyncio.Event()

    async def run(self, host: str, port: int) -> None:
        """Connect, send, await what is under way.

        Raises:
            ConfigError: nothing listens there.
        """
        self._address = (host, port)
        loop = asyncio.get_running_loop()
        try:
            for _ in range(self._num_connections):
                _, connection = await loop.create_connection(lambda: _Connection(self), host, port)
                self._connections.append(connection)
        except OSError as error:
            raise ConfigError(f"nothing listens on {host}:{port} ({error}): start it") from error
        start = time.monotonic()
        self._stop = start + self._duration_s
        if self._offsets is None:
            for connection in tuple(self._connections):
                self.idle(connection)
        else:
            for index in range(self._size):
                self.due[index] = start + self._offsets[index]
            self._free = list(self._connections)
            self._tick()
        self._sweep()
        await self._over.wait()
        for task in self._tasks:
            task.cancel()
        for connection in self._connections:
            connection.abort()

    def _tick(self) -> None:
        """Open loop: queue what is due by now, and wake up for the next."""
        now = time.monotonic()
        while self._next < self._size and self.due[self._next] <= now:
            self._waiting.append(self._next)
            self._next += 1
        # The freshest first: the server closes idle connections sooner or later.
        while self._waiting and self._free:
            self._free.pop().send(self._waiting.popleft())
        if self._next < self._size:
            # Timers count in milliseconds: a shorter wait would spin.
            delay = math.ceil((self.due[self._next] - now) * 1e3) / 1e3
            asyncio.get_running_loop().call_later(delay, self._tick)

    def idle(self, connection: _Connection) -> None:
        """A connection can take the next request."""
        if self._offsets is not None:
            if self._waiting:
                connection.send(self._waiting.popleft())
            else:
                self._free.append(connection)
        elif (index := self._take()) is not None:
            connection.send(index)

    def _take(self) -> int | None:
        """Closed loop: the next request, due now; None when the run is over."""
        now = time.monotonic()
        if self._next >= self._size or now >= self._stop:
            self._left -= self._size - self._next
            self._size = self._next
            if self._left == 0:
                self._over.set()
            return None
        self._next += 1
        self.due[self._next - 1] = now
        return self._next - 1

    def finish(self, index: int, outcome: int, body: bytes | bytearray = b"") -> None:
        """A request has come to its end."""
        self.done[index] = time.monotonic()
        self.outcome[index] = outcome
        for bit, mark in enumerate(self._marks):
            if mark in body:
                self.marks[index] |= 1 << bit
        self._left -= 1
        if self._left == 0:
            self._over.set()

    def lost(self, connection: _Connection) -> None:
        """A connection is gone: what was under way on it has failed; another takes its place."""
        if self._over.is_set():
            return
        self._connections.remove(connection)
        if connection in self._free:
            self._free.remove(connection)
        if connection.index is not None:
            late = time.monotonic() - self.due[connection.index] >= self._timeout_s
            self.finish(connection.index, TIMED_OUT if late else RESET)
        task = asyncio.get_running_loop().create_task(self._reconnect())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _reconnect(self) -> None:
        """Until it succeeds; each refusal fails a request that waits for a connection."""
        loop = asyncio.get_running_loop()
        while True:
            try:
                _, connection = await loop.create_connection(
                    lambda: _Connection(self), *self._address
                )
            except OSError:
                index = self._waiting.popleft() if self._waiting else None
                if self._offsets is None:
                    index = self._take()
                if index is not None:
                    self.sent[index] = time.monotonic()
                    self.finish(index, REFUSED)
                await asyncio.sleep(RECONNECT_S)
            else:
                self._connections.append(connection)
                self.idle(connection)
                return

    def _sweep(self) -> None:
        """Give up on what has taken too long, sent or not."""
        latest = time.monotonic() - self._timeout_s
        while self._waiting and self.due[self._waiting[0]] < latest:
            self.finish(self._waiting.popleft(), TIMED_OUT)
        for connection in tuple(self._connections):
            if connection.index is not None and self.due[connection.index] < latest:
                connection.abort()
        if not self._over.is_set():
            asyncio.get_running_loop().call_later(SWEEP_S, self._sweep)

    def records(self) -> Records:
        """What was sent, as an array."""
        records = np.zeros(self._size, dtype=RECORD)
        for name in ("due", "sent", "done", "outcome", "marks"):
            records[name] = np.asarray(getattr(self, name))[: self._size]
        return records


def generate(config: LoadConfig) -> Result:
    """Run the load that ``config`` describes.

    Raises:
        ConfigError: nothing listens at the address, or the bodies cannot be read.
    """
    url = urlsplit(config.url)
    if url.scheme != "http" or url.hostname is None:
        raise ConfigError(
            f"setting url = {config.url!r} is not an address such as http://HOST:PORT"
        )
    due = (
        None
        if config.rate is None
        else due_moments(config.rate, config.duration_s, config.arrivals, config.seed)
    )
    requests = _requests(config, len(due) if due is not None else config.count)
    load = _Load(
        requests,
        config.connections,
        due,
        config.duration_s,
        config.timeout_s,
        [mark.encode() for mark in config.marks],
    )
    started = time.process_time()
    uvloop.run(load.run(url.hostname, url.port or 80))
    return Result(load.records(), time.process_time() - started)


def _requests(config: LoadConfig, wanted: int) -> list[bytes]:
    """Whole HTTP requests, head and body."""
    url = urlsplit(config.url)
    try:
        lines = config.requests.read_bytes().splitlines()
    except OSError as error:
        raise ConfigError(f"--requests {config.requests} cannot be read: {error}") from error
    lines = lines[config.first : config.first + min(wanted, config.count)]
    if not lines:
        raise ConfigError(f"--requests {config.requests} has no line {config.first}: make more")
    further = "".join(f"{header}\r\n" for header in config.headers)
    head = (
        f"POST {url.path or '/'} HTTP/1.1\r\nhost: {url.netloc}\r\n"
        f"content-type: application/json\r\n{further}content-length: "
    ).encode()
    return [b"%s%d\r\n\r\n%s" % (head, len(line), line) for line in lines]


def main() -> None:
    """Parse, run, write the records; one line of JSON says what it was."""
    config = parse(LoadConfig)
    result = generate(config)
    np.save(config.out, result.records, allow_pickle=False)
    counts = {NAMES.get(outcome, str(outcome)): n for outcome, n in result.counts.items()}
    sys.stdout.write(json.dumps({"cpu_s": result.cpu_s, "outcomes": counts}) + "\n")


if __name__ == "__main__":
    run(main)
