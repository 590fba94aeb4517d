import json
import warnings
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fusionrec.bundles.store import BundleStore
from fusionrec.data.catalogue import Catalogue
from fusionrec.data.dataset import Dataset
from fusionrec.data.splits import Protocol, split
from fusionrec.data.text import item_texts
from fusionrec.fusion.model import Fusion, Segment
from fusionrec.language.encoder import Encoder
from fusionrec.language.reranker import Reranker, RerankerConfig
from fusionrec.serving.pipeline import PipelineConfig
from fusionrec.sources.bm25 import BM25, BM25Config
from fusionrec.sources.ease import EASE
from fusionrec.sources.item_item import ItemItem, ItemItemConfig
from fusionrec.sources.popularity import Popularity, PopularityConfig
from fusionrec.sources.protocol import TrainingData
from fusionrec.sources.semantic import Semantic
from fusionrec.sources.transitions import Transitions

with warnings.catch_warnings():  # its schemas use a deprecated form of pydantic's Field
    warnings.simplefilter("ignore", DeprecationWarning)
    import ray.serve  # noqa: F401


@pytest.fixture(scope="session")
def paper_bundles(tmp_path_factory: pytest.TempPathFactory) -> BundleStore:
    """A current bundle with all that the gateway reads, and stages that exist on paper only."""
    directory = tmp_path_factory.mktemp("paper")
    numbers = range(20)
    Catalogue(
        item_ids=tuple(f"i{n}" for n in numbers),
        titles=tuple(f"Title {n}" for n in numbers),
        texts=("",) * 20,
        categories=((),) * 20,
        domains=("films",) * 20,
    ).save(directory / "catalogue.parquet")
    users = {
        "user_id": ["ann"],
        "item_codes": pa.array([[3, 1]], pa.list_(pa.int32())),
        "timestamps": pa.array([[10, 20]], pa.list_(pa.int64())),
    }
    pq.write_table(pa.table(users), directory / "users.parquet")
    np.save(directory / "item_counts.npy", np.arange(20))
    sources = ("popularity", "semantic")
    settings = {"dataset": {"name": "paper"}, "sources": sources, "rerank_top": 10}
    (directory / "pipeline.json").write_text(json.dumps(settings))
    weights = dict.fromkeys(sources, 1.0)
    Fusion(
        sources=sources,
        scales=weights,
        segments=(Segment(max_events=0, weights=weights), Segment(weights=weights, reranker=0.5)),
    ).save(directory / "fusion.json")
    for stage in ("encoder", "reranker"):
        (directory / stage).mkdir()
        (directory / stage / "weights").write_bytes(b"none")
    store = BundleStore(tmp_path_factory.mktemp("bundles"))
    store.promote(store.add(directory).id, "test")
    return store


FIT = {
    "popularity": Popularity(PopularityConfig()),
    "ease": ItemItem(ItemItemConfig(learner=EASE())),
    "transitions": ItemItem(ItemItemConfig(learner=Transitions())),
    "bm25": BM25(BM25Config()),
    "semantic": Semantic(),
}


@pytest.fixture(scope="session")
def bundles(
    synthetic: Dataset, tiny_encoder: Path, tmp_path_factory: pytest.TempPathFactory
) -> BundleStore:
    """A current bundle with every stage, made from the small synthetic data set."""
    directory = tmp_path_factory.mktemp("pipeline")
    parts, catalogue = split(synthetic), synthetic.catalogue
    catalogue.save(directory / "catalogue.parquet")
    np.save(directory / "item_counts.npy", parts.item_counts)
    known = [parts.known.slice(u, u + 1) for u in range(len(parts.user_ids))]
    users = {
        "user_id": list(parts.user_ids),
        "item_codes": pa.array([k.items for k in known], pa.list_(pa.int32())),
        "timestamps": pa.array([k.timestamps for k in known], pa.list_(pa.int64())),
    }
    pq.write_table(pa.table(users), directory / "users.parquet")

    encoder = Encoder.load(tiny_encoder, device="cpu")
    encoder.save(directory / "encoder")
    vectors = encoder.encode(item_texts(catalogue))
    np.save(directory / "vectors.npy", vectors)
    settings = RerankerConfig(model="tiny", max_tokens=64)
    (directory / "reranker").mkdir()
    reranker = Reranker.load(tiny_encoder, device="cpu")
    Reranker(reranker.model, reranker.tokenizer, settings).save(directory / "reranker")

    data = TrainingData(catalogue, parts.train, item_vectors=vectors)
    for name, source in FIT.items():
        source.fit(data).save(directory / "sources" / name)
    names = tuple(FIT)
    weights = dict(zip(names, (0.2, 1.0, 0.8, 0.3, 0.4), strict=True))
    Fusion(
        sources=names,
        scales=dict.fromkeys(names, 1.0),
        segments=(
            Segment(max_events=2, weights=weights),
            Segment(weights=weights, reranker=0.3),
        ),
    ).save(directory / "fusion.json")
    config = PipelineConfig(
        dataset=synthetic.info,
        protocol=Protocol.LEAVE_ONE_OUT,
        sources=names,
        candidates=60,
        rerank_top=8,
    )
    (directory / "pipeline.json").write_text(config.model_dump_json())

    store = BundleStore(tmp_path_factory.mktemp("bundles"))
    store.promote(store.add(directory).id, "test")
    return store
