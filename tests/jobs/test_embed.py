import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from fusionrec.data.catalogue import Catalogue
from fusionrec.data.text import item_texts
from fusionrec.errors import DataError
from fusionrec.language.encoder import Encoder
from jobs.embed import EmbedConfig, _Embedder, embed

WORDS = ["film", "book", "music", "love", "war", "space", "night"]
CATALOGUE = Catalogue(
    item_ids=tuple(str(i) for i in range(600)),
    titles=tuple(f"{WORDS[i % 7]} {i}" if i % 50 else "" for i in range(600)),
    texts=tuple(" ".join(WORDS[: i % 8]) for i in range(600)),
    categories=((),) * 600,
    domains=("",) * 600,
)


@pytest.fixture
def pipeline(tmp_path: Path) -> Path:
    CATALOGUE.save(tmp_path / "catalogue.parquet")
    return tmp_path


@pytest.mark.ray
@pytest.mark.filterwarnings("ignore::DeprecationWarning:ray.data.context")  # Ray's own doing
def test_vectors_are_the_encoder_s_in_the_order_of_the_catalogue(
    pipeline: Path, tiny_encoder: Path, ray_cluster
):
    config = EmbedConfig(pipeline=pipeline, encoder=str(tiny_encoder), history_items=3, threads=1)
    vectors = embed(config)
    encoder = Encoder.load(pipeline / "encoder", device="cpu")
    assert encoder.config.history_items == 3
    assert encoder.config.model == str(tiny_encoder)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(vectors, encoder.encode(item_texts(CATALOGUE)), atol=1e-6)
    (blank,) = np.nonzero(np.linalg.norm(vectors, axis=1) == 0)
    assert blank.tolist() == [0, 200, 400]  # neither a title nor a description
    assert sorted(path.name for path in pipeline.iterdir()) == [
        "catalogue.parquet",
        "encoder",
        "vectors.npy",
    ]


def test_of_two_towers_each_is_used_for_its_side(pipeline: Path, tiny_encoder: Path, monkeypatch):
    """What the workers would do is done here: the vectors are those of the items' tower."""
    both = shutil.copytree(tiny_encoder, pipeline.parent / "both")
    items = Encoder.load(tiny_encoder, device="cpu")
    with torch.no_grad():
        items.model.embeddings.word_embeddings.weight.neg_()
    items.save(both / "item")

    def encode(texts: list[str], dimension: int, encoder: Path, out: Path, config: EmbedConfig):
        worker = _Embedder(str(encoder), 1, config.batch_size)
        with out.open("wb") as stream:
            np.save(stream, worker({"code": np.arange(len(texts)), "text": texts})["vector"])

    monkeypatch.setattr("jobs.embed._encode", encode)
    vectors = embed(EmbedConfig(pipeline=pipeline, encoder=str(both), history_items=3))
    texts = item_texts(CATALOGUE)
    np.testing.assert_allclose(vectors, items.encode(texts), atol=1e-6)
    served = Encoder.load(pipeline / "encoder", device="cpu", frozen=True)
    assert served.config.history_items == 3
    assert np.abs(served.encode(texts) - vectors).max() > 0.01


def test_a_failure_leaves_what_was_there(pipeline: Path, tiny_encoder: Path, monkeypatch):
    np.save(pipeline / "vectors.npy", np.ones((1, 1), np.float32))
    (pipeline / "encoder").mkdir()
    (pipeline / "encoder" / "old").touch()

    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("jobs.embed._encode", full_disk)
    with pytest.raises(OSError, match="No space left"):
        embed(EmbedConfig(pipeline=pipeline, encoder=str(tiny_encoder)))
    assert np.load(pipeline / "vectors.npy").tolist() == [[1.0]]
    assert (pipeline / "encoder" / "old").exists()
    assert len(list(pipeline.iterdir())) == 3


def test_a_catalogue_without_text(tmp_path: Path):
    empty = ("",) * 2
    Catalogue(("a", "b"), empty, empty, (("attribute 7",), ()), empty).save(
        tmp_path / "catalogue.parquet"
    )
    with pytest.raises(DataError, match=r"no item of .* has a title or a description"):
        embed(EmbedConfig(pipeline=tmp_path))


def test_a_mistake_is_one_sentence_and_status_2(tmp_path: Path):
    command = [sys.executable, "-m", "jobs.embed", "--pipeline", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: --pipeline {tmp_path} has no catalogue.parquet")
    assert done.stderr.count("\n") == 1
