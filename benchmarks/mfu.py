"""Model FLOPs utilisation of the engine on GPUs: a decoder from a random config, full and LoRA.

::

    python -m benchmarks.mfu --size 1b --batch-size 8 --length 2048
    python -m torch.distributed.run --nproc-per-node 8 -m benchmarks.mfu --zero-stage 2 …

Without Ray: the engine is called as under torchrun. FLOPs are those of
:mod:`benchmarks.harness.flops`; the texts are the synthetic catalogue's, without padding. Exit
status 1 where full fine-tuning at 2,048 tokens or more stays below 45% of the peak.
"""

from __future__ import annotations

import gc
import json
import os
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from pydantic import Field

from benchmarks.harness.flops import Counted, count, peak_of
from benchmarks.harness.machine import describe, today
from benchmarks.harness.processes import free_port
from benchmarks.harness.tables import table
from benchmarks.harness.training import write_llama
from fusionrec.config import JobConfig, parse
from fusionrec.data.dataset import Dataset
from fusionrec.data.synthetic import SyntheticConfig, generate
from fusionrec.data.text import item_texts
from fusionrec.errors import ConfigError, TrainingError
from fusionrec.training.config import Method, TrainingConfig
from fusionrec.training.engine import train
from fusionrec.training.loads import load_of
from fusionrec.training.memory import estimate
from fusionrec.training.objectives.pretraining import PretrainingSettings, PretrainingTask
from fusionrec.training.process import prepare_process
from fusionrec.training.tracking import Report
from fusionrec.training.weights import with_adapters
from jobs.entry import run

BOUND = 0.45
"""Of the peak, in full fine-tuning at BOUND_LENGTH tokens or more."""
BOUND_LENGTH = 2048
SIZES: dict[str, dict[str, Any]] = {
    "tiny": {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 128,
    },
    "0.5b": {
        "hidden_size": 896,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "intermediate_size": 4864,
        "vocab_size": 151_936,
        "tie_word_embeddings": True,
    },
    "1b": {
        "hidden_size": 2048,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": 8192,
        "vocab_size": 128_256,
        "tie_word_embeddings": True,
    },
    "1.5b": {
        "hidden_size": 1536,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "intermediate_size": 8960,
        "vocab_size": 151_936,
        "tie_word_embeddings": True,
    },
}
"""Shapes of a Llama: those of Qwen2.5-0.5B, Llama-3.2-1B and Qwen2.5-1.5B, and one for a try."""


class MfuBenchmark(JobConfig):
    """Measure model FLOPs utilisation."""

    out: Path = Path("artifacts/benchmarks/mfu")
    """Where model, runs and the report go; about 25 bytes of disk a weight."""
    size: Literal["tiny", "0.5b", "1b", "1.5b"] = "1b"
    """Of the decoder."""
    methods: tuple[Literal["full", "lora"], ...] = ("full", "lora")
    """What is trained, one after the other."""
    batch_size: int = Field(default=8, ge=1)
    """Texts of a forward pass of one worker."""
    length: int = Field(default=2048, ge=16)
    """Tokens of each."""
    accumulation: int = Field(default=1, ge=1)
    """Forward passes of a step."""
    zero_stage: int = Field(default=1, ge=1, le=3)
    """DeepSpeed ZeRO."""
    activation_checkpointing: bool = False
    """Whether layers are computed again; what that takes counts as no model FLOPs."""
    steps: int = Field(default=20, ge=2)
    """Optimizer steps of each run."""
    warm_up: int = Field(default=5, ge=1)
    """Of them, at the beginning, those that no time is taken of."""
    peak_tflops: float | None = Field(default=None, gt=0)
    """Dense bf16 peak of one device, 10^12 FLOPs a second; by default, by the GPU's name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One run."""

    method: str
    workers: int
    parameters: int
    trained: int
    flops_a_token: int
    tokens_per_s: float
    """Of all workers."""
    mfu: float | None
    """Of all devices' peak; nothing where that is not known."""
    peak_memory: int
    """Bytes of the worker that took most."""
    estimate: int
    """The preflight's."""


def material(config: MfuBenchmark) -> PretrainingTask:
    """Texts, and the model, which the first worker makes.

    Raises:
        TrainingError: there are too few texts for a batch.
    """
    model, data = config.out / "model", config.out / "dataset"
    batches = dist.get_world_size() * config.accumulation
    tokens = batches * config.batch_size * config.length
    if dist.get_rank() == 0:
        shutil.rmtree(config.out, ignore_errors=True)
        # A text has some 30 tokens; no more events than there must be.
        items = min(100_000, max(500, tokens // 15))
        dataset = generate(SyntheticConfig(num_users=50, num_items=items), data)
        size = SIZES[config.size] | {"max_position_embeddings": config.length}
        write_llama(model, item_texts(dataset.catalogue), size)
    dist.barrier()
    task = PretrainingTask(_settings(config), Dataset.open(data).catalogue)
    task.head = ()  # adapters alone are trained, as those of a decoder that ranks
    plan = task.plan(config.batch_size, np.random.default_rng(0))
    if len(plan) < batches or len(plan[0]) < config.batch_size:
        raise TrainingError(
            f"the synthetic catalogue does not fill a step of {tokens:,} tokens: set a smaller "
            "--batch-size or --accumulation"
        )
    return task


def measure(config: MfuBenchmark, task: PretrainingTask, method: str) -> Cell:
    """Train with the engine, and count."""
    training = TrainingConfig(
        method=Method(method),
        zero_stage=config.zero_stage,
        activation_checkpointing=config.activation_checkpointing,
        epochs=1_000_000,
        max_steps=config.steps,
        batch_size=config.batch_size,
        accumulation=config.accumulation,
        checkpoint_every=config.steps,
        keep_checkpoints=1,
        report_every=1,
        trackers=(),
    )
    ends: list[float] = []

    def on_report(_: Report) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # what the step has left to do counts as its own
        ends.append(time.perf_counter())

    workers = dist.get_world_size()
    result = train(task, training, config.out / "runs" / method, on_report=on_report)
    timed = result.examples * config.length * (config.steps - config.warm_up) // config.steps
    rate = timed / (ends[-1] - ends[config.warm_up - 1])
    counted, parameters, trained = weights_of(config.out / "model", training)
    load = load_of("pretraining", _settings(config), config.batch_size, 0)
    need = estimate(config.out / "model", load, training, num_workers=workers)
    flops, peak = counted.a_token(config.length), _peak(config)
    return Cell(
        method=method,
        workers=workers,
        parameters=parameters,
        trained=trained,
        flops_a_token=flops,
        tokens_per_s=rate,
        mfu=None if peak is None else rate * flops / (peak * workers),
        peak_memory=result.peak_memory_bytes,
        estimate=need.peak,
    )


def weights_of(folder: Path, config: TrainingConfig) -> tuple[Counted, int, int]:
    """What is counted of the model of ``folder``; its parameters, and those that are trained."""
    from transformers import AutoConfig, AutoModelForCausalLM

    class Headless:
        head = ()

    with torch.device("meta"):
        bare: Any = AutoModelForCausalLM
        model = bare.from_config(AutoConfig.from_pretrained(folder))
        model.tie_weights()
        model = with_adapters(model, Headless(), config)
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return count(model), sum(n for n, _ in sizes), sum(n for n, on in sizes if on)


def text(config: MfuBenchmark, cells: Sequence[Cell], machine: str) -> str:
    """The report."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    peak = _peak(config)
    known = "not known" if peak is None else f"{peak / 1e12:,.1f} · 10^12 FLOPs/s in dense bf16"
    again = ", layers computed again" if config.activation_checkpointing else ""
    rows = [
        (
            cell.method,
            f"{cell.trained / 1e6:,.1f} of {cell.parameters / 1e6:,.1f}",
            f"{cell.flops_a_token / 1e9:,.2f}",
            f"{cell.tokens_per_s:,.0f}",
            "–" if cell.mfu is None else f"{cell.mfu:.1%}",
            f"{cell.peak_memory / 1e9:.2f}",
            f"{cell.estimate / 1e9:.2f}",
            f"{cell.peak_memory / cell.estimate:.2f}",
        )
        for cell in cells
    ]
    head = ("method", "million weights trained", "10^9 FLOPs a token", "tokens/s", "MFU")
    memory = ("peak memory, GB", "estimated, GB", "measured / estimated")
    return "\n".join(
        [
            f"# Model FLOPs utilisation, {today()}\n",
            f"{machine}\n",
            f"Device: {device}, peak {known}; {cells[0].workers} of them.\n",
            f"Llama {config.size} from a random config, causal language modelling: "
            f"{config.batch_size} texts of {config.length} tokens a forward pass, "
            f"{config.accumulation} of these a step, ZeRO {config.zero_stage}{again}. "
            f"{config.steps} steps, the first {config.warm_up} not timed. FLOPs of a token: 6 for "
            "each weight that it is multiplied with, 4 where the weight is frozen, and "
            "12 · layers · heads · head dimension · length (PaLM, appendix B).\n",
            table((*head, *memory), rows),
        ]
    )


def holds(config: MfuBenchmark, cells: Sequence[Cell]) -> bool:
    """Whether full fine-tuning of long texts reaches the bound, as far as it was measured."""
    if config.length < BOUND_LENGTH:
        return True
    return all(c.mfu is None or c.mfu >= BOUND for c in cells if c.method == "full")


def _settings(config: MfuBenchmark) -> PretrainingSettings:
    return PretrainingSettings(encoder=str(config.out / "model"), max_tokens=config.length)


def _peak(config: MfuBenchmark) -> float | None:
    if config.peak_tflops is not None:
        return config.peak_tflops * 1e12
    return peak_of(torch.cuda.get_device_name()) if torch.cuda.is_available() else None


def _begin() -> None:
    """Join the workers that torchrun started, or be the only one."""
    if not dist.is_torchelastic_launched():
        alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
        os.environ |= alone | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    prepare_process(TrainingConfig())
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")


def main() -> None:
    """Parse, train, report; exit status 1 where the claim does not hold."""
    config = parse(MfuBenchmark)
    if config.warm_up >= config.steps:
        raise ConfigError(
            f"setting warm_up = {config.warm_up} is wrong: no step is timed; set it below "
            f"--steps {config.steps}"
        )
    machine = describe()
    _begin()
    try:
        task = material(config)
        cells = []
        for method in config.methods:
            cells.append(measure(config, task, method))
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        first = dist.get_rank() == 0
    finally:
        dist.destroy_process_group()
    if first:
        path = config.out / f"mfu-{today()}.md"
        path.write_text(text(config, cells, machine), encoding="utf-8")
        raw = json.dumps([asdict(cell) for cell in cells], indent=1)
        path.with_suffix(".json").write_text(raw, encoding="utf-8")
        sys.stdout.write(f"{path.read_text(encoding='utf-8')}\nreport: {path}\n")
    sys.exit(0 if holds(config, cells) else 1)


if __name__ == "__main__":
    run(main)
