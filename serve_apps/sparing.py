"""Logs what may happen with every batch, without a line for every batch."""

from __future__ import annotations

import logging
import time

_EVERY_S = 10.0
"""Seconds between two lines of one kind."""


class Sparing:
    """A logger that says a thing of a subject at once, and then not again for a while.

    The next line tells how often it happened in between. May be called from any thread.
    """

    def __init__(self, logger: logging.Logger, every_s: float = _EVERY_S) -> None:
        self._logger = logger
        self._every_s = every_s
        self._said: dict[tuple[str, str], tuple[float, int]] = {}
        """Message and subject → when they were said, and how often they were not since then."""

    def warning(self, message: str, subject: str, *rest: object) -> None:
        """Log ``message``, whose first argument is ``subject``, unless that was done just now."""
        now = time.monotonic()
        said, kept_back = self._said.get((message, subject), (-self._every_s, 0))
        if now - said < self._every_s:
            self._said[message, subject] = said, kept_back + 1
            return
        self._said[message, subject] = now, 0
        again = f" ({kept_back} times more since the last line)" if kept_back else ""
        self._logger.warning(message + "%s", subject, *rest, again)
