"""A light load generator for HTTP/1.1, in a process of its own: ``python -m benchmarks.load``.

Two ways to ask, over a fixed number of keep-alive connections, one request at a time on each:

*Open loop* (``--rate``). Requests are due at moments that are fixed beforehand. One that finds all
connections busy waits, and its latency counts from the moment it was due: a server that stalls is
charged for everybody who would have come meanwhile (no coordinated omission).

*Closed loop* (no ``--rate``). Every connection sends its next request when it has the answer to the
last: the rate that comes out is the capacity at that concurrency. Its latencies say how long a
request takes at saturation, and nothing about users who come when they please.

Nothing is retried and every outcome counts: a status, or one of REFUSED, RESET and TIMED_OUT. Needs
Linux's system-wide monotonic clock for times that other processes can compare.
"""

from __future__ import annotations

import json
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import numpy.typing as npt
import uvloop
from pydantic import Field

from benchmarks.harness.engine import NAMES, Load, Records
from fusionrec.config import JobConfig, parse
from fusionrec.errors import ConfigError
from jobs.entry import run

STARTED = "started"


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
    """Seconds in which requests are due, if no SIGTERM comes before; answers are awaited beyond."""
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

    def capacity(self, connections: int) -> float:
        """Of a closed loop over ``connections``: the rate while all of them are busy.

        From the moment that there are as many answers as connections to the last answer before the
        last request is sent: neither the first batches, which find empty stages, count, nor the
        last, which leave them empty. :attr:`rate` where there are too few answers for that.
        """
        done = np.sort(self.answered["done"])
        if len(done) <= connections:
            return self.rate
        up = done[connections - 1]
        inside = done[(done > up) & (done <= self.records["due"].max())]
        if len(inside) <= connections:
            return self.rate
        return len(inside) / float(inside[-1] - up)

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


def generate(
    config: LoadConfig,
    started: Callable[[], None] = lambda: None,
    stopped: Callable[[], bool] = lambda: False,
) -> Result:
    """Run the load that ``config`` describes, in the main thread.

    Args:
        config: what to send and how.
        started: called when all connections are there.
        stopped: asked again and again whether to send nothing more.

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
    load = Load(
        requests,
        config.connections,
        due,
        config.duration_s,
        config.timeout_s,
        [mark.encode() for mark in config.marks],
    )
    before = time.process_time()
    uvloop.run(load.run(url.hostname, url.port or 80, started, stopped))
    return Result(load.records(), time.process_time() - before)


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
    """Parse, say ``started``, run, write the records; one line of JSON says what it was."""
    config = parse(LoadConfig)
    stopped: list[int] = []
    # Not the event loop's way: its handler would be gone before the records are written.
    signal.signal(signal.SIGTERM, lambda number, _: stopped.append(number))
    result = generate(config, lambda: print(STARTED, flush=True), lambda: bool(stopped))
    np.save(config.out, result.records, allow_pickle=False)
    counts = {NAMES.get(outcome, str(outcome)): n for outcome, n in result.counts.items()}
    sys.stdout.write(json.dumps({"cpu_s": result.cpu_s, "outcomes": counts}) + "\n")


if __name__ == "__main__":
    run(main)
