"""Files that a process has mapped, brought into its memory before anybody waits for them."""

from __future__ import annotations

import ctypes
import re
from pathlib import Path

_MADV_POPULATE_READ = 22
"""Of Linux from 5.14 on; the standard library does not name it."""
_MAPS, _MEMORY = Path("/proc/self/maps"), Path("/proc/meminfo")


def read_in(directory: Path) -> int:
    """Touch every page of the files in ``directory`` that this process has mapped; their bytes.

    By default that is left to the first query that needs a page: it waits for a fault, and for the
    disk where the file has dropped out of the system's cache. Nothing is read, and 0 returned, if
    all of it does not fit into the memory that is available, or the system is not Linux.
    """
    if not _MAPS.is_file():
        return 0
    place = f"{directory.resolve()}/"
    found = []
    for line in _MAPS.read_text(encoding="utf-8").splitlines():
        fields = line.split(maxsplit=5)  # the sixth is the path
        if len(fields) == 6 and fields[5].startswith(place):
            start, stop = (int(address, 16) for address in fields[0].split("-"))
            found.append((start, stop - start))
    total = sum(size for _, size in found)
    available = re.search(r"MemAvailable:\s+(\d+)", _MEMORY.read_text(encoding="utf-8"))
    if available is None or total > 1024 * int(available[1]):
        return 0
    advise = ctypes.CDLL(None).madvise
    advise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    for start, size in found:
        advise(start, size, _MADV_POPULATE_READ)  # an older Linux refuses, and reads when asked
    return total
