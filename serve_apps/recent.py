"""A dear question that anybody may ask: asked once, answered to all who ask it within a while."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Coroutine
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class Recent(Generic[T]):
    """Keeps the outcome of a question, an exception too. Lives in one event loop."""

    def __init__(self, ask: Callable[[], Coroutine[Any, Any, T]], keep_s: float) -> None:
        """Ask with ``ask``, and again when the outcome is ``keep_s`` old."""
        self._ask = ask
        self._keep_s = keep_s
        self._asked: asyncio.Task[T] | None = None
        self._until = 0.0

    async def get(self) -> T:
        """The outcome, of a question that is under way or was not long ago.

        Raises:
            Exception: whatever it ended in.
        """
        if self._asked is None or time.monotonic() >= self._until:
            self._until = math.inf
            self._asked = asyncio.ensure_future(self._ask())
            self._asked.add_done_callback(self._answered)
        # One that goes away must not take the answer from the others.
        return await asyncio.shield(self._asked)

    def _answered(self, _: asyncio.Task[T]) -> None:
        self._until = time.monotonic() + self._keep_s
