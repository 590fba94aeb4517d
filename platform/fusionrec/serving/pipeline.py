"""The pipeline: histories in, ranked lists with exact explanations out.

Offline evaluation, the search of the fusion and the endpoint all run this one implementation. Each
stage takes a batch as one unit and returns compact arrays, so that a Serve deployment is a stage
and nothing more:

    embed     histories → histories with text vectors      needs encoder/; nothing is done where
                                                            no source asks for them
    retrieve  histories → fused candidates                  needs sources/, fusion.json, and
                                                            lambdarank/, diversity/ and
                                                            rules.json where there are any
    rerank    histories, fused → fused                      needs reranker/, fusion.json

A *pipeline directory* holds what the jobs made; published, it is a bundle. Its ``inference.json``,
if it has one, says in which precision its language models compute, here as everywhere.
"""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Self

import numpy as np
from pydantic import Field, ValidationError

from fusionrec.config import Config
from fusionrec.data.catalogue import Catalogue
from fusionrec.data.dataset import Dataset, DatasetInfo
from fusionrec.data.histories import CodeArray, FloatArray, Histories, IntArray
from fusionrec.data.releases import RELEASES, Releases
from fusionrec.data.splits import Protocol
from fusionrec.data.text import history_texts, item_text
from fusionrec.errors import BundleError, ConfigError
from fusionrec.fusion.candidates import Candidates, candidates
from fusionrec.fusion.diversity import DIVERSITY, Diversity
from fusionrec.fusion.features import newest_times
from fusionrec.fusion.model import LAMBDARANK, Fusion, fuse
from fusionrec.fusion.model import Fused as Fused
from fusionrec.fusion.rules import Rules, load_rules
from fusionrec.language.precision import InferenceConfig, read_inference
from fusionrec.sources.load import load_source
from fusionrec.sources.protocol import Source
from fusionrec.sources.semantic import Semantic

if TYPE_CHECKING:
    from fusionrec.fusion.lambdarank import LambdaRank
    from fusionrec.language.encoder import Encoder
    from fusionrec.language.rankers import AnyReranker


class Stage(StrEnum):
    """A part of the pipeline that can live in a process of its own."""

    EMBEDDER = "embedder"
    RETRIEVER = "retriever"
    RERANKER = "reranker"


ALL_STAGES = frozenset(Stage)


class PipelineConfig(Config):
    """What ``pipeline.json`` says."""

    dataset: DatasetInfo
    """What the sources were fitted on."""
    protocol: Protocol
    """The split whose training part they saw."""
    sources: tuple[str, ...]
    """Names of all that were fitted. The fusion says which of them are asked."""
    candidates: int = Field(default=100, ge=1)
    """Items that each source proposes for a history."""
    rerank_top: int = Field(default=20, ge=1)
    """Places of the fused list that the reranker reads."""

    def refuse_other_data(self, dataset: Dataset, pipeline: Path) -> None:
        """Check that the sources in the folder ``pipeline`` were fitted on ``dataset``.

        Raises:
            ConfigError: they were not.
        """
        if self.dataset.fingerprint != dataset.info.fingerprint:
            raise ConfigError(
                f"--dataset {dataset.directory} is not what {pipeline} was fitted on; "
                "give the same one or run jobs.fit again"
            )


class Pipeline:
    """The stages of one pipeline directory. Read-only once loaded; threads may share it."""

    def __init__(
        self,
        config: PipelineConfig,
        catalogue: Catalogue | None,
        item_counts: IntArray,
        sources: list[Source],
        fusion: Fusion,
        encoder: Encoder | None = None,
        reranker: AnyReranker | None = None,
        item_vectors: FloatArray | None = None,
        learned: LambdaRank | None = None,
        diversity: Diversity | None = None,
        rules: Rules | None = None,
    ) -> None:
        self.config = config
        self._catalogue = catalogue
        self.item_counts = item_counts
        self.sources = sources
        """In the order of the fusion's tensors."""
        self.fusion = fusion
        self.encoder = encoder
        self.reranker = reranker
        self.item_vectors = item_vectors
        self.learned = learned
        self.diversity = diversity
        self.rules = rules
        self._cold = item_counts == 0

    @classmethod
    def load(
        cls, directory: Path, *, stages: frozenset[Stage] = ALL_STAGES, weighed: bool = True
    ) -> Self:
        """Load what ``stages`` need of a pipeline directory; large arrays are memory-mapped.

        A source that the fusion does not ask stays on disk, and where none asks for text vectors,
        so does the encoder. With ``weighed`` off the fusion and its trees stay there instead: every
        source that was fitted is asked, under equal weights, as before any search.

        A language model whose precision is bf16 is loaded in fp32 on a machine that has no
        instructions for bf16.

        Raises:
            BundleError: a part is missing or cannot be read.
            ConfigError: the fusion, its diversity or the rules are missing in part or
                inconsistent.
        """
        config = read_config(directory)
        inference = read_inference(directory)
        retrieves = Stage.RETRIEVER in stages
        # Who only retrieves knows codes: the texts of a million items take a gigabyte.
        reads = stages != {Stage.RETRIEVER}
        reranks = Stage.RERANKER in stages and (directory / "reranker").is_dir()
        vectors = directory / "vectors.npy"
        try:
            fusion = (Fusion.served(directory) if weighed else None) or _equal(config)
            names = fusion.sources if retrieves else ()
            asks = Stage.EMBEDDER in stages and Semantic.name in fusion.sources
            embeds = asks and (directory / "encoder").is_dir()
            sources = [load_source(directory / "sources" / name) for name in names]
            item_counts = np.load(directory / "item_counts.npy", allow_pickle=False)
            releases = Releases.load(directory / RELEASES) if retrieves else None
            return cls(
                config,
                Catalogue.load(directory / "catalogue.parquet") if reads else None,
                item_counts,
                sources,
                fusion,
                _encoder(directory / "encoder", inference) if embeds else None,
                _reranker(directory / "reranker", inference) if reranks else None,
                np.load(vectors, mmap_mode="r", allow_pickle=False)
                if retrieves and vectors.is_file()
                else None,
                _learned(directory, fusion, item_counts) if retrieves and weighed else None,
                _diversity(directory / DIVERSITY, item_counts, releases) if retrieves else None,
                load_rules(directory, item_counts, releases) if retrieves else None,
            )
        except OSError as error:
            raise BundleError(f"{directory} is incomplete: {error}; run the jobs again") from error

    def asking(self, fusion: Fusion) -> Pipeline:
        """Retrieval alone, by another fusion over some of these sources, without trees.

        For histories that have their text vectors already.
        """
        named = {source.name: source for source in self.sources}
        return Pipeline(
            self.config,
            self._catalogue,
            self.item_counts,
            [named[name] for name in fusion.sources],
            fusion,
            item_vectors=self.item_vectors,
            diversity=self.diversity,
            rules=self.rules,
        )

    @property
    def catalogue(self) -> Catalogue:
        """The items. Not there in a pipeline that was loaded for retrieval alone."""
        assert self._catalogue is not None, "loaded for retrieval alone"
        return self._catalogue

    def embed(self, histories: Histories) -> Histories:
        """The histories with their text vectors; unchanged without an encoder."""
        if self.encoder is None:
            return histories
        texts = history_texts(self.catalogue, histories, self.encoder.config.history_items)
        return histories.with_vectors(self.encoder.encode(texts))

    def candidates(self, histories: Histories) -> Candidates:
        """What the sources propose and the rules permit, and what each source thinks of it."""
        k, fallback = self.config.candidates, self.fusion.fallback
        return candidates(self.sources, histories, k, self.rules, fallback)

    def retrieve(self, histories: Histories) -> Fused:
        """The fused list of each history; none of its own items is in it."""
        found = self.candidates(histories)
        if self.learned is None:
            fused = fuse(self.fusion, found, self._cold)
        else:
            fused = self.learned.fuse(found, newest_times(histories), self._cold)
        return fused if self.diversity is None else self.diversity.apply(histories, fused)

    def weights(self) -> dict[str, dict[str, float]]:
        """What the fusion trusts, for people: as :meth:`Fusion.table`, and what trees look at."""
        table = self.fusion.table()
        return table if self.learned is None else {**table, **self.learned.table()}

    def off(self) -> dict[str, float | None]:
        """Sources that were fitted and are not always asked → why, as :attr:`Fusion.off` says."""
        return self.fusion.unasked(self.config.sources)

    def rerank(self, histories: Histories, fused: Fused) -> Fused:
        """Add the reranker's term over the top of each list of a segment that it helps.

        The term is ``weight · (s − min) / (max − min)`` of the reranker's scores ``s`` over the
        top: never negative, so that no item falls below what was not read.
        """
        weights = self.fusion.reranked(histories.lengths)
        (rows,) = np.nonzero(weights > 0)
        if self.reranker is None or not len(rows):
            return fused
        top = fused.items[rows, : self.config.rerank_top]
        found = self.rerank_scores(histories.take(rows), top)
        return fused.reranked(rows, weights[rows, None] * found)

    def rerank_scores(self, histories: Histories, items: CodeArray) -> FloatArray:
        """[B, R] the reranker's scores of ``items`` [B, R], scaled to 0 … 1."""
        assert self.reranker is not None
        asked = history_texts(self.catalogue, histories, self.reranker.config.history_items)
        texts = [[item_text(self.catalogue, code) for code in row if code >= 0] for row in items]
        result = np.zeros(items.shape, dtype=np.float32)
        for row, scores in enumerate(self.reranker.score(asked, texts)):
            if not asked[row] or not len(scores):
                continue  # Nothing to read: the fused order stands.
            spread = max(float(scores.max() - scores.min()), 1e-6)
            result[row, : len(scores)] = (scores - scores.min()) / spread
        return result

    def recommend(self, histories: Histories, *, rerank: bool = True) -> Fused:
        """All stages in a row."""
        embedded = self.embed(histories)
        fused = self.retrieve(embedded)
        return self.rerank(embedded, fused) if rerank else fused


def read_config(directory: Path) -> PipelineConfig:
    """Read ``pipeline.json``.

    Raises:
        BundleError: the directory is not a pipeline's.
    """
    path = directory / "pipeline.json"
    try:
        return PipelineConfig.model_validate_json(path.read_bytes())
    except OSError as error:
        raise BundleError(
            f"{directory} is not a pipeline directory: it has no pipeline.json; "
            "make one with `python -m jobs.fit`"
        ) from error
    except ValidationError as error:
        raise BundleError(f"{path} is wrong: {error.errors()[0]['msg']}; fit again") from error


def _encoder(folder: Path, inference: InferenceConfig) -> Encoder:
    # Here, as in _reranker: torch costs seconds and 200 MB, and a retriever needs neither model.
    from fusionrec.language.encoder import Encoder

    peaks = inference.encoder_peaks
    return Encoder.load(folder, precision=inference.encoder, frozen=True, peaks=peaks)


def _reranker(folder: Path, inference: InferenceConfig) -> AnyReranker:
    from fusionrec.language.rankers import load_reranker

    peaks = inference.reranker_peaks
    return load_reranker(folder, precision=inference.reranker, frozen=True, peaks=peaks)


def _equal(config: PipelineConfig) -> Fusion:
    """Equal weights: where nothing has been searched yet."""
    return Fusion.uniform(config.sources, np.ones(len(config.sources), dtype=np.float32))


def _learned(directory: Path, fusion: Fusion, item_counts: IntArray) -> LambdaRank | None:
    """The learned fusion, where one was chosen."""
    folder = directory / LAMBDARANK
    if not folder.is_dir():
        return None
    from fusionrec.fusion.lambdarank import LambdaRank  # LightGBM takes a second to import

    learned = LambdaRank.load(folder, item_counts)
    if not learned.grown_over(fusion):
        raise ConfigError(
            f"{folder} was grown over other weights than {directory / 'fusion.json'} holds: "
            "remove it to use these alone, or to make another with `python -m tuning.fusion`"
        )
    return learned


def _diversity(folder: Path, item_counts: IntArray, releases: Releases | None) -> Diversity | None:
    return Diversity.load(folder, item_counts, releases) if folder.is_dir() else None
