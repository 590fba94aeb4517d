"""A worker's process before its first collective, whoever started it."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

from fusionrec.errors import TrainingError
from fusionrec.training import operators
from fusionrec.training.config import TrainingConfig


def prepare_process(config: TrainingConfig) -> None:
    """What must be so before collectives and DeepSpeed's import: device, build tools, threads.

    Raises:
        TrainingError: this machine has fewer GPUs than workers.
    """
    if torch.cuda.is_available():
        own, gpus = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        if own >= gpus:
            raise TrainingError(
                f"worker {own} of this machine has no GPU of its own: there are {gpus}; start as "
                "many workers, or give --no-use-gpu"
            )
        # DeepSpeed would do so only after 4-bit weights are made, on everybody's first GPU.
        torch.cuda.set_device(own)
    else:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    operators.find_tools()
    if sys.prefix != sys.base_prefix:
        # DeepSpeed builds its operator against the environment's own torch. In the shared default
        # folder two environments would build it over each other, again and again.
        os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(Path(sys.prefix) / "torch_extensions"))
    local = max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    # A Ray worker with a fraction of a CPU has OMP_NUM_THREADS=1, so the number is always set.
    torch.set_num_threads(config.num_threads or max(1, (os.cpu_count() or 1) // local))
