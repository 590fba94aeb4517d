"""The pipeline on a real directory, with a small language model at both ends."""

import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from fusionrec.data.histories import Histories
from fusionrec.data.splits import split
from fusionrec.data.text import item_texts
from fusionrec.errors import BundleError, ConfigError, DataError
from fusionrec.fusion.model import Fusion, Segment
from fusionrec.language.encoder import Encoder
from fusionrec.language.precision import INFERENCE, InferenceConfig, Precision
from fusionrec.language.reranker import Reranker
from fusionrec.serving.pipeline import Pipeline, Stage, read_config
from fusionrec.serving.schemas import RecommendRequest
from fusionrec.serving.service import Service, recommend
from fusionrec.sources.load import load_source
from jobs.fit import FitConfig, fit


@pytest.fixture(scope="module")
def directory(synthetic, tiny_encoder, tmp_path_factory):
    place = tmp_path_factory.mktemp("whole") / "pipeline"
    config = FitConfig(dataset=synthetic.directory, pipeline=place, candidates=20, rerank_top=5)
    fit(config.model_copy(update={"prepare": True}))
    encoder = Encoder.load(tiny_encoder)
    encoder.save(place / "encoder")
    np.save(place / "vectors.npy", encoder.encode(item_texts(synthetic.catalogue)))
    fit(config)
    Reranker.load(tiny_encoder).save(place / "reranker")
    names = Pipeline.load(place).config.sources
    weights = dict.fromkeys(names, 1.0)
    Fusion(
        sources=names,
        scales=weights,
        segments=(
            Segment(max_events=5, weights=weights),
            Segment(weights=weights, reranker=2.0),
        ),
    ).save(place / "fusion.json")
    return place


@pytest.fixture(scope="module")
def pipeline(directory):
    return Pipeline.load(directory)


@pytest.fixture(scope="module")
def histories(synthetic):
    return split(synthetic).test.histories.slice(0, 40)


def test_all_sources_are_fitted(pipeline):
    assert {source.name for source in pipeline.sources} == {
        "popularity",
        "item-knn",
        "ease",
        "transitions",
        "ials",
        "bm25",
        "semantic",
    }


def test_the_encoder_rests_where_no_source_asks_for_vectors(directory, histories, tmp_path):
    place = shutil.copytree(directory, tmp_path / "pipeline")
    settings = read_config(place)
    others = tuple(name for name in settings.sources if name != "semantic")
    settings = settings.model_copy(update={"sources": others})
    (place / "pipeline.json").write_text(settings.model_dump_json())
    Fusion.uniform(others, np.ones(len(others), np.float32)).save(place / "fusion.json")
    found = Pipeline.load(place)
    assert found.encoder is None
    assert found.embed(histories) is histories
    assert found.reranker is not None


@pytest.fixture(scope="module")
def spare(directory, tmp_path_factory):
    """A pipeline whose fusion trusts two sources; the others are on disk."""
    place = shutil.copytree(directory, tmp_path_factory.mktemp("spare") / "pipeline")
    every = Fusion.load(place / "fusion.json")
    every.without(set(every.sources) - {"ease", "transitions"}).save(place / "fusion.json")
    return place


def test_what_the_fusion_turned_off_is_not_asked(directory, spare, histories, monkeypatch):
    found = Pipeline.load(spare)
    assert [source.name for source in found.sources] == ["ease", "transitions", "popularity"]
    assert found.encoder is None  # semantic is off
    assert found.embed(histories) is histories
    assert set(found.off()) == {"popularity", "item-knn", "ials", "bm25", "semantic"}
    assert set(found.config.sources) == {*found.off(), "ease", "transitions"}
    lists = found.retrieve(histories)
    assert lists.term_names == ("ease", "transitions", "popularity")
    np.testing.assert_allclose(lists.terms.sum(axis=1), lists.scores, atol=1e-6)
    # A search asks all that were fitted.
    whole = Pipeline.load(spare, weighed=False)
    assert [source.name for source in whole.sources] == list(found.config.sources)
    assert whole.encoder is not None
    assert whole.off() == {}
    again = whole.asking(found.fusion)
    np.testing.assert_array_equal(again.retrieve(histories).items, lists.items)
    # A weight of 0 in every segment is enough.
    every = Fusion.load(directory / "fusion.json")
    zeros = dict.fromkeys(found.off(), 0.0)
    segments = tuple(
        segment.model_copy(update={"weights": {**segment.weights, **zeros}})
        for segment in every.segments
    )
    every.model_copy(update={"segments": segments}).save(spare / "fusion.json")
    zeroed = Pipeline.load(spare)
    assert zeroed.fusion == found.fusion
    np.testing.assert_array_equal(zeroed.retrieve(histories).items, lists.items)


def test_people_of_whom_nothing_is_known_get_what_is_popular(directory, spare, synthetic):
    asked = [
        RecommendRequest(user_id="nobody knows me", k=5),
        RecommendRequest(history=["no such item"], k=5),
        RecommendRequest(k=5),
        RecommendRequest(history=[synthetic.catalogue.item_ids[0]], k=5),
    ]
    before = recommend(Service.load(directory), Pipeline.load(directory), asked)
    answers = recommend(Service.load(spare), Pipeline.load(spare), asked)
    for answer, as_before in zip(answers[:3], before, strict=False):
        assert answer.fallback == as_before.fallback is not None
        assert [item.item_id for item in answer.items] == [i.item_id for i in as_before.items]
        assert len(answer.items) == 5
    assert answers[3].fallback is None
    assert len(answers[3].items) == 5
    popular = load_source(spare / "sources" / "popularity").top(Histories.of([[]]), 5)
    ids = [synthetic.catalogue.item_ids[code] for code in popular.items[0]]
    assert [item.item_id for item in answers[0].items] == ids


def test_retrieval_alone_needs_no_catalogue(directory, pipeline, histories):
    alone = Pipeline.load(directory, stages=frozenset({Stage.RETRIEVER}))
    embedded = pipeline.embed(histories)
    np.testing.assert_array_equal(alone.retrieve(embedded).items, pipeline.retrieve(embedded).items)
    with pytest.raises(AssertionError, match="loaded for retrieval alone"):
        _ = alone.catalogue


def test_lists_are_ordered_explained_and_new(pipeline, histories):
    fused = pipeline.recommend(histories)
    assert fused.term_names[-1] == "reranker"
    np.testing.assert_allclose(fused.terms.sum(axis=1), fused.scores, atol=1e-5)
    for row in range(len(histories)):
        items = fused.items[row][fused.items[row] >= 0]
        assert len(set(items.tolist())) == len(items) > 0
        assert not set(items.tolist()) & set(histories.row(row).tolist())
        assert (np.diff(fused.scores[row][: len(items)]) <= 0).all()


def test_only_the_segment_that_it_helps_is_reranked(pipeline, histories):
    fused = pipeline.recommend(histories)
    term = fused.terms[:, -1]
    long = histories.lengths > 5
    assert not term[~long].any()
    assert term[long].any(axis=1).all()
    assert (term >= 0).all()
    assert ((term > 0).sum(axis=1) < pipeline.config.rerank_top).all()


def test_reranking_moves_nothing_from_below_into_the_top(pipeline, histories):
    before = pipeline.recommend(histories, rerank=False)
    after = pipeline.recommend(histories)
    top = pipeline.config.rerank_top
    for row in range(len(histories)):
        assert set(before.items[row, :top]) == set(after.items[row, :top])


def test_batches_of_any_size_agree(pipeline, histories):
    together = pipeline.recommend(histories, rerank=False)
    for row in range(0, len(histories), 7):
        alone = pipeline.recommend(histories.slice(row, row + 1), rerank=False)
        width = min(10, alone.items.shape[1])
        np.testing.assert_array_equal(alone.items[0, :width], together.items[row, :width])


def test_empty_and_text_histories_are_answered(pipeline):
    fused = pipeline.recommend(Histories.of([[], []], texts=[None, "a film of love and war"]))
    assert (fused.items[:, 0] >= 0).all()
    popularity = fused.term_names.index("popularity")
    np.testing.assert_allclose(fused.terms[0, popularity], fused.scores[0])
    assert fused.terms[1, fused.term_names.index("bm25")].any()


def test_sources_without_text_go_on_without_the_embedder(pipeline, histories):
    fused = pipeline.retrieve(histories)
    assert not fused.terms[:, fused.term_names.index("semantic")].any()
    assert (fused.items[:, 0] >= 0).all()


def test_a_stage_loads_only_what_it_needs(directory):
    retriever = Pipeline.load(directory, stages=frozenset({Stage.RETRIEVER}))
    assert retriever.encoder is None
    assert retriever.reranker is None
    embedder = Pipeline.load(directory, stages=frozenset({Stage.EMBEDDER}))
    assert embedder.sources == []
    assert embedder.encoder is not None


def test_models_are_loaded_in_the_precision_that_the_directory_says(
    directory, pipeline, histories, tmp_path, monkeypatch
):
    place = shutil.copytree(directory, tmp_path / "copy")
    config = InferenceConfig(encoder=Precision.BF16, reranker=Precision.FP32)
    (place / INFERENCE).write_text(config.model_dump_json())
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True})
    half = Pipeline.load(place)
    assert (half.encoder.precision, half.reranker.precision) == (Precision.BF16, Precision.FP32)
    vectors = half.embed(histories).vectors
    assert vectors.dtype == np.float32
    assert (vectors * pipeline.embed(histories).vectors).sum(axis=1).min() > 0.999
    assert half.recommend(histories).items.shape[0] == len(histories)
    # Another machine, without instructions for bf16: what it answers is float32's, to the bit.
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    elsewhere = Pipeline.load(place)
    assert elsewhere.encoder.precision is Precision.FP32
    expected, found = pipeline.recommend(histories), elsewhere.recommend(histories)
    np.testing.assert_array_equal(found.items, expected.items)
    np.testing.assert_array_equal(found.scores, expected.scores)


def test_known_users_are_written(directory, synthetic):
    table = pq.read_table(directory / "users.parquet").to_pydict()
    known = split(synthetic).known
    assert table["user_id"] == list(split(synthetic).user_ids)
    assert table["item_codes"][3] == known.row(3).tolist()


def test_what_is_missing_is_named(tmp_path, directory):
    with pytest.raises(BundleError, match=r"has no pipeline.json; make one with"):
        Pipeline.load(tmp_path)
    (tmp_path / "pipeline.json").write_bytes((directory / "pipeline.json").read_bytes())
    with pytest.raises(BundleError, match=r"is incomplete"):
        Pipeline.load(tmp_path)
    (tmp_path / "pipeline.json").write_text("{}")
    with pytest.raises(BundleError, match=r"is wrong"):
        Pipeline.load(tmp_path)


def test_fit_names_what_it_cannot_do(synthetic, tmp_path):
    config = FitConfig(dataset=synthetic.directory, pipeline=tmp_path / "p", sources=("magic",))
    with pytest.raises(ConfigError, match=r"--sources magic is unknown: choose among popularity"):
        fit(config)
    with pytest.raises(DataError, match=r"semantic needs the catalogue's text vectors"):
        fit(config.model_copy(update={"sources": ("semantic",)}))


def test_other_sources_forget_the_old_weights(synthetic, tmp_path):
    config = FitConfig(
        dataset=synthetic.directory, pipeline=tmp_path / "p", sources=("popularity",)
    )
    fit(config)
    Fusion.uniform(("popularity",), np.ones(1, np.float32)).save(tmp_path / "p" / "fusion.json")
    fit(config)
    assert (tmp_path / "p" / "fusion.json").exists()
    fit(config.model_copy(update={"sources": ("popularity", "bm25")}))
    assert not (tmp_path / "p" / "fusion.json").exists()
