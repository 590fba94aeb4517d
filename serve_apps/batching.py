"""Gathers concurrent requests into batches, without waiting when there is nothing to wait for.

While nothing is under way a request starts a batch at once, together with whatever else came in the
same turn of the event loop. While all places are taken, requests gather. A free place beside others
is given to what makes its fair share of all requests: the first of those that were answered
together, and come back together, would else leave with a batch of its own, whose fixed cost the
others then wait for. Nobody waits for that longer than a part of what a batch takes. So batches
grow with the load and are of one size, without a window to tune. While a batch is in its last
stage, one more may go through the stages before it, or the last one, which costs most, would wait
for them. Knows nothing of Ray or HTTP.

Every request has a deadline. When it comes, the request is answered with the best there is by then
(:attr:`Entry.fallback`), or refused. A batch that nobody waits for any more is cancelled.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import Generic, TypeVar

Q = TypeVar("Q")
A = TypeVar("A")

_MEMORY = 0.8
"""Weight of the past in the running mean of how long a batch takes."""
_PATIENCE = 0.25
"""What the first of a batch waits for others at most, as a part of what a batch takes."""


class Overloaded(Exception):
    """The waiting room is full, or the wait would outlast the deadline; ask again later."""


class Late(Exception):
    """The deadline came before there was anything to answer."""


class Entry(Generic[Q, A]):
    """A question on its way to an answer."""

    __slots__ = ("_answer", "_batch", "_timer", "deadline", "fallback", "question", "since")

    def __init__(self, question: Q, deadline: float, loop: asyncio.AbstractEventLoop) -> None:
        self.question = question
        self.deadline = deadline
        """On the clock of :func:`time.monotonic`."""
        self.since = time.monotonic()
        """When it came."""
        self.fallback: Callable[[], A] | None = None
        """Makes what is answered when the deadline comes."""
        self._answer: asyncio.Future[A] = loop.create_future()
        self._batch: _Batch[Q, A] | None = None
        self._timer = loop.call_later(max(deadline - self.since, 0), self._expire)

    @property
    def done(self) -> bool:
        """Whether it has been answered, or nobody waits for the answer any more."""
        return self._answer.done()

    @property
    def travels(self) -> bool:
        """Whether it has left, in a batch."""
        return self._batch is not None

    @property
    def remaining(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - time.monotonic()

    def answer(self, answer: A) -> None:
        """Answer, unless it was answered before."""
        if not self._answer.done():
            self._answer.set_result(answer)

    def fail(self, error: BaseException) -> None:
        """Raise ``error`` at the asker, unless it was answered before."""
        if not self._answer.done():
            self._answer.set_exception(error)

    async def wait(self) -> A:
        """The answer. Leaves the batch however it ends."""
        try:
            return await self._answer
        finally:
            self._timer.cancel()
            if self._batch is not None:
                self._batch.leave()

    def _expire(self) -> None:
        if self._answer.done():
            return
        if self.fallback is None:
            self.fail(Late())
            return
        try:
            self.answer(self.fallback())
        except Exception as error:
            self.fail(error)


class _Batch(Generic[Q, A]):
    """Counts who still waits for a batch."""

    def __init__(self, entries: Sequence[Entry[Q, A]]) -> None:
        self.waiting = len(entries)
        self.task: asyncio.Task[None] | None = None
        for entry in entries:
            entry._batch = self

    def leave(self) -> None:
        """One asker less; without any the work is for nobody."""
        self.waiting -= 1
        if self.waiting == 0 and self.task is not None:
            self.task.cancel()


class Batcher(Generic[Q, A]):
    """One per event loop; made and used inside it."""

    def __init__(
        self,
        work: Callable[[Sequence[Entry[Q, A]]], Awaitable[None]],
        *,
        max_batch: int,
        small_batch: int = 1,
        max_running: int,
        max_waiting: int,
    ) -> None:
        """Answer batches with ``work``.

        Args:
            work: called with 1 to ``max_batch`` entries, which it answers; an exception goes to
                those that it left without an answer.
            max_batch: largest number of questions in a batch.
            small_batch: number of questions that are not spread over several batches.
            max_running: batches under way at a time, and one more beside one in its last stage; may
                be set anew at any time.
            max_waiting: questions that may wait; more are refused.
        """
        self._work = work
        self._max_batch = max_batch
        self._small_batch = min(small_batch, max_batch)
        self.max_running = max_running
        self._max_waiting = max_waiting
        self._waiting: deque[Entry[Q, A]] = deque()
        self._running: set[asyncio.Task[None]] = set()
        self._start_scheduled = False
        self._batch_s = 0.0
        """Running mean of how long a batch takes."""
        self._travelling = 0
        """Questions in the batches under way."""
        self._ending = 0
        """Batches in their last stage."""
        self._timer: asyncio.TimerHandle | None = None

    @property
    def waiting(self) -> int:
        """Questions that wait for a place."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Batches under way."""
        return len(self._running)

    @property
    def _places(self) -> int:
        return self.max_running + min(self._ending, 1)

    @contextmanager
    def last_stage(self) -> Iterator[None]:
        """Entered by a batch that leaves the stages before its last one to others.

        One more batch in all: it is ready when the next place in the last stage is free.
        """
        self._ending += 1
        self._schedule()
        try:
            yield
        finally:
            self._ending -= 1

    async def submit(self, question: Q, deadline: float) -> A:
        """The answer.

        Args:
            question: what is asked.
            deadline: on the clock of :func:`time.monotonic`; something is answered by then.

        Raises:
            Overloaded: too many wait already, or for too long.
            Late: nothing was found by the deadline.
        """
        ahead = len(self._waiting)
        if ahead >= self._max_waiting:
            raise Overloaded
        wait_s = self._batch_s * (ahead // self._max_batch) / self.max_running
        if wait_s > deadline - time.monotonic():
            raise Overloaded
        loop = asyncio.get_running_loop()
        entry: Entry[Q, A] = Entry(question, deadline, loop)
        self._waiting.append(entry)
        self._schedule()
        try:
            return await entry.wait()
        finally:
            if not entry.travels:  # it waits no longer, and takes nobody's place
                with suppress(ValueError):  # passed over already
                    self._waiting.remove(entry)

    def _schedule(self) -> None:
        if not self._start_scheduled:
            # Not at once: requests that arrive in the same turn of the loop share the batch.
            self._start_scheduled = True
            asyncio.get_running_loop().call_soon(self._start)

    def _start(self) -> None:
        self._start_scheduled = False
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        while self._waiting and len(self._running) < self._places:
            if self._waiting[0].done:  # its asker has gone away
                self._waiting.popleft()
                continue
            share = (len(self._waiting) + self._travelling) / self._places
            wait_s = self._waiting[0].since + _PATIENCE * self._batch_s - time.monotonic()
            enough = min(math.floor(share), self._max_batch)
            if self._running and len(self._waiting) < enough and wait_s > 0:
                self._timer = asyncio.get_running_loop().call_later(wait_s, self._start)
                return
            entries: list[Entry[Q, A]] = []
            most = min(max(math.ceil(share), self._small_batch), self._max_batch)
            while self._waiting and len(entries) < most:
                entry = self._waiting.popleft()
                if not entry.done:
                    entries.append(entry)
            batch = _Batch(entries)
            batch.task = asyncio.ensure_future(self._run(entries))
            self._running.add(batch.task)
            self._travelling += len(entries)
            batch.task.add_done_callback(partial(self._finished, len(entries)))

    def _finished(self, size: int, task: asyncio.Task[None]) -> None:
        self._running.discard(task)
        self._travelling -= size
        self._start()

    async def _run(self, entries: list[Entry[Q, A]]) -> None:
        started = time.monotonic()
        try:
            await self._work(entries)
        except Exception as error:
            for entry in entries:
                entry.fail(error)
        else:
            took = time.monotonic() - started
            self._batch_s = took + _MEMORY * (self._batch_s - took) if self._batch_s else took
