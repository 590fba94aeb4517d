"""What ``benchmarks.training`` trains on, how it starts its workers, and what it says of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from benchmarks.harness.tables import spread, table
from fusionrec.data.catalogue import Catalogue
from fusionrec.data.dataset import Dataset
from fusionrec.data.histories import Histories
from fusionrec.data.splits import Protocol, split
from fusionrec.data.text import history_texts, item_text, item_texts
from fusionrec.errors import TrainingError
from fusionrec.language.encoder import Encoder
from fusionrec.language.models import DEFAULT_MODEL
from fusionrec.training.examples import Examples
from fusionrec.training.objectives.encoder import EncoderSettings
from fusionrec.training.objectives.pretraining import PretrainingSettings
from fusionrec.training.tasks import save_task
from serve_apps.ingress import free_ports

ENCODER, DECODER = "encoder", "decoder"
HISTORY_TOKENS = 42
"""Mean length of a history's text that the number of its items is chosen for."""
MAX_TOKENS = 64
BLOCK_TOKENS = 256
"""Of an example of the decoder."""
HELD_OUT = 256
"""Pairs whose loss is measured."""
STAGES = ("data", "forward", "backward", "optimizer", "rest")


@dataclass(frozen=True, slots=True)
class Material:
    """A task and what its examples are like."""

    kind: str
    task: Path
    held_out: Path
    tokens: float
    """Mean tokens of an example, padding not counted."""
    text: str
    """Of the report."""


def encoder_material(dataset: Dataset, folder: Path) -> Material:
    """Pairs of a history's titles and a title, each title the answer of one pair only.

    So no negative is a false one, which a plain trainer would not know, and both have one loss.
    """
    plain = dataset.catalogue
    size = len(plain)
    catalogue = replace(plain, texts=("",) * size, categories=((),) * size)
    parts = split(dataset, Protocol.LEAVE_ONE_OUT)
    every = Examples.of(
        parts.train,
        per_user=50,
        limit=200_000,
        generator=np.random.default_rng(0),
        with_text=np.array([bool(title) for title in catalogue.titles]),
    )
    order = np.random.default_rng(1).permutation(len(every))
    titles = np.array([catalogue.titles[code] for code in every.positives[order]])
    once = order[np.sort(np.unique(titles, return_index=True)[1])]
    examples = every.take(np.random.default_rng(2).permutation(once))
    examples = replace(
        examples,
        users=np.arange(len(examples)),
        seen=Histories.of([[code] for code in examples.positives.tolist()]),
    )
    encoder = Encoder.load(DEFAULT_MODEL, device="cpu")
    tokenizer = encoder.tokenizer

    def lengths(texts: list[str]) -> float:
        rows = tokenizer(texts, truncation=True, max_length=MAX_TOKENS)["input_ids"]
        return float(np.mean([len(row) for row in rows]))

    sample = examples.take(np.arange(min(500, len(examples))))
    by_items = {
        count: lengths(history_texts(catalogue, sample.histories, count)) for count in range(1, 13)
    }
    count = min(by_items, key=lambda each: abs(by_items[each] - HISTORY_TOKENS))
    item = lengths([item_text(catalogue, int(code)) for code in sample.positives])
    settings = EncoderSettings(max_tokens=MAX_TOKENS, history_items=count)
    held_out = np.arange(HELD_OUT)
    rest = np.arange(HELD_OUT, len(examples))
    if len(rest) < HELD_OUT:
        raise TrainingError(
            f"data set {dataset.info.name} makes {len(examples)} pairs with different answers, and "
            f"the benchmark needs {2 * HELD_OUT}: bring a larger one"
        )
    places = (folder / "encoder-task", folder / "encoder-held-out")
    for place, chosen in zip(places, (rest, held_out), strict=True):
        save_task(ENCODER, settings, catalogue, examples.take(chosen).newest(count), place)
    return Material(
        ENCODER,
        *places,
        tokens=by_items[count] + item,
        text=f"MiniLM (22.7 million weights), pairs of {by_items[count]:.0f} and {item:.0f} tokens "
        f"on average (titles of {count} items and a title, cut at {MAX_TOKENS})",
    )


def decoder_material(dataset: Dataset, folder: Path, *, tiny: bool) -> Material:
    """Blocks of the catalogue's texts, and a random Llama with a tokenizer of their words."""
    catalogue = dataset.catalogue
    order = np.random.default_rng(0).permutation(len(catalogue))
    cut = len(order) // 10
    size = {"hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 128}
    if not tiny:
        size = {"hidden_size": 512, "num_hidden_layers": 8, "intermediate_size": 1408}
    model = folder / "llama"
    count = write_llama(model, item_texts(catalogue), size)
    settings = PretrainingSettings(encoder=str(model), max_tokens=BLOCK_TOKENS)
    places = (folder / "decoder-task", folder / "decoder-held-out")
    for place, codes in zip(places, (order[cut:], order[:cut]), strict=True):
        save_task("pretraining", settings, _chosen(catalogue, codes.tolist()), None, place)
    return Material(
        DECODER,
        *places,
        tokens=BLOCK_TOKENS,
        text=f"random Llama of {size['num_hidden_layers']} layers, {size['hidden_size']} wide "
        f"({count / 1e6:.1f} million weights), blocks of {BLOCK_TOKENS} tokens",
    )


def _chosen(catalogue: Catalogue, codes: list[int]) -> Catalogue:
    return Catalogue.from_table(catalogue.to_table().take(codes))


def write_llama(folder: Path, texts: list[str], size: Mapping[str, Any]) -> int:
    """A Llama with random weights whose tokenizer has learned from ``texts``; its weights.

    ``size`` is of ``LlamaConfig``; what it leaves out is small.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
    trainer = trainers.BpeTrainer(
        vocab_size=8_000,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer_class: Any = PreTrainedTokenizerFast  # not typed
    fast = tokenizer_class(tokenizer_object=tokenizer, **special)
    torch.manual_seed(0)
    shape: dict[str, Any] = {"num_attention_heads": 8, "num_key_value_heads": 8}
    shape |= {"vocab_size": tokenizer.get_vocab_size(), "max_position_embeddings": BLOCK_TOKENS}
    config = LlamaConfig(bos_token_id=0, eos_token_id=1, pad_token_id=1, **shape | dict(size))
    model: Any = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    fast.save_pretrained(folder)
    return sum(parameter.numel() for parameter in model.parameters())


@dataclass(frozen=True, slots=True)
class Sample:
    """One system in one repetition."""

    kind: str
    system: str
    precision: str
    workers: int
    threads: int
    """Of each worker."""
    repetition: int
    rate: float
    """Examples in a second, over all workers."""
    seconds: float
    """Of a step."""
    cpu_ms: float
    """CPU time of an example on the first worker, all its threads."""
    stages: dict[str, float]
    """Seconds of a step's stages, on the first worker."""
    loss_before: float
    loss_after: float
    """Of the held-out examples, without dropout."""
    losses: tuple[float, ...]
    """Of the steps."""


def train(
    material: Material,
    system: str,
    *,
    folder: Path,
    precision: str,
    workers: int,
    threads: int,
    repetition: int,
    settings: dict[str, Any],
) -> Sample:
    """Run the workers of one system; their messages go to a log beside the result.

    Raises:
        TrainingError: one failed; the log says why.
    """
    folder.mkdir(parents=True)
    words = {"system": system, "task": material.task, "held-out": material.held_out, "out": folder}
    words |= {"threads": threads, "precision": precision} | settings
    arguments = [word for key, value in words.items() for word in (f"--{key}", str(value))]
    (port,) = free_ports(1)
    shared = {"WORLD_SIZE": workers, "LOCAL_WORLD_SIZE": workers, "MASTER_ADDR": "127.0.0.1"}
    shared |= {"MASTER_PORT": port, "OMP_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "false"}
    if torch.cuda.is_available():
        # A plain trainer would spread one batch over all that it sees.
        seen = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(99)))
        shared |= {"CUDA_VISIBLE_DEVICES": ",".join(seen.split(",")[:workers])}
    processes = []
    for rank in range(workers):
        own = {key: str(value) for key, value in (shared | {"RANK": rank}).items()}
        with (folder / f"log-{rank}.txt").open("wb") as log:
            processes.append(
                subprocess.Popen(
                    [sys.executable, "-m", "benchmarks.peers.trainer", *arguments],
                    env=os.environ | own | {"LOCAL_RANK": str(rank)},
                    stdout=log,
                    stderr=subprocess.STDOUT,
                )
            )
    try:
        status = [process.wait(timeout=1800) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    if any(status):
        raise TrainingError(f"{system} failed: its reason stands in {folder}/log-*.txt")
    found = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    return Sample(
        kind=material.kind,
        system=system,
        precision=precision,
        workers=workers,
        threads=threads,
        repetition=repetition,
        rate=settings["batch-size"] * workers / found["seconds_a_step"],
        seconds=found["seconds_a_step"],
        cpu_ms=found["cpu_seconds_a_step"] / settings["batch-size"] * 1e3,
        stages=found["stages"],
        loss_before=found["loss_before"],
        loss_after=found["loss_after"],
        losses=tuple(found["losses"]),
    )


def rates_table(samples: Sequence[Sample], tokens: float) -> str:
    """A row for each system, precision and number of workers."""
    rows = []
    for name, cell in by_system(samples).items():
        rates = [sample.rate for sample in cell]
        rows.append(
            (
                *name,
                spread(rates, 1),
                spread([rate * tokens for rate in rates], 0),
                spread([sample.cpu_ms for sample in cell], 1),
                f"{cell[0].loss_before:.4f}",
                spread([sample.loss_after for sample in cell], 4),
                f"{median(sample.losses[-1] for sample in cell):.4f}",
            )
        )
    columns = ("system", "precision", "workers × threads", "samples/s", "tokens/s")
    losses = ("held-out loss before", "after", "loss of the last step")
    return table((*columns, "CPU ms a sample", *losses), rows)


def stages_table(samples: Sequence[Sample]) -> str:
    """Milliseconds of a step, by stage."""

    def cell(found: Sequence[Sample], value: Callable[[Sample], float]) -> str:
        return f"{median(value(sample) for sample in found) * 1e3:.0f}"

    rows = [
        (
            *name,
            *(cell(found, lambda s, stage=stage: s.stages.get(stage, 0.0)) for stage in STAGES),  # type: ignore[misc]
            cell(found, lambda s: s.seconds),
        )
        for name, found in by_system(samples).items()
    ]
    return table(("system", "precision", "workers × threads", *STAGES, "step, ms"), rows)


def by_system(samples: Sequence[Sample]) -> dict[tuple[str, str, str], list[Sample]]:
    """Samples by system, precision, and workers × threads."""
    found: dict[tuple[str, str, str], list[Sample]] = {}
    for sample in samples:
        name = (sample.system, sample.precision, f"{sample.workers} × {sample.threads}")
        found.setdefault(name, []).append(sample)
    return found
