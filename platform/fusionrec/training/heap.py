"""What glibc's allocator takes of a system for the tensors of a training process on a CPU.

More than what is alive in it: a third to two thirds, for two reasons, both of which are followed
here allocation by allocation.

- torch asks for memory at multiples of 64 bytes (``posix_memalign``). glibc looks for 96 bytes
  more, and gives back what is before and behind. The small objects that autograd makes for every
  operator move in there and stay as long as the loss does. A tensor between them leaves, once
  freed, a hole that is too small by those bytes for another of its size, and that cannot be joined
  with its neighbours.
- What was mapped by itself and freed raises the size from which glibc maps (to 32 MiB at most):
  from the second step on nearly all comes from the heap, whose holes stay with the process.

Costs: microseconds an allocation. It knows one thread, and no bins other than one by size: which of
several equal holes is taken differs. See malloc/malloc.c of glibc 2.36: ``_int_malloc``,
``_int_memalign``, ``_int_free`` and ``sysmalloc``.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from typing import NamedTuple

_PAGE = 4096
_SMALLEST = 32
"""Bytes of a chunk at least."""
_ALIGNMENT = 64
"""Of torch's tensors on a CPU."""
_FIRST_THRESHOLD, _LAST_THRESHOLD = 128 * 2**10, 32 * 2**20
"""Bytes from which on a piece is mapped by itself: at first, and at most."""
_PAD = 128 * 2**10
"""What the heap grows by beyond what is asked for."""
_CACHED, _CACHE = 1040, 7
"""Chunks up to so many bytes are kept for the next of their size, so many of each size."""
_NODE = (24, 40, 300)
"""Bytes of what autograd makes for an operator: its edges, sizes of its inputs, and the node."""
_TENSOR = (72, 192)
"""Bytes of what a tensor is besides its content: its storage and itself."""
_STEPS = 3
"""After so many the heap of a repeated step hardly grows."""


class Event(NamedTuple):
    """Of a traced step."""

    tensor: int | None
    """Its number where one is made or freed; None where autograd made a node for an operator."""
    size: int = 0
    """Bytes of one that is made; 0 where it is freed."""


class _Chunk(NamedTuple):
    start: int | None
    """In the heap; None where it is mapped by itself."""
    size: int


class Heap:
    """Where chunks are, and how many bytes of the system that takes."""

    def __init__(self, threshold: int | None = None) -> None:
        """Map pieces of ``threshold`` bytes; by default as glibc chooses, which learns it."""
        self._learns = threshold is None
        self._threshold = threshold or _FIRST_THRESHOLD
        self._trim = _PAD
        self._top = self._end = self._mapped = 0
        self._holes: list[tuple[int, int]] = []  # (size, start), ascending
        self._by_start: dict[int, int] = {}  # of holes: their sizes
        self._by_end: dict[int, int] = {}  # of holes: their starts
        self._cache: dict[int, list[int]] = {}
        self.peak = 0

    def malloc(self, size: int) -> _Chunk:
        """Room for ``size`` bytes."""
        size = max(_SMALLEST, (size + 23) // 16 * 16)
        if self._cache.get(size):
            return _Chunk(self._cache[size].pop(), size)
        place = bisect_left(self._holes, (size, -1))
        if place < len(self._holes):
            hole, start = self._holes[place]
            self._take(start, hole)
            if hole - size < _SMALLEST:
                return _Chunk(start, hole)
            self._put(start + size, hole - size)
            return _Chunk(start, size)
        if self._end - self._top < size + _SMALLEST:
            if size >= self._threshold:
                pages = -(-(size + 16) // _PAGE) * _PAGE
                self._mapped += pages
                self._note()
                return _Chunk(None, pages)
            self._end = -(-(self._top + size + _SMALLEST + _PAD) // _PAGE) * _PAGE
            self._note()
        self._top += size
        return _Chunk(self._top - size, size)

    def align(self, size: int) -> _Chunk:
        """Room for ``size`` bytes of a tensor."""
        kept = max(_SMALLEST, (size + 23) // 16 * 16)
        start, length = self.malloc(kept + _ALIGNMENT + _SMALLEST)
        if start is None:
            return _Chunk(None, length)
        before = -(start + 16) % _ALIGNMENT
        if before:
            before += _ALIGNMENT if before < _SMALLEST else 0
            self.free(_Chunk(start, before))
        behind = length - before - kept
        if behind > _SMALLEST:
            self.free(_Chunk(start + before + kept, behind))
            return _Chunk(start + before, kept)
        return _Chunk(start + before, length - before)

    def free(self, chunk: _Chunk) -> None:
        """Take a chunk back."""
        start, size = chunk
        if start is None:
            self._mapped -= size
            if self._learns and self._threshold < size <= _LAST_THRESHOLD:
                self._threshold, self._trim = size, 2 * size
            return
        if size <= _CACHED:
            same = self._cache.setdefault(size, [])
            if len(same) < _CACHE:
                same.append(start)
                return
        before = self._by_end.get(start)
        if before is not None:
            self._take(before, start - before)
            start, size = before, size + start - before
        behind = self._by_start.get(start + size)
        if behind is not None:
            self._take(start + size, behind)
            size += behind
        if start + size < self._top:
            self._put(start, size)
            return
        self._top = start
        if self._end - start >= self._trim:
            self._end = -(-(start + _SMALLEST + _PAD) // _PAGE) * _PAGE

    def _note(self) -> None:
        self.peak = max(self.peak, self._end + self._mapped)

    def _put(self, start: int, size: int) -> None:
        insort(self._holes, (size, start))
        self._by_start[start] = size
        self._by_end[start + size] = start

    def _take(self, start: int, size: int) -> None:
        del self._holes[bisect_left(self._holes, (size, start))]
        del self._by_start[start], self._by_end[start + size]


def peak_of_steps(events: Sequence[Event], threshold: int | None = None) -> int:
    """Bytes that a process takes at most for steps of ``events``, one after the other.

    What they do not free is freed at the end of each step, as gradients and the loss are.

    Args:
        events: Of one step.
        threshold: See :class:`Heap`.
    """
    heap = Heap(threshold)
    for _ in range(_STEPS):
        tensors: dict[int, list[_Chunk]] = {}
        nodes: list[_Chunk] = []
        for number, size in events:
            if number is None:
                nodes += [heap.malloc(each) for each in _NODE]
            elif size:
                tensors[number] = [heap.align(size), *map(heap.malloc, _TENSOR)]
            else:
                for chunk in tensors.pop(number, ()):
                    heap.free(chunk)
        for chunk in [*(c for chunks in tensors.values() for c in chunks), *nodes]:
            heap.free(chunk)
    return heap.peak
