from pathlib import Path

import numpy as np
import pytest

from fusionrec.data.dataset import Dataset
from fusionrec.data.text import item_texts
from fusionrec.fusion.model import Fusion, Segment
from fusionrec.language.encoder import Encoder
from fusionrec.language.reranker import Reranker
from jobs.fit import FitConfig, fit


@pytest.fixture(scope="session")
def fitted(
    synthetic: Dataset, tiny_encoder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A pipeline directory with tiny language models of two layers; whoever changes it, copies."""
    place = tmp_path_factory.mktemp("fitted") / "pipeline"
    sources = ("popularity", "item-knn", "semantic")
    config = FitConfig(dataset=synthetic.directory, pipeline=place, candidates=20, rerank_top=5)
    fit(config.model_copy(update={"prepare": True}))
    encoder = Encoder.load(tiny_encoder, device="cpu")
    encoder.save(place / "encoder")
    np.save(place / "vectors.npy", encoder.encode(item_texts(synthetic.catalogue)))
    fit(config.model_copy(update={"sources": sources}))
    Reranker.load(tiny_encoder, device="cpu").save(place / "reranker")
    weights = dict.fromkeys(sources, 1.0)
    Fusion(
        sources=sources, scales=weights, segments=(Segment(weights=weights, reranker=0.1),)
    ).save(place / "fusion.json")
    return place
