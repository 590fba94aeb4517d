"""One fault under load: a pinger at a constant rate, our client beside it, and what both saw.

The pinger is the open-loop load generator: it retries nothing and counts every status. The client
is ``fusionrec.client`` as users have it, with its retries. Latencies are told before the fault,
from the fault until recovery, and after.
"""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from benchmarks.harness.engine import NAMES, REFUSED, RESET
from benchmarks.harness.processes import LoadProcess
from benchmarks.load import Result
from fusionrec.client import Client
from fusionrec.client.calls import TIMEOUT_S
from fusionrec.errors import RequestFailed

POLL_S = 0.1
SPARE_S = 60.0
"""Load that is ordered beyond what is planned: a pinger that ends by itself while it is told to
would die of the signal."""


@dataclass(frozen=True, slots=True)
class Scene:
    """An endpoint under test and how it is asked."""

    address: str
    requests: Path
    """Bodies, one a line."""
    rate: float
    """Of the pinger, requests/s."""
    client_rate: float
    """Of the client, calls/s at most."""
    before_s: float
    """Load before the fault."""
    after_s: float
    """Load after recovery at least."""
    patience_s: float
    """Longest time that a recovery may take."""
    connections: int = 256
    """Of the pinger: enough for all that are under way, so that none waits for a connection."""
    timeout_s: float = 30.0
    """Of the pinger."""
    client_timeout_s: float = TIMEOUT_S
    """Of the client; by default as users have it."""


@dataclass(frozen=True, slots=True)
class Damage:
    """What a fault has done, on the clock of the records."""

    began_s: float
    """When it began: nothing was wrong before."""
    done_s: float
    """When what it was to end had ended; as :attr:`began_s` where it ends nothing.

    A process that gets SIGKILL goes on for a while, longer where the processors are busy: its
    connections are there, its backlog takes new ones, requests arrive and nobody reads them.
    """
    recovered: Callable[[], bool]
    """Whether the endpoint is at full strength again."""


@dataclass(frozen=True, slots=True)
class Happening:
    """What :func:`observe` saw."""

    result: Result
    fault_s: float
    """When the fault began, on the clock of the records."""
    gone_s: float
    """When what it ended had ended: :attr:`Damage.done_s`."""
    recovered_s: float | None
    """When the endpoint was at full strength again; None if it never was."""
    client_calls: int
    client_failures: tuple[str, ...]
    """What the client raised."""

    @property
    def counts(self) -> dict[str, int]:
        """Status or outcome → requests."""
        return {NAMES.get(o, str(o)): n for o, n in sorted(self.result.counts.items())}

    @property
    def errors(self) -> int:
        """Requests without status 200."""
        return len(self.result.records) - len(self.result.answered)

    @property
    def server_errors(self) -> int:
        """Requests with a status of 500 or above."""
        return sum(n for outcome, n in self.result.counts.items() if outcome >= 500)

    @property
    def in_flight(self) -> int:
        """Requests under way at a moment between the fault's begin and the end of what it ended.

        More than were in the hands of one gateway: which one had a request cannot be told.
        """
        return int(self._in_flight().sum())

    def errors_not_in_flight(self, excused: npt.NDArray[np.bool_] | None = None) -> int:
        """Requests without status 200 beside those in flight and those that are excused."""
        failed = (self.result.records["outcome"] != 200) & ~self._in_flight()
        return int((failed if excused is None else failed & ~excused).sum())

    def turned_away(self) -> npt.NDArray[np.bool_]:
        """Requests that nobody took, until the endpoint was at full strength.

        The connection was refused; or it was one of the process that had ended, which the pinger
        had not noticed yet; or it was made, and the answer 503.
        """
        records = self.result.records
        outcome, sent = records["outcome"], records["sent"]
        stale = (outcome == RESET) & (records["dialled"] <= self.gone_s)
        after = (stale | (outcome == 503)) & (sent > self.gone_s)
        refused = (outcome == REFUSED) & (sent > self.fault_s)
        return np.asarray((refused | after) & (sent <= self._end_s))

    def _in_flight(self) -> npt.NDArray[np.bool_]:
        records = self.result.records
        sent = (records["dialled"] > 0) & (records["sent"] > 0) & (records["sent"] <= self.gone_s)
        return np.asarray(sent & (records["done"] > self.fault_s))

    @property
    def recovery_s(self) -> float | None:
        """Time to full strength."""
        return None if self.recovered_s is None else self.recovered_s - self.fault_s

    @property
    def last_error_s(self) -> float | None:
        """Time from the fault to the last error; None without errors."""
        records = self.result.records
        failed = records["due"][records["outcome"] != 200]
        return float(failed.max()) - self.fault_s if len(failed) else None

    def latencies_ms(self) -> tuple[tuple[float, float], ...]:
        """(p50, p99) before, during and after; NaN where nothing was answered."""
        before, after = self._due_ms(-np.inf, self.fault_s), self._due_ms(self._end_s, np.inf)
        return tuple(percentiles(values) for values in (before, self.during_ms(), after))

    def during_ms(self, at_least_s: float = 0.0) -> npt.NDArray[np.float64]:
        """Latencies from the fault to recovery, and for ``at_least_s`` where that was shorter."""
        return self._due_ms(self.fault_s, max(self._end_s, self.fault_s + at_least_s))

    @property
    def _end_s(self) -> float:
        return np.inf if self.recovered_s is None else self.recovered_s

    def _due_ms(self, since: float, until: float) -> npt.NDArray[np.float64]:
        """Latencies of the answers to what was due then."""
        due = self.result.answered["due"]
        return self.result.latencies_ms()[(due >= since) & (due < until)]


def observe(
    scene: Scene,
    fault: Callable[[Scene], Damage],
    marks: tuple[str, ...] = (),
) -> Happening:
    """Load, fault, recovery, load.

    Args:
        scene: what is asked and how.
        fault: does it; whether the endpoint has recovered is asked every ``POLL_S`` seconds.
        marks: strings to look for in the pinger's answers.
    """
    pinger = LoadProcess(
        url=f"{scene.address}/v1/recommend",
        requests=scene.requests,
        marks=list(marks),
        connections=scene.connections,
        rate=scene.rate,
        # Ends early, below, when the endpoint has recovered.
        duration_s=scene.before_s + scene.patience_s + scene.after_s + SPARE_S,
        timeout_s=scene.timeout_s,
    )
    with _ClientPinger(scene) as client:
        pinger.await_start()
        time.sleep(scene.before_s)
        damage = fault(scene)
        recovered_s = None
        while recovered_s is None and time.monotonic() < damage.began_s + scene.patience_s:
            if damage.recovered():
                recovered_s = time.monotonic()
            time.sleep(POLL_S)
        time.sleep(scene.after_s)
        pinger.stop()
    return Happening(
        result=pinger.result(),
        fault_s=damage.began_s,
        gone_s=damage.done_s,
        recovered_s=recovered_s,
        client_calls=client.calls,
        client_failures=tuple(client.failures),
    )


class _ClientPinger:
    """Calls of our client, one after the other, in a thread of its own."""

    def __init__(self, scene: Scene) -> None:
        self.calls = 0
        self.failures: list[str] = []
        self._scene = scene
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> _ClientPinger:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        # From the end of the file: the pinger takes them from its beginning.
        bodies = self._scene.requests.read_text(encoding="utf-8").splitlines()
        with Client(self._scene.address, timeout_s=self._scene.client_timeout_s) as client:
            while not self._over.wait(1 / self._scene.client_rate):
                body = json.loads(bodies.pop())
                self.calls += 1
                try:
                    client.recommend(history=body["history"], k=body["k"])
                except RequestFailed as error:
                    self.failures.append(f"{type(error).__name__}: {error}")


def percentiles(values: npt.NDArray[np.float64]) -> tuple[float, float]:
    """p50 and p99; NaN of nothing."""
    if not len(values):
        return (float("nan"), float("nan"))
    p50, p99 = np.percentile(values, (50, 99))
    return (float(p50), float(p99))


def counted(failures: tuple[str, ...]) -> str:
    """The client's failures in a few words."""
    return "; ".join(f"{n} × {text}" for text, n in Counter(failures).most_common(3))
