import mmap

import pytest
import torch

from fusionrec.training.peak import PeakMemory

MB = 10**6
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there it is the device's")


def test_most_of_each_lap_and_of_all():
    memory = PeakMemory()
    # Of the system, not of malloc, which keeps what is freed where an earlier test has raised its
    # thresholds.
    with mmap.mmap(-1, 80 * MB) as block:
        for _ in range(80):
            block.write(bytes(MB))
    assert memory.lap() == pytest.approx(80 * MB, abs=8 * MB)
    with mmap.mmap(-1, 40 * MB) as block:
        for _ in range(40):
            block.write(bytes(MB))
        assert memory.lap() == pytest.approx(40 * MB, abs=8 * MB)
    assert memory.bytes() == pytest.approx(80 * MB, abs=8 * MB)


def test_pages_of_files_do_not_count(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(bytes(80 * MB))
    memory = PeakMemory()
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        assert not any(mapped[:: mmap.PAGESIZE])
        assert memory.bytes() < 16 * MB
