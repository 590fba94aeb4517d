"""The audit log: who asked what and when, as JSON lines of the logger ``fusionrec.audit``.

::

    {"time": "2026-11-21T12:00:00.000+00:00", "key": "shop", "method": "POST",
     "route": "/v1/recommend", "status": 200, "user": "5f0c…"}

Whoever is denied (401, 429) is always written down, the rest by chance. ``key`` is the name of a
key, ``route`` the pattern of a route and never the path that was asked for, ``user`` an HMAC. A
request that is not sampled costs one random number; one that is, some 20 µs and a place in a
bounded queue: a thread writes the lines, and what found it full since the start is ``dropped``.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
import queue
import random
import secrets
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from datetime import UTC, datetime
from logging.handlers import QueueHandler, QueueListener, RotatingFileHandler
from pathlib import Path
from typing import Any, Self

VARIABLE = "FUSIONREC_LOG_SECRET"
DENIED = frozenset({401, 429})
logger = logging.getLogger("fusionrec.audit")
_MAX_FILE_BYTES = 64 << 20
_NUM_OLD_FILES = 4
_MAX_WAITING = 10_000


@dataclass(frozen=True, slots=True)
class Pseudonyms:
    """Names for user ids that lead back to them only with the secret."""

    secret: bytes

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> Self:
        """With the secret ``FUSIONREC_LOG_SECRET``; without it, one that ends with the process."""
        return cls(environment.get(VARIABLE, "").encode() or secrets.token_bytes(32))

    def of(self, user_id: str) -> str:
        """The first 128 bits of the HMAC-SHA256 of ``user_id``, in hex."""
        digest = hmac.digest(self.secret, user_id.encode("utf-8", "replace"), hashlib.sha256)
        return digest[:16].hex()


class AuditLog:
    """Writes down a share of the requests that were admitted, and all that were not."""

    def __init__(self, sample: float, pseudonyms: Pseudonyms) -> None:
        """Let ``sample`` (0 to 1) of the admitted requests be written down."""
        self._sample = sample
        self._pseudonyms = pseudonyms
        self._handler: _Enqueue | None = None

    def write_to(self, file: Path) -> None:
        """Write to ``file`` from now on, in a thread; by default the lines go where logging says.

        The file starts anew at 64 MiB, and four older ones are kept.
        """
        file.parent.mkdir(parents=True, exist_ok=True)
        self._handler = _Enqueue(queue.Queue(_MAX_WAITING))
        target = RotatingFileHandler(
            file, maxBytes=_MAX_FILE_BYTES, backupCount=_NUM_OLD_FILES, encoding="utf-8"
        )
        self._listener = QueueListener(self._handler.queue, target)
        self._listener.start()
        logger.addHandler(self._handler)
        logger.setLevel(logging.INFO)
        logger.propagate = False

    def close(self) -> None:
        """Write what waits and let go of the file."""
        if self._handler is not None:
            logger.removeHandler(self._handler)
            self._listener.stop()
            for handler in self._listener.handlers:
                handler.close()
            self._handler = None
            logger.propagate = True

    def note(self, scope: MutableMapping[str, Any], status: int) -> None:
        """Write down the request of an ASGI ``scope`` if it asked for a key and is denied or drawn.

        What is known of the caller lies in the scope's state: ``key``, and ``user`` where the
        request names one.
        """
        state = scope.get("state", {})
        if "key" not in state:
            return
        if status not in DENIED and random.random() >= self._sample:
            return
        entry: dict[str, Any] = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "key": state["key"],
            "method": scope["method"],
            # The path itself may hold anything, also what somebody took for a place of a user id.
            "route": getattr(scope.get("route"), "path", None),
            "status": status,
        }
        user = state.get("user")
        if user is not None:
            entry["user"] = self._pseudonyms.of(user)
        if self._handler is not None and self._handler.dropped:
            entry["dropped"] = self._handler.dropped
        logger.info(json.dumps(entry))


class _Enqueue(QueueHandler):
    """Never waits: what finds the queue full is dropped and counted."""

    queue: queue.Queue[Any]
    dropped = 0

    def enqueue(self, record: logging.LogRecord) -> None:
        try:
            self.queue.put_nowait(record)
        except queue.Full:
            self.dropped += 1
