"""The C library's allocator: a setting for processes that compute with models on a CPU."""

from __future__ import annotations

import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_PIECE_BYTES, _LEFT_BYTES = 2**30, 2**31 - 1
SMALL_BYTES = 2**20
"""What is larger goes back at once after :func:`return_memory`."""


def keep_memory() -> None:
    """Have glibc keep what models let go of: they want as much for the next layer.

    By default it gives pieces beyond 32 MiB, and the end of its heap, back to the system, which
    clears each page before it lends it again: a seventh of a reranker's time. The process stays as
    large as it has ever been. Does nothing with another C library. See mallopt(3).
    """
    _set({_M_MMAP_THRESHOLD: _PIECE_BYTES, _M_TRIM_THRESHOLD: _LEFT_BYTES})


def return_memory() -> None:
    """Have glibc give back at once what a model let go of, for where memory is scarcer than time.

    By default it keeps what is smaller than 32 MiB, among which other sizes find no room: ZeRO-3's
    gathered weights, and layers that are computed again, took half as much again as was alive.
    """
    _set({_M_MMAP_THRESHOLD: SMALL_BYTES})


def _set(options: dict[int, int]) -> None:
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for option, value in options.items():
            mallopt(option, value)
