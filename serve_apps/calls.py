"""Calls of one stage: on any replica that is there, in parts, again where one died, or not at all.

A part that fails is sent again, to another replica where there is one: the stages are idempotent.
A stage that keeps failing is left alone for a while (a circuit breaker), so that nobody waits for
it; then one call at a time tries whether it is back. Knows nothing of HTTP.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from itertools import pairwise
from typing import Any, Protocol, TypeVar

from serve_apps.delivery import Delivery
from serve_apps.held import BundleNotHeld
from serve_apps.sparing import Sparing

logger = logging.getLogger("ray.serve")

R = TypeVar("R")

ATTEMPTS = 4
"""Times that a part is sent before its stage counts as failed."""
_PAUSE_S = 0.02
"""Before the second attempt; each further pause is twice as long."""
_FAILURES = 3
"""Failures in a row that open the circuit."""
_OPEN_S = 2.0
"""How long an open circuit stays open."""
_MEMORY = 0.8
"""Weight of the past in the running mean of what a row costs."""
_FORGET_S = 2.0
"""After which what a row was seen to cost counts half."""
MIN_PART = 4
"""Rows below which it does not pay to call another replica."""


class StageDown(Exception):
    """The stage cannot be used now."""


class Handle(Protocol):
    """What is needed of a Serve handle: ``handle.method.remote(...)`` can be awaited."""

    def __getattr__(self, method: str) -> Any: ...

    def broadcast(self, method_name: str, *args: Any) -> Any:
        """Call a method of every replica."""
        ...


class Circuit:
    """Opens after failures in a row; closes with a success."""

    def __init__(self, failures: int = _FAILURES, open_s: float = _OPEN_S) -> None:
        self._failures = failures
        self._open_s = open_s
        self._failed = 0
        self._next_try = 0.0

    @property
    def is_open(self) -> bool:
        """Whether the stage failed too often, and has not answered since."""
        return self._failed >= self._failures

    def admit(self) -> bool:
        """Whether to call now; while open, once in ``open_s`` seconds."""
        if not self.is_open:
            return True
        now = time.monotonic()
        if now < self._next_try:
            return False
        self._next_try = now + self._open_s
        return True

    def succeeded(self) -> None:
        """A call was answered."""
        self._failed = 0

    def failed(self) -> None:
        """A call was not answered."""
        self._failed += 1
        if self._failed == self._failures:
            self._next_try = time.monotonic() + self._open_s


class Stage:
    """One stage, as the gateway sees it."""

    def __init__(
        self,
        name: str,
        handle: Handle,
        *,
        on_call: Callable[[str, int], None] = lambda _stage, _rows: None,
        on_retry: Callable[[str], None] = lambda _stage: None,
    ) -> None:
        """Wrap a handle.

        Args:
            name: of the stage and of the method of its replicas.
            handle: of the deployment.
            on_call: told the stage and the rows of every part that is sent.
            on_retry: told the stage whenever a part is sent again.
        """
        self.name = name
        self.handle = handle
        self.replicas = 1
        """How many there are; set by whoever knows."""
        self.batches: Callable[[], int] = lambda: 1
        """How many batches are under way, here or in another stage; set by whoever knows."""
        self.refused: Callable[[], None] = lambda: None
        """Told when a replica does not hold the bundle that it is asked for; set by whoever can
        have it load that."""
        self.circuit = Circuit()
        self._log = Sparing(logger)
        self._on_call = on_call
        self._on_retry = on_retry
        self._row_s = 0.0
        self._learned = 0.0
        self._running = 0

    def expected_s(self, rows: int) -> float:
        """How long ``rows`` are going to take, by what they took before; 0 before the first.

        What was seen counts for less the longer ago it was: a stage that nobody dares to ask
        because it was slow is asked again.
        """
        age_s = time.monotonic() - self._learned
        return self._row_s * rows * float(0.5 ** (age_s / _FORGET_S))

    async def call(
        self,
        rows: int,
        arguments: Callable[[int, int], tuple[Any, ...]],
        join: Callable[[Sequence[R]], R],
        timeout_s: float,
        *,
        hurried: bool = False,
    ) -> R:
        """Call the stage with a batch, in as many parts as it has replicas of its own.

        Every batch under way has an equal share in the replicas: with as many batches as replicas
        none is split, since small parts cost more, and all wait for the slowest of them. A replica
        is told where it has the only part of the only batch.

        Args:
            rows: of the batch.
            arguments: of the call with the rows from ``start`` to ``stop``.
            join: puts the answers to the parts together.
            timeout_s: all of it is given up after so long.
            hurried: whether the callers have less time than the stage may fairly take: that they
                could not wait says nothing of it.

        Raises:
            StageDown: the circuit is open.
            TimeoutError: it took too long.
            Exception: whatever the last attempt of a part raised.
        """
        if not self.circuit.admit():
            raise StageDown(self.name)
        idle, share = self.replicas - self._running, self.replicas // max(self.batches(), 1)
        parts = max(min(idle, share, rows // MIN_PART), 1)
        lone = parts == 1 and self.batches() <= 1
        bounds = [rows * part // parts for part in range(parts + 1)]
        started = time.monotonic()
        self._running += parts
        try:
            async with asyncio.timeout(timeout_s) as limit:
                calls = [
                    self._call(stop - start, arguments(start, stop), lone=lone)
                    for start, stop in pairwise(bounds)
                ]
                found = [await calls[0]] if parts == 1 else await _all(calls)
        except asyncio.CancelledError:
            # Nobody waits any more. That is no failure, but it took longer than this.
            row_s = (time.monotonic() - started) / rows
            if row_s > self._row_s:
                self._learn(row_s)
            raise
        except Exception:
            if not (hurried and limit.expired()):
                self.circuit.failed()
            raise
        finally:
            self._running -= parts
        self.circuit.succeeded()
        row_s = (time.monotonic() - started) / rows
        self._learn(row_s + _MEMORY * (self._row_s - row_s) if self._row_s else row_s)
        return found[0] if parts == 1 else join(found)

    def _learn(self, row_s: float) -> None:
        self._row_s, self._learned = row_s, time.monotonic()

    async def _call(self, rows: int, arguments: tuple[Any, ...], *, lone: bool) -> Any:
        delivery = Delivery(lone)
        for attempt in range(ATTEMPTS):
            self._on_call(self.name, rows)
            response = getattr(self.handle, self.name).remote(*arguments, delivery=delivery)
            try:
                return await response
            except asyncio.CancelledError:
                cancel = getattr(response, "cancel", None)
                if cancel is not None:
                    cancel()  # or the replica would go on
                raise
            except Exception as error:
                if isinstance(error, BundleNotHeld):
                    self.refused()
                if attempt + 1 == ATTEMPTS:
                    raise
                delivery.failed()
                self._log.warning("stage %s is called again after %r", self.name, error)
                self._on_retry(self.name)
                await asyncio.sleep(_PAUSE_S * 2**attempt)
        raise AssertionError("the last attempt returns or raises")

    async def hold(self, bundles: Sequence[str], timeout_s: float) -> None:
        """Have every replica hold ``bundles`` and nothing else.

        Raises:
            TimeoutError: it took too long.
            Exception: a replica cannot.
        """
        await self.handle.broadcast("hold", list(bundles)).results_async(timeout_s=timeout_s)


async def _all(calls: Sequence[Awaitable[R]]) -> list[R]:
    """The results; with the first exception the other calls are cancelled."""
    tasks = [asyncio.ensure_future(call) for call in calls]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
