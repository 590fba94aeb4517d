"""BM25: items whose words are those of the history's items, or of a free-text wish.

The query of a history is the bag of words of its newest items, weighted by recency; the score is
the BM25 of Lucene (Kamphuis et al. 2020), which is linear in the query's words:

    score(h, c) = Σ_e recency ** age(e) · Σ_{w ∈ words(item(e))} bm25(w, c)   + the same for a wish

bm25s splits, stems nothing, and computes the weights; scoring adds up the postings of the query's
words. A category is a word of its own besides the words in its name, so a catalogue that has
nothing but attributes is served too. In a large catalogue a common word has more postings than all
others of a query together, and says least: ``query_postings`` bounds what a query reads.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Self

import bm25s
import numpy as np
import scipy.sparse as sp
from pydantic import Field

from fusionrec.config import Config
from fusionrec.data.catalogue import Catalogue
from fusionrec.data.histories import CodeArray, FloatArray, Histories
from fusionrec.retrieval.rows import SparseRows, stack
from fusionrec.retrieval.sums import total
from fusionrec.sources.answers import scored
from fusionrec.sources.protocol import Answer, Ranked, TrainingData
from fusionrec.space import Range


class BM25Config(Config):
    """Settings of :class:`BM25`."""

    k1: Annotated[float, Range(0.2, 4)] = Field(default=1.2, ge=0)
    """Saturation of a word's count in an item."""
    b: Annotated[float, Range(0, 1)] = Field(default=0.75, ge=0, le=1)
    """Damping of long items."""
    recency: Annotated[float, Range(0.3, 1)] = Field(default=0.8, gt=0, le=1)
    """Weight of an event relative to the next newer one of its history."""
    history_items: Annotated[int, Range(1, 30, log=True)] = Field(default=10, ge=1)
    """How many of the newest items make up the query."""
    query_words: int = Field(default=32, ge=1)
    """Rarest words of an item that enter a query; bounds the cost of long descriptions."""
    query_postings: int = Field(default=50_000, ge=1)
    """Postings, pairs of a word and an item that has it, that a query reads at most, those of the
    rarest words first; bounds the cost of common words in large catalogues."""


class BM25:
    """Scores items by their words."""

    name = "bm25"

    def __init__(
        self,
        config: BM25Config | None = None,
        vocabulary: dict[str, int] | None = None,
        words: SparseRows | None = None,
        queries: SparseRows | None = None,
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
        parts = (scores["data"], scores["indices"], scores["indptr"])
        words = SparseRows.of(sp.csr_array(parts, shape)).compact()
        rarity = np.diff(words.indptr)
        asked = [
            sorted(set(item), key=lambda word: (rarity[word], word))[: self.config.query_words]
            for item in ids
        ]
        queries = _bags(asked, len(vocabulary)).compact()
        return type(self)(self.config, vocabulary, words, queries)

    def ask(self, histories: Histories) -> Answer:
        """Add up the postings of the words of each query."""
        words, _ = self._fitted
        bags = [self._rarest(*bag) for bag in self._queried(histories)]
        offsets = np.cumsum([0, *(len(rows) for rows, _ in bags)])
        rows = np.concatenate([np.empty(0, np.int32), *(rows for rows, _ in bags)])
        weights = np.concatenate([np.empty(0, np.float32), *(weights for _, weights in bags)])
        return scored(histories, words.sums(offsets, rows, weights))

    def top(self, histories: Histories, k: int) -> Ranked:
        """The best ``k`` items of each history."""
        return self.ask(histories).top(k)

    def score(self, histories: Histories, candidates: CodeArray) -> FloatArray:
        """[B, C] scores of ``candidates``."""
        return self.ask(histories).score(candidates)

    def save(self, directory: Path) -> None:
        """Write ``config.json``, ``vocabulary.json`` and the two matrices as npy files."""
        words, queries = self._fitted
        words.save(directory, "words.")
        queries.save(directory, "queries.")
        vocabulary = json.dumps(self._vocabulary, ensure_ascii=False)
        (directory / "vocabulary.json").write_text(vocabulary, encoding="utf-8")
        (directory / "config.json").write_text(self.config.model_dump_json(indent=2))

    @classmethod
    def load(cls, directory: Path) -> Self:
        """Read the settings, memory-map the matrices."""
        config = BM25Config.model_validate_json((directory / "config.json").read_bytes())
        vocabulary = json.loads((directory / "vocabulary.json").read_text(encoding="utf-8"))
        queries = SparseRows.load(directory, "queries.", width=len(vocabulary))
        words = SparseRows.load(directory, "words.", width=len(queries))
        return cls(config, vocabulary, words, queries)

    @property
    def _fitted(self) -> tuple[SparseRows, SparseRows]:
        assert self._words is not None
        assert self._queries is not None
        return self._words, self._queries

    def _queried(self, histories: Histories) -> Iterator[tuple[CodeArray, FloatArray]]:
        """The words that each history asks with, and their weights."""
        _, queries = self._fitted
        newest = histories.newest(self.config.history_items)
        weights = (self.config.recency**newest.ages).astype(np.float32)
        wishes = self._wishes(histories)
        for row in range(len(histories)):
            events = slice(newest.offsets[row], newest.offsets[row + 1])
            words, values = queries.entries(newest.items[events], weights[events])
            wish = wishes[row]
            yield total(
                np.concatenate([words, wish]),
                np.concatenate([values, np.ones(len(wish), dtype=np.float32)]),
            )

    def _wishes(self, histories: Histories) -> list[CodeArray]:
        """The known words of each history's free text."""
        texts = histories.texts
        if texts is None or not any(texts):
            return [np.empty(0, np.int32)] * len(histories)
        known = self._vocabulary
        return [
            np.array([known[word] for word in words if word in known], dtype=np.int32)
            for words in _split([text or "" for text in texts])
        ]

    def _rarest(self, words: CodeArray, weights: FloatArray) -> tuple[CodeArray, FloatArray]:
        """The rarest ``words``, at least one of them, whose postings may be read."""
        lengths = self._fitted[0].lengths_of(words)
        if lengths.sum() <= self.config.query_postings:
            return words, weights
        order = np.argsort(lengths, kind="stable")
        count = np.count_nonzero(np.cumsum(lengths[order]) <= self.config.query_postings)
        keep = np.sort(order[: max(count, 1)])
        return words[keep], weights[keep]


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


def _bags(ids: Sequence[Sequence[int]], num_words: int) -> SparseRows:
    rows = [np.array(row, dtype=np.int32) for row in ids]
    return stack([total(row, np.ones(len(row), dtype=np.float32)) for row in rows], num_words)
