import resource
import sys

import numpy as np
import pytest

from fusionrec import residence
from fusionrec.residence import read_in

linux = pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")


def mapped(directory, num_bytes=1 << 24):
    directory.mkdir()
    np.save(directory / "numbers.npy", np.ones(num_bytes, np.uint8))
    return np.load(directory / "numbers.npy", mmap_mode="r")


@linux
def test_what_was_read_in_is_touched_without_a_fault(tmp_path):
    numbers, other = mapped(tmp_path / "a"), mapped(tmp_path / "ab")
    assert read_in(tmp_path / "a") >= numbers.nbytes

    def faults(array):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        array[::4096].sum()
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    assert faults(numbers) < faults(other) / 4


@linux
def test_what_does_not_fit_is_left_where_it_is(tmp_path, monkeypatch):
    numbers = mapped(tmp_path / "a")
    (tmp_path / "meminfo").write_text("MemAvailable:       16000 kB\n")
    monkeypatch.setattr(residence, "_MEMORY", tmp_path / "meminfo")
    assert numbers.nbytes > 16000 * 1024
    assert read_in(tmp_path / "a") == 0


def test_other_systems_do_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(residence, "_MAPS", tmp_path / "maps")
    assert read_in(tmp_path) == 0
