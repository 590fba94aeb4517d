"""The semantic source alone, by the encoder's options and by the dimensions that are kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fusionrec.data.dataset import Dataset
from fusionrec.data.histories import FloatArray
from fusionrec.data.splits import Split
from fusionrec.data.text import history_texts, item_texts
from fusionrec.evaluation.metrics import METRICS
from fusionrec.evaluation.ranks import full_ranks
from fusionrec.language.encoder import Encoder
from fusionrec.sources.protocol import TrainingData
from fusionrec.sources.semantic import Semantic

K = 10
OPTIONS: Mapping[str, Mapping[str, object]] = {
    "one-tower": {},
    "two-towers": {"towers": 2},
    "matryoshka": {"dimensions": ()},
    "mined": {"mined_negatives": 1, "mine_every": 16},
}
"""Settings of ``jobs.finetune --task encoder``, one changed at a time; the benchmark tells which
dimensions."""


def semantic_ndcg(
    model: Path, dataset: Dataset, parts: Split, dimensions: Sequence[int], history_items: int
) -> list[tuple[int, list[float], list[float]]]:
    """NDCG@10 of each validation and each test case, for all dimensions and each of ``dimensions``.

    Cost: the texts of the catalogue and of both parts' histories through ``model``.
    """
    catalogue = dataset.catalogue
    items = Encoder.load(model, items=True).encode(item_texts(catalogue))
    encoder = Encoder.load(model)
    cases = (parts.validation, parts.test)
    asked = [
        encoder.encode(history_texts(catalogue, part.histories, history_items)) for part in cases
    ]
    found = []
    for size in (items.shape[1], *dimensions):
        data = TrainingData(catalogue, parts.train, item_vectors=shortened(items, size))
        source = Semantic().fit(data)
        values: list[list[float]] = []
        for part, vectors in zip(cases, asked, strict=True):
            histories = part.histories.with_vectors(shortened(vectors, size))
            ranks = full_ranks(source, histories, part.targets, len(catalogue))
            values.append(METRICS["ndcg"](ranks, K).tolist())
        found.append((size, values[0], values[1]))
    return found


def shortened(vectors: FloatArray, size: int) -> FloatArray:
    """The first ``size`` of unit vectors, as unit vectors again; rows of zeros stay."""
    short: Any = vectors[:, :size]
    lengths = np.linalg.norm(short, axis=1, keepdims=True)
    return np.asarray(short / np.where(lengths > 0, lengths, 1), dtype=np.float32)
