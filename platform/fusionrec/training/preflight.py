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
import sysconfig
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from fusionrec.errors import ConfigError, ModelError, TrainingError
from fusionrec.language.models import resolve
from fusionrec.language.precision import Precision
from fusionrec.training import operators, quantization, room
from fusionrec.training.config import RESULT, Method, TrackerName, TrainingConfig
from fusionrec.training.devices import Device
from fusionrec.training.memory import Estimate, estimate
from fusionrec.training.nearest import Setting, nearest
from fusionrec.training.objectives.settings import refuse_two_towers
from fusionrec.training.tasks import TaskSettings
from fusionrec.training.traced import Load

LoadOf: TypeAlias = Callable[[TaskSettings, int], Load]
"""What a backward pass goes through, by settings and batch size."""

_SPARE = 1.1
"""An allocator takes a little more than what is used at once."""
_PACKAGES = {TrackerName.MLFLOW: "mlflow", TrackerName.WANDB: "wandb"}


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run will take."""

    estimate: Estimate
    """Of one worker."""
    device: Device
    """Of the one that has the least."""

    @property
    def sentence(self) -> str:
        """For the person who starts it."""
        e = self.estimate
        parts = {"weights": e.weights, "gradients": e.gradients, "optimizer": e.optimizer}
        parts["activations"] = e.activations
        listed = ", ".join(f"{name} {_gb(size)}" for name, size in parts.items())
        return (
            f"{e.trained / 1e6:,.1f} of {e.parameters / 1e6:,.1f} million parameters are trained; "
            f"a worker takes up to {_gb(e.peak)} ({listed}) of {self.has}"
            f"{self.offloaded}; a checkpoint takes {_gb(e.checkpoint)}"
        )

    @property
    def has(self) -> str:
        """The part of a sentence that tells what memory a worker can have, and whose."""
        free = self.device.memory
        return f"the {'unknown memory' if free is None else _gb(free)} of {self.device.name}"

    @property
    def offloaded(self) -> str:
        """The part of a sentence that tells of what leaves the GPU; empty where nothing does."""
        host, free = self.estimate.host, self.device.machine
        known = "memory" if free is None else _gb(free)
        return f", and offloads {_gb(host)} of its machine's {known}" if host else ""

    @property
    def fits(self) -> bool:
        """Whether a worker can have it, as far as is known."""
        e, device = self.estimate, self.device
        taken = ((e.peak, device.memory), (e.host, device.machine))
        return all(free is None or need * _SPARE <= free for need, free in taken)


def check(
    settings: TaskSettings,
    config: TrainingConfig,
    directory: Path,
    load_of: LoadOf,
    *,
    num_workers: int,
    fewest: int,
    workers_here: int,
    device: Device,
) -> Plan:
    """Look at a worker's device and these settings; read no weights.

    Args:
        settings: Of the task.
        config: Of the engine.
        directory: Of the run.
        load_of: See :func:`fusionrec.training.loads.load_of`.
        num_workers: In all, at most.
        fewest: In all, at least: they hold the most, and take the batches of the others.
        workers_here: Of all, how many are on this machine, where it is known.
        device: Of the worker that has the least.

    Raises:
        ConfigError: settings contradict each other, the model, or what is installed.
        ModelError: the model is not there or not usable.
        TrainingError: a compiler or ninja is missing, or memory or the disk are too small.
    """
    _settings(config, fewest, device)
    folder = resolve(settings.encoder, settings.revision)
    _positions(folder, settings)
    refuse_two_towers(settings)
    finished = (directory / RESULT).exists()  # it will not be run again, and takes nothing
    if not finished and device.is_here and device.kind == "cpu":
        _build_tools()
    if config.compile and not finished and device.is_here:
        _compile_tools(device)

    def planned(task: TaskSettings, training: TrainingConfig) -> Plan:
        load = load_of(task, training.batch_size)
        share = training.accumulation * num_workers // fewest
        training = training.model_copy(update={"accumulation": share})
        found = estimate(folder, load, training, num_workers=fewest, device=device)
        return Plan(found, device)

    def fits(task: TaskSettings, training: TrainingConfig) -> bool:
        try:
            return planned(task, training).fits
        except ConfigError:  # what the architecture cannot do is no remedy
            return False

    plan = planned(settings, config)
    if finished:
        return plan
    share = workers_here / num_workers if device.is_here else 0.0
    room.check(plan.estimate, config, directory, share_here=share)
    if not plan.fits:
        on_gpu = device.kind == "cuda"
        found = nearest(Setting(settings, config), fits, num_workers=fewest, on_gpu=on_gpu)
        remedy = "take a smaller model, or a machine with more"
        if found is not None:
            need = planned(found.task, found.training).estimate.peak
            remedy = f"{' '.join(found.flags)} fits ({_gb(need)})"
        e = plan.estimate
        raise TrainingError(
            f"a worker needs about {_gb(e.peak)} of memory, {_gb(e.activations)} of it for "
            f"the activations of its batch, and can have {plan.has}{plan.offloaded}: {remedy}"
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


def _settings(config: TrainingConfig, num_workers: int, device: Device) -> None:
    cuda = device.kind == "cuda"
    if config.precision is Precision.BF16 and not device.has_bf16:
        if cuda:
            raise ConfigError(
                f"setting precision = bf16 is wrong: {device.name} has no instructions for it; set "
                "--precision fp32"
            )
        warnings.warn(
            f"--precision bf16 is only emulated here: {device.name} have neither AMX nor AVX-512 "
            "BF16; leave it out",
            stacklevel=3,
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
    if config.compile and (config.zero_stage == 3 or config.method is Method.QLORA):
        what = "zero_stage = 3" if config.zero_stage == 3 else "method = qlora"
        raise ConfigError(
            f"setting compile = True is wrong: with {what} weights are made whole one by one, "
            "which is not compiled; leave it out"
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


def _compile_tools(device: Device) -> None:
    headers = Path(sysconfig.get_path("include")) / "Python.h"
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None or not headers.exists():
        raise TrainingError(
            f"--compile needs {compiler} and {headers}: install g++ and Python's headers (apt-get "
            "install g++ python3-dev), or leave it out"
        )
    if device.kind == "cuda" and importlib.util.find_spec("triton") is None:
        raise TrainingError("--compile needs triton on a GPU: pip install triton, or leave it out")


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
    operators.find_tools()
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


def _gb(size: int) -> str:
    return f"{size / 1e9:.2f} GB"
