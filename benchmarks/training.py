"""``make bench-training``: our engine beside the plain trainers that a team would write.

The encoder beside ``SentenceTransformerTrainer`` with ``MultipleNegativesRankingLoss``, a decoder
beside ``transformers.Trainer``: the same model, batches in the same order, precision, schedule and
cores, one after the other in every repetition. ``docs/benchmarks.md`` says how and why.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Literal

import torch
from pydantic import Field

from benchmarks.harness.machine import describe, today
from benchmarks.harness.tables import spread, table
from benchmarks.harness.training import (
    DECODER,
    ENCODER,
    Material,
    Sample,
    decoder_material,
    encoder_material,
    rates_table,
    stages_table,
    train,
)
from fusionrec.config import JobConfig, parse
from fusionrec.data.dataset import Dataset
from fusionrec.data.ingest import IngestConfig, ingest
from fusionrec.data.synthetic import SyntheticConfig, generate
from jobs.entry import run

PEERS = {ENCODER: "sentence-transformers", DECODER: "transformers"}
BATCHES = {ENCODER: 32, DECODER: 8}
BOUNDS = {ENCODER: 1.2, DECODER: 1.0}
"""Of our samples/s to the peer's."""
LOSS_BOUND = 1.02
"""Of our held-out loss to the peer's: the same but for what dropout draws."""
PEER_MISSING = (
    "The encoder has no peer here: `pip install 'fusionrec[peers]'` brings sentence-transformers.\n"
)


class TrainingBenchmark(JobConfig):
    """Measure the training engine beside plain trainers."""

    data: Path | None = None
    """Folder with raw data of items with titles; by default the synthetic catalogue."""
    out: Path = Path("artifacts/benchmarks/training")
    """Where tasks, runs, logs and the report go."""
    kinds: tuple[Literal["encoder", "decoder"], ...] = ("encoder", "decoder")
    """What to train."""
    precisions: tuple[Literal["fp32", "bf16"], ...] = ("fp32", "bf16")
    """Arithmetic of the models; a claim is made on the first."""
    threads: int | None = Field(default=None, ge=1)
    """Of the one worker that is compared with the peers; by default the number of cores."""
    workers: tuple[int, ...] = (1, 2)
    """Workers of our engine, with a thread each; more than there are GPUs, or cores where there are
    none, are left out."""
    repetitions: int = Field(default=3, ge=1)
    """Rounds over all systems."""
    steps: int = Field(default=30, ge=3)
    """Optimizer steps of a run."""
    warm_up: int = Field(default=5, ge=1)
    """Of them, at the beginning, those that no time is taken of."""
    learning_rate: float = Field(default=1e-4, gt=0)
    """At its peak, of all systems."""
    seed: int = Field(default=0, ge=0)
    """Of the order of the examples and of dropout."""
    compile: bool = False
    """Measure our engine with compiled layers, too (jobs.finetune --compile)."""
    quick: bool = False
    """One round of a few steps with a tiny decoder: whether it works, not how fast."""


@dataclass(frozen=True, slots=True)
class Claim:
    """A ratio of our engine to the peer, over the repetitions."""

    text: str
    ratios: tuple[float, ...]
    bound: float
    at_least: bool = True

    @property
    def holds(self) -> bool:
        """Whether the median ratio is on the right side."""
        middle = median(self.ratios)
        return middle >= self.bound if self.at_least else middle <= self.bound


def material(config: TrainingBenchmark) -> dict[str, Material]:
    """Tasks by kind, made anew."""
    folder = config.out / "material"
    shutil.rmtree(folder, ignore_errors=True)
    if config.data is None:
        dataset = generate(SyntheticConfig(), folder / "dataset")
    else:
        ingest(IngestConfig(raw=config.data, out=folder / "dataset"))
        dataset = Dataset.open(folder / "dataset")
    found: dict[str, Material] = {}
    if ENCODER in config.kinds:
        found[ENCODER] = encoder_material(dataset, folder)
    if DECODER in config.kinds:
        found[DECODER] = decoder_material(dataset, folder, tiny=config.quick)
    return found


def rounds(config: TrainingBenchmark, made: Material) -> Iterator[Sample]:
    """All repetitions of one kind: engine and peer by turns, then the numbers of workers."""
    cores = len(os.sched_getaffinity(0))
    peer = PEERS[made.kind]
    systems = ["engine", peer] if find_spec(peer.replace("-", "_")) else ["engine"]
    if config.compile:
        systems.insert(1, "compiled")
    threads = config.threads or cores
    contenders = [(system, p, 1, threads) for p in config.precisions for system in systems]
    most = torch.cuda.device_count() or cores
    scaling = [("engine", config.precisions[0], n, 1) for n in config.workers if n <= most]
    contenders += [one for one in scaling if one not in contenders]
    settings = {
        "steps": config.steps,
        "warm-up": config.warm_up,
        "batch-size": BATCHES[made.kind],
        "learning-rate": config.learning_rate,
        "seed": config.seed,
    }
    for repetition in range(config.repetitions):
        for system, precision, workers, each in contenders:
            name = f"{made.kind}-{system}-{precision}-{workers}x{each}"
            folder = config.out / "runs" / name
            shutil.rmtree(folder, ignore_errors=True)
            sample = train(
                made,
                system,
                folder=folder,
                precision=precision,
                workers=workers,
                threads=each,
                repetition=repetition,
                settings=settings,
            )
            shutil.rmtree(folder / "run", ignore_errors=True)
            sys.stdout.write(
                f"{name}: {sample.rate:.1f} samples/s, held-out loss {sample.loss_before:.4f} → "
                f"{sample.loss_after:.4f}\n"
            )
            sys.stdout.flush()
            yield sample


def claims(samples: list[Sample], precision: str) -> list[Claim]:
    """What the engine is held to, as far as the samples tell."""
    found = []
    for kind, peer in PEERS.items():
        whole = [s for s in samples if s.kind == kind and s.precision == precision]
        compared = {s.threads for s in whole if s.system == peer}
        ours, theirs = (
            sorted(
                (
                    s
                    for s in whole
                    if s.system == system and s.workers == 1 and s.threads in compared
                ),
                key=lambda s: s.repetition,
            )
            for system in ("engine", peer)
        )
        pairs = list(zip(ours, theirs, strict=False))
        if not pairs:
            continue
        rates = tuple(a.rate / b.rate for a, b in pairs)
        losses = tuple(a.loss_after / b.loss_after for a, b in pairs)
        found.append(Claim(f"{kind}, {precision}: samples/s to {peer}", rates, BOUNDS[kind]))
        text = f"{kind}, {precision}: held-out loss to {peer}"
        found.append(Claim(text, losses, LOSS_BOUND, at_least=False))
    return found


def write(
    config: TrainingBenchmark, made: dict[str, Material], samples: list[Sample], machine: str
) -> tuple[Path, list[Claim]]:
    """Markdown and raw samples; the Markdown's path and the claims."""
    held = [claim for p in config.precisions for claim in claims(samples, p)]
    text = [
        f"# Training, {today()}\n",
        machine + "\n",
        f"Rounds over all systems: {config.repetitions}; medians of the rounds, [lowest, highest]. "
        f"{config.steps} optimizer steps each, the first {config.warm_up} not timed; ratios are "
        "taken within a round.\n",
        "## Ratios\n",
        table(
            ("ratio", "", "bound", ""),
            [
                (
                    claim.text,
                    spread(claim.ratios, 3),
                    f"{'≥' if claim.at_least else '≤'} {claim.bound:g}",
                    "holds" if claim.holds else "**missed**",
                )
                for claim in held
            ],
        ),
    ]
    if ENCODER in made and not any(s.system == PEERS[ENCODER] for s in samples):
        text.append(PEER_MISSING)
    for kind, one in made.items():
        own = [sample for sample in samples if sample.kind == kind]
        text += [
            f"## {kind.capitalize()}\n",
            f"{one.text}; batches of {BATCHES[kind]} a worker.\n",
            rates_table(own, one.tokens),
            "Where the time of a step goes, in ms, on the first worker:\n",
            stages_table(own),
        ]
    path = config.out / f"training-{today()}.md"
    path.write_text("\n".join(text), encoding="utf-8")
    raw = [asdict(sample) for sample in samples]
    path.with_suffix(".json").write_text(json.dumps(raw, indent=1), encoding="utf-8")
    return path, held[: 2 * len(made)]


def main() -> None:
    """Parse, train, report; exit status 1 where the first precision's claims do not hold."""
    config = parse(TrainingBenchmark)
    if config.quick:
        quick = {"repetitions": 1, "steps": 6, "warm_up": 2, "precisions": config.precisions[:1]}
        config = config.model_copy(update=quick)
    machine = describe()
    made = material(config)
    samples = [sample for one in made.values() for sample in rounds(config, one)]
    path, held = write(config, made, samples, machine)
    sys.stdout.write(f"\n{path.read_text(encoding='utf-8')}\nreport: {path}\n")
    sys.exit(0 if all(claim.holds for claim in held) else 1)


if __name__ == "__main__":
    run(main)
