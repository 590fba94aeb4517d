"""Small linear algebra: on one thread, because starting more takes longer than they save."""

from __future__ import annotations

from contextlib import AbstractContextManager
from functools import cache

from threadpoolctl import ThreadpoolController


def one_thread() -> AbstractContextManager[object]:
    """While it is open, BLAS computes on the thread that calls it."""
    limited: AbstractContextManager[object] = _controller().limit(limits=1, user_api="blas")
    return limited


@cache
def _controller() -> ThreadpoolController:
    """Looking for the libraries takes milliseconds, and they stay what they are."""
    return ThreadpoolController()
