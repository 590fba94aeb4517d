"""Gathers concurrent requests into batches, without waiting when there is nothing to wait for.

A request that comes while fewer than ``max_running`` batches are under way starts one at once,
together with whatever else came in the same turn of the event loop. While all places are taken,
requests gather, and the next free place takes as many as fit: batches grow with the load and the
wait is never longer than a batch takes. No timer, no window to tune. Knows nothing of Ray or HTTP.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

Q = TypeVar("Q")
A = TypeVar("A")


class Overloaded(Exception):
    """The waiting room is full; ask again later."""


@dataclass(slots=True)
class _Waiting(Generic[Q, A]):
    question: Q
    answer: asyncio.Future[tuple[A, float]]
    since: float = field(default_factory=time.perf_counter)


class Batcher(Generic[Q, A]):
    """One per event loop; made and used inside it."""

    def __init__(
        self,
        work: Callable[[Sequence[Q]], Awaitable[Sequence[A]]],
        *,
        max_batch: int,
        max_running: int,
        max_waiting: int,
    ) -> None:
        """Answer batches with ``work``: one answer a question, in order.

        Args:
            work: called with 1 to ``max_batch`` questions; an exception goes to all askers.
            max_batch: largest number of questions in a batch.
            max_running: batches under way at a time.
            max_waiting: questions that may wait; more are refused.
        """
        self._work = work
        self._max_batch = max_batch
        self._max_running = max_running
        self._max_waiting = max_waiting
        self._waiting: deque[_Waiting[Q, A]] = deque()
        self._running: set[asyncio.Task[None]] = set()
        self._start_scheduled = False

    async def submit(self, question: Q) -> tuple[A, float]:
        """The answer, and how many milliseconds the question waited for a place.

        Raises:
            Overloaded: ``max_waiting`` questions wait already.
        """
        if len(self._waiting) >= self._max_waiting:
            raise Overloaded
        loop = asyncio.get_running_loop()
        entry: _Waiting[Q, A] = _Waiting(question, loop.create_future())
        self._waiting.append(entry)
        if not self._start_scheduled:
            # Not at once: requests that arrive in the same turn of the loop share the batch.
            self._start_scheduled = True
            loop.call_soon(self._start)
        return await entry.answer

    def _start(self) -> None:
        self._start_scheduled = False
        while self._waiting and len(self._running) < self._max_running:
            batch: list[_Waiting[Q, A]] = []
            while self._waiting and len(batch) < self._max_batch:
                entry = self._waiting.popleft()
                if not entry.answer.done():  # its asker may have gone away
                    batch.append(entry)
            if batch:
                task = asyncio.ensure_future(self._run(batch))
                self._running.add(task)
                task.add_done_callback(self._finished)

    def _finished(self, task: asyncio.Task[None]) -> None:
        self._running.discard(task)
        self._start()

    async def _run(self, batch: list[_Waiting[Q, A]]) -> None:
        started = time.perf_counter()
        try:
            answers = await self._work([entry.question for entry in batch])
            pairs = list(zip(batch, answers, strict=True))
        except Exception as error:
            for entry in batch:
                if not entry.answer.done():
                    entry.answer.set_exception(error)
            return
        for entry, answer in pairs:
            if not entry.answer.done():
                entry.answer.set_result((answer, (started - entry.since) * 1e3))
