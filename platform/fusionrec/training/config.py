"""Settings of a fine-tuning run, and the DeepSpeed configuration that they mean."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, field_validator

from fusionrec.config import Config
from fusionrec.language.precision import Precision
from fusionrec.space import Range

RESULT = "result.json"
"""In a run's directory, once the run is finished."""


class Method(StrEnum):
    """Which weights are trained."""

    FULL = "full"
    LORA = "lora"
    DORA = "dora"
    QLORA = "qlora"

    @property
    def adapts(self) -> bool:
        """Whether adapters are trained, and all else but the head is frozen."""
        return self is not Method.FULL


class TrackerName(StrEnum):
    """Where the curves of a run go; the last two need the extra of their name."""

    TENSORBOARD = "tensorboard"
    MLFLOW = "mlflow"
    WANDB = "wandb"


class LoraSettings(Config):
    """Low-rank adapters (Hu et al., 2021, arXiv:2106.09685) on every linear layer but the head.

    W becomes W + ΔW with ΔW = B A alpha / rank. DoRA (Liu et al., 2024, arXiv:2402.09353) trains
    the norm m of the weights of each output, too, which begins as that of W: W becomes
    m (W + ΔW) / ‖W + ΔW‖, where the norm below is a constant to the gradient. QLoRA keeps W in 4
    bits, see :mod:`fusionrec.training.quantization`.
    """

    rank: Annotated[int, Range(4, 64, log=True)] = Field(16, ge=1)
    """Rank of the update of a weight matrix."""
    alpha: int = Field(32, ge=1)
    """The update is scaled by alpha / rank."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout in front of the adapters."""


class TrainingConfig(Config):
    """How a task is trained. What is trained is the task's own business."""

    method: Method = Method.FULL
    """full: every weight; lora: low-rank adapters; dora: these and the norm of each output's
    weights; qlora: low-rank adapters on weights that are kept in 4 bits. Adapters are merged into
    the weights at the end."""
    lora: LoraSettings = LoraSettings()
    """Only read by the methods lora, dora and qlora."""
    zero_stage: int = Field(1, ge=1, le=3)
    """DeepSpeed ZeRO: 1 shards optimizer states over workers, 2 gradients too, 3 weights too."""
    offload_optimizer: bool = False
    """Keep the optimizer's states and float32 weights in the machine's memory instead of the GPU's,
    and step on its cores."""
    offload_parameters: bool = False
    """Keep the weights there, too, but for those that are computed with; with ZeRO 3 only."""
    epochs: int = Field(1, ge=1)
    """Passes over the examples."""
    max_steps: int | None = Field(None, ge=1)
    """Optimizer steps after which the run ends even if the epochs have not."""
    batch_size: int = Field(32, ge=1)
    """Examples of one forward pass of one worker."""
    accumulation: int = Field(1, ge=1)
    """Forward passes of a worker before each optimizer step."""
    activation_checkpointing: bool = False
    """Keep only the input of each layer for the backward pass and compute the layer again: less
    memory for about a third more time, and the same numbers."""
    compile: bool = False
    """Compile the model's layers (torch.compile): fewer passes over memory, for a minute or two
    before the first step. The numbers are the same up to rounding, but for what dropout draws."""
    learning_rate: Annotated[float, Range(1e-5, 1e-3, log=True)] = Field(5e-5, gt=0)
    """Peak of the schedule, reached after the warm-up; it then falls linearly to zero."""
    warmup: Annotated[float, Range(0, 0.3)] = Field(0.1, ge=0, lt=1)
    """Share of the steps over which the learning rate rises."""
    weight_decay: Annotated[float, Range(1e-4, 0.3, log=True)] = Field(0.01, ge=0)
    """AdamW's decay of weight matrices; biases and norms are not decayed."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Gradients are scaled down to this global L2 norm."""
    precision: Precision = Precision.AUTO
    """auto: bf16 on a GPU that has it, float32 elsewhere; nothing is trained in int8."""
    seed: int = Field(0, ge=0)
    """Of the order of examples, new weights and dropout."""
    num_threads: int | None = Field(None, ge=1)
    """CPU threads of a worker; default: its machine's cores shared among the workers on it."""
    max_skipped_steps: int = Field(0, ge=0)
    """Steps that may be left out in a run because a loss or a gradient was NaN or infinite; the
    batch is saved each time. One more ends the run."""
    spike_sigmas: float = Field(6.0, gt=0)
    """A loss so many robust standard deviations (1.4826 · MAD) above the median of the 50 before it
    is flagged as a spike, and its batch saved."""
    trackers: tuple[TrackerName, ...] = (TrackerName.TENSORBOARD,)
    """Where curves go: tensorboard, mlflow, wandb."""
    checkpoint_every: int = Field(50, ge=1)
    """Optimizer steps between checkpoints."""
    keep_checkpoints: int = Field(2, ge=1)
    """Newest checkpoints that are kept."""
    checkpoint_staging: Path | None = None
    """Folder on each worker's own disk, by its absolute path, for an --out that is slow to write
    to: training waits until a checkpoint is written there, and goes on while it is uploaded."""
    report_every: int = Field(5, ge=1)
    """Optimizer steps between reports of progress."""

    @field_validator("precision")
    @classmethod
    def _trains(cls, precision: Precision) -> Precision:
        if precision is Precision.INT8:
            raise ValueError("int8 is for serving (jobs.optimise): give auto, fp32 or bf16")
        return precision

    @field_validator("checkpoint_staging")
    @classmethod
    def _same_everywhere(cls, folder: Path | None) -> Path | None:
        if folder is not None and not folder.is_absolute():  # workers run in other folders
            raise ValueError("give the absolute path of a folder on each worker's own disk")
        return folder

    def total_steps(self, steps_per_epoch: int) -> int:
        """Optimizer steps of the whole run."""
        steps = self.epochs * steps_per_epoch
        return steps if self.max_steps is None else min(steps, self.max_steps)

    def learning_rate_at(self, step: int, total: int) -> float:
        """Rate of optimizer step ``step`` (from 0) of ``total``: linear warm-up, linear decay.

        A function of the step alone, so that there is no scheduler state to restore.
        """
        rising = max(1, round(self.warmup * total))
        if step < rising:
            return self.learning_rate * (step + 1) / rising
        return self.learning_rate * (total - step) / max(1, total - rising)

    def identity(self) -> dict[str, Any]:
        """The settings that decide the numbers of a run; a resumed run must share them.

        Beside them stands how many batches a step has, over all workers.
        """
        free = {"num_threads", "checkpoint_every", "keep_checkpoints", "report_every"}
        free |= {"activation_checkpointing", "max_skipped_steps", "spike_sigmas", "trackers"}
        free |= {"checkpoint_staging", "accumulation", "offload_optimizer", "offload_parameters"}
        free.add("compile")
        if not self.method.adapts:
            free.add("lora")
        return self.model_dump(mode="json", exclude=free)

    def works_in_place(self, world_size: int) -> bool:
        """Whether the optimizer works on the model's own tensors, which nobody shares with it."""
        return world_size == 1 and self.zero_stage < 3 and not self.offload_optimizer

    @property
    def is_sparing(self) -> bool:
        """Whether what is asked for trades time for memory."""
        return self.activation_checkpointing or self.zero_stage == 3

    def deepspeed(self, world_size: int, *, bf16: bool, universal: bool = False) -> dict[str, Any]:
        """DeepSpeed's own configuration; ``universal`` when it will load a universal checkpoint."""
        zero: dict[str, Any] = {"stage": self.zero_stage}
        if world_size == 1 and self.zero_stage < 3:
            # Gradients beyond the size of a bucket are taken as they are. With nobody to send them
            # to there is no reason to copy them into one; see lone.py, too.
            zero |= {"reduce_bucket_size": 1}
        if self.zero_stage == 3:
            # With the default thresholds a small model is never partitioned at all.
            zero |= {"stage3_param_persistence_threshold": 10_000}
        if self.offload_optimizer:
            zero |= {"offload_optimizer": {"device": "cpu"}}
        if self.offload_parameters:
            zero |= {"offload_param": {"device": "cpu"}}
        return {
            "train_micro_batch_size_per_gpu": self.batch_size,
            "gradient_accumulation_steps": self.accumulation,
            "train_batch_size": self.batch_size * self.accumulation * world_size,
            "gradient_clipping": self.max_grad_norm,
            "bf16": {"enabled": bf16},
            "zero_optimization": zero,
            "optimizer": {
                "type": "AdamW",
                # torch's own AdamW: DeepSpeed's would compile a second native operator. Fused, it
                # goes over weights and states once and needs no room for copies of them, on CPUs
                # too: offloaded states want no other.
                "params": {"lr": self.learning_rate, "torch_adam": True, "fused": True},
            },
            "checkpoint": {"load_universal": universal},
            "steps_per_print": 10**9,
        }
