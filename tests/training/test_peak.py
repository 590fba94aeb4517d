import mmap

import numpy as np
import pytest
import torch

from fusionrec.training.peak import PeakMemory

MB = 10**6
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there it is the device's")


def test_most_of_each_lap_and_of_all():
    memory = PeakMemory()
    block = np.ones(80 * MB, dtype=np.uint8)
    del block
    assert memory.lap() == pytest.approx(80 * MB, abs=8 * MB)
    block = np.ones(40 * MB, dtype=np.uint8)
    assert memory.lap() == pytest.approx(40 * MB, abs=8 * MB)
    assert memory.bytes() == pytest.approx(80 * MB, abs=8 * MB)
    del block


def test_pages_of_files_do_not_count(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(bytes(80 * MB))
    memory = PeakMemory()
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        assert not any(mapped[:: mmap.PAGESIZE])
        assert memory.bytes() < 16 * MB
