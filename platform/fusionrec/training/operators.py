"""The operator that DeepSpeed compiles at first use on a CPU: by one process at a time."""

from __future__ import annotations

import fcntl
import os
import sys
from pathlib import Path


def find_tools() -> None:
    """Have ``ninja`` found where this Python's environment has it.

    A console script of the environment is not on PATH where its Python was called by path.
    """
    tools, known = str(Path(sys.executable).parent), os.environ.get("PATH", "")
    if tools not in known.split(os.pathsep):
        os.environ["PATH"] = os.pathsep.join((tools, known))


def load_operator() -> None:
    """Load DeepSpeed's operator for workers of one machine, which may compile it for minutes.

    torch lets other processes wait while one compiles, for a file that this one removes in the end.
    One that was killed leaves the file, and all that come later would wait for ever. So they wait
    for a lock here, which ends with its process; whoever has it knows that such a file is stale.
    """
    import deepspeed
    from deepspeed.accelerator import get_accelerator
    from torch.utils import cpp_extension

    builder = get_accelerator().create_op_builder("ShareMemCommBuilder")
    if builder is None or not deepspeed.ops.__compatible_ops__.get(builder.NAME, False):
        return
    built = Path(cpp_extension._get_build_directory(builder.NAME, verbose=False))
    with built.with_name(f".{builder.NAME}.lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        (built / "lock").unlink(missing_ok=True)
        builder.load()
