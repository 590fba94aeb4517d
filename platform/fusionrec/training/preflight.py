"""What would stop a run after minutes, said in one sentence before any worker starts."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import torch

from fusionrec.errors import ConfigError, ModelError, TrainingError
from fusionrec.language.models import resolve
from fusionrec.language.precision import Precision
from fusionrec.training.config import Method, TrainingConfig
from fusionrec.training.tasks import TaskSettings

_FULL_COPIES = 4
"""Float32 copies of the weights in a checkpoint of a full run: weights, master, two moments."""


def check(
    settings: TaskSettings, config: TrainingConfig, directory: Path, *, num_workers: int
) -> None:
    """Look at this machine and these settings; read no weights.

    Raises:
        ConfigError: settings contradict each other or the model.
        ModelError: the model is not there or not usable.
        TrainingError: a compiler or ninja is missing, or the disk is too small.
    """
    _settings(config, num_workers)
    folder = resolve(settings.encoder, settings.revision)
    _positions(folder, settings)
    _build_tools()
    _disk(folder, config, directory)


def _settings(config: TrainingConfig, num_workers: int) -> None:
    cuda = torch.cuda.is_available()
    if config.precision is Precision.BF16 and cuda and not torch.cuda.is_bf16_supported():
        raise ConfigError(
            "setting precision = bf16 is wrong: this GPU has no bfloat16; set --precision fp32"
        )
    if "lora" in config.model_fields_set and config.method is Method.FULL:
        warnings.warn("--lora.* is ignored by --method full: set --method lora", stacklevel=3)
    if config.zero_stage > 1 and num_workers == 1:
        warnings.warn(
            f"--zero-stage {config.zero_stage} has nothing to shard with one worker", stacklevel=3
        )


def _positions(folder: Path, settings: TaskSettings) -> None:
    try:
        described = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{folder / 'config.json'} is not JSON: fetch the model again") from error
    positions = described.get("max_position_embeddings")
    if positions is not None and settings.max_tokens > positions:
        raise ConfigError(
            f"setting max_tokens = {settings.max_tokens} is wrong: {settings.encoder} has "
            f"{positions} positions; set --max-tokens {positions} or less"
        )


def _build_tools() -> None:
    """DeepSpeed compiles a shared-memory operator for CPUs; on GPUs nothing is compiled."""
    if torch.cuda.is_available():
        return
    # A console script of the environment is not on PATH where its Python was called by path.
    tools = str(Path(sys.executable).parent)
    if tools not in os.environ.get("PATH", "").split(os.pathsep):
        os.environ["PATH"] = os.pathsep.join((tools, os.environ.get("PATH", "")))
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler) is None:
        raise TrainingError(
            f"DeepSpeed needs a C++ compiler and {compiler} is not found: install g++ (apt-get "
            "install g++) or set CXX"
        )
    try:
        subprocess.run(["ninja", "--version"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise TrainingError(
            "DeepSpeed needs ninja and it is not found: pip install ninja"
        ) from error


def _disk(folder: Path, config: TrainingConfig, directory: Path) -> None:
    """Room for the checkpoints that are kept, one that is being written, and the result twice."""
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    checkpoint = _FULL_COPIES * size if config.method is Method.FULL else size // 4
    needed = (config.keep_checkpoints + 1) * checkpoint + 2 * size
    place = directory.resolve()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < needed:
        raise TrainingError(
            f"{directory} needs about {needed / 1e9:.1f} GB for checkpoints and {place} has "
            f"{free / 1e9:.1f} GB free: free some, set another --out or --keep-checkpoints 1"
        )
