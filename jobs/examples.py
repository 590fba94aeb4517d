"""Examples for ``jobs.finetune``: what histories, a pipeline, ratings and a teacher give.

Shape legend: P examples, M negatives.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from fusionrec.data.dataset import Dataset
from fusionrec.data.histories import FloatArray, Histories
from fusionrec.data.splits import Cases, Protocol, Split, split
from fusionrec.data.text import history_texts, item_text, item_texts, with_reviews
from fusionrec.errors import ConfigError
from fusionrec.evaluation.collaborative import Biases, Factors, ItemKnn, Rated
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
) -> dict[str, dict[str, dict[str, float]]]:
    """MAE and RMSE of a trained rater on validation and test targets, beside what reads no text.

    The others are fitted on all that is known when the cases are asked, and the rater's histories
    hold it: for test cases, the validation events too. The rater's weights know training alone.

    Returns:
        By part and predictor, in the unit of the ratings: the model; matrix factorisation and
        item-kNN over biases, and these alone; the user's expected rating alone; the mean of all
        ratings.
    """
    known = {"validation": (parts.train, parts.validation), "test": (parts.known, parts.test)}
    return {
        name: _rating_errors(model, dataset, before, cases.take(np.arange(len(cases))[:max_cases]))
        for name, (before, cases) in known.items()
    }


def _rating_errors(
    model: Path, dataset: Dataset, before: Histories, cases: Cases
) -> dict[str, dict[str, float]]:
    from fusionrec.language.reranker import Reranker

    ratings = Ratings.of(dataset.events, before)
    rows, items, times, actual = ratings.targets(cases.users, cases.targets)
    users, codes = cases.users[rows], items.astype(np.int64)
    expected = ratings.by_user[users]
    rater = Reranker.load(model)
    config = RaterConfig.model_validate_json((model / RATER).read_bytes())
    histories = history_texts(
        dataset.catalogue, cases.histories.take(rows), rater.config.history_items
    )
    texts = [item_text(dataset.catalogue, int(code)) for code in items]
    if config.num_reviews:
        reviews = Reviews.of(dataset, before)
        read = reviews.before(users, items, times, config.num_reviews)
        own, others = ([reviews.text_of(row[row >= 0]) for row in read[:, side]] for side in (0, 1))
        histories, texts = with_reviews(histories, own), with_reviews(texts, others)
    scores = [float(each[0]) for each in rater.score(histories, [[text] for text in texts])]
    rated = _rated(ratings, len(dataset.catalogue))
    biases = Biases.fit(rated)
    predicted: dict[str, npt.ArrayLike] = {
        "model": expected + config.scale * np.array(scores),
        "factors": Factors.fit(rated, biases).predict(users, codes),
        "item-kNN": ItemKnn.fit(rated, biases).predict(users, codes),
        "biases": biases.predict(users, codes),
        "user": expected,
        "mean": np.full(len(actual), ratings.mean),
    }
    return {name: rating_errors(values, actual) for name, values in predicted.items()}


def _rated(ratings: Ratings, num_items: int) -> Rated:
    """All ratings of the histories; of one item, a user's last."""
    given = np.flatnonzero(~np.isnan(ratings.train))
    users, items = ratings.histories.rows[given], ratings.histories.items[given].astype(np.int64)
    keys = users * num_items + items
    last = len(keys) - 1 - np.unique(keys[::-1], return_index=True)[1]
    values = ratings.train[given[last]].astype(np.float64)
    return Rated(users[last], items[last], values, (len(ratings.histories), num_items))


def stored_settings(pipeline: Path) -> list[object]:
    """What decides which items a pipeline puts on top."""
    parts = (pipeline / name for name in ("pipeline.json", "fusion.json"))
    return [json.loads(part.read_text()) if part.is_file() else None for part in parts]
