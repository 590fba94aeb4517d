"""The engine of the load generator: connections, queues and clocks of one run.

Sends whole requests as they are and reads of an answer its status, its end, and whether it contains
some strings. Knows nothing of files, settings or statistics: ``benchmarks.load`` does.
"""

from __future__ import annotations

import asyncio
import math
import time
from array import array
from collections import deque
from collections.abc import Callable, Sequence
from typing import cast

import httptools
import numpy as np
import numpy.typing as npt

from fusionrec.errors import ConfigError

REFUSED, RESET, TIMED_OUT = -1, -2, -3
"""Outcomes without a status: no connection, a connection lost before the answer, no answer within
``timeout_s``."""

NAMES = {REFUSED: "refused", RESET: "reset", TIMED_OUT: "timed out"}

MOMENTS = ("due", "dialled", "sent", "done")
RECORD = np.dtype([*((name, "f8") for name in MOMENTS), ("outcome", "i2"), ("marks", "u1")])
"""One request: moments of ``time.monotonic()``, its status or outcome, and a bit for each mark that
the answer contains. ``dialled`` is when its connection began to be made; 0 where it got none."""

Records = npt.NDArray[np.void]
RECONNECT_S = 0.05
SWEEP_S = 0.05


class Connection(asyncio.Protocol):
    """One keep-alive connection with at most one request under way."""

    def __init__(self, load: Load, dialled: float) -> None:
        self._load = load
        self._dialled = dialled
        self._parser = httptools.HttpResponseParser(self)
        self._body = bytearray()
        self._transport: asyncio.Transport | None = None
        self.index: int | None = None
        """The request under way."""

    def send(self, index: int) -> None:
        """Write the request of that number."""
        assert self._transport is not None
        self.index = index
        self._load.dialled[index] = self._dialled
        self._load.sent[index] = time.monotonic()
        self._transport.write(self._load.requests[index])

    def abort(self) -> None:
        """Close at once; what is under way fails."""
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Called by the event loop."""
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        """Called by the event loop."""
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            self.abort()  # counts as a reset

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002
        """Called by the event loop."""
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


class Load:
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
        self.due, self.dialled, self.sent, self.done = (
            array("d", bytes(8 * size)) for _ in MOMENTS
        )
        self.outcome, self.marks = array("h", bytes(2 * size)), array("B", bytes(size))
        self._size = size
        self._offsets = due
        self._connections: list[Connection] = []
        self._num_connections = connections
        self._duration_s = duration_s
        self._timeout_s = timeout_s
        self._marks = marks
        self._free: list[Connection] = []
        self._waiting: deque[int] = deque()
        self._dormant = 0
        """Connections that the server closed while they were idle."""
        self._opening = 0
        """Connections that are being made."""
        self._next = 0
        self._left = size
        self._tasks: set[asyncio.Task[None]] = set()
        self._over = asyncio.Event()

    async def run(
        self, host: str, port: int, started: Callable[[], None], stopped: Callable[[], bool]
    ) -> None:
        """Connect, call ``started``, send until the end or until ``stopped``, await the answers.

        Raises:
            ConfigError: nothing listens there.
        """
        self._address = (host, port)
        try:
            for _ in range(self._num_connections):
                self._connections.append(await self._dial())
        except OSError as error:
            raise ConfigError(f"nothing listens on {host}:{port} ({error}): start it") from error
        started()
        self._stopped = stopped
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

    def stop(self) -> None:
        """Send nothing that is not due yet; what is due is still sent, and answers are awaited."""
        self._left -= self._size - self._next
        self._size = self._next
        if self._left == 0:
            self._over.set()

    def _tick(self) -> None:
        """Open loop: queue what is due by now, and wake up for the next."""
        now = time.monotonic()
        while self._next < self._size and self.due[self._next] <= now:
            self._waiting.append(self._next)
            self._next += 1
        self._dispatch()
        if self._next < self._size:
            # Timers count in milliseconds: a shorter wait would spin.
            delay = math.ceil((self.due[self._next] - now) * 1e3) / 1e3
            asyncio.get_running_loop().call_later(delay, self._tick)

    def _dispatch(self) -> None:
        """Open loop: send what waits, as far as there are connections."""
        # The freshest first: the server closes idle connections sooner or later.
        while self._waiting and self._free:
            self._free.pop().send(self._waiting.popleft())
        while self._dormant and self._opening < len(self._waiting):
            self._dormant -= 1
            self._open()

    def idle(self, connection: Connection) -> None:
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
            self.stop()
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

    def lost(self, connection: Connection) -> None:
        """A connection is gone, and what was under way on it has failed."""
        if self._over.is_set():
            return
        self._connections.remove(connection)
        if connection in self._free:
            self._free.remove(connection)
        if connection.index is None and self._offsets is not None:
            self._dormant += 1  # opened again when it is needed
            self._dispatch()
            return
        if connection.index is not None:
            late = time.monotonic() - self.due[connection.index] >= self._timeout_s
            self.finish(connection.index, TIMED_OUT if late else RESET)
        self._open()

    def _open(self) -> None:
        """Make a connection, in the background."""
        self._opening += 1
        task = asyncio.get_running_loop().create_task(self._connect())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _dial(self) -> Connection:
        """Make a connection, or raise OSError."""
        made = Connection(self, time.monotonic())
        await asyncio.get_running_loop().create_connection(lambda: made, *self._address)
        return made

    async def _connect(self) -> None:
        """Until it succeeds; each refusal fails a request that waits for a connection."""
        while True:
            try:
                connection = await self._dial()
            except OSError:
                index = self._waiting.popleft() if self._waiting else None
                if self._offsets is None:
                    index = self._take()
                if index is not None:
                    self.sent[index] = time.monotonic()
                    self.finish(index, REFUSED)
                await asyncio.sleep(RECONNECT_S)
            else:
                self._opening -= 1
                self._connections.append(connection)
                self.idle(connection)
                return

    def _sweep(self) -> None:
        """Give up on what has taken too long, sent or not; see whether to stop."""
        if self._stopped():
            self.stop()
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
        for name in (*MOMENTS, "outcome", "marks"):
            records[name] = np.asarray(getattr(self, name))[: self._size]
        return records
