"""BM25: items whose words are those of the history's items, or of a free-text wish.

The query of a history is the bag of words of its newest items, weighted by recency; the score is
the BM25 of Lucene (Kamphuis et al. 2020), which is linear in the query's words:

    score(h, c) = Σ_e recency ** age(e) · Σ_{w ∈ words(item(e))} bm25(w, c)   + the same for a wish

bm25s splits, stems nothing, and computes the weights; scoring is a sparse product over them. A
category is a word of its own besides the words in its name, so a catalogue that has nothing but
attributes is served too.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import bm25s
import numpy as np
import scipy.sparse as sp
from pydantic import Field

from fusionrec.config import Config
from fusionrec.data.catalogue import Catalogue
from fusionrec.data.histories import CodeArray, FloatArray, Histories
from fusionrec.retrieval.neighbours import CSR, blocks, gather, profiles, top_of_sparse
from fusionrec.sources.protocol import Ranked, TrainingData


class BM25Config(Config):
    """Settings of :class:`BM25`."""

    k1: float = Field(default=1.2, ge=0)
    """Saturation of a word's count in an item."""
    b: float = Field(default=0.75, ge=0, le=1)
    """Damping of long items."""
    recency: float = Field(default=0.8, gt=0, le=1)
    """Weight of an event relative to the next newer one of its history."""
    history_items: int = Field(default=10, ge=1)
    """How many of the newest items make up the query."""
    query_words: int = Field(default=32, ge=1)
    """Rarest words of an item that enter a query; bounds the cost of long descriptions."""


class BM25:
    """Scores items by their words."""

    name = "bm25"

    def __init__(
        self,
        config: BM25Config | None = None,
        vocabulary: dict[str, int] | None = None,
        words: CSR | None = None,
        queries: CSR | None = None,
    ) -> None:
        self.config = config or BM25Config()
        self._vocabulary = vocabulary or {}
        self._words = words
        """[W, I] BM25 of each word in each item."""
        self._queries = queries
        """[I, W] the words by which an item asks for others."""

    def fit(self, data: TrainingData) -> Self:
        """Index the catalogue. Cost: linear in its words."""
        tokens = _tokens(data.catalogue)
        vocabulary = {word: i for i, word in enumerate(sorted({w for ws in tokens for w in ws}))}
        ids = [[vocabulary[word] for word in words] for words in tokens]
        index = bm25s.BM25(k1=self.config.k1, b=self.config.b, method="lucene")
        index.index((ids, vocabulary), show_progress=False, create_empty_token=False)
        shape = (len(vocabulary), data.num_items)
        scores = index.scores
        words: CSR = sp.csr_array(
            (scores["data"].astype(np.float32), scores["indices"], scores["indptr"]), shape
        )
        rarity = np.diff(words.indptr)
        asked = [
            sorted(set(item), key=lambda word: (rarity[word], word))[: self.config.query_words]
            for item in ids
        ]
        return type(self)(self.config, vocabulary, words, _bags(asked, len(vocabulary)))

    def top(self, histories: Histories, k: int) -> Ranked:
        """The best ``k`` items of each history."""
        return Ranked(*top_of_sparse(self._scores(histories), histories, k))

    def score(self, histories: Histories, candidates: CodeArray) -> FloatArray:
        """[B, C] scores of ``candidates``."""
        words, _ = self._fitted
        result = np.zeros(candidates.shape, dtype=np.float32)
        for start, stop in blocks(len(histories), words.shape[1]):
            scores = self._scores(histories.slice(start, stop)).toarray()
            result[start:stop] = gather(scores, candidates[start:stop])
        return result

    def save(self, directory: Path) -> None:
        """Write ``config.json``, ``vocabulary.json`` and the two matrices as npy files."""
        directory.mkdir(parents=True, exist_ok=True)
        for name, matrix in zip(("words", "queries"), self._fitted, strict=True):
            for part in ("data", "indices", "indptr"):
                path = directory / f"{name}.{part}.npy"
                np.save(path, getattr(matrix, part), allow_pickle=False)
        vocabulary = json.dumps(self._vocabulary, ensure_ascii=False)
        (directory / "vocabulary.json").write_text(vocabulary, encoding="utf-8")
        (directory / "config.json").write_text(self.config.model_dump_json(indent=2))

    @classmethod
    def load(cls, directory: Path) -> Self:
        """Read the settings, memory-map the matrices."""
        config = BM25Config.model_validate_json((directory / "config.json").read_bytes())
        vocabulary = json.loads((directory / "vocabulary.json").read_text(encoding="utf-8"))

        def matrix(name: str) -> tuple[Any, Any, Any]:
            data, indices, indptr = (
                np.load(directory / f"{name}.{part}.npy", mmap_mode="r", allow_pickle=False)
                for part in ("data", "indices", "indptr")
            )
            return data, indices, indptr

        queries = matrix("queries")
        shape = (len(queries[2]) - 1, len(vocabulary))
        return cls(
            config,
            vocabulary,
            sp.csr_array(matrix("words"), shape=shape[::-1]),
            sp.csr_array(queries, shape=shape),
        )

    @property
    def _fitted(self) -> tuple[CSR, CSR]:
        assert self._words is not None
        assert self._queries is not None
        return self._words, self._queries

    def _scores(self, histories: Histories) -> CSR:
        words, queries = self._fitted
        newest = histories.newest(self.config.history_items)
        weights = (self.config.recency**newest.ages).astype(np.float32)
        bags = profiles(newest, weights, queries.shape[0]) @ queries
        if histories.texts is not None and any(histories.texts):
            wishes = _split([text or "" for text in histories.texts])
            known = [[self._vocabulary[w] for w in ws if w in self._vocabulary] for ws in wishes]
            bags = bags + _bags(known, len(self._vocabulary))
        return sp.csr_array(bags @ words)


def _split(texts: Sequence[str]) -> list[list[str]]:
    return list(bm25s.tokenize(list(texts), stopwords="en", return_ids=False, show_progress=False))


def _tokens(catalogue: Catalogue) -> list[list[str]]:
    """The words of each item's title, description and categories, and each category as a word."""
    texts = (
        " ".join((title, text, *categories))
        for title, text, categories in zip(
            catalogue.titles, catalogue.texts, catalogue.categories, strict=True
        )
    )
    return [
        [*words, *(f"category={category.lower()}" for category in categories)]
        for words, categories in zip(_split(list(texts)), catalogue.categories, strict=True)
    ]


def _bags(ids: Sequence[Sequence[int]], num_words: int) -> CSR:
    indptr = np.zeros(len(ids) + 1, dtype=np.int64)
    np.cumsum([len(row) for row in ids], out=indptr[1:])
    indices = np.fromiter((word for row in ids for word in row), dtype=np.int32)
    data = np.ones(len(indices), dtype=np.float32)
    return sp.csr_array((data, indices, indptr), shape=(len(ids), num_words))
