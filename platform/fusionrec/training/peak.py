"""The most memory that a process took, as the system tells."""

from __future__ import annotations

import contextlib
import ctypes
import gc
from pathlib import Path

import torch


class PeakMemory:
    """The most memory that this process took since the object was made, beyond what it had then.

    Of the device where there is one. Else without the pages of files that it has mapped, such as
    the code of libraries: the system takes those back when it wants. On systems without ``/proc``
    it is 0.
    """

    def __init__(self) -> None:
        self._before = self._most = 0
        if not torch.cuda.is_available():
            gc.collect()
            with contextlib.suppress(OSError, AttributeError):
                # What was freed before and kept for later would be taken again unseen.
                ctypes.CDLL(None).malloc_trim(0)
            self._before = _status("VmRSS") - _status("RssFile")
        self._forget()

    def lap(self) -> int:
        """The most since the last lap."""
        if torch.cuda.is_available():
            found = torch.cuda.max_memory_allocated()
        else:
            # Of files there are at most as many when they are counted as there were at the peak.
            found = max(0, _status("VmHWM") - _status("RssFile") - self._before)
        self._forget()
        self._most = max(self._most, found)
        return found

    def bytes(self) -> int:
        """Until now."""
        return max(self.lap(), self._most)

    @staticmethod
    def _forget() -> None:
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
            return
        # Where that is not allowed, the peak is of the whole process's life.
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def _status(field: str) -> int:
    """Bytes that ``/proc/self/status`` tells of this process."""
    path = Path("/proc/self/status")
    if not path.exists():
        return 0
    lines = path.read_text(encoding="ascii", errors="replace").splitlines()
    [line] = [line for line in lines if line.startswith(f"{field}:")]
    return int(line.split()[1]) * 1024
