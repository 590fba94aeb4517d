"""Fit the candidate sources on the training part of a data set; begin a pipeline directory.

``--prepare`` writes the catalogue, the known histories and the settings only, which is what
jobs.embed needs; without it the sources are fitted, the semantic one on what jobs.embed left.
"""

from __future__ import annotations

import shutil
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field
from rich.table import Table

from fusionrec.bundles.gate import forget_measurements
from fusionrec.config import JobConfig, parse
from fusionrec.data.dataset import Dataset
from fusionrec.data.releases import RELEASES, Releases
from fusionrec.data.splits import Protocol, Split, split
from fusionrec.errors import ConfigError
from fusionrec.progress import bar, console
from fusionrec.retrieval.index import IndexConfig
from fusionrec.serving import installing
from fusionrec.serving.installing import forget_lists, install
from fusionrec.serving.pipeline import PipelineConfig, read_config
from fusionrec.sources.bm25 import BM25, BM25Config
from fusionrec.sources.content import Content, ContentConfig
from fusionrec.sources.ease import EASE, num_pairs
from fusionrec.sources.ials import IALS, IALSConfig
from fusionrec.sources.item_item import ItemItem, ItemItemConfig
from fusionrec.sources.item_knn import ItemKNN
from fusionrec.sources.load import SOURCES
from fusionrec.sources.popularity import Popularity, PopularityConfig
from fusionrec.sources.protocol import Source, TrainingData
from fusionrec.sources.recvae import RecVAE, RecVAEConfig
from fusionrec.sources.sasrec import SASRec, SASRecConfig
from fusionrec.sources.semantic import Semantic
from fusionrec.sources.transitions import Transitions
from jobs.entry import run

_SLOW = frozenset({"sasrec"})
_NAMED = frozenset({"content", "recvae"})
"""Sources that no ablation speaks for yet: fitted where --sources names them."""


class FitConfig(JobConfig):
    """Fit candidate sources."""

    dataset: Path
    """Data set to fit on."""
    pipeline: Path
    """Pipeline directory to write into; made if missing."""
    protocol: Protocol = Protocol.LEAVE_ONE_OUT
    """The split whose training part is fitted on: leave-one-out or global-time."""
    prepare: bool = False
    """Write catalogue, known histories and settings, and fit nothing yet."""
    sources: tuple[str, ...] | None = None
    """Sources to fit, by name; by default all that the data can carry: semantic once jobs.embed has
    run, ease unless there are more pairs of items than ease.learner.max_pairs, no slow ones, and
    not content and recvae."""
    slow_sources: bool = False
    """Whether sasrec, which takes minutes to train, is among those by default."""
    num_workers: int = Field(default=1, ge=1)
    """Processes that sasrec learns in, started by Ray Train; 1: this one alone, without Ray."""
    candidates: int = Field(default=150, ge=1)
    """Items that each source proposes for a history."""
    rerank_top: int = Field(default=20, ge=1)
    """Places of the fused list that a reranker reads."""
    popularity: PopularityConfig = PopularityConfig()
    item_knn: ItemItemConfig = ItemItemConfig(learner=ItemKNN(), recency=0.7)
    ease: ItemItemConfig = ItemItemConfig(learner=EASE(), recency=0.8)
    transitions: ItemItemConfig = ItemItemConfig(learner=Transitions(), recency=0.5)
    ials: IALSConfig = IALSConfig()
    sasrec: SASRecConfig = SASRecConfig()
    bm25: BM25Config = BM25Config()
    semantic: IndexConfig = IndexConfig()
    content: ContentConfig = ContentConfig()
    recvae: RecVAEConfig = RecVAEConfig()

    def build(self, name: str) -> Source:
        """The unfitted source of that name."""
        if name == "semantic":
            return Semantic(self.semantic)
        if name == "popularity":
            return Popularity(self.popularity)
        if name == "bm25":
            return BM25(self.bm25)
        if name == "content":
            return Content(self.content)
        if name == "ials":
            return IALS(self.ials)
        if name == "sasrec":
            return SASRec(self.sasrec)
        if name == "recvae":
            return RecVAE(self.recvae)
        return ItemItem({"item-knn": self.item_knn, "ease": self.ease}.get(name, self.transitions))


def prepare(config: FitConfig, dataset: Dataset, parts: Split) -> None:
    """Write what does not depend on any model."""
    config.pipeline.mkdir(parents=True, exist_ok=True)
    forget_measurements(config.pipeline)
    _forget_other_data(config, dataset)
    dataset.catalogue.save(config.pipeline / "catalogue.parquet")
    known = parts.known
    table = pa.table(
        {
            "user_id": list(parts.user_ids),
            "item_codes": pa.ListArray.from_arrays(
                pa.array(known.offsets.astype(np.int32)), pa.array(known.items)
            ),
            "timestamps": pa.ListArray.from_arrays(
                pa.array(known.offsets.astype(np.int32)), pa.array(known.timestamps)
            ),
        }
    )
    pq.write_table(table, config.pipeline / "users.parquet")
    np.save(config.pipeline / "item_counts.npy", parts.item_counts, allow_pickle=False)
    releases = Releases.of(dataset, parts.train)
    if releases is not None:
        releases.save(config.pipeline / RELEASES)
    _write_config(config, dataset, _names(config, parts))


def fit(config: FitConfig) -> dict[str, float]:
    """Fit and save the sources; source → seconds.

    Raises:
        ConfigError: an unknown source is asked for.
        DataError: the data cannot carry a source.
        TrainingError: a worker failed.
    """
    dataset = Dataset.open(config.dataset)
    parts = split(dataset, config.protocol)
    prepare(config, dataset, parts)
    if config.prepare:
        return {}
    names = _names(config, parts)
    if config.num_workers > 1 and "sasrec" not in names:
        warnings.warn(
            f"--num-workers {config.num_workers} is ignored: sasrec is not among the sources, give "
            "--slow-sources or name it in --sources",
            stacklevel=2,
        )
    data = training_data(config, dataset, parts)
    seconds = {}
    with bar("fitting sources", len(names)) as advance:
        for name in names:
            seconds[name] = fit_source(config, name, data)
            advance(note=name)
    return seconds


def training_data(config: FitConfig, dataset: Dataset, parts: Split) -> TrainingData:
    """What the sources learn from: the training part, and the vectors that jobs.embed left."""
    return installing.training_data(config.pipeline, dataset, parts, config.semantic.seed)


def fit_source(config: FitConfig, name: str, data: TrainingData) -> float:
    """Fit the source ``name`` and put it into the pipeline directory; seconds that it took."""
    start = time.perf_counter()
    install(config.pipeline, name, _fitted(config, config.build(name), data), forget_lists)
    return time.perf_counter() - start


def _fitted(config: FitConfig, source: Source, data: TrainingData) -> Callable[[Path], None]:
    """What writes the fitted source."""
    if config.num_workers == 1 or not isinstance(source, SASRec):
        return source.fit(data).save
    # Here: no other fit needs Ray.
    from fusionrec.training import source_worker
    from jobs import cluster

    def save(place: Path) -> None:
        with cluster.start():
            source_worker.fit(source, data, place, num_workers=config.num_workers)

    return save


def _names(config: FitConfig, parts: Split) -> tuple[str, ...]:
    if config.sources is None:
        left_out = _NAMED if config.slow_sources else _NAMED | _SLOW
        names = [name for name in SOURCES if name not in left_out]
        if not (config.pipeline / "vectors.npy").is_file():
            names.remove("semantic")
        learner = config.ease.learner
        if isinstance(learner, EASE) and not learner.can_solve(parts.train):
            warnings.warn(
                f"source ease is left out: the histories hold {num_pairs(parts.train)} pairs of "
                f"items, and it takes {learner.max_pairs} (--ease.learner.max-pairs)",
                stacklevel=2,
            )
            names.remove("ease")
        return tuple(names)
    unknown = [name for name in config.sources if name not in SOURCES]
    if unknown:
        raise ConfigError(f"--sources {unknown[0]} is unknown: choose among {', '.join(SOURCES)}")
    return config.sources


def _forget_other_data(config: FitConfig, dataset: Dataset) -> None:
    """Remove models of another data set from the directory: their item codes mean other items."""
    if not (config.pipeline / "pipeline.json").is_file():
        return
    if read_config(config.pipeline).dataset.fingerprint != dataset.info.fingerprint:
        for name in ("vectors.npy", RELEASES):
            (config.pipeline / name).unlink(missing_ok=True)
        for name in ("encoder", "reranker", "sources"):
            shutil.rmtree(config.pipeline / name, ignore_errors=True)


def _write_config(config: FitConfig, dataset: Dataset, names: tuple[str, ...]) -> None:
    settings = PipelineConfig(
        dataset=dataset.info,
        protocol=config.protocol,
        sources=names,
        candidates=config.candidates,
        rerank_top=config.rerank_top,
    )
    path = config.pipeline / "pipeline.json"
    if path.is_file() and read_config(config.pipeline) != settings:
        forget_lists(config.pipeline)  # found for other sources or other data
    path.write_text(settings.model_dump_json(indent=2), encoding="utf-8")


def main() -> None:
    """Parse, fit, report."""
    config = parse(FitConfig)
    seconds = fit(config)
    if seconds:
        table = Table("source", "fit, s")
        for name, spent in seconds.items():
            table.add_row(name, f"{spent:.1f}")
        console.print(table)
    sys.stdout.write(f"pipeline: {config.pipeline}\n")


if __name__ == "__main__":
    run(main)
