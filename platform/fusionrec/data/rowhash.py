"""64-bit hashes of rows, and sets of them, in numpy: a few bytes a row where Python needs hundreds.

Two different rows share a hash with a probability of 2⁻⁶⁴: among ten million rows that some two do
has a chance of 3 in a million. The hashes are for telling rows apart, not for fingerprints.
"""

from __future__ import annotations

import hashlib
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from fusionrec.data.histories import BoolArray

HashArray: TypeAlias = npt.NDArray[np.uint64]

_random = np.random.default_rng(0x5EED)
_BYTES = _random.integers(0, 2**64, 256, dtype=np.uint64)
_POWERS = np.ones(256, dtype=np.uint64)
np.multiply.accumulate(np.full(255, 0x9E3779B97F4A7C15, np.uint64), out=_POWERS[1:])
_NULL = np.uint64(0xA5A5_0F0F_3C3C_9696)


def mix(values: HashArray) -> HashArray:
    """The finaliser of MurmurHash3: every bit of the input moves every bit of the output."""
    values = (values ^ (values >> np.uint64(33))) * np.uint64(0xFF51AFD7ED558CCD)
    values = (values ^ (values >> np.uint64(33))) * np.uint64(0xC4CEB9FE1A85EC53)
    return values ^ (values >> np.uint64(33))


def hash_column(column: pa.Array | pa.ChunkedArray) -> HashArray:
    """[N] hashes of a column of strings, numbers or booleans; all nulls are equal."""
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    if array.null_count == len(array):
        return np.full(len(array), _NULL)
    if pa.types.is_string(array.type) or pa.types.is_binary(array.type):
        hashes = _hash_strings(array)
    else:
        filled = pc.cast(pc.fill_null(array, 0) if array.null_count else array, pa.float64())
        hashes = mix(filled.to_numpy(zero_copy_only=False).view(np.uint64) + np.uint64(1))
    if array.null_count:
        hashes = np.where(pc.is_null(array).to_numpy(zero_copy_only=False), _NULL, hashes)
    return hashes


def hash_rows(columns: list[pa.Array | pa.ChunkedArray]) -> HashArray:
    """[N] hashes of rows made of several columns of equal length."""
    rows = np.zeros(len(columns[0]), dtype=np.uint64)
    for column in columns:
        rows = mix(rows * np.uint64(0x9DDFEA08EB382D69) + hash_column(column))
    return rows


def _hash_strings(array: pa.Array) -> HashArray:
    """Long strings (reviews) by BLAKE2; short ones (ids) by a polynomial over their bytes."""
    offsets = np.frombuffer(array.buffers()[1], np.int32)[array.offset :][: len(array) + 1]
    lengths = np.diff(offsets)
    data = array.buffers()[2]
    text = (
        np.frombuffer(data, np.uint8)[offsets[0] : offsets[-1]] if data else np.empty(0, np.uint8)
    )
    short = lengths <= 32
    hashes = mix(lengths.astype(np.uint64))
    if not short.all():
        whole = text.tobytes()
        for row in np.flatnonzero(~short):
            start = offsets[row] - offsets[0]
            digest = hashlib.blake2b(whole[start : start + lengths[row]], digest_size=8).digest()
            hashes[row] = int.from_bytes(digest, "little")
        text = text[np.repeat(short, lengths)]
    some = short & (lengths > 0)
    sizes = lengths[some].astype(np.int64)
    if len(sizes):
        starts = np.cumsum(sizes) - sizes
        positions = np.arange(len(text)) - np.repeat(starts, sizes)
        hashes[some] += np.add.reduceat(_BYTES[text] * _POWERS[positions], starts)
    hashes[short] = mix(hashes[short])
    return hashes


class HashSet:
    """A growing set of hashes in a few sorted runs: 8 bytes a member, 24 while runs are merged.

    Runs grow geometrically, so a member is merged O(log N) times and looked up in O(log² N).
    """

    def __init__(self) -> None:
        self._runs: list[HashArray] = []

    def __len__(self) -> int:
        return sum(len(run) for run in self._runs)

    def members(self) -> HashArray:
        """All members, in no order."""
        return np.concatenate(self._runs) if self._runs else np.empty(0, np.uint64)

    def contains(self, hashes: HashArray) -> BoolArray:
        """[N] whether each of ``hashes`` is a member."""
        found = np.zeros(len(hashes), dtype=np.bool_)
        for run in self._runs:
            at = np.minimum(np.searchsorted(run, hashes), len(run) - 1)
            found |= run[at] == hashes
        return found

    def add(self, hashes: HashArray) -> BoolArray:
        """Add ``hashes``; [N] whether each was new, the first of equals alone counting as new."""
        unique, first = np.unique(hashes, return_index=True)
        fresh = ~self.contains(unique)
        new = np.zeros(len(hashes), dtype=np.bool_)
        new[first[fresh]] = True
        if fresh.any():
            self._runs.append(unique[fresh])
        while len(self._runs) > 1 and len(self._runs[-2]) < 2 * len(self._runs[-1]):
            merged = np.concatenate([self._runs.pop(), self._runs.pop()])
            merged.sort(kind="stable")  # timsort: two sorted runs merge in linear time
            self._runs.append(merged)
        return new
