"""The followed allocator against glibc's own, and on sequences whose outcome is known."""

import json
import platform
import subprocess
import sys

import numpy as np
import pytest

from fusionrec.training.heap import Event, Heap, peak_of_steps

MIB = 2**20
GLIBC = """
import ctypes, json, sys
class Info(ctypes.Structure):
    names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in names.split()]
library = ctypes.CDLL(None)
library.mallinfo2.restype = Info
library.malloc.restype = ctypes.c_void_p
library.free.argtypes = [ctypes.c_void_p]
order, threshold = json.loads(sys.argv[1])
pieces, place = [None] * len(order), ctypes.c_void_p()
def taken():
    found = library.mallinfo2()
    return found.arena + found.hblkhd
if threshold:
    library.mallopt(-3, threshold)
library.malloc_trim(0)
before, peak = taken(), 0
for number, (aligned, size, freed) in enumerate(order):
    if freed is not None:
        library.free(pieces[freed])
    elif aligned:
        library.posix_memalign(ctypes.byref(place), 64, size)
        pieces[number] = place.value
    else:
        pieces[number] = library.malloc(size)
    peak = max(peak, taken() - before)
print(peak)
"""


def sequence(seed: int) -> list:
    """[(whether it is a tensor's, bytes, or which one is freed)]: as layers make and free them."""
    draw = np.random.default_rng(seed)
    sizes = draw.choice([300_000, 590_000, 900_000, 1_900_000, 2_400_000], 4, replace=False)
    order, alive = [], []
    for _ in range(6):
        for _ in range(60):
            order.append((True, int(draw.choice(sizes)), None))
            alive.append(len(order) - 1)
            order.append((False, 40, None))
            if draw.random() < 0.5:
                newest = len(alive) - 1 - int(draw.integers(min(5, len(alive))))
                order.append((False, 0, alive.pop(newest)))
        while len(alive) > 10:
            order.append((False, 0, alive.pop()))
    return order


def followed(order: list, threshold: int | None) -> int:
    heap, pieces = Heap(threshold), {}
    for number, (aligned, size, freed) in enumerate(order):
        if freed is not None:
            heap.free(pieces.pop(freed))
        else:
            pieces[number] = heap.align(size) if aligned else heap.malloc(size)
    return heap.peak


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
@pytest.mark.parametrize("threshold", [None, MIB])
def test_peak_is_that_of_glibc(threshold):
    """On the whole: which of several equal holes is taken differs, and so may a single sequence."""
    expected, found = [], []
    for order in map(sequence, range(6)):
        command = [sys.executable, "-c", GLIBC, json.dumps([order, threshold])]
        answer = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        expected.append(int(answer))
        found.append(followed(order, threshold))
    assert sum(found) == pytest.approx(sum(expected), rel=0.1)
    assert found == pytest.approx(expected, rel=0.35)


def test_what_is_large_is_mapped_and_goes_back():
    heap = Heap(MIB)
    for _ in range(10):
        heap.free(heap.align(2 * MIB))
    assert 2 * MIB < heap.peak < 2 * MIB + 2 * 4096


def test_a_tensor_does_not_fit_where_one_of_its_size_was():
    heap = Heap(100 * MIB)
    pieces = []
    for _ in range(40):
        pieces.append(heap.align(MIB))
        heap.malloc(40)
    for piece in pieces[::2]:
        heap.free(piece)
    for _ in range(20):
        heap.align(MIB)
    assert 60 * MIB < heap.peak < 61 * MIB


def test_neighbours_are_joined():
    heap = Heap(100 * MIB)
    pieces = [heap.malloc(MIB) for _ in range(3)]
    heap.malloc(MIB)
    peak = heap.peak
    for piece in (pieces[0], pieces[2], pieces[1]):
        heap.free(piece)
    heap.malloc(3 * MIB)
    assert heap.peak == peak


def test_steps_are_repeated_and_what_they_leave_is_freed():
    events = [Event(None), Event(1, MIB), Event(2, 2 * MIB), Event(1)]
    # In the second step the first one's size is no longer mapped, and its hole is of no use.
    assert 3 * MIB < peak_of_steps(events) < 6 * MIB
    assert peak_of_steps(events, MIB) < 4 * MIB
    assert peak_of_steps([]) == 0
