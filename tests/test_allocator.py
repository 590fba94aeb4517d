import ctypes
import subprocess
import sys

import pytest

FAULTS = """
import resource, numpy as np
from fusionrec.allocator import keep_memory
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        pieces = [np.full(2**21, 1.0) for _ in range(3)]  # 16 MiB each
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
{call}
faults()
print(faults())
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="needs glibc")
def test_memory_that_models_use_again_is_kept():
    kept, given_back = (
        int(
            subprocess.run(
                [sys.executable, "-c", FAULTS.format(call=call)],
                stdout=subprocess.PIPE,
                check=True,
            ).stdout
        )
        for call in ("keep_memory()", "")
    )
    assert kept < given_back / 10
