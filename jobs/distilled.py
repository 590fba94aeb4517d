"""What a distilled model keeps of its teacher's gain, and at which cost.

Both put the heads of the same fused lists, of validation cases, into the order of their scores
alone. A model's gain is the NDCG@10 of that order beyond that of the fused one; the student keeps
its gain's share of the teacher's, where the teacher gains anything. Lists that hold no target are
worth 0 in any order, and no model reads them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias

import numpy as np

from fusionrec.config import Config
from fusionrec.data.dataset import Dataset
from fusionrec.data.histories import FloatArray
from fusionrec.data.splits import split
from fusionrec.data.text import history_texts, item_text
from fusionrec.evaluation.metrics import METRICS
from fusionrec.evaluation.ranks import RealArray, hit_lists, list_ranks
from fusionrec.evaluation.significance import BootstrapConfig, Comparison, compare

if TYPE_CHECKING:  # torch and FAISS come along
    import torch

    from fusionrec.language.encoder import Encoder

_CASES = 300
"""Validation cases at most: a large teacher reads some lists a second."""
_K = 10

Score: TypeAlias = Callable[[Sequence[str], Sequence[Sequence[str]]], list[FloatArray]]
"""B texts of histories and C texts of candidates for each → B arrays [C]."""


class Reader(Config):
    """A model that reads lists."""

    parameters: int
    ms_a_list: float
    """Milliseconds, on the machine that trained."""
    gain: Comparison
    """NDCG@10 of its order against the fused one."""


class Distilled(Config):
    """``distillation.json``."""

    list_length: int
    """Candidates of a list."""
    teacher: Reader
    student: Reader

    @property
    def kept(self) -> float | None:
        """The student's gain as a share of the teacher's; null where that has none to keep."""
        if self.teacher.gain.difference.low <= 0:
            return None
        return self.student.gain.difference.mean / self.teacher.gain.difference.mean

    @property
    def sentence(self) -> str:
        """For people."""
        teacher, student = self.teacher.gain, self.student.gain
        kept = "the teacher gains nothing that could be kept"
        if self.kept is not None:
            kept = f"{self.kept:.0%} of the teacher's gain is kept"
        return (
            f"NDCG@10 of {teacher.num_cases} validation cases: fused order {teacher.mean_b:.4f}, "
            f"teacher's {teacher.mean_a:.4f} ({self.teacher.ms_a_list:.1f} ms a list), student's "
            f"{student.mean_a:.4f} ({self.student.ms_a_list:.1f} ms): {kept}."
        )


def distillation_report(
    model: Path,
    kind: Literal["encoder", "reranker"],
    teacher: Path,
    pipeline: Path,
    dataset: Dataset,
    seed: int,
) -> Distilled:
    """Let teacher and student order the same lists.

    Args:
        model: the student's folder.
        kind: what it is.
        teacher: the folder of a reranker of either kind.
        pipeline: whose fused lists are read, to the depth that it reranks.
        dataset: what it was fitted on.
        seed: of the sample of cases and the bootstrap.

    Raises:
        ModelError: a model cannot be loaded.
    """
    from fusionrec.language.encoder import Encoder
    from fusionrec.language.rankers import load_reranker
    from fusionrec.serving.pipeline import Pipeline, Stage

    loaded = Pipeline.load(pipeline, stages=frozenset({Stage.EMBEDDER, Stage.RETRIEVER}))
    validation = split(dataset, loaded.config.protocol).validation
    cases, catalogue = validation.sample(_CASES, seed), dataset.catalogue
    fused = loaded.recommend(cases.histories, rerank=False).head(loaded.config.rerank_top)
    # One at least, for the time that it takes.
    held = hit_lists(fused.items, cases.targets)
    rows = held if len(held) else np.arange(1)
    histories = cases.histories.take(rows)
    texts = [[item_text(catalogue, code) for code in row if code >= 0] for row in fused.items[rows]]

    def ndcg(scores: FloatArray) -> RealArray:
        return METRICS["ndcg"](list_ranks(fused.items, scores, cases.targets), _K)

    def read(name: str, model: torch.nn.Module, num_items: int, score: Score) -> Reader:
        asked = history_texts(catalogue, histories, num_items)
        score(asked[:1], texts[:1])  # the first call of a model takes longer
        began = time.perf_counter()
        found = score(asked, texts)
        seconds = time.perf_counter() - began
        scores = fused.scores.copy()  # which stand where there was nothing to read
        for row, own in zip(rows, found, strict=True):
            if len(own) and own.min() < own.max():
                scores[row, : len(own)] = own
        values = np.stack([ndcg(scores), ndcg(fused.scores)], axis=1)
        return Reader(
            parameters=sum(p.numel() for p in model.parameters()),
            ms_a_list=1e3 * seconds / len(rows),
            gain=compare("ndcg", (name, "fused"), values, BootstrapConfig(seed=seed)),
        )

    whole = load_reranker(teacher)
    told = read("teacher", whole.model, whole.config.history_items, whole.score)
    if kind == "encoder":
        encoder = Encoder.load(model)
        score: Score = partial(nearness, encoder)
        learned = read("student", encoder.model, encoder.config.history_items, score)
    else:
        small = load_reranker(model)
        learned = read("student", small.model, small.config.history_items, small.score)
    return Distilled(list_length=fused.items.shape[1], teacher=told, student=learned)


def nearness(
    encoder: Encoder, histories: Sequence[str], candidates: Sequence[Sequence[str]]
) -> list[FloatArray]:
    """Cosines of the encoder's vectors: a :data:`Score`."""
    vectors = encoder.encode([*histories, *chain.from_iterable(candidates)])
    ends = np.cumsum([len(row) for row in candidates])[:-1]
    items = np.split(vectors[len(histories) :], ends)
    return [row @ own for row, own in zip(items, vectors, strict=False)]
