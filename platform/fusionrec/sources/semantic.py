"""Semantic: items whose text vectors point where the history's does.

    score(h, c) = ⟨vector(h), vector(c)⟩        both L2-normalised: the cosine

The vector of the history comes from the embedder, as part of :class:`Histories`; a history without
one, and an item without text, score 0.
"""

from __future__ import annotations

from pathlib import Path
from typing import Self

from fusionrec.data.histories import CodeArray, FloatArray, Histories
from fusionrec.errors import DataError
from fusionrec.retrieval.index import IndexConfig, VectorIndex, build, load
from fusionrec.sources.answers import Nearest
from fusionrec.sources.protocol import Ranked, TrainingData


class Semantic:
    """Scores items by the cosine of text vectors."""

    name = "semantic"

    def __init__(self, config: IndexConfig | None = None, index: VectorIndex | None = None) -> None:
        self.config = config or IndexConfig()
        self._index = index

    def fit(self, data: TrainingData) -> Self:
        """Index the item vectors. Cost: that of the index; an approximate one takes minutes.

        Raises:
            DataError: the training data carries none.
        """
        if data.item_vectors is None:
            raise DataError(
                "source semantic needs the catalogue's text vectors: run `python -m jobs.embed` "
                "first, or leave semantic out of --sources"
            )
        return type(self)(self.config, build(data.item_vectors, self.config, data.history_vectors))

    @property
    def reads_item_vectors(self) -> bool:
        """Always: they are all that it has."""
        return True

    def ask(self, histories: Histories) -> Nearest:
        """Search with the histories' vectors."""
        return Nearest(histories, self._index, histories.vectors)

    def top(self, histories: Histories, k: int) -> Ranked:
        """The best ``k`` items by cosine: exactly, or with the recall of an approximate index."""
        return self.ask(histories).top(k)

    def score(self, histories: Histories, candidates: CodeArray) -> FloatArray:
        """[B, C] cosines of ``candidates``."""
        return self.ask(histories).score(candidates)

    def save(self, directory: Path) -> None:
        """Write ``config.json``, the vectors, the index and what was measured of it."""
        assert self._index is not None, "semantic is not fitted"
        self._index.save(directory)
        (directory / "config.json").write_text(self.config.model_dump_json(indent=2))

    @classmethod
    def load(cls, directory: Path) -> Self:
        """Read the settings, memory-map the vectors and their index."""
        config = IndexConfig.model_validate_json((directory / "config.json").read_bytes())
        return cls(config, load(directory))
