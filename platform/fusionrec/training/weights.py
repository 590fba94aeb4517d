"""Weights on their way into DeepSpeed, into shards, and out again as one plain model.

Everything here that touches a distributed engine is called by all ranks together.
"""

from __future__ import annotations

import argparse
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, Protocol

import safetensors.torch
import torch
import torch.distributed as dist
from transformers.modeling_layers import GradientCheckpointingLayer

from fusionrec.allocator import return_memory
from fusionrec.errors import ConfigError
from fusionrec.language.inference import has_bf16
from fusionrec.language.precision import Precision
from fusionrec.training.config import Method, TrainingConfig
from fusionrec.training.lone import work_in_place
from fusionrec.training.operators import load_operator
from fusionrec.training.quantization import quantize, values
from fusionrec.training.task import Batch, Task

SHARDS = "deepspeed"


def use_bf16(precision: Precision, *, on_gpu: bool, has: bool) -> bool:
    """Whether to compute in bfloat16 on a device that ``has`` instructions for it or not."""
    return precision is Precision.BF16 or (precision is Precision.AUTO and on_gpu and has)


class _LossModule(torch.nn.Module):
    """Model and loss as one module, so that one forward of the engine is one batch.

    ZeRO-3 follows the order of submodules between two forwards of the outermost module; a loss that
    calls the model twice, once for histories and once for items, must happen inside of one.
    """

    def __init__(self, model: torch.nn.Module, task: Task) -> None:
        super().__init__()
        self.model = model
        self._task = task

    def forward(
        self,
        batch: Batch,
        function: Callable[[torch.nn.Module, Batch], torch.Tensor] | None = None,
    ) -> torch.Tensor:
        return (function or self._task.loss)(self.model, batch)


def build_engine(
    task: Task,
    config: TrainingConfig,
    world_size: int,
    *,
    universal: bool = False,
) -> Any:
    """A ``deepspeed.DeepSpeedEngine`` around the task's model and loss.

    ``universal`` where :func:`load_shards` will be given a universal checkpoint.
    """
    # DeepSpeed takes seconds to import, and reads DS_ACCELERATOR while it does.
    import deepspeed
    from deepspeed.accelerator import get_accelerator
    from transformers.integrations.deepspeed import HfDeepSpeedConfig

    load_operator()
    # Before any model is built: ZeRO-3 partitions it then, and must know the group.
    deepspeed.init_distributed(dist.get_backend(), auto_mpi_discovery=False, verbose=False)
    device = torch.device(get_accelerator().current_device_name())
    bf16 = use_bf16(config.precision, on_gpu=device.type == "cuda", has=has_bf16(device))
    settings = config.deepspeed(world_size, bf16=bf16, universal=universal)
    # Alive while the model is loaded: without it every rank would hold all of a ZeRO-3 model.
    partition: Any = HfDeepSpeedConfig  # not typed
    partitioning = partition(settings) if config.zero_stage == 3 else None
    torch.manual_seed(config.seed)  # new weights (a head, adapters) are the same on every rank
    if config.is_sparing and not torch.cuda.is_available():
        return_memory()
    model = task.build_model()
    if config.activation_checkpointing:
        checkpoint_activations(model)
    model = with_adapters(model, task, config)
    if config.method is Method.QLORA:
        quantize(model, device, torch.bfloat16 if bf16 else torch.float32)
    if config.compile:
        compile_layers(model)
    del partitioning
    module = _LossModule(model, task)
    trained = [p for p in module.parameters() if p.requires_grad]
    matrices = [p for p in trained if _dimensions(p) > 1]
    vectors = [p for p in trained if _dimensions(p) <= 1]
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    engine, *_ = deepspeed.initialize(
        model=module, model_parameters=[g for g in groups if g["params"]], config=settings
    )
    if config.works_in_place(world_size):
        work_in_place(engine.optimizer)
    return engine


@contextmanager
def own_linear() -> Iterator[None]:
    """Leave ``torch.nn.functional.linear`` as it was.

    ZeRO-3 puts its own in place, which keeps no gathered weights, and never takes it back: whatever
    the process trains next, under any stage, would round differently.
    """
    linear = torch.nn.functional.linear
    try:
        yield
    finally:
        torch.nn.functional.linear = linear


def _dimensions(parameter: torch.nn.Parameter) -> int:
    """Of the whole parameter, also where ZeRO-3 left only a shard of it here."""
    shape = getattr(parameter, "ds_shape", parameter.shape)
    return len(shape)


class Headed(Protocol):
    """What :func:`with_adapters` asks of a task."""

    @property
    def head(self) -> tuple[str, ...]:
        """See :class:`~fusionrec.training.task.Task`."""
        ...


def checkpoint_activations(model: torch.nn.Module) -> None:
    """Have every layer computed again in the backward pass instead of kept.

    Raises:
        ConfigError: the architecture cannot.
    """
    able = [m for m in model.modules() if getattr(m, "supports_gradient_checkpointing", False)]
    if not able:
        raise ConfigError(
            "setting activation_checkpointing = True is wrong: this model's architecture cannot "
            "compute its layers again; leave it out"
        )
    # A model of several parts has some that can.
    for part in able[:1] if able[0] is model else able:
        transformer: Any = part
        # Reentrant checkpoints would lose the gradients of adapters behind frozen embeddings.
        transformer.activation_checkpointing_enable({"use_reentrant": False})


def compile_layers(model: torch.nn.Module) -> None:
    """Have torch.compile translate every layer when it is first called; names stay as they are.

    By layers, because all of them have one translation in common, and whatever a task does around
    them stays Python. Sizes are symbols in it: batches of other lengths want no other one, but for
    a single text or token, which is a case of its own.

    Raises:
        ConfigError: the architecture does not say what its layers are.
    """
    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    if not layers:
        raise ConfigError(
            "setting compile = True is wrong: this model's architecture does not say what its "
            "layers are; leave it out"
        )
    for layer in layers:
        layer.compile(dynamic=True)


def with_adapters(model: torch.nn.Module, task: Headed, config: TrainingConfig) -> torch.nn.Module:
    """The model itself, or with adapters around its linear layers and all else frozen."""
    if not config.method.adapts:
        return model
    import peft

    settings = peft.LoraConfig(
        r=config.lora.rank,
        lora_alpha=config.lora.alpha,
        lora_dropout=config.lora.dropout,
        use_dora=config.method is Method.DORA,
        target_modules="all-linear",
        exclude_modules=rf"(.*\.)?({'|'.join(task.head)})(\..*)?" if task.head else None,
    )
    with warnings.catch_warnings():
        # peft reads an attribute that transformers has renamed.
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing.*", FutureWarning)
        adapted: torch.nn.Module = peft.get_peft_model(model, settings)
    for name, parameter in adapted.named_parameters():
        if any(part in task.head for part in name.split(".")):
            parameter.requires_grad_(True)
    return adapted


def save_shards(engine: Any, directory: Path, *, only_trained: bool) -> None:
    """Write this rank's shards of weights and optimizer states.

    A rank that cannot write still goes through all of DeepSpeed's collectives, so that no other
    one waits for it, and raises afterwards.

    Raises:
        OSError, RuntimeError: as torch.save does.
    """
    writer = engine.checkpoint_engine
    write = writer.save
    faults: list[Exception] = []

    def save(*args: Any, **kwargs: Any) -> None:
        try:
            write(*args, **kwargs)
        except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
            faults.append(error)

    writer.save = save
    try:
        engine.save_checkpoint(
            str(directory), tag=SHARDS, save_latest=False, exclude_frozen_parameters=only_trained
        )
    finally:
        writer.save = write
    if faults:
        raise faults[0]


def load_shards(engine: Any, directory: Path, *, only_trained: bool) -> None:
    """The inverse of :func:`save_shards`. They are pickles: check their hashes first."""
    optimizer = engine.optimizer.optimizer
    decays = [group["weight_decay"] for group in optimizer.param_groups]
    loaded, _ = engine.load_checkpoint(
        str(directory), tag=SHARDS, load_module_strict=not only_trained
    )
    assert loaded is not None
    # From a universal checkpoint ZeRO-3 gives all groups the settings of the first, and one shared
    # counter of steps, which each of them would then count up.
    for group, decay in zip(optimizer.param_groups, decays, strict=True):
        group["weight_decay"] = decay
    for state in optimizer.state.values():
        if torch.is_tensor(state.get("step")):
            state["step"] = state["step"].clone()


def make_universal(shards: Path, directory: Path) -> None:
    """Merge the shards of all workers, so that any number of workers can load them; on one rank.

    Args:
        shards: Checkpoint directory whose hashes were checked: DeepSpeed reads pickles.
        directory: Takes what :func:`load_shards` reads; replaced.
    """
    from deepspeed.checkpoint.ds_to_universal import main

    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()
    arguments = {
        "input_folder": str(shards / SHARDS),
        "output_folder": str(directory / SHARDS),
        "num_extract_workers": 1,
        "num_merge_workers": 1,
        "keep_temp_folder": False,
        "strict": True,
        "inject_missing_state": True,
    }
    with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        main(argparse.Namespace(**arguments))


def save_tensors(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Write a safetensors file."""
    safetensors.torch.save_file(tensors, path)


def load_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Read a safetensors file."""
    tensors: dict[str, torch.Tensor] = safetensors.torch.load_file(path)
    return tensors


def gather(engine: Any) -> dict[str, torch.Tensor]:
    """All weights and buffers of the task's model by name, whole, on rank 0; empty elsewhere.

    Trained weights are the optimizer's float32 ones, also where bfloat16 did the computing. Weights
    in 4 bits are those that they stand for.
    """
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param

    keep = dist.get_rank() == 0
    full: dict[str, torch.Tensor] = {}
    for name, parameter in engine.module.model.named_parameters():
        if parameter.requires_grad:
            value = safe_get_full_fp32_param(parameter)
            if keep:
                full[name] = value.detach().cpu().clone()
        else:
            with deepspeed.zero.GatheredParameters(
                [parameter], enabled=hasattr(parameter, "ds_id")
            ):
                if keep:
                    full[name] = values(parameter).detach().cpu().clone()
    if keep:
        full |= {n: b.detach().cpu().clone() for n, b in engine.module.model.named_buffers()}
    return full


def trained(engine: Any, full: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Those of the weights of :func:`gather` that are trained."""
    named = engine.module.model.named_parameters()
    return {name: full[name] for name, parameter in named if parameter.requires_grad}


def merged(full: dict[str, torch.Tensor], task: Task, config: TrainingConfig) -> torch.nn.Module:
    """A plain model on the CPU with the weights of :func:`gather`, adapters merged."""
    model: Any = with_adapters(task.build_model(), task, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(full.pop(name))
        for name, buffer in model.named_buffers():
            buffer.copy_(full.pop(name))
    assert not full, f"weights without a place: {sorted(full)}"
    if config.method.adapts:
        model = model.merge_and_unload()
    plain: torch.nn.Module = model.eval()
    return plain
