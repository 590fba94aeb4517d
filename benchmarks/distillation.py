"""What small language models keep of a large one, and at which cost, from raw files.

A cross-encoder of all layers is fine-tuned on fused lists and teaches smaller ones: a cross-encoder
of a few layers and an encoder of as many. Beside them stand equally small models that learned from
the same examples without it, and what they started from; then the teacher with fewer layers, taught
again, and in int8; a decoder that reads whole lists, shown in several orders; and the encoder's
options on the same pairs. ``docs/benchmarks.md`` says more.

Every step leaves its result behind, and the same command goes on after the last whole one.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from benchmarks.harness.command import command_of, run_job
from benchmarks.harness.distilling import MODELS, TEACHER, Findings, report, served
from benchmarks.harness.encoders import OPTIONS, semantic_ndcg
from benchmarks.harness.heads import Heads, Reading
from benchmarks.harness.machine import describe, today
from benchmarks.harness.orders import PROMPT_TOKENS, Ordered, ordered, write_decoder
from benchmarks.harness.reranking import best_weight
from fusionrec.config import JobConfig, parse
from fusionrec.data.dataset import Dataset
from fusionrec.data.ingest import IngestConfig, ingest
from fusionrec.data.splits import Protocol, Split, split
from fusionrec.data.text import item_texts
from fusionrec.evaluation.significance import BootstrapConfig
from fusionrec.fusion.model import Fusion
from fusionrec.language.inference import has_bf16, pick_device
from fusionrec.language.models import DEFAULT_MODEL
from fusionrec.language.precision import Precision
from fusionrec.language.reranker import Reranker, RerankerConfig
from fusionrec.serving.pipeline import Pipeline, Stage
from jobs.entry import run
from jobs.fit import FitConfig, fit
from jobs.installed import install
from jobs.optimise import OptimiseConfig, optimise
from jobs.prune import Pruning
from tuning.fusion import FusionCampaign, campaign
from tuning.learned import FusionModel

K = 10


class DistillationBenchmark(JobConfig):
    """Measure distillation, pruning, int8 and the encoder's options on one data set."""

    data: Path
    """Folder with raw data, in any format that jobs.ingest reads."""
    out: Path = Path("artifacts/benchmarks/distillation")
    """Where runs, pipelines and the report go, in a folder of the data's name."""
    minutes: float | None = Field(default=None, gt=0)
    """Begin no step after so many; the same command goes on then. By default all are taken."""
    encoder: str = DEFAULT_MODEL
    """What is fine-tuned."""
    first_pairs: int = Field(default=4096, ge=2)
    """Pairs that it learns from first, by InfoNCE: teacher and students start from what comes of
    it, since some hundred lists alone teach a cross-encoder nothing."""
    student_layers: int = Field(default=2, ge=1)
    """Layers of the small models."""
    pruned_layers: int = Field(default=4, ge=1)
    """Layers that are left of the teacher when it is pruned."""
    lists: int = Field(default=800, ge=1)
    """Lists that teacher, students and decoder are trained on."""
    num_negatives: int = Field(default=4, ge=1)
    """Hard negatives of each, from the fused candidates."""
    epochs: int = Field(default=1, ge=1)
    """Passes over the lists, of teacher and students alike."""
    pairs: int = Field(default=2048, ge=2)
    """Pairs that the encoder is trained on under each of its options."""
    dimensions: tuple[int, ...] = (128, 64, 32)
    """Beginnings of the encoder's vectors that are measured, and trained by Matryoshka."""
    history_items: int = Field(default=2, ge=1)
    """Newest items that every model reads of a history."""
    max_tokens: int = Field(default=48, ge=8)
    """Tokens of a text, or of a pair of texts."""
    decoder_width: int = Field(default=256, ge=8)
    """Of the random decoder of four layers that reads lists."""
    ordered: int = Field(default=100, ge=2)
    """Test lists that it is shown in several orders."""
    max_cases: int = Field(default=200, ge=20)
    """Validation cases on which jobs.prune and jobs.optimise compare."""
    trials: int = Field(default=100, ge=1)
    """Trials of the search of the fusion."""
    draws: int = Field(default=2000, ge=100)
    """Bootstrap resamples."""
    seed: int = Field(default=0, ge=0)
    """Of everything."""
    quick: bool = False
    """Few examples and trials: whether it works, not what it brings."""


class Bench:
    """One data set, leave-one-out."""

    def __init__(self, config: DistillationBenchmark) -> None:
        self._config = config
        self.folder = config.out / config.data.resolve().name
        self._begin()
        fast = has_bf16(pick_device(None))
        self._precision = Precision.BF16 if fast else Precision.FP32
        self._pipeline, self._compressed = self.folder / "pipeline", self.folder / "compressed"

    def _begin(self) -> None:
        """Forget what was found with other settings."""
        config = self._config.model_dump(mode="json", exclude={"minutes", "out"})
        known = self.folder / "settings.json"
        if not known.is_file() or json.loads(known.read_text(encoding="utf-8")) != config:
            shutil.rmtree(self.folder, ignore_errors=True)
            (self.folder / "steps").mkdir(parents=True)
            known.write_text(json.dumps(config), encoding="utf-8")

    def steps(self) -> Iterator[tuple[str, Callable[[], object]]]:
        """By name, in their order; each returns what JSON can hold, or nothing."""
        teach = partial(self._finetune, pipeline=self._pipeline, learning_rate=2e-4, batch_size=8)
        small = self._model("untaught")
        distil = partial(teach, task="distillation", encoder=small, teacher=self._model("teacher"))
        pairs, whole = self._config.first_pairs, self._config.encoder
        yield "sources", self._sources
        yield "first", partial(self._train_encoder, "first", pairs, encoder=whole)
        yield "small", self._small
        yield "teacher", partial(teach, "teacher", task="reranker", encoder=self._model("first"))
        yield f"read {TEACHER}", partial(self._read, TEACHER)
        yield "student", partial(teach, "student", task="reranker", encoder=small)
        for loss in ("margin-mse", "kl"):
            yield f"student-{loss}", partial(distil, f"student-{loss}", distillation_loss=loss)
        yield "encoder", partial(self._train_encoder, "encoder", self._config.lists, batch_size=16)
        own = {"encoder": self._model("small"), "student": "encoder", "learning_rate": 1e-4}
        yield "encoder-kl", partial(distil, "encoder-kl", distillation_loss="kl", **own)
        yield "pruned", self._pruned
        healing = {"encoder": self._model("pruned"), "pipeline": self._compressed}
        yield "healed", partial(distil, "healed", **healing)
        yield "int8", self._int8
        for name in [name for name in MODELS if name != TEACHER]:
            yield f"read {name}", partial(self._read, name)
        yield "orders", self._orders
        for name, settings in OPTIONS.items():
            yield f"option-{name}", partial(self._option, name, settings)
        yield "option-untouched", partial(self._semantic, self._model("plain"))

    def run(self) -> Path | None:
        """Take the steps that are left; the report, or nothing where time ran out before."""
        began = time.perf_counter()
        machine = self.folder / "machine.txt"
        if not machine.is_file():
            machine.write_text(describe(), encoding="utf-8")
        for name, step in self.steps():
            place = self.folder / "steps" / f"{name}.json"
            if place.is_file():
                continue
            minutes = (time.perf_counter() - began) / 60
            if self._config.minutes is not None and minutes > self._config.minutes:
                return None
            start = time.perf_counter()
            found = step()
            seconds = time.perf_counter() - start
            place.write_text(json.dumps({"seconds": seconds, "found": found}), encoding="utf-8")
        path = self.folder / f"distillation-{today()}.md"
        path.write_text(self._report(), encoding="utf-8")
        return path

    def _model(self, name: str) -> Path:
        return self.folder / name / "model"

    @cached_property
    def _dataset(self) -> Dataset:
        return Dataset.open(self.folder / "dataset")

    @cached_property
    def _parts(self) -> Split:
        return split(self._dataset, Protocol.LEAVE_ONE_OUT)

    @cached_property
    def _heads(self) -> tuple[Heads, Heads]:
        """Of validation and test."""
        stages = frozenset({Stage.EMBEDDER, Stage.RETRIEVER})
        pipeline = Pipeline.load(self._pipeline, stages=stages)
        return Heads(pipeline, self._parts.validation), Heads(pipeline, self._parts.test)

    def _sources(self) -> None:
        config, place = self._config, self._pipeline
        ingest(IngestConfig(raw=config.data, out=self.folder / "dataset"))
        settings = FitConfig(dataset=self.folder / "dataset", pipeline=place, prepare=True)
        fit(settings)
        given = {"history_items": config.history_items, "max_tokens": config.max_tokens}
        run_job("jobs.embed", pipeline=place, encoder=config.encoder, **given)
        fit(settings.model_copy(update={"prepare": False}))
        campaign(
            FusionCampaign(
                pipeline=place,
                dataset=self.folder / "dataset",
                out=self.folder / "campaign",
                trials=config.trials,
                seed=config.seed,
                model=FusionModel.LINEAR,
            )
        )

    def _small(self) -> None:
        """Encoders of few layers of the one that was published and of the one that learned first.

        And with a random head, the cross-encoder of these.
        """
        config = self._config
        self._prune("encoder", self._pipeline, "plain", config.student_layers)
        learned = self.folder / "learned"  # pruning looks at the encoder alone
        shutil.copytree(self._pipeline, learned, dirs_exist_ok=True)
        install(self._model("first"), learned / "encoder")
        self._prune("encoder", learned, "small", config.student_layers)
        started = Reranker.load(self._model("small"), seed=config.seed, precision=Precision.FP32)
        settings = RerankerConfig(
            model=config.encoder, max_tokens=config.max_tokens, history_items=config.history_items
        )
        Reranker(started.model, started.tokenizer, settings).save(self._model("untaught"))

    def _prune(self, model: str, pipeline: Path, out: str, num_layers: int) -> None:
        run_job(
            "jobs.prune",
            model=model,
            pipeline=pipeline,
            dataset=self.folder / "dataset",
            out=self.folder / out,
            num_layers=num_layers,
            compared_cases=20,
            max_cases=self._config.max_cases,
            seed=self._config.seed,
        )

    def _finetune(self, name: str, **settings: object) -> None:
        """Into the folder ``name``; on as many lists as there are unless told otherwise."""
        config = self._config
        given: dict[str, object] = {
            "dataset": self.folder / "dataset",
            "out": self.folder / name,
            "max_examples": config.lists,
            "examples_per_user": 50,
            "epochs": config.epochs,
            "history_items": config.history_items,
            "max_tokens": config.max_tokens,
            "precision": self._precision,
            "seed": config.seed,
        }
        if "pipeline" in settings:
            given["num_negatives"] = config.num_negatives
        run_job("jobs.finetune", **given | settings)

    def _train_encoder(self, name: str, pairs: int, **settings: object) -> None:
        """The small one, by InfoNCE."""
        given: dict[str, object] = {
            "task": "encoder",
            "encoder": self._model("small"),
            "max_examples": pairs,
            "popularity_correction": True,
        }
        self._finetune(name, **given | settings)

    def _pruned(self) -> None:
        """On a copy of the pipeline that has the teacher.

        It has the best single weight on validation there, whatever the gate says: without any
        nothing could be compared.
        """
        shutil.copytree(self._pipeline, self._compressed, dirs_exist_ok=True)
        install(self._model("teacher"), self._compressed / "reranker")
        fusion = Fusion.load(self._compressed / "fusion.json")
        scores = self._reading(TEACHER, 0)[0].scores
        weight = {"reranker": best_weight(self._heads[0].lists(scores), K)}
        segments = [each.model_copy(update=weight) for each in fusion.segments]
        fusion = fusion.model_copy(update={"segments": tuple(segments)})
        fusion.save(self._compressed / "fusion.json")
        self._prune("reranker", self._compressed, "pruned", self._config.pruned_layers)

    def _int8(self) -> list[list[Any]]:
        """What ``jobs.optimise`` chose for the pruned model, taught again, and the encoder."""
        config = OptimiseConfig(
            pipeline=self._compressed,
            dataset=self.folder / "dataset",
            max_cases=self._config.max_cases,
            precision="int8",
            seed=self._config.seed,
        )
        return [served(each) for each in optimise(config)]

    def _read(self, name: str) -> dict[str, float]:
        model = replace(MODELS[name], folder=self._model(str(MODELS[name].folder)))
        loaded = model.load()
        readings = [heads.read(loaded) for heads in self._heads]
        place = self.folder / "readings"
        place.mkdir(exist_ok=True)
        np.savez(place / f"{name}.npz", validation=readings[0].scores, test=readings[1].scores)
        return {"weights": model.num_weights, "mib": model.mib, "ms": readings[1].ms}

    def _orders(self) -> list[dict[str, Any]]:
        config, model = self._config, self.folder / "llama"
        write_decoder(model, item_texts(self._dataset.catalogue), config.decoder_width)
        self._finetune(
            "decoder",
            task="decoder",
            encoder=model,
            pipeline=self._pipeline,
            num_negatives=19,
            max_tokens=PROMPT_TOKENS,
            batch_size=8,
            learning_rate=1e-3,
        )
        found = ordered(model, self._model("decoder"), self._heads[1], config.ordered, K)
        return [each.model_dump(mode="json") for each in found]

    def _option(self, name: str, settings: Mapping[str, object]) -> object:
        own = dict(settings)
        if "dimensions" in own:
            own["dimensions"] = self._config.dimensions
        plain = self._model("plain")
        self._train_encoder(f"option-{name}", self._config.pairs, encoder=plain, **own)
        return self._semantic(self._model(f"option-{name}"))

    def _semantic(self, model: Path) -> object:
        return semantic_ndcg(
            model, self._dataset, self._parts, self._config.dimensions, self._config.history_items
        )

    def _report(self) -> str:
        config = self._config
        steps = {
            name: json.loads((self.folder / "steps" / f"{name}.json").read_text(encoding="utf-8"))
            for name, _ in self.steps()
        }
        found = {name: step["found"] for name, step in steps.items()}
        findings = Findings(
            heads=self._heads,
            fusion=Fusion.load(self._pipeline / "fusion.json"),
            readings={name: self._reading(name, found[f"read {name}"]["ms"]) for name in MODELS},
            pruning=Pruning.model_validate_json(
                (self.folder / "pruned" / "pruning.json").read_bytes()
            ),
            chosen=found["int8"],
            orders=[Ordered.model_validate(each) for each in found["orders"]],
            options={name: found[f"option-{name}"] for name in ("untouched", *OPTIONS)},
            sizes={name: found[f"read {name}"] for name in MODELS},
            seconds={name: step["seconds"] for name, step in steps.items()},
            bootstrap=BootstrapConfig(draws=config.draws, seed=config.seed),
            seed=config.seed,
            k=K,
        )
        machine = (self.folder / "machine.txt").read_text(encoding="utf-8")
        shown = config.model_copy(update={"minutes": None})
        return (
            f"# Distillation on {config.data.resolve().name}, {today()}\n\n{machine}\n\n"
            f"`{command_of('benchmarks.distillation', shown)}`, leave-one-out, trained in "
            f"{self._precision}: teacher and students on the same {config.lists:,} lists of one "
            f"positive and {config.num_negatives} hard negatives, {config.epochs} × over. All "
            f"start from the encoder after {config.first_pairs:,} pairs of InfoNCE; small means "
            f"the {config.student_layers} layers that `jobs.prune` leaves of it, *before* that "
            "these have read no lists. NDCG@10 of the encoders is that of the "
            "cosines.\n\n" + report(findings)
        )

    def _reading(self, name: str, ms: float) -> tuple[Reading, Reading]:
        with np.load(self.folder / "readings" / f"{name}.npz", allow_pickle=False) as kept:
            return Reading(kept["validation"], ms), Reading(kept["test"], ms)


def main() -> None:
    """Parse, take the steps, print the report."""
    config = parse(DistillationBenchmark)
    if config.quick:
        quick = {
            "first_pairs": 128,
            "lists": 16,
            "pairs": 128,
            "trials": 10,
            "max_cases": 20,
            "decoder_width": 64,
        }
        config = config.model_copy(update=quick)
    path = Bench(config).run()
    if path is None:
        sys.stdout.write("unfinished: the same command goes on\n")
        return
    sys.stdout.write(f"{path.read_text(encoding='utf-8')}\nreport: {path}\n")


if __name__ == "__main__":
    run(main)
