"""One worker of ``benchmarks.training``: trains a few steps with our engine or a plain trainer.

All three take the same batches of the same task in the same order, with the same settings. The
times of a step's stages come from the clock around the calls that every one of them makes; a GPU is
waited for before the clock is read, so that nothing runs beside them. A process for each run: what
one leaves in memory slows no other.
"""

from __future__ import annotations

import json
import os
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from pydantic import Field

from fusionrec.config import JobConfig, parse
from fusionrec.language.models import resolve
from fusionrec.language.precision import Precision
from fusionrec.training.config import TrainingConfig
from fusionrec.training.engine import train
from fusionrec.training.objectives.encoder import EncoderTask
from fusionrec.training.objectives.pretraining import PretrainingTask
from fusionrec.training.process import prepare_process
from fusionrec.training.tasks import load_task
from jobs.entry import run

HELD_OUT_BATCHES = 8
Task = EncoderTask | PretrainingTask


class TrainerConfig(JobConfig):
    """Train one model for some steps; one line of JSON is left in a file."""

    system: Literal["engine", "compiled", "sentence-transformers", "transformers"]
    """Who trains."""
    task: Path
    """Folder that fusionrec.training.tasks.save_task wrote."""
    held_out: Path
    """The same of other examples: the loss on them is measured before and after."""
    out: Path
    """Folder of the run, with what was measured in result.json."""
    steps: int = Field(default=20, ge=2)
    """Optimizer steps."""
    warm_up: int = Field(default=4, ge=1)
    """Steps at the beginning that no time is taken of."""
    batch_size: int = Field(default=32, ge=1)
    """Examples of a step of one worker."""
    threads: int = Field(default=1, ge=1)
    """Of this process."""
    learning_rate: float = Field(default=5e-5, gt=0)
    """At its peak."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """What is computed in."""
    seed: int = Field(default=0, ge=0)
    """Of the order of the examples and of dropout."""


def _now() -> float:
    """Seconds, when everything that was asked of the GPU is done: a stage's time is its own."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


class Clock:
    """Seconds of each stage, and when each step ended."""

    def __init__(self, warm_up: int) -> None:
        self._warm_up = warm_up
        self._ends: list[float] = []
        self._cpu: list[float] = []
        self._stages: defaultdict[str, float] = defaultdict(float)
        self.losses: list[float] = []

    def add(self, stage: str, seconds: float) -> None:
        """Count ``seconds``, unless the machine is still warming up."""
        if len(self._ends) >= self._warm_up:
            self._stages[stage] += seconds

    def timed(self, stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """``function``, whose time counts as ``stage``."""

        def call(*args: Any, **kwargs: Any) -> Any:
            began = _now()
            try:
                return function(*args, **kwargs)
            finally:
                self.add(stage, _now() - began)

        return call

    def step(self) -> None:
        """A step has ended."""
        self._ends.append(_now())
        self._cpu.append(time.process_time())

    def summary(self) -> dict[str, Any]:
        """Seconds a step, of CPU, in all and by stage; losses of the steps."""
        first = self._warm_up - 1  # the end of the last step that does not count
        count = len(self._ends) - self._warm_up
        each = (self._ends[-1] - self._ends[first]) / count
        stages = {stage: seconds / count for stage, seconds in self._stages.items()}
        stages["rest"] = each - sum(stages.values())
        cpu = (self._cpu[-1] - self._cpu[first]) / count
        found = {"seconds_a_step": each, "cpu_seconds_a_step": cpu}
        return found | {"stages": stages, "losses": self.losses}


def by_engine(config: TrainerConfig, task: Task, clock: Clock) -> torch.nn.Module | None:
    """Our engine, as ``jobs.finetune`` calls it; the trained model on the first worker."""
    import deepspeed

    plain: Any = task
    plain.batch = clock.timed("data", task.batch)
    plain.loss = clock.timed("forward", task.loss)
    engine: Any = deepspeed.DeepSpeedEngine
    engine.backward = clock.timed("backward", engine.backward)
    engine.step = clock.timed("optimizer", engine.step)
    settings = TrainingConfig(
        epochs=1_000_000,
        max_steps=config.steps,
        batch_size=config.batch_size,
        learning_rate=config.learning_rate,
        precision=Precision(config.precision),
        num_threads=config.threads,
        checkpoint_every=config.steps,
        report_every=1,
        trackers=(),
        compile=config.system == "compiled",
        seed=config.seed,
    )

    def on_report(report: Any) -> None:
        clock.step()
        clock.losses.append(report.loss)

    result = train(plain, settings, config.out / "run", on_report=on_report)
    del plain.batch, plain.loss
    if dist.get_rank():
        return None
    kind: Any = _kind(task)
    model: torch.nn.Module = kind.from_pretrained(result.model, dtype=torch.float32)
    return model


def by_sentence_transformers(config: TrainerConfig, task: Task, clock: Clock) -> torch.nn.Module:
    """SentenceTransformerTrainer with MultipleNegativesRankingLoss: the same InfoNCE."""
    from datasets import Dataset
    from sentence_transformers import (
        SentenceTransformer,
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
    )
    from sentence_transformers.base.sampler import DefaultBatchSampler
    from sentence_transformers.sentence_transformer import losses

    settings = task.identity
    pairs = task.describe(np.concatenate(_plan(config, task)))
    model = SentenceTransformer(str(resolve(settings["encoder"])))
    model.max_seq_length = settings["max_tokens"]

    def in_order(dataset: Any, **kwargs: Any) -> Any:
        return DefaultBatchSampler(torch.utils.data.SequentialSampler(dataset), **kwargs)

    trainer = SentenceTransformerTrainer(
        model=model,
        args=SentenceTransformerTrainingArguments(**_arguments(config), batch_sampler=in_order),
        train_dataset=Dataset.from_dict(
            {"anchor": [p["history"] for p in pairs], "positive": [p["item"] for p in pairs]}
        ),
        loss=losses.MultipleNegativesRankingLoss(model, scale=1 / settings["temperature"]),
    )
    _follow(trainer, clock)
    trainer.train()
    first: Any = model[0]
    trained: torch.nn.Module = first.auto_model
    return trained


def by_transformers(config: TrainerConfig, task: Task, clock: Clock) -> torch.nn.Module:
    """``transformers.Trainer`` on the same blocks."""
    from transformers import Trainer, TrainingArguments

    order = np.concatenate(_plan(config, task))
    rows = task.batch(order)
    model = task.build_model()
    trainer = Trainer(
        model=model,
        args=TrainingArguments(**_arguments(config), train_sampling_strategy="sequential"),
        train_dataset=[{name: rows[name][i] for name in rows} for i in range(len(order))],
    )
    _follow(trainer, clock)
    trainer.train()
    return model


SYSTEMS: dict[str, Callable[[TrainerConfig, Task, Clock], torch.nn.Module | None]] = {
    "engine": by_engine,
    "compiled": by_engine,
    "sentence-transformers": by_sentence_transformers,
    "transformers": by_transformers,
}


def _plan(config: TrainerConfig, task: Task) -> list[Any]:
    """The batches that one worker of the engine sees."""
    found: list[Any] = []
    while len(found) < config.steps:
        generator = np.random.default_rng([config.seed, len(found)])
        found += task.plan(config.batch_size, generator)
        assert found, "there are fewer examples than a batch"
    return found[: config.steps]


def _arguments(config: TrainerConfig) -> dict[str, Any]:
    """What the engine does too: schedule, decay, clipping, AdamW; nothing is saved or reported."""
    ours = TrainingConfig()
    return {
        "output_dir": str(config.out / "trainer"),
        "max_steps": config.steps,
        "per_device_train_batch_size": config.batch_size,
        "learning_rate": config.learning_rate,
        "lr_scheduler_type": "linear",
        "warmup_steps": max(1, round(ours.warmup * config.steps)),
        "weight_decay": ours.weight_decay,
        "max_grad_norm": ours.max_grad_norm,
        "bf16": config.precision == "bf16",
        "use_cpu": not torch.cuda.is_available(),
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "seed": config.seed,
    }


def _follow(trainer: Any, clock: Clock) -> None:
    """Have the clock told of the stages of a Trainer's steps."""
    from transformers import PrinterCallback, TrainerCallback

    trainer.compute_loss = clock.timed("forward", trainer.compute_loss)
    trainer.accelerator.backward = clock.timed("backward", trainer.accelerator.backward)
    # Clipping, the step itself, and making the gradients zero.
    trainer.accelerator.clip_grad_norm_ = clock.timed(
        "optimizer", trainer.accelerator.clip_grad_norm_
    )

    class Follower(TrainerCallback):
        last = _now()

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            clock.add("data", _now() - self.last)

        def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
            self.last = _now()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            clock.add("optimizer", _now() - self.last)
            clock.step()
            self.last = _now()

        def on_log(self, *_: Any, **given: Any) -> None:
            if "loss" in given["logs"]:
                clock.losses.append(float(given["logs"]["loss"]))
            self.last = _now()

    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(Follower())


def _kind(task: Task) -> Any:
    from transformers import AutoModel, AutoModelForCausalLM

    return AutoModel if isinstance(task, EncoderTask) else AutoModelForCausalLM


def loss_of(task: Task, model: torch.nn.Module, batch_size: int) -> float:
    """Mean loss of the first batches, without dropout."""
    task.build_model()  # which lets the task know the tokenizer
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model.to(device).eval()
    with torch.inference_mode():
        plan = task.plan(batch_size, np.random.default_rng(0))[:HELD_OUT_BATCHES]
        batches = [{k: v.to(device) for k, v in task.batch(rows).items()} for rows in plan]
        found = [float(task.loss(model, batch)) for batch in batches]
    return float(np.mean(found))


def main() -> None:
    """Parse, train, leave what was measured."""
    config = parse(TrainerConfig)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    prepare_process(TrainingConfig(num_threads=config.threads))
    task: Any = load_task(config.task)
    held_out: Any = load_task(config.held_out)
    clock = Clock(config.warm_up)
    if SYSTEMS[config.system] is by_engine:
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    torch.manual_seed(config.seed)
    model = SYSTEMS[config.system](config, task, clock)
    if SYSTEMS[config.system] is by_engine:
        dist.destroy_process_group()  # the held-out examples are read by the first worker alone
    if model is not None:
        found = clock.summary()
        found["loss_before"] = loss_of(held_out, held_out.build_model(), config.batch_size)
        found["loss_after"] = loss_of(held_out, model.float(), config.batch_size)
        (config.out / "result.json").write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    run(main)
