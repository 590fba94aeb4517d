"""Drop layers of a pipeline's encoder or reranker that change what it says least.

::

    python -m jobs.prune --model reranker --num-layers 4 --pipeline PIPELINE --dataset DIR --out RUN
    python -m jobs.finetune --task distillation --encoder RUN/model --teacher PIPELINE/reranker …

The smaller model is left in ``RUN/model``, and ``RUN/pruning.json`` tells which layers went, how
like the whole model it still is, and for a reranker NDCG@10 and time of the served list with both.
A reranker that keeps 99.5% of NDCG@10 is put into the pipeline; one that does not is taught again
by the whole one, as above. An encoder goes on with ``jobs.finetune --task encoder --encoder
RUN/model`` or straight to ``jobs.embed --encoder RUN/model``. The gate compares the bundle that
comes of it.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import Field

from fusionrec.bundles.gate import KEPT
from fusionrec.config import Config, JobConfig, parse
from fusionrec.data.dataset import Dataset
from fusionrec.data.histories import BoolArray, FloatArray
from fusionrec.data.splits import Cases, split
from fusionrec.data.text import history_texts, item_text
from fusionrec.errors import ConfigError
from fusionrec.language.encoder import ITEM_TOWER, Encoder, has_two_towers
from fusionrec.language.precision import Precision
from fusionrec.language.pruning import Dropped, drop_layers
from fusionrec.language.rankers import AnyReranker, load_reranker
from fusionrec.progress import bar, console
from fusionrec.serving.pipeline import Pipeline
from jobs.entry import run
from jobs.installed import install
from jobs.optimise import Served, measure


class PruneConfig(JobConfig):
    """Drop layers of a pipeline's encoder or reranker."""

    pipeline: Path
    """Directory that jobs.fit and the jobs after it wrote."""
    dataset: Path
    """The data set that it was fitted on."""
    model: Literal["encoder", "reranker"]
    """Which of its models loses layers."""
    num_layers: int = Field(ge=1)
    """Layers that are left."""
    out: Path
    """Directory for the smaller model and pruning.json; what is there is replaced."""
    compared_cases: int = Field(default=50, ge=2)
    """Validation histories whose vectors or lists the smaller models are compared on."""
    max_cases: int = Field(default=300, ge=20)
    """Validation cases that a reranker's NDCG@10 is measured on; more are sampled."""
    seed: int = Field(default=0, ge=0)
    """Seed of the samples."""


class Pruning(Config):
    """What was found; ``pruning.json``."""

    dropped: tuple[Dropped, ...]
    """In the order they went; of two towers, first those of the histories'."""
    before: Served | None = None
    """With the whole reranker, in float32; null of an encoder."""
    after: Served | None = None

    @property
    def kept(self) -> bool:
        """Whether the quality of the served list is kept."""
        if self.before is None or self.after is None:
            return False
        return self.after.ndcg >= KEPT * self.before.ndcg


def prune(config: PruneConfig) -> Pruning:
    """Drop, measure, write, and install a reranker that is as good.

    Raises:
        ConfigError: the pipeline has no such model, fewer layers, or was fitted on other data.
        ModelError: the model's architecture has no list of layers.
    """
    dataset = Dataset.open(config.dataset)
    pipeline = Pipeline.load(config.pipeline)
    pipeline.config.refuse_other_data(dataset, config.pipeline)
    folder = config.pipeline / config.model
    if not folder.is_dir():
        raise ConfigError(f"setting model = {config.model} is wrong: {config.pipeline} has none")
    if config.model == "reranker" and not any(s.reranker > 0 for s in pipeline.fusion.segments):
        raise ConfigError(
            f"--pipeline {config.pipeline} gives its reranker no weight, so that nothing can be "
            "measured of it: weigh it with `python -m tuning.reranking` first"
        )
    cases = split(dataset, pipeline.config.protocol).validation
    place = config.out / "model"
    shutil.rmtree(place, ignore_errors=True)
    if config.model == "encoder":
        pruning = Pruning(dropped=tuple(_prune_encoder(config, pipeline, cases, place)))
    else:
        pruning = _prune_reranker(config, pipeline, cases, place)
    text = pruning.model_dump_json(indent=1) + "\n"
    (config.out / "pruning.json").write_text(text, encoding="utf-8")
    return pruning


def _prune_encoder(
    config: PruneConfig, pipeline: Pipeline, cases: Cases, place: Path
) -> list[Dropped]:
    """Each tower is compared on what it reads; one tower on both."""
    folder, catalogue = config.pipeline / "encoder", pipeline.catalogue
    histories = cases.sample(config.compared_cases, config.seed).histories
    generator = np.random.default_rng(config.seed)
    chosen = generator.permutation(len(catalogue))[: config.compared_cases]
    items = [item_text(catalogue, int(code)) for code in chosen]
    encoder = _whole_encoder(folder)
    asked = history_texts(catalogue, histories, encoder.config.history_items)
    if not has_two_towers(folder):
        return _drop_encoder_layers(config, encoder, [*asked, *items], place)
    dropped = _drop_encoder_layers(config, encoder, asked, place)
    tower = _whole_encoder(folder, items=True)
    return dropped + _drop_encoder_layers(config, tower, items, place / ITEM_TOWER)


def _whole_encoder(folder: Path, *, items: bool = False) -> Encoder:
    return Encoder.load(folder, precision=Precision.FP32, items=items)


def _drop_encoder_layers(
    config: PruneConfig, encoder: Encoder, texts: Sequence[str], place: Path
) -> list[Dropped]:
    """The likeness is the mean cosine of the texts' vectors."""
    whole = encoder.encode(texts)
    told = np.linalg.norm(whole, axis=1) > 0

    def likeness() -> float:
        return float((encoder.encode(texts) * whole).sum(axis=1)[told].mean())

    return _drop(config, encoder, likeness, place)


def _prune_reranker(config: PruneConfig, pipeline: Pipeline, cases: Cases, place: Path) -> Pruning:
    """The likeness is the mean correlation of the scores of a list."""
    pipeline.reranker = reranker = load_reranker(
        config.pipeline / "reranker", precision=Precision.FP32
    )
    sample = cases.sample(config.max_cases, config.seed)
    before = measure(pipeline, sample, "the whole reranker")
    histories = cases.sample(config.compared_cases, config.seed).histories
    fused = pipeline.recommend(histories, rerank=False)
    top = fused.items[:, : pipeline.config.rerank_top]
    whole = pipeline.rerank_scores(histories, top)

    def likeness() -> float:
        return _correlation(pipeline.rerank_scores(histories, top), whole, top >= 0)

    dropped = _drop(config, reranker, likeness, place)
    after = measure(pipeline, sample, f"{config.num_layers} layers")
    pruning = Pruning(dropped=tuple(dropped), before=before, after=after)
    if pruning.kept:
        install(place, config.pipeline / "reranker")
    return pruning


def _drop(
    config: PruneConfig,
    model: Encoder | AnyReranker,
    likeness: Callable[[], float],
    place: Path,
) -> list[Dropped]:
    with bar("dropping layers", None):
        dropped = drop_layers(model.model, config.num_layers, likeness)
    model.save(place)
    return dropped


def _correlation(a: FloatArray, b: FloatArray, exists: BoolArray) -> float:
    """Mean over [B, R] lists of Pearson's correlation; lists where one is constant say nothing."""
    counts = exists.sum(axis=1, keepdims=True).clip(min=1)
    a, b = (
        np.where(exists, each - np.where(exists, each, 0).sum(axis=1, keepdims=True) / counts, 0)
        for each in (a, b)
    )
    spreads = np.sqrt((a**2).sum(axis=1) * (b**2).sum(axis=1))
    told = spreads > 0
    return float(((a * b).sum(axis=1)[told] / spreads[told]).mean()) if told.any() else 0.0


def main() -> None:
    """Parse, prune, report."""
    config = parse(PruneConfig)
    pruning = prune(config)
    for each in pruning.dropped:
        sys.stdout.write(f"layer {each.layer} dropped: likeness {each.likeness:.4f}\n")
    if pruning.before is not None and pruning.after is not None:
        console.print(
            f"NDCG@10 {pruning.before.ndcg:.4f} with all layers, {pruning.after.ndcg:.4f} with "
            f"{config.num_layers}; {pruning.before.rerank_s * 1000:.1f} ms a list before, "
            f"{pruning.after.rerank_s * 1000:.1f} ms after: "
            + ("put into the pipeline" if pruning.kept else "the pipeline keeps the whole one"),
            soft_wrap=True,
        )
    sys.stdout.write(f"model: {config.out / 'model'}\n")


if __name__ == "__main__":
    run(main)
