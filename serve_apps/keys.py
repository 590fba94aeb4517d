"""API keys: who may call an endpoint that others can reach, and how often.

Only SHA-256 hashes of keys are configured and kept. ``FUSIONREC_API_KEYS`` holds the hashes, or the
name of a file with one on each line; ``name=hash`` gives a key a name. Make a key and its hash with
``key=$(openssl rand -hex 24); printf %s "$key" | sha256sum``.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import re
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NewType, Self

from fusionrec.errors import ConfigError

VARIABLE = "FUSIONREC_API_KEYS"
_LONGEST_NAME = 256
"""Longer than any name of a file: looking for one raises."""
KeyName = NewType("KeyName", str)
ANYBODY = KeyName("anybody")
"""Who calls an endpoint without keys."""
_ENTRY = re.compile(r"(?:(?P<name>[\w.-]+)=)?(?P<digest>[0-9a-fA-F]{64})")


@dataclass(frozen=True, slots=True)
class ApiKeys:
    """The keys that are admitted; with none of them, everybody is."""

    digests: tuple[bytes, ...] = ()
    names: tuple[KeyName, ...] = ()
    """Who holds each key. Keys of one name share its rate: so they are rotated."""

    @classmethod
    def parse(cls, entries: Iterable[str]) -> Self:
        """From ``hash`` or ``name=hash`` entries; a key without a name gets one from its hash.

        Raises:
            ConfigError: an entry is neither.
        """
        digests, names = [], []
        for number, entry in enumerate(entries, start=1):
            match = _ENTRY.fullmatch(entry)
            if match is None:
                # The entry itself may be a key that somebody forgot to hash: it is not repeated.
                raise ConfigError(
                    f"entry {number} of {VARIABLE} is not a SHA-256 hash in hex: "
                    'give the output of printf %s "$key" | sha256sum, not the key'
                )
            digests.append(bytes.fromhex(match["digest"]))
            names.append(KeyName(match["name"] or f"key-{match['digest'][:8].lower()}"))
        return cls(tuple(digests), tuple(names))

    def admit(self, headers: Mapping[str, str]) -> KeyName | None:
        """Whose key ``Authorization: Bearer KEY`` or ``x-api-key: KEY`` is; None for nobody's.

        Every digest is compared, each in constant time.
        """
        if not self.digests:
            return ANYBODY
        scheme, _, token = headers.get("authorization", "").partition(" ")
        presented = token.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")
        digest = hashlib.sha256(presented.encode("latin-1", "replace")).digest()
        same = [hmac.compare_digest(digest, known) for known in self.digests]
        return self.names[same.index(True)] if any(same) else None


class RateLimit:
    """A token bucket for each key, in one process: N gateway replicas let N times as much pass.

    A bucket holds ``burst`` requests at most and gains ``per_second`` of them; one that is not in
    use costs nothing.
    """

    def __init__(
        self, per_second: float, burst: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._per_second = per_second
        self._burst = float(burst)
        self._clock = clock
        self._buckets: dict[KeyName, tuple[float, float]] = {}

    def take(self, key: KeyName) -> float:
        """Let a request of ``key`` pass and return 0, or the seconds until one could pass."""
        now = self._clock()
        left, since = self._buckets.get(key, (self._burst, now))
        left = min(self._burst, left + (now - since) * self._per_second)
        passes = left >= 1
        self._buckets[key] = (left - 1 if passes else left, now)
        return 0.0 if passes else (1 - left) / self._per_second


def read_entries(environment: Mapping[str, str]) -> tuple[str, ...]:
    """The entries that ``FUSIONREC_API_KEYS`` holds or points at; none where it is not set.

    Raises:
        ConfigError: the file it names cannot be read.
    """
    value = environment.get(VARIABLE, "").strip()
    if not value:
        return ()
    if "/" in value or (len(value) < _LONGEST_NAME and Path(value).is_file()):
        try:
            value = Path(value).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{VARIABLE} names the file {value}, which cannot be read") from error
    lines = (line.partition("#")[0] for line in value.splitlines())
    return tuple(entry for line in lines for entry in re.split(r"[\s,]+", line) if entry)


def guard(host: str | None, keys: ApiKeys) -> None:
    """Refuse to serve others without keys.

    Raises:
        ConfigError: ``host`` can be reached from other machines and there is no key.
    """
    if keys.digests or is_loopback(host):
        return
    raise ConfigError(
        f"host {host} can be reached from other machines, and no API key is set: set {VARIABLE} to "
        "the SHA-256 hashes of your keys (or to a file of them), or bind to 127.0.0.1"
    )


def is_loopback(host: str | None) -> bool:
    """Whether only this machine can reach ``host``; None means that nothing is bound."""
    if host is None or host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
