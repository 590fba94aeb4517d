"""API keys: who may call an endpoint that others can reach.

Only SHA-256 hashes of keys are configured and kept. ``FUSIONREC_API_KEYS`` holds the hashes, or the
name of a file with one on each line; ``name=hash`` gives a key a name. Make a key and its hash with
``key=$(openssl rand -hex 24); printf %s "$key" | sha256sum``.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from fusionrec.errors import ConfigError

VARIABLE = "FUSIONREC_API_KEYS"
_ENTRY = re.compile(r"(?:(?P<name>[\w.-]+)=)?(?P<digest>[0-9a-fA-F]{64})")


@dataclass(frozen=True, slots=True)
class ApiKeys:
    """The keys that are admitted; with none of them, everybody is."""

    digests: tuple[bytes, ...] = ()

    @classmethod
    def parse(cls, entries: Iterable[str]) -> Self:
        """From ``hash`` or ``name=hash`` entries.

        Raises:
            ConfigError: an entry is neither.
        """
        digests = []
        for number, entry in enumerate(entries, start=1):
            match = _ENTRY.fullmatch(entry)
            if match is None:
                # The entry itself may be a key that somebody forgot to hash: it is not repeated.
                raise ConfigError(
                    f"entry {number} of {VARIABLE} is not a SHA-256 hash in hex: "
                    'give the output of printf %s "$key" | sha256sum, not the key'
                )
            digests.append(bytes.fromhex(match["digest"]))
        return cls(tuple(digests))

    def admits(self, headers: Mapping[str, str]) -> bool:
        """Whether ``Authorization: Bearer KEY`` or ``x-api-key: KEY`` is one of the keys.

        Every digest is compared, each in constant time.
        """
        if not self.digests:
            return True
        scheme, _, token = headers.get("authorization", "").partition(" ")
        presented = token.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")
        digest = hashlib.sha256(presented.encode("latin-1", "replace")).digest()
        return sum(hmac.compare_digest(digest, known) for known in self.digests) > 0


def read_entries(environment: Mapping[str, str]) -> tuple[str, ...]:
    """The entries that ``FUSIONREC_API_KEYS`` holds or points at; none where it is not set.

    Raises:
        ConfigError: the file it names cannot be read.
    """
    value = environment.get(VARIABLE, "").strip()
    if not value:
        return ()
    if "/" in value or Path(value).is_file():
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
