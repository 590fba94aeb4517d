"""What would stop a run after minutes, said in one sentence before any worker starts.

Memory is estimated from the model's config (:mod:`fusionrec.training.memory`); a run that will not
fit is refused with the nearest settings that do, nearest meaning that they change the result least.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch

from fusionrec.errors import ConfigError, ModelError, TrainingError
from fusionrec.language.models import resolve
from fusionrec.language.precision import Precision
from fusionrec.training import quantization
from fusionrec.training.config import Method, TrackerName, TrainingConfig
from fusionrec.training.memory import Estimate, Load, estimate
from fusionrec.training.objectives.settings import refuse_two_towers
from fusionrec.training.tasks import TaskSettings

LoadOf: TypeAlias = Callable[[int], Load]
"""What a backward pass goes through, by batch size."""

_LIBRARIES = 700_000_000
"""About the bytes of a process that has imported torch, DeepSpeed and transformers."""
_SPARE = 1.1
"""An allocator takes a little more than what is used at once."""
_PACKAGES = {TrackerName.MLFLOW: "mlflow", TrackerName.WANDB: "wandb"}


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run will take."""

    estimate: Estimate
    """Of one worker."""
    available: int
    """Bytes that a worker can have: of its GPU, or its part of this machine's memory."""
    machine: int
    """Its part of this machine's memory, for what is offloaded from a GPU."""

    @property
    def sentence(self) -> str:
        """For the person who starts it."""
        e = self.estimate
        parts = {"weights": e.weights, "gradients": e.gradients, "optimizer": e.optimizer}
        parts["activations"] = e.activations
        listed = ", ".join(f"{name} {_gb(size)}" for name, size in parts.items())
        return (
            f"{e.trained / 1e6:,.1f} of {e.parameters / 1e6:,.1f} million parameters are trained; "
            f"a worker takes up to {_gb(e.peak)} of {_gb(self.available)} ({listed})"
            f"{self.offloaded}; a checkpoint takes {_gb(e.checkpoint)}"
        )

    @property
    def offloaded(self) -> str:
        """The part of a sentence that tells of what leaves the GPU; empty where nothing does."""
        host, free = self.estimate.host, self.machine
        return f", and offloads {_gb(host)} of the machine's {_gb(free)}" if host else ""

    @property
    def fits(self) -> bool:
        """Whether a worker can have it."""
        taken = ((self.estimate.peak, self.available), (self.estimate.host, self.machine))
        return all(need * _SPARE <= free for need, free in taken)


def check(
    settings: TaskSettings,
    config: TrainingConfig,
    directory: Path,
    load_of: LoadOf,
    *,
    num_workers: int,
    workers_here: int,
) -> Plan:
    """Look at this machine and these settings; read no weights.

    Args:
        settings: Of the task.
        config: Of the engine.
        directory: Of the run.
        load_of: See :func:`fusionrec.training.loads.load_of`.
        num_workers: In all.
        workers_here: Of these, how many share this machine's memory.

    Raises:
        ConfigError: settings contradict each other, the model, or what is installed.
        ModelError: the model is not there or not usable.
        TrainingError: a compiler or ninja is missing, or memory or the disk are too small.
    """
    _settings(config, num_workers)
    folder = resolve(settings.encoder, settings.revision)
    _positions(folder, settings)
    refuse_two_towers(settings)
    _build_tools()
    available, machine = _available(workers_here), _machine(workers_here)

    def planned(chosen: TrainingConfig) -> Plan:
        load = load_of(chosen.batch_size)
        found = estimate(folder, load, chosen, num_workers=num_workers)
        return Plan(found, available, machine)

    plan = planned(config)
    need = plan.estimate
    _disk(need, config, directory)
    if not plan.fits:
        remedy = "take a smaller model, or a machine with more"
        for flags, other in _nearer(config, num_workers):
            found = planned(other)
            if found.fits:
                remedy = f"{flags} fits ({_gb(found.estimate.peak)})"
                break
        raise TrainingError(
            f"a worker needs about {_gb(need.peak)} of memory, {_gb(need.activations)} of it for "
            f"the activations of its batch, and can have {_gb(available)}{plan.offloaded}: {remedy}"
        )
    return plan


def check_shares(fewest: int, num_workers: int, accumulation: int) -> None:
    """A step has the same batches whatever the number of workers, the same number for each of them.

    Raises:
        ConfigError: from ``fewest`` to ``num_workers`` there is one that does not divide them.
    """
    batches = num_workers * accumulation
    between = range(fewest, num_workers + 1)
    if not between:
        raise ConfigError(
            f"setting min_workers = {fewest} is wrong: it is above num_workers = {num_workers}"
        )
    if any(batches % workers for workers in between):
        enough = math.lcm(*between) // math.gcd(math.lcm(*between), num_workers)
        raise ConfigError(
            f"setting min_workers = {fewest} is wrong: the {batches} batches of a step cannot be "
            f"shared evenly by any number of workers from {fewest} to {num_workers}; set "
            f"accumulation = {enough}, or a higher min_workers"
        )


def _nearer(config: TrainingConfig, num_workers: int) -> Iterator[tuple[str, TrainingConfig]]:
    """Settings that take less, those first that change the result least, and their flags."""
    flags, changed = "", config
    if not config.activation_checkpointing:
        flags += " --activation-checkpointing"
        changed = changed.model_copy(update={"activation_checkpointing": True})
        yield flags.strip(), changed
    highest = 2 if config.method is Method.QLORA else 3
    for stage in range(config.zero_stage + 1, highest + 1 if num_workers > 1 else 0):
        changed = changed.model_copy(update={"zero_stage": stage})
        yield f"{flags} --zero-stage {stage}".strip(), changed
    if changed.zero_stage != config.zero_stage:
        flags += f" --zero-stage {changed.zero_stage}"
    others: list[tuple[str, dict[str, Any]]] = [("", {})]
    if torch.cuda.is_available() and not config.offload_optimizer:
        others.append((" --offload-optimizer", {"offload_optimizer": True}))
        yield f"{flags} --offload-optimizer".strip(), changed.model_copy(update=others[-1][1])
    if config.method not in (Method.LORA, Method.QLORA):
        others.append((" --method lora", {"method": Method.LORA}))
    for flag, setting in others:
        size, times = config.batch_size, config.accumulation
        while size >= 1:
            update = {"batch_size": size, "accumulation": times} | setting
            smaller = f" --batch-size {size} --accumulation {times}"
            yield (
                (flags + flag + (smaller if size < config.batch_size else "")).strip(),
                changed.model_copy(update=update),
            )
            size, times = size // 2, times * 2


def _available(workers_here: int) -> int:
    """Bytes that a worker can have: free on the GPU, or its part of what is free in memory."""
    if torch.cuda.is_available():
        free, _ = torch.cuda.mem_get_info()
        return free
    return _machine(workers_here)


def _machine(workers_here: int) -> int:
    """A worker's part of what is free of this machine's memory."""
    known = Path("/proc/meminfo")
    if known.is_file():
        lines = known.read_text(encoding="ascii").splitlines()
        [line] = [line for line in lines if line.startswith("MemAvailable:")]
        free = int(line.split()[1]) * 1024
    else:
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    group = Path("/sys/fs/cgroup")  # the container's own limit
    if (group / "memory.max").is_file():
        limit = (group / "memory.max").read_text(encoding="ascii").strip()
        if limit != "max":
            used = int((group / "memory.current").read_text(encoding="ascii"))
            free = min(free, int(limit) - used)
    return max(0, free // workers_here - _LIBRARIES)


def _settings(config: TrainingConfig, num_workers: int) -> None:
    cuda = torch.cuda.is_available()
    if config.precision is Precision.BF16 and cuda and not torch.cuda.is_bf16_supported():
        raise ConfigError(
            "setting precision = bf16 is wrong: this GPU has no bfloat16; set --precision fp32"
        )
    if "lora" in config.model_fields_set and config.method is Method.FULL:
        warnings.warn("--lora.* is ignored by --method full: set --method lora", stacklevel=3)
    if config.method is Method.QLORA:
        quantization.require()
        if config.zero_stage == 3:
            raise ConfigError(
                "setting zero_stage = 3 is wrong: weights in 4 bits are not sharded; set "
                "--zero-stage 2, or --method lora"
            )
    for tracker, package in _PACKAGES.items():
        if tracker in config.trackers and importlib.util.find_spec(package) is None:
            raise ConfigError(
                f"setting trackers = {tracker} needs the Python package {package}, which is not "
                f"installed: run pip install 'fusionrec[{tracker}]'"
            )
    if config.offload_parameters and config.zero_stage < 3:
        raise ConfigError(
            "setting offload_parameters = True is wrong: ZeRO 1 and 2 keep the weights on the GPU; "
            "set --zero-stage 3, or leave it out"
        )
    for name in ("offload_optimizer", "offload_parameters"):
        if getattr(config, name) and not cuda:
            flag = name.replace("_", "-")
            warnings.warn(f"--{flag} has nothing to move where there is no GPU", stacklevel=3)
    if config.zero_stage > 1 and num_workers == 1 and not config.offload_parameters:
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


def _disk(need: Estimate, config: TrainingConfig, directory: Path) -> None:
    """Room for the checkpoints that are kept, one that is being written, and the result twice."""
    result = 4 * need.parameters
    needed = (config.keep_checkpoints + 1) * need.checkpoint + 2 * result
    place = directory.resolve()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < needed:
        raise TrainingError(
            f"{directory} needs about {_gb(needed)} for checkpoints and {place} has "
            f"{_gb(free)} free: free some, set another --out or --keep-checkpoints 1"
        )


def _gb(size: int) -> str:
    return f"{size / 1e9:.2f} GB"
