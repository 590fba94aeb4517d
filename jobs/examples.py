"""Examples for ``jobs.finetune``: what histories, a pipeline, ratings and a teacher give.

Shape legend: P examples, M negatives.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fusionrec.data.dataset import Dataset
from fusionrec.data.histories import FloatArray
from fusionrec.data.splits import Protocol, Split, split
from fusionrec.data.text import history_texts, item_text, item_texts, with_reviews
from fusionrec.errors import ConfigError
from fusionrec.evaluation.metrics import rating_errors
from fusionrec.progress import bar
from fusionrec.training.examples import Examples, lists
from fusionrec.training.objectives.rating import RATER, RaterConfig
from fusionrec.training.objectives.settings import HistorySettings, Need
from fusionrec.training.ratings import Ratings
from fusionrec.training.reviews import Reviews

if TYPE_CHECKING:
    from jobs.finetune import FinetuneConfig

_CHUNK = 128
"""Histories that the pipeline or a teacher answers at a time."""


def make_examples(config: FinetuneConfig, settings: HistorySettings, dataset: Dataset) -> Examples:
    """All that the task of ``config`` is trained on besides texts.

    Raises:
        ConfigError: the pipeline was fitted on another data set.
        TrainingError: there are no examples, or no ratings where they are needed.
    """
    parts = split(dataset, config.protocol)
    examples = Examples.of(
        parts.train,
        per_user=config.examples_per_user,
        limit=config.max_examples,
        generator=np.random.default_rng([config.seed, 0]),
        with_text=np.array([bool(text) for text in item_texts(dataset.catalogue)]),
    )
    if Need.RATINGS in settings.needs:
        examples = Ratings.of(dataset.events, parts.train).beside(examples)
        if config.num_reviews:
            examples = Reviews.of(dataset, parts.train).beside(examples, config.num_reviews)
    if Need.NEGATIVES in settings.needs:
        examples = with_negatives(
            examples,
            dataset,
            config.need("pipeline"),
            config.protocol,
            count=config.num_negatives_of_task,
            best=config.negatives_from,
            generator=np.random.default_rng([config.seed, 1]),
        )
    if Need.TEACHER in settings.needs:
        examples = with_scores(examples, dataset, config.need("teacher"))
    return examples.newest(settings.history_items)


def make_reviews(config: FinetuneConfig, dataset: Dataset) -> list[str]:
    """What users wrote in training events, oldest first; beyond ``max_examples`` a random choice.

    Raises:
        ConfigError: they were asked for, and there are none.
    """
    found = Reviews.of(dataset, split(dataset, config.protocol).train)
    codes = np.arange(len(found.users))
    if config.reviews and not len(codes):
        raise ConfigError(
            f"setting reviews = True is wrong: data set {dataset.info.name} has no reviews in its "
            "training events; leave --reviews out"
        )
    if len(codes) > config.max_examples:
        generator = np.random.default_rng([config.seed, 2])
        codes = np.sort(generator.choice(codes, size=config.max_examples, replace=False))
    return found.text_of(codes)


def with_negatives(
    examples: Examples,
    dataset: Dataset,
    pipeline: Path,
    protocol: Protocol,
    *,
    count: int,
    best: int,
    generator: np.random.Generator,
) -> Examples:
    """Hard negatives: ``count`` drawn from the ``best`` of the fused list of each history.

    Raises:
        ConfigError: the pipeline was fitted on another data set.
    """
    # Here, because it brings FAISS and every source along: the encoder needs none of them.
    from fusionrec.serving.pipeline import Pipeline, Stage

    loaded = Pipeline.load(pipeline, stages=frozenset({Stage.EMBEDDER, Stage.RETRIEVER}))
    fitted = loaded.config
    if fitted.dataset.fingerprint != dataset.info.fingerprint or fitted.protocol != protocol:
        raise ConfigError(
            f"setting pipeline = {pipeline} is wrong: it was fitted on {fitted.dataset.name} under "
            f"{fitted.protocol} and {dataset.directory} is {dataset.info.name} under {protocol}; "
            "give one that was fitted on the same"
        )
    candidates = np.full((len(examples), best), -1, dtype=np.int32)
    with bar("Collect hard negatives", len(examples)) as advance:
        for start in range(0, len(examples), _CHUNK):
            chunk = examples.histories.slice(start, min(start + _CHUNK, len(examples)))
            items = loaded.recommend(chunk, rerank=False).items[:, :best]
            candidates[start : start + len(chunk), : items.shape[1]] = items
            advance(len(chunk))
    return examples.with_negatives(generator.permuted(candidates, axis=1), count)


def with_scores(examples: Examples, dataset: Dataset, teacher: Path) -> Examples:
    """The teacher's scores of each example's list, read as the teacher was trained to read.

    Raises:
        ModelError: the teacher cannot be loaded.
    """
    from fusionrec.language.rankers import load_reranker

    model, catalogue = load_reranker(teacher), dataset.catalogue
    scores: FloatArray = np.zeros(
        (len(examples), 1 + examples.negatives.shape[1]), dtype=np.float32
    )
    with bar("Ask the teacher", len(examples)) as advance:
        for start in range(0, len(examples), _CHUNK):
            rows = examples.take(np.arange(start, min(start + _CHUNK, len(examples))))
            codes, exists = lists(rows)
            histories = history_texts(catalogue, rows.histories, model.config.history_items)
            texts = [[item_text(catalogue, int(code)) for code in row[row >= 0]] for row in codes]
            found = model.score(histories, texts)
            scores[start : start + len(rows)][exists] = np.concatenate(found)
            advance(len(rows))
    return replace(examples, scores=scores)


def rating_report(
    model: Path, dataset: Dataset, parts: Split, *, max_cases: int
) -> dict[str, dict[str, float]]:
    """MAE and RMSE of a trained rater on the validation targets, beside what reads no text.

    Returns:
        By predictor, in the unit of the ratings: the model; the user's expected rating alone; that
        and the item's damped mean above it; the mean of all training ratings.
    """
    from fusionrec.language.reranker import Reranker

    ratings = Ratings.of(dataset.events, parts.train)
    cases = parts.validation
    rows, items, times, actual = ratings.targets(cases.users, cases.targets)
    rows, items = rows[:max_cases], items[:max_cases]
    times, actual = times[:max_cases], actual[:max_cases]
    expected = ratings.by_user[cases.users[rows]]
    rater = Reranker.load(model)
    config = RaterConfig.model_validate_json((model / RATER).read_bytes())
    histories = history_texts(
        dataset.catalogue, cases.histories.take(rows), rater.config.history_items
    )
    texts = [item_text(dataset.catalogue, int(code)) for code in items]
    if config.num_reviews:
        reviews = Reviews.of(dataset, parts.train)
        read = reviews.before(cases.users[rows], items, times, config.num_reviews)
        own, others = ([reviews.text_of(row[row >= 0]) for row in read[:, side]] for side in (0, 1))
        histories, texts = with_reviews(histories, own), with_reviews(texts, others)
    scores = [float(each[0]) for each in rater.score(histories, [[text] for text in texts])]
    offsets = ratings.item_offsets(len(dataset.catalogue))
    return {
        "model": rating_errors(expected + config.scale * np.array(scores), actual),
        "user": rating_errors(expected, actual),
        "user and item": rating_errors(expected + offsets[items], actual),
        "mean": rating_errors(np.full(len(actual), ratings.mean), actual),
    }


def stored_settings(pipeline: Path) -> list[object]:
    """What decides which items a pipeline puts on top."""
    parts = (pipeline / name for name in ("pipeline.json", "fusion.json"))
    return [json.loads(part.read_text()) if part.is_file() else None for part in parts]
