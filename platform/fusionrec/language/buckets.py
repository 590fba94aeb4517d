"""The few shapes that batches have where each shape has to be prepared, as on a GPU.

A batch is padded to its bucket: a number of rows that is a power of two, and one of a ladder of
lengths. Texts go from the longest to the shortest, those of half of a bucket's length and more
together, and rows that are left over take the next shorter texts, which costs nothing. What is run,
counted in tokens, stays below four times what the texts have, counted as 8 at least each, and a
constant: 2 · ``_SMALL``.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

LENGTHS = (16, 32, 48, 64, 96, 128, 192, 256, 384, 512)
"""Tokens of a row. The next is at most twice as much; multiples of 8 suit the matrix units."""
_MOST_ROWS = 256
_SMALL = 2048
"""Tokens that one pass may run for what is left: another pass would cost more than its padding."""


@dataclass(frozen=True, slots=True)
class Bucket:
    """A shape."""

    rows: int
    length: int

    @property
    def tokens(self) -> int:
        """Padding included."""
        return self.rows * self.length


@dataclass(frozen=True, slots=True)
class Batch:
    """Texts that run together."""

    bucket: Bucket
    texts: list[int]
    """Their places among all; no more than the bucket has rows."""


class Buckets:
    """The shapes for texts of a model."""

    def __init__(self, max_tokens: int, most_tokens: int) -> None:
        """Prepare for texts of up to ``max_tokens``, and up to ``most_tokens`` in a batch."""
        assert max_tokens > 0
        self._lengths = (*(each for each in LENGTHS if each < max_tokens),)
        self._lengths += (min(max_tokens, LENGTHS[-1]),) * (max_tokens <= LENGTHS[-1])
        self._most_tokens = most_tokens
        self.largest = max(most_tokens, max_tokens)
        """Tokens of a batch at most."""

    @property
    def shapes(self) -> list[Bucket]:
        """Those to prepare, the largest first. Texts above the longest have shapes of their own."""
        found = [
            Bucket(rows, length)
            for length in self._lengths
            for rows in _powers(self._most_rows(length))
        ]
        return sorted(found, key=lambda bucket: -bucket.tokens)

    def plan(self, lengths: Sequence[int]) -> list[Batch]:
        """Each text, of so many tokens, in one batch, from the longest to the shortest."""
        order = np.argsort([-length for length in lengths], kind="stable")
        descending = -np.asarray(lengths, dtype=np.int64)[order]
        batches, start = [], 0
        while start < len(order):
            length = self._length(int(-descending[start]))
            most, left = self._most_rows(length), len(order) - start
            alike = left
            if length > self._lengths[0] and left * length > _SMALL:
                alike = int(np.searchsorted(descending, -length / 2)) - start
            rows = min(most, 1 << (alike - 1).bit_length())
            texts = order[start : start + rows].tolist()
            batches.append(Batch(Bucket(rows, length), texts))
            start += len(texts)
        return batches

    def _length(self, tokens: int) -> int:
        place = bisect_left(self._lengths, tokens)
        return self._lengths[place] if place < len(self._lengths) else tokens

    def _most_rows(self, length: int) -> int:
        most = max(1, min(_MOST_ROWS, self._most_tokens // length))
        return 1 << (most.bit_length() - 1)


def _powers(most: int) -> list[int]:
    return [1 << power for power in range(most.bit_length())]
